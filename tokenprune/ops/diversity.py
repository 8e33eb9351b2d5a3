"""Selections of tokens that differ from each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.ops.ranking import ROUNDING

__all__ = [
    "cosine_distances",
    "cover",
    "dpp_greedy_map",
    "max_min_diversity",
    "segments",
    "static_segments",
]


def cover(similarity: Tensor, worth: Tensor, count: int) -> Tensor:
    """A subset that is similar to all rows, selected greedily (facility location).

    Each step selects the row ``j`` with the largest ``worth_j * sum_i max(0, s_ij - c_i)``, where
    ``s`` is ``similarity`` and ``c_i`` the largest ``s_ik`` of a selected row ``k``, initially 0.
    Ties go to the earlier row (SCOPE, arXiv 2510.24214).

    Args:
        similarity: (P, P).
        worth: (P,) weights, not negative.
        count: Number of rows, at most P.

    Returns:
        (count,) sorted indices.
    """
    chosen = torch.empty(count, dtype=torch.long, device=similarity.device)
    covered = similarity.new_zeros(len(similarity))
    free = torch.zeros_like(covered)
    for step in range(count):
        gain = (similarity - covered[:, None]).clamp(min=0).sum(0) * worth + free
        # A tensor of one entry: a Python number would take a synchronisation.
        index = gain.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        covered = torch.maximum(covered, similarity.index_select(1, index).squeeze(1))
        free.index_fill_(0, index, -torch.inf)
    return chosen.sort().values


def max_min_diversity(features: Tensor, count: int) -> Tensor:
    """A subset whose smallest pairwise cosine distance is large, selected greedily.

    The first step selects the row with the largest distance to its nearest neighbour.  Each further
    step selects the row with the largest distance to the nearest selected row.  Ties go to the
    earlier row (DivPrune, arXiv 2503.02175, algorithm 1).

    Args:
        features: (P, D); compared in float32.
        count: Number of rows, at most P.

    Returns:
        (count,) indices in the order of selection.
    """
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    if count < 1:
        return chosen
    distance = cosine_distances(features)
    others = distance.clone().fill_diagonal_(torch.inf)
    closest = torch.minimum(others.amin(0), others.amin(1))  # rounding is not symmetric
    del others
    for step in range(count):
        # A tensor of one entry: a Python number would take a synchronisation.
        index = closest.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        row = distance.index_select(0, index).squeeze(0)
        closest = row if step == 0 else torch.minimum(closest, row)
        closest.index_fill_(0, index, -torch.inf)
    return chosen


def cosine_distances(features: Tensor) -> Tensor:
    """(P, P) float32 one minus the cosine of the rows (P, D); values up to `ROUNDING` are 0."""
    unit = F.normalize(features.float(), dim=-1)
    return torch.threshold_(1 - unit @ unit.T, ROUNDING, 0.0)


def dpp_greedy_map(kernel: Tensor, count: int) -> Tensor:
    """The most probable subset of a determinantal point process, selected greedily.

    Each step selects the row that increases ``det(kernel[S, S])`` by the largest factor.  This gain
    is initially ``kernel_jj``.  Every selection adds a row to a Cholesky decomposition, which
    updates the gains at O(P * count) (Chen et al., arXiv 1709.05135, algorithm 1, as in the
    official code of CDPruner).  Ties go to the row with the smallest sum of entries.

    A gain below 1e-5 of ``kernel_jj`` is a rounding error, because the subset already spans the
    row.  It counts as 0.  If only such rows remain, those with the largest ``kernel_jj`` are
    selected first.

    Args:
        kernel: (P, P) symmetric, positive semidefinite; computed in float32.
        count: Number of rows, at most P; may exceed the rank.

    Returns:
        (count,) indices in the order of selection.
    """
    order = kernel.float().sum(1).argsort(stable=True)
    kernel = kernel.float()[order][:, order]
    worth = kernel.diagonal()
    gain = worth.clone()
    place = torch.arange(len(kernel), device=kernel.device)
    last = torch.empty_like(gain)  # less than every gain, descending with the diagonal
    last[worth.argsort(descending=True, stable=True)] = -1 - place.float()
    factor = kernel.new_zeros(count, len(kernel))
    chosen = torch.empty(count, dtype=torch.long, device=kernel.device)
    taken = torch.zeros_like(gain)
    for step in range(count):
        spent = gain <= 1e-5 * worth
        # A tensor of one entry: a Python number would take a synchronisation.
        index = (torch.where(spent, last, gain) + taken).argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        row = kernel.index_select(0, index)[0]
        row = row - factor[:step].index_select(1, index)[:, 0] @ factor[:step]
        row = row / gain.index_select(0, index).sqrt()
        factor[step] = torch.where(spent.index_select(0, index), 0, row)
        gain = gain - factor[step].square()
        taken.index_fill_(0, index, -torch.inf)
    return order[chosen]


def segments(gain: Tensor) -> list[tuple[int, int]]:
    """Divide a sequence of F entries into runs with the largest sum of gains.

    It is solved by dynamic programming.

    Args:
        gain: (F, F) gain of the run from ``s`` to ``e``, inclusive, at ``[s, e]``; 0 for a single
            entry.

    Returns:
        First and last entry of every run, in order.  Of equal sums, the division with the shortest
        last run.
    """
    table = gain.tolist()
    best, start = [0.0], []
    for end in range(len(table)):
        options = [best[first] + table[first][end] for first in range(end, -1, -1)]
        most = max(options)
        best.append(most)
        start.append(end - options.index(most))
    runs, end = [], len(table) - 1
    while end >= 0:
        runs.append((start[end], end))
        end = start[end] - 1
    return runs[::-1]


def static_segments(still: Tensor) -> list[tuple[int, int]]:
    """The division of a video into `segments` that saves the most tokens.

    A run of frames needs only one token for each location that is static in the whole run.  The
    other frames of the run save one token each (HoliTom, arXiv 2505.21334).

    Args:
        still: (F - 1, P) bool, whether a location equals that of the previous frame, for every
            frame except the first.
    """
    frames = len(still) + 1
    saved = torch.zeros(frames, frames, dtype=torch.int64, device="cpu")
    for first in range(frames - 1):
        static = still[first:].cumprod(0).sum(1)
        saved[first, first + 1 :] = static * (1 + torch.arange(len(static), device="cpu"))
    return segments(saved)
