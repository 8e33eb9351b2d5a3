"""Runs selections, drops columns of the prompt and packs the kept columns.

`shorten` acts in front of the language model, `cut` in front of a decoder layer.  `surroundings`
returns the mask, the position ids and the rotary embedding of the layers after a cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from tokenprune.attention import proportional_mask
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.engine.arguments import Kwargs
from tokenprune.engine.cache import CACHE
from tokenprune.engine.decoder import LayerSignals, Once
from tokenprune.engine.deepstack import merge_levels
from tokenprune.engine.forward import Pass, Span
from tokenprune.engine.numbering import axes_of, renumber, text_of
from tokenprune.engine.plan import Plan
from tokenprune.engine.trace import SelectionRecord
from tokenprune.errors import ContractError, UserError
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "PROMPT",
    "Memory",
    "cut",
    "narrow",
    "pack",
    "proportional",
    "shorten",
    "surroundings",
]


PROMPT = Signal("llm_prompt")


class Memory:
    """Selections of earlier forwards, for generation without a KV cache.

    Every decode step then runs the whole prompt again, longer by one token.  The selection of the
    first forward is reused, so that generated tokens do not rank.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, int | None, Tensor, Tensor, Selection]] = []

    def recall(self, state: Pass, span: Span, layer: int | None) -> Selection | None:
        """The selection of an earlier forward of the same prompt, or None.

        Args:
            state: The forward.
            span: The image.
            layer: Decoder layer in front of which the selection was made, or None.
        """
        if state.prompt_ids is None:
            return None
        row = state.prompt_ids[span.row]
        for carrier, where, there, ids, selection in self._entries:
            same = carrier is span.carrier and where == layer and torch.equal(there, span.there)
            if same and torch.equal(row[: len(ids)], ids):
                return selection
        return None

    def remember(self, state: Pass, span: Span, layer: int | None, selection: Selection) -> None:
        """Store ``selection`` while its image is in the prompts."""
        if state.prompt_ids is None:
            return
        here = {id(other.carrier) for other in state.spans}
        self._entries = [entry for entry in self._entries if id(entry[0]) in here]
        ids = state.prompt_ids[span.row]
        self._entries.append((span.carrier, layer, span.there, ids, selection))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()


# -- in front of the language model --------------------------------------------------------------


def shorten(
    plan: Plan, memory: Memory, state: Pass, step: int, embeds: Tensor, changed: Kwargs
) -> Tensor:
    """Drop columns of the prompt in front of the language model.

    Args:
        plan: The compressors by stage and layer.
        memory: Selections of earlier forwards.
        state: The forward.
        step: Index among the compressors that act there one after the other.
        embeds: (B, M, D) embeddings of the slots.
        changed: Arguments of the forward, changed in place.

    Returns:
        (B, M', D) embeddings of the kept columns.
    """
    keep, whole, gone, keeps_positions = state.real, embeds, False, False
    made: dict[Any, Selection] = {}
    state.begin_selections()
    for span in state.spans:
        parts = plan.before[plan.index(span.row, len(state.columns))]
        if step >= len(parts):
            continue
        part = parts[step]
        keeps_positions = plan.keeps_positions(part)
        if not len(span.tokens.layout.patches):  # the attention mask hides them all
            gone |= narrow(state, span, part(span.tokens).keep, keep, part.stage, None)
            continue
        # Without a KV cache the prompt grows, and a selection that depends on it would change.
        asks = PROMPT in part.needs
        selection = memory.recall(state, span, None) if asks else None
        if selection is None:
            # Prompts with the same image share its selection, unless it depends on the prompt.
            key = (id(part), id(span.record)) if span.is_untouched else None
            selection = made.get(key) or select(part, span, span.tokens)
            if key is not None:
                made[key] = selection
            state.accounts[span.row].select(part, span.tokens, span.tokens, selection, span.layout)
            if asks:
                memory.remember(state, span, None, selection)
        embeds = _with_merged(embeds, whole, state, span, selection)
        gone |= narrow(state, span, selection.keep, keep, part.stage, None)
    changed["inputs_embeds"] = embeds
    if not gone:
        return embeds
    shift = pack(state, keep, keeps_positions)
    embeds = state.repack(embeds)
    for layer in state.layers:
        layer.expect(state.real, whole.shape[1] - embeds.shape[1])
        layer.shift = layer.shift + shift.to(layer.shift.device)
    mask = state.layers[0].mask() if state.layers else state.real
    changed.update(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=state.positions)
    return embeds


# -- between decoder layers ----------------------------------------------------------------------


def cut(
    plan: Plan,
    memory: Memory,
    signals: LayerSignals,
    once: Once,
    state: Pass,
    index: int,
    hidden: Tensor,
    kwargs: Kwargs,
) -> Tensor:
    """Drop columns of the prompt in front of decoder layer ``index``.

    Args:
        plan: The compressors by stage and layer.
        memory: Selections of earlier forwards.
        signals: Computes the signals of the decoder layers.
        once: Runs a computation once for all contexts that share a prefix.
        state: The forward.
        index: Index of the layer.
        hidden: (B, M, D) hidden states of the slots.
        kwargs: Arguments of the layer.

    Returns:
        (B, M', D) hidden states of the kept columns.
    """
    part, whole, keep, gone = plan.inside[index], hidden, state.real, False
    state.begin_selections()
    rows = signals.everywhere(state, part, index, whole, kwargs, once)
    for span in state.spans:
        if not len(span.tokens.layout.patches):  # the attention mask hides them all
            gone |= narrow(state, span, part(span.tokens).keep, keep, Stage.LLM, index)
            continue
        tokens = signals.tokens(state, span, part, index, whole, rows, once)
        selection = memory.recall(state, span, index)
        if selection is None:
            selection = select(part, span, tokens)
            tapped = state.taps & state.tapped.keys()
            state.accounts[span.row].select(
                part, span.tokens, tokens, selection, span.layout, tapped
            )
            memory.remember(state, span, index, selection)
        hidden = _with_merged(hidden, whole, state, span, selection)
        if selection.sizes is not None:
            if state.sizes is None:
                state.sizes = torch.ones_like(state.columns, dtype=torch.float32)
            slots = state.slots(span.row, span.columns[selection.keep])
            state.sizes[span.row, slots] = selection.sizes.to(state.sizes)
        gone |= narrow(state, span, selection.keep, keep, Stage.LLM, index)
    state.tapped.clear()
    state.projected.clear()
    if not gone:
        return hidden
    return _continue_shorter(plan, state, index, keep, hidden, kwargs)


def _continue_shorter(
    plan: Plan, state: Pass, index: int, keep: Tensor, hidden: Tensor, kwargs: Kwargs
) -> Tensor:
    """Pack after a cut in front of layer ``index``: (B, M', D) states of the kept columns."""
    keeps_positions, width = plan.keeps_positions(plan.inside[index]), hidden.shape[1]
    shift = pack(state, keep, keeps_positions)
    state.cuts += 1
    state.masks.clear()
    hidden = state.repack(hidden)
    if keeps_positions:
        cos, sin = state.rotary or kwargs["position_embeddings"]
        rows = len(hidden)
        state.rotary = (
            state.repack(cos.expand(rows, -1, -1)),
            state.repack(sin.expand(rows, -1, -1)),
        )
    else:
        at = axes_of(state.positions).to(hidden.device)
        state.rotary = plan.adapter.language_model.rotary_emb(hidden, at)
    for layer in state.layers[index:]:
        layer.expect(state.real, width - hidden.shape[1], state.sizes)
        layer.cut += 1
        if not keeps_positions:
            more = shift.to(layer.valid.device)
            layer.extra = more if layer.extra is None else layer.extra + more
    state.enter_count(index)
    return hidden


def surroundings(
    adapter: Adapter, state: Pass, index: int, cuts: int, hidden: Tensor, kwargs: Kwargs
) -> Kwargs:
    """Mask, rotary embedding and position ids of a layer after a cut.

    Args:
        adapter: The model.
        state: The forward.
        index: Index of the layer.
        cuts: Number of cuts in front of the layer.
        hidden: (B, M, D) hidden states of the slots.
        kwargs: Arguments of the layer.
    """
    language = adapter.language_model
    layer = state.layers[index] if state.layers else None
    positions, rotary = state.positions, state.rotary
    if rotary is None:  # the cut was made by an earlier forward
        rotary = kwargs["position_embeddings"]
    moved = state.inherited[index] if state.inherited else None
    if moved is not None:
        positions = (positions - moved.to(positions.device)).to(hidden.device)
        rotary = language.rotary_emb(hidden, axes_of(positions))
    if cuts not in state.masks:
        there = state.real if layer is None else layer.mask()
        # No mask is needed without padding, which the CPU knows without a synchronisation.
        # Without a KV cache a mask is needed: transformers would take gaps in the position ids for
        # the borders of packed sequences.
        unmasked = state.is_whole and layer is not None
        mask = create_causal_mask(
            config=language.config,
            inputs_embeds=hidden,
            attention_mask=None if unmasked else there.long(),
            position_ids=text_of(positions),
            layer_idx=index,
            **{CACHE: state.cache},
        )
        sizes = state.sizes if layer is None else layer.sizes
        if sizes is not None:
            mask = proportional(language.config, mask, sizes, hidden)
        state.masks[cuts] = mask
    mask = state.masks[cuts]
    return {
        "attention_mask": None if mask is None else mask.to(hidden.device),
        "position_ids": text_of(positions),
        "position_embeddings": tuple(table.to(hidden.device) for table in rotary),
    }


def proportional(config: Any, mask: Tensor | None, sizes: Tensor, hidden: Tensor) -> Tensor:
    """``mask`` for attention that counts merged tokens as often as ``sizes`` (B, K) says.

    Args:
        config: Configuration of the language model.
        mask: Mask of the layer, or None.
        sizes: Number of tokens that each of the K keys stands for.
        hidden: (B, M, D) hidden states of the queries.

    Raises:
        UserError: The attention kernel of the model does not support such a mask.
    """
    kernel = config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise UserError(
            f"proportional attention to merged tokens needs the sdpa or eager kernel, but this "
            f"model runs {kernel}; load it with attn_implementation='sdpa', or "
            "turn the method's option off (pact:proportional=false)."
        )
    return proportional_mask(mask, sizes.to(hidden.device), hidden.shape[1], hidden.dtype)


# -- at every stage ------------------------------------------------------------------------------


def select(part: Compressor, span: Span, tokens: VisualTokens) -> Selection:
    """The selection of ``part`` from an image.  A `ContractError` names the image."""
    try:
        return part(tokens)
    except ContractError as error:
        where = f"{span.layout.modality} {span.image} of prompt {span.row}, both counted from 0"
        raise ContractError(f"{error} ({where})") from error


def _with_merged(
    states: Tensor, whole: Tensor, state: Pass, span: Span, selection: Selection
) -> Tensor:
    """``states`` with the merged vectors of an image, copied first if they still are ``whole``."""
    if selection.features is None:
        return states
    if states is whole:
        states = states.clone()
    slots = state.slots(span.row, span.columns[selection.keep]).to(states.device)
    states[span.row, slots] = selection.features.to(states.dtype)
    merge_levels(state, span, selection)
    return states


def narrow(
    state: Pass, span: Span, kept: Tensor, keep: Tensor, stage: Stage, layer: int | None
) -> bool:
    """Remove from an image the tokens that were not selected.

    Args:
        state: The forward, which records the selection.
        span: The image.
        kept: (M',) indices of the selected tokens among the image's remaining tokens.
        keep: (B, M) bool, the slots that stay; changed in place.
        stage, layer: Where the selection was made.

    Returns:
        Whether any token was dropped.
    """
    gone = len(kept) < len(span.columns)
    if gone:
        keep[span.row, state.slots(span.row, span.columns)] = False
        state.prompts.left[span.row] -= len(span.columns) - len(kept)
        span.index, span.columns = span.index[kept], span.columns[kept]
        span.deep = span.deep[kept]
        keep[span.row, state.slots(span.row, span.columns)] = True
        span.tokens = span.tokens.take(kept)
    record = SelectionRecord(span.row, span.image, stage, layer, span.layout, span.index)
    state.selections.append(record)
    return gone


def pack(state: Pass, keep: Tensor, keeps_positions: bool) -> Tensor:
    """Move the kept slots of every row to the right, with padding on the left.

    Args:
        state: The forward, whose slots change.
        keep: (B, M) bool, the slots that stay.
        keeps_positions: Whether kept tokens keep their position ids.

    Returns:
        (B, 1) number of positions that each row lost.
    """
    lost = state.real & ~keep
    steps, shift = lost.cumsum(1), lost.sum(1, keepdim=True)
    if state.hidden is not None and not keeps_positions:
        closes = shift > 0
        steps += state.hidden.gather(1, state.columns.clamp(min=0)) * closes
        shift = shift + state.hidden[:, -1:] * closes
        state.hidden = state.hidden * ~closes
    width = max(state.prompts.left)
    # A stable sort moves dropped slots to the front and keeps the order of the others after them.
    state.order = keep.int().argsort(dim=1, stable=True)[:, -width:]
    state.columns = torch.where(keep, state.columns, -1).gather(1, state.order)
    if state.positions.ndim == 3:
        shift = renumber(state, steps, keeps_positions)
    else:
        if not keeps_positions:
            state.positions = state.positions - steps
        state.positions = state.positions.gather(1, state.order)
    if state.sizes is not None:
        state.sizes = state.sizes.gather(1, state.order)
    state.packed = True
    return torch.zeros_like(shift) if keeps_positions else shift
