"""Features of the vision encoder that a model adds to its visual tokens after its first layers.

Qwen3-VL adds the features of some encoder layers after the first decoder layers, in a method of its
language model that takes the mask of the visual tokens and their features.  After a cut it gets the
mask and the features of what is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.compressor import Selection
from tokenprune.engine.forward import Pass, Span
from tokenprune.layout import moved

__all__ = ["DEEPSTACK", "added", "merge_levels"]

DEEPSTACK = "_deepstack_process"
"""Name of the method of the language model."""


def added(
    current: Callable[[], Pass | None],
    original: Callable[..., Tensor],
    hidden_states: Tensor,
    visual_pos_masks: Tensor,
    visual_embeds: Tensor,
) -> Tensor:
    """The hidden states (B, M, D) plus the features of the visual tokens that are left.

    Args:
        current: Returns the forward, if it is compressed.
        original: The method of the model.
        hidden_states: (B, M, D) output of a decoder layer.
        visual_pos_masks: (B, S) columns of the full prompt that are visual.
        visual_embeds: (V, D) features of all of them.
    """
    state = current()
    level = visual_embeds if state is None else state.levels[len(state.ran) - 1]
    if state is None or not (state.packed or level is not visual_embeds):
        return original(hidden_states, visual_pos_masks, visual_embeds)
    visual_pos_masks = torch.zeros_like(state.columns, dtype=torch.bool)
    for span in state.spans:
        visual_pos_masks[span.row, state.slots(span.row, span.columns)] = True
    # The method counts the tokens row by row; a video may have its columns around an image.
    places = torch.cat([span.row * state.width + span.columns for span in state.spans])
    rows = torch.cat([span.deep for span in state.spans])[places.argsort()]
    return original(hidden_states, visual_pos_masks, level[moved(rows, level.device)])


def merge_levels(state: Pass, span: Span, selection: Selection) -> None:
    """Merge the features that are still to be added, as the ``selection`` of an image merges."""
    if selection.merging is None:
        return
    for index in range(len(state.ran), len(state.levels)):
        level = state.levels[index]
        mine = moved(span.deep, level.device)
        merged = selection.merging(level[mine]).to(level)
        state.levels[index] = level.index_copy(0, mine[moved(selection.keep, level.device)], merged)
