"""Position ids of the tokens that stay.

A model with multimodal rotary positions numbers every token by time, row and column: (3, B, S), in
`generate` with a row for the text in front, (4, B, S).  ``original`` keeps these numbers.
``compact`` numbers a prompt as if each image had only the rows and columns of which a token is
left; what follows the image moves up, and times keep their distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.layout import moved

if TYPE_CHECKING:
    from tokenprune.engine.forward import Pass

__all__ = ["axes_of", "renumber", "runs_of", "taken", "text_of"]


def text_of(positions: Tensor) -> Tensor | None:
    """(B, M) position ids from which masks are made, or None if there are only those of images."""
    if positions.ndim == 2:
        return positions
    return positions[0] if len(positions) == 4 else None


def axes_of(positions: Tensor) -> Tensor:
    """The position ids that the rotary embedding takes."""
    return positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions


def taken(positions: Tensor, slots: Tensor) -> Tensor:
    """(..., B, K) position ids in the ``slots`` (B, K)."""
    return positions.gather(-1, slots.expand(*positions.shape[:-2], *slots.shape))


def _closed_grids(state: Pass) -> tuple[Tensor, Tensor]:
    """How far ``compact`` moves every column of the prompt.

    Returns:
        (3, B, S) amount to subtract from time, row and column, and (B, 1) the total of each row,
        both on the CPU.
    """
    rows, width = len(state.columns), state.width
    inside = torch.zeros(3, rows, width, dtype=torch.long, device="cpu")
    after = torch.zeros(rows, width + 1, dtype=torch.long, device="cpu")
    for span in state.spans:
        for run in range(int(span.runs[-1]) + 1):
            mine = span.index[span.runs[span.index] == run]
            ends = int(span.placed[span.runs == run][-1]) + 1
            full, left = span.layout.view_shape, []
            for axis, place in enumerate((span.layout.row[mine], span.layout.col[mine]), start=1):
                found, rank = place.unique(return_inverse=True)
                inside[axis, span.row, span.placed[mine]] = place - rank
                left.append(len(found))
            after[span.row, ends] += max(full) - max(left)
    moves = after.cumsum(1)
    return inside + moves[:, :-1], moves[:, -1:]


def renumber(state: Pass, lost: Tensor, keeps_positions: bool) -> Tensor:
    """Position ids of the slots after the latest packing, of a model with multimodal positions.

    Args:
        state: The forward, whose columns are packed and whose positions are not.
        lost: (B, M) number of slots that are dropped up to each slot before the packing.
        keeps_positions: Whether kept tokens keep their position ids.

    Returns:
        (B, 1) number of positions that each row lost.
    """
    text, axes = text_of(state.positions), axes_of(state.positions)
    device = state.columns.device
    shift = torch.zeros(len(state.columns), 1, dtype=torch.long, device=device)
    if keeps_positions:
        axes = taken(axes, state.order)
    else:
        moves, total = _closed_grids(state)
        axes = axes_of(state.numbered) - moved(moves, device)
        axes = taken(axes, state.columns.clamp(min=0))
        shift, state.closed = moved(total - state.closed, device), total
    if text is None:
        state.positions = axes
    else:  # it only counts tokens; gaps would be taken for the borders of packed sequences
        state.positions = torch.cat([taken(text - lost, state.order)[None], axes])
    return shift


def runs_of(columns: Tensor) -> Tensor:
    """(N,) index of the run of neighbouring ``columns`` (N,) that each one belongs to."""
    return F.pad((columns.diff() != 1).cumsum(0), (1, 0))
