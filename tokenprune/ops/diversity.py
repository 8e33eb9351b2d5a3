"""Selections of tokens that differ from each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.ops.similarity import (
    FEWEST,
    cosine_distances,
    distance_of,
    fits,
    parts,
    products,
    tabled,
    unit,
)

__all__ = [
    "cover",
    "cover_by_cosine",
    "dpp_greedy",
    "dpp_greedy_map",
    "dpp_kernel",
    "max_min_diversity",
    "segments",
    "static_segments",
]

POOL = 1024
"""Rows among which a greedy selection goes on until a row outside may be better.

The value of a row only falls while others are selected.  The best row of a pool therefore is the
best of all, as long as it is better than the best row outside was when the pool was formed.  Then
the values of all rows are updated, by one product with all rows selected from the pool.  On other
devices than the CPU, all rows form one pool, because the comparison would be a synchronisation.
"""

TABLE = 4608
"""Rows up to which `dpp_greedy` makes the kernel (81 MiB); with more, pools are faster."""

CANDIDATES = 64
"""Rows in the pool of `cover_by_cosine`, whose values take a column of P cosines each."""

SPENT = 1e-5
"""Share of the diagonal below which a gain is a rounding error."""

Row = Callable[[Tensor], Tensor]
"""From an index (1,) to that row (P,) of a table (P, P), which need not exist as a whole."""


class _Pool:
    """The ``size`` rows of the largest ``value`` (P,); of equal ones the earlier.

    Attributes:
        index: (size,) their indices, sorted.
    """

    def __init__(self, value: Tensor, size: int) -> None:
        ranked = value.sort(descending=True, stable=True)
        self.index = ranked.indices[:size].sort().values
        self._outside = ranked.values[size].item(), -ranked.indices[size].item()

    def leads(self, value: Tensor, place: Tensor) -> bool:
        """Whether the row at ``place`` of the pool, which now has ``value``, is the best of all."""
        return (value.item(), -self.index[place].item()) > self._outside


def max_min_diversity(features: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
    """A subset whose smallest pairwise cosine distance is large, selected greedily.

    The first step selects the row with the largest distance to its nearest neighbour.  Each further
    step selects the row with the largest distance to the nearest selected row.  Ties go to the
    earlier row (DivPrune, arXiv 2503.02175, algorithm 1).

    Rows whose table of distances does not fit a block take O(P * count * D) operations and O(P)
    memory.  The operations of the first step depend on the features (`_most_isolated`).

    Args:
        features: (N, D); compared in float32.
        count: Number of rows, at most P.
        rows: (P,) indices of the rows to select from; None for all.

    Returns:
        (count,) indices into ``features``, in the order of selection.
    """
    if rows is None:
        rows = torch.arange(len(features), device=features.device)
    if count < 1:
        return rows[:0]
    if fits(len(rows)):
        table = cosine_distances(features[rows])
        isolation, row = _isolation(table), _row_of(table)
    elif features.device.type == "cpu":
        return rows[_max_min_by_pools(features, count, rows)]
    else:
        isolation, row = _isolation_by_blocks(features[rows]), _distances_to(features[rows])
    first = isolation.argmax(0, keepdim=True)
    closest = row(first).index_fill(0, first, -torch.inf)
    return rows[torch.cat([first, _farthest(closest, row, count - 1)])]


def _farthest(closest: Tensor, row: Row, count: int, pool: _Pool | None = None) -> Tensor:
    """Up to ``count`` indices, each of the row farthest from all selected before.

    Args:
        closest: (P,) distance to the nearest row that is selected already; -inf for those.
        row: Distances.
        count: Number of indices.
        pool: What the rows are a part of.  The selection ends when a row outside may be farther.
    """
    chosen = [torch.empty(0, dtype=torch.long, device=closest.device)]
    for _ in range(count):
        # A tensor of one entry: a Python number would take a synchronisation.
        index = closest.argmax(0, keepdim=True)
        if pool and not pool.leads(closest[index], index):
            break
        chosen.append(index)
        closest = torch.minimum(closest, row(index)).index_fill_(0, index, -torch.inf)
    return torch.cat(chosen)


def _max_min_by_pools(features: Tensor, count: int, rows: Tensor) -> Tensor:
    """`max_min_diversity` on a CPU: (count,) indices into ``rows``."""

    def vectors(index: Tensor) -> Tensor:
        return unit(features[rows[index]])

    everything = torch.arange(len(rows), device=rows.device)
    chosen = new = _most_isolated(vectors, everything)
    closest = torch.full_like(everything, torch.inf, dtype=torch.float32)
    while len(chosen) < count:
        latest = vectors(new)
        for some in _split(everything):
            far = distance_of(products(vectors(some), latest).amax(1))
            closest[some] = torch.minimum(closest[some], far)
        closest[chosen] = -torch.inf
        pool = _Pool(closest, POOL)
        row = _row_of(cosine_distances(features[rows[pool.index]]))
        new = pool.index[_farthest(closest[pool.index], row, count - len(chosen), pool)]
        chosen = torch.cat([chosen, new])
    return chosen


def _most_isolated(vectors: Callable[[Tensor], Tensor], everything: Tensor) -> Tensor:
    """(1,) index of the row with the largest distance to its nearest neighbour, on a CPU.

    All rows are compared with one part of the rows after the other.  The rows of the first part
    then are compared with all.  A row leaves as soon as it is nearer to some row than the best of
    these is to any: most rows leave early.

    Args:
        vectors: From indices (R,) to the unit rows (R, D).
        everything: (P,) the indices of all rows.
    """
    left, best = everything, (-1.0, 0)
    closest = torch.full_like(everything, torch.inf, dtype=torch.float32)
    # Each part has rows from everywhere, so that most rows soon meet a similar one.
    strides = -(-len(everything) // POOL)
    for part in _split(torch.cat([everything[first::strides] for first in range(strides)])):
        near, known = _nearest_others(vectors, left, part)
        closest = torch.minimum(closest, near)
        if len(left) == len(everything):
            most = known.max()
            best = max(best, (most.item(), -int(part[known == most].min())))
        stays = (closest > best[0]) | ((closest == best[0]) & (left <= -best[1]))
        left, closest = left[stays], closest[stays]
    return left[closest.argmax(0, keepdim=True)]


def _nearest_others(
    vectors: Callable[[Tensor], Tensor], rows: Tensor, others: Tensor
) -> tuple[Tensor, Tensor]:
    """Distance of each of ``rows`` (R,) to the nearest of ``others`` (S,), and of these to those.

    A row does not count as its own neighbour.
    """
    of_rows, right = torch.empty_like(rows, dtype=torch.float32), vectors(others)
    of_others = torch.full_like(others, -torch.inf, dtype=torch.float32)
    for some, nearest in zip(_split(rows), _split(of_rows), strict=True):
        cosine = products(vectors(some), right)
        cosine.masked_fill_(some[:, None] == others, -torch.inf)
        nearest.copy_(cosine.amax(1))
        torch.maximum(of_others, cosine.amax(0), out=of_others)
    return distance_of(of_rows), distance_of(of_others)


def _isolation(table: Tensor) -> Tensor:
    """(P,) distance of each row to its nearest neighbour, from the distances (P, P)."""
    others = table.clone().fill_diagonal_(torch.inf)
    return torch.minimum(others.amin(0), others.amin(1))  # rounding is not symmetric


def _isolation_by_blocks(features: Tensor) -> Tensor:
    """`_isolation` without a table.  Each pair is computed once, because of its rounding."""
    closest = torch.full(features.shape[:1], torch.inf, device=features.device)
    blocks = list(zip(_split(unit(features)), _split(closest), strict=True))
    for place, (rows, near) in enumerate(blocks):
        torch.minimum(near, _isolation(distance_of(rows @ rows.T)), out=near)
        for others, near_others in blocks[place + 1 :]:
            far = distance_of(rows @ others.T)
            torch.minimum(near, far.amin(1), out=near)
            torch.minimum(near_others, far.amin(0), out=near_others)
    return closest


def _split(rows: Tensor) -> tuple[Tensor, ...]:
    """Parts of `POOL` rows of ``rows`` (P, ...); the last one has up to `FEWEST` more or less."""
    return rows.tensor_split(list(range(POOL, len(rows) - FEWEST, POOL)))


def _row_of(table: Tensor) -> Row:
    return lambda index: table.index_select(0, index)[0]


def _distances_to(features: Tensor) -> Row:
    rows = unit(features)
    return lambda index: distance_of(rows @ rows.index_select(0, index)[0])


def dpp_kernel(features: Tensor, quality: Tensor) -> Tensor:
    """(P, P) ``q_i * cos(x_i, x_j) * q_j`` of features (P, D) and ``quality`` (P,), in float32."""
    rows = unit(features)
    # A cosine of exactly 1 with itself, so that equal tokens have equal gains.
    return (rows @ rows.T).fill_diagonal_(1).mul_(quality[:, None]).mul_(quality)


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
    return order[_grown(_row_of(kernel), worth, worth, _last(worth), count)[0]]


def dpp_greedy(features: Tensor, quality: Tensor, count: int, rows: Tensor) -> Tensor:
    """`dpp_greedy_map` of the `dpp_kernel` of some rows, in O(P * count) memory.

    Args:
        features: (N, D).
        quality: (N,) float32.
        count: Number of rows, at most P.
        rows: (P,) indices of the rows.

    Returns:
        (count,) the selected ones of ``rows``, in the order of selection.
    """
    if fits(len(rows)):
        return rows[dpp_greedy_map(dpp_kernel(features[rows], quality[rows]), count)]
    rows = rows[_kernel_sums(features, quality, rows).argsort(stable=True)]
    if len(rows) > TABLE and features.device.type == "cpu":
        return rows[_dpp_by_pools(features, quality, count, rows)]
    quality = quality[rows]
    if len(rows) <= TABLE:
        row = _row_of(dpp_kernel(features[rows], quality))
    else:
        row = _kernel_row(unit(features[rows]), quality)
    worth = quality.square()
    return rows[_grown(row, worth, worth, _last(worth), count)[0]]


def _kernel_row(vectors: Tensor, quality: Tensor) -> Row:
    """Rows of the `dpp_kernel` of unit ``vectors`` (P, D) and ``quality`` (P,)."""

    def row(index: Tensor) -> Tensor:
        cosine = (vectors @ vectors.index_select(0, index)[0]).index_fill_(0, index, 1)
        return quality.index_select(0, index) * cosine * quality

    return row


def _grown(
    row: Row, gain: Tensor, worth: Tensor, last: Tensor, count: int, pool: _Pool | None = None
) -> tuple[Tensor, Tensor]:
    """Select up to ``count`` rows by their gain, and decompose the kernel at these rows.

    Args:
        row: The kernel, without the part that rows selected already explain.
        gain: (P,) its diagonal; -inf for those rows.
        worth: (P,) diagonal of the whole kernel.
        last: (P,) value in place of a gain that is a rounding error; -inf for those rows.
        count: Number of rows.
        pool: What the rows are a part of.  The selection ends when a row outside may be better.

    Returns:
        (C,) indices of the selected rows, and (C, P) their rows of the Cholesky decomposition; 0
        where the gain was a rounding error.
    """
    factor = gain.new_zeros(count, len(gain))
    chosen = [torch.empty(0, dtype=torch.long, device=gain.device)]
    for step in range(count):
        spent = gain <= SPENT * worth
        value = torch.where(spent, last, gain)
        # A tensor of one entry: a Python number would take a synchronisation.
        index = value.argmax(0, keepdim=True)
        if pool and not pool.leads(value[index], index):
            break
        chosen.append(index)
        new = row(index) - factor[:step].index_select(1, index)[:, 0] @ factor[:step]
        new = new / gain.index_select(0, index).sqrt()
        factor[step] = torch.where(spent.index_select(0, index), 0, new)
        gain = (gain - factor[step].square()).index_fill_(0, index, -torch.inf)
        last = last.index_fill(0, index, -torch.inf)
    return torch.cat(chosen), factor[: len(chosen) - 1]


def _last(worth: Tensor) -> Tensor:
    """(P,) values below every gain, the larger the larger ``worth`` (P,) is."""
    place = torch.arange(len(worth), device=worth.device)
    last = torch.empty_like(worth)
    last[worth.argsort(descending=True, stable=True)] = -1 - place.float()
    return last


def _kernel_sums(features: Tensor, quality: Tensor, rows: Tensor) -> Tensor:
    """(P,) sums of the rows of the `dpp_kernel`; of equal rows equal to the last bit."""
    parts = _split(rows)
    total = torch.stack([quality[some] @ unit(features[some]) for some in parts]).sum(0)
    sums = [quality[some] * (unit(features[some]) * total).sum(1) for some in parts]
    return torch.cat(sums)


def _dpp_by_pools(features: Tensor, quality: Tensor, count: int, rows: Tensor) -> Tensor:
    """`dpp_greedy` on a CPU: (count,) indices into ``rows``, of which the earlier win ties."""
    everything, quality = torch.arange(len(rows), device=rows.device), quality[rows]
    worth = quality.square()
    gain, last = worth.clone(), _last(worth)
    factor = worth.new_empty(count, len(rows))
    chosen, filled = everything[:0], 0

    def kernel(some: Tensor, others: Tensor) -> Tensor:
        cosines = unit(features[rows[some]]) @ unit(features[rows[others]]).T
        cosines.masked_fill_(some[:, None] == others, 1)
        return quality[some, None] * cosines * quality[others]

    while True:
        pool = _Pool(torch.where(gain <= SPENT * worth, last, gain), POOL)
        own, most = pool.index, min(POOL, count - len(chosen))
        known = factor[:filled, own]
        row = _row_of(kernel(own, own) - known.T @ known)
        places, made = _grown(row, gain[own], worth[own], last[own], most, pool)
        chosen = torch.cat([chosen, own[places]])
        if len(chosen) == count:
            return chosen
        lower = made[:, places].T
        real = lower.diagonal() > 0
        lower, new = lower[real][:, real], own[places[real]]
        known = factor[:filled, new].T
        for some in _split(everything):
            first, end = int(some[0]), int(some[-1]) + 1
            rest = kernel(new, some) - known @ factor[:filled, first:end]
            rest = torch.linalg.solve_triangular(lower, rest, upper=False)
            factor[filled : filled + len(new), first:end] = rest
            gain[first:end] -= rest.square().sum(0)
        filled += len(new)
        gain[chosen] = last[chosen] = -torch.inf


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
    added = torch.empty_like(similarity)  # new memory for every step would double the time
    for step in range(count):
        torch.sub(similarity, covered[:, None], out=added)
        gain = added.clamp_(min=0).sum(0) * worth + free
        # A tensor of one entry: a Python number would take a synchronisation.
        index = gain.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        covered = torch.maximum(covered, similarity.index_select(1, index).squeeze(1))
        free.index_fill_(0, index, -torch.inf)
    return chosen.sort().values


def cover_by_cosine(vectors: Tensor, worth: Tensor, count: int) -> Tensor:
    """`cover` by the cosines of ``vectors`` (P, D) of unit length.

    Cosines that are too many for one table (`tabled`) are made for a `_Pool` of candidates at a
    time.  Every comparison of the pool with the rest is then a synchronisation.
    """
    if tabled(vectors):
        return cover(vectors @ vectors.T, worth, count)
    gain = torch.empty_like(worth)
    for part in parts(len(vectors), len(vectors)):
        gain[part] = (vectors @ vectors[part].T).clamp_(min=0).sum(0)
    gain *= worth
    covered = torch.zeros_like(worth)
    cosine = vectors.new_empty(len(vectors), min(CANDIDATES, len(vectors)))
    added = torch.empty_like(cosine)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        pool = _Pool(gain, CANDIDATES)
        torch.mm(vectors, vectors[pool.index].T, out=cosine)
        weight = worth[pool.index]
        free = torch.zeros_like(weight).masked_fill_(gain[pool.index].isneginf(), -torch.inf)
        while len(chosen) < count:
            torch.sub(cosine, covered[:, None], out=added)
            value = added.clamp_(min=0).sum(0) * weight + free
            gain[pool.index] = value
            place = value.argmax(0, keepdim=True)
            if not pool.leads(value[place], place):
                break
            chosen.append(pool.index[place])
            torch.maximum(covered, cosine[:, place].squeeze(1), out=covered)
            free[place] = gain[chosen[-1]] = -torch.inf
    return torch.cat(chosen).sort().values if chosen else torch.arange(0)


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
