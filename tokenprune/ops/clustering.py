"""Clusters of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenprune.ops.merging import group_means, tally
from tokenprune.ops.similarity import fits, parts, products, tabled

__all__ = [
    "ROUNDS",
    "central_members",
    "density_peaks",
    "dispersed",
    "kernel_density",
    "least_cosine_cutoff",
    "least_cutoff",
    "nearest_centres",
    "others",
    "recycling",
]


WALK = 1024
"""Points that are compared with all centres at a time."""

ROUNDS = 16
"""Rounds of `dispersed` before a synchronisation checks for undecided points; most need fewer."""


def central_members(cluster: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """The member of every cluster nearest to its mean location; ties go to the earlier one.

    Args:
        cluster: (M,) int64 identifier of each member's cluster.
        row, col: (M,) int64 location of each member.

    Returns:
        (C,) index of each cluster's central member, by identifier, and (C,) numbers of members.
    """
    _, place, members = cluster.unique(return_inverse=True, return_counts=True)
    # Squared distance times the squared number of members: an integer, hence exact.
    distance = torch.zeros_like(place)
    for axis in (row, col):
        total = torch.zeros_like(members).index_add_(0, place, axis)
        distance += (members[place] * axis - total[place]).square()
    near = distance.argsort(stable=True)
    order = near[place[near].argsort(stable=True)]
    return order[members.cumsum(0) - members], members


def kernel_density(distance: Tensor, width: float = 2.0) -> Tensor:
    """(P,) ``sum_j exp(-(d_ij / width)²)`` of distances (P, Q)."""
    return (-(distance / width).square()).exp().sum(1)


def dispersed(distance: Tensor, density: Tensor, cutoff: float | Tensor) -> Tensor:
    """The points that, densest first, are farther than ``cutoff`` from all points selected before.

    These are the centres of DBDPC (PACT, arXiv 2504.08966, algorithm 2).  Every other point is
    within ``cutoff`` of a selected one.  A few rounds over all points give the result of a loop
    over points: in each round, every point that is denser than all undecided points nearby is
    selected, and those points are rejected.  Of equally dense points, the earlier one counts as
    denser.

    Args:
        distance: (P, P) symmetric.
        density: (P,).
        cutoff: At least 0.

    Returns:
        (P,) bool.
    """
    rounds, denser = ROUNDS, _denser(density)
    while True:
        chosen, undecided = _rounds(distance, denser, cutoff, rounds)
        if not undecided.any():
            return chosen
        rounds *= 2


def least_cutoff(
    distance: Tensor, density: Tensor, count: int, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The smallest cutoff, at least ``least``, at which at most ``count`` points are `dispersed`.

    The interval [``least``, largest distance] is bisected 16 times.  One synchronisation at the end
    checks whether `ROUNDS` were enough.

    Args:
        distance, density: As in `dispersed`.
        count: At least 1.
        least: Lower end of the interval.

    Returns:
        The cutoff, () on the device, and the result of `dispersed` for it, on the CPU.
    """
    rounds, denser = ROUNDS, _denser(density)
    while True:
        pending: list[Tensor] = []

        def disperse(
            cutoff: Tensor, rounds: int = rounds, pending: list[Tensor] = pending
        ) -> Tensor:
            chosen, undecided = _rounds(distance, denser, cutoff, rounds)
            pending.append(undecided)
            return chosen

        cutoff, found = _bisected(disperse, distance.max(), count, least)
        found, undecided = torch.stack([found, torch.stack(pending).any(0)]).cpu()
        if not undecided.any():
            return cutoff, found
        rounds *= 2


def _bisected(
    disperse: Callable[[Tensor], Tensor], most: Tensor, count: int, least: float
) -> tuple[Tensor, Tensor]:
    """The cutoff of `least_cutoff` between ``least`` and ``most``, and the points dispersed by it.

    ``disperse`` gives the points (P,) bool for a cutoff; if more than ``count``, not all.
    """
    low = torch.full((), least, dtype=torch.float64, device=most.device)
    high = most.double().clamp(min=least)
    first, found = disperse(low), disperse(high)
    fits_low = first.sum() <= count
    high, found = torch.where(fits_low, low, high), torch.where(fits_low, first, found)
    for _ in range(16):
        middle = (low + high) / 2
        tried = disperse(middle)
        few = tried.sum() <= count
        low, high = torch.where(few, low, middle), torch.where(few, middle, high)
        found = torch.where(few, tried, found)
    return high, found


def least_cosine_cutoff(vectors: Tensor, count: int, least: float) -> tuple[Tensor, Tensor]:
    """`least_cutoff` of one minus the cosine (at least 0), with the `kernel_density`.

    Distances that are too many for one table (`tabled`) are made a block at a time, whenever they
    are needed.  Every block is then a synchronisation, because the number of centres, and so the
    size of the blocks, is known only on the device.

    Args:
        vectors: (P, D) of unit length.
        count, least: As in `least_cutoff`.
    """
    if tabled(vectors):
        far = (1 - vectors @ vectors.T).clamp(min=0)
        far = torch.maximum(far, far.T).fill_diagonal_(0)  # rounding is not symmetric
        return least_cutoff(far, kernel_density(far), count, least)
    place = torch.arange(len(vectors), device=vectors.device)
    density, largest = vectors.new_empty(len(vectors)), vectors.new_zeros(())
    for part in parts(len(vectors), len(vectors)):
        far = (1 - vectors[part] @ vectors.T).clamp_(min=0)
        far.masked_fill_(place[part, None] == place, 0)
        torch.maximum(largest, far.max(), out=largest)
        density[part] = kernel_density(far)
    order = density.argsort(descending=True, stable=True)

    def disperse(cutoff: Tensor) -> Tensor:
        return torch.zeros_like(order, dtype=torch.bool).index_fill_(
            0, order[_walked(vectors[order], cutoff, count)], True
        )

    cutoff, found = _bisected(disperse, largest, count, least)
    return cutoff, found.cpu()


def nearest_centres(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) cosine distance of unit vectors (P, D) to the nearest of (C, D), and (P,) its index."""
    nearest = vectors.new_empty(len(vectors))
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for part in parts(len(vectors), len(centres)):
        nearest[part], index[part] = (1 - vectors[part] @ centres.T).min(1)
    return nearest, index


def _walked(vectors: Tensor, cutoff: Tensor, count: int) -> Tensor:
    """Indices that are `dispersed`, of unit vectors (P, D), the densest first.

    Blocks of points are compared with all centres before them, then with each other.  The walk ends
    after the block in which more than ``count`` centres are found.
    """
    centres: list[Tensor] = []
    for start in range(0, len(vectors), WALK):
        index = torch.arange(start, min(start + WALK, len(vectors)), device=vectors.device)
        for earlier in centres:
            far = (1 - products(vectors[index], vectors[earlier])).clamp_(min=0)
            index = index[~_any(far <= cutoff)]
        if len(index):
            far = (1 - products(vectors[index], vectors[index])).clamp_(min=0)
            centres.append(index[dispersed(far, -index, cutoff)])
        if sum(map(len, centres)) > count:
            break
    return torch.cat(centres)


def _denser(density: Tensor) -> Tensor:
    """(P, P) bool, whether ``j`` is denser than ``i``, or equally dense and earlier."""
    place = torch.arange(len(density), device=density.device)
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(place).scatter_(0, order, place)
    return rank[None] < rank[:, None]


def _any(mask: Tensor) -> Tensor:
    """(P,) ``mask.any(1)`` of ``mask`` (P, Q); this form is much faster on a CPU."""
    return mask.view(torch.uint8).amax(1).bool()


def _rounds(
    distance: Tensor, denser: Tensor, cutoff: Tensor | float, rounds: int
) -> tuple[Tensor, Tensor]:
    """(P,) bool each: the selected and the undecided points after ``rounds`` of `dispersed`."""
    near = (distance <= cutoff).fill_diagonal_(False)
    before = near & denser
    chosen = torch.zeros_like(near[0])
    free = ~chosen
    for _ in range(rounds):
        if free.device.type == "cpu" and not free.any():  # elsewhere this would synchronise
            break
        new = free & ~_any(before & free)
        chosen |= new
        free &= ~new & ~_any(near & new)
    return chosen, free


def density_peaks(
    vectors: Tensor, count: int, neighbours: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster around points that are dense and far from denser ones (density peaks, kNN).

    ``d`` is the Euclidean distance divided by the root of the dimension.  The density of a point is
    ``exp(-mean d²)`` over its nearest points (``neighbours``, or ``count``), including itself.  Its
    score is the density times the distance to the nearest denser point, or times the largest of all
    distances for the densest point.  The ``count`` points of the highest scores are centres, and
    every other point joins the nearest centre.  This is ``cluster_and_merge`` of SparseVLM (arXiv
    2410.04417), except for ties: there noise breaks them, here the earlier of equally dense points
    counts as denser.

    Args:
        vectors: (P, D); compared in float32.
        count: Number of clusters, in [1, P].
        neighbours: Number of nearest points that determine the density, at most ``count``; None
            for ``count``.

    Returns:
        (count,) indices of the centres, best first, and (P,) cluster of every point.
    """
    apart, some = _Apart(vectors), parts(len(vectors), len(vectors))
    nearest = count if neighbours is None else min(neighbours, count)
    spread, largest = vectors.new_empty(len(vectors), dtype=torch.float32), []
    for part in some:
        distance = apart(part)
        spread[part] = distance.topk(nearest, largest=False).values.square().mean(-1)
        largest.append(distance.max())
    density = (-spread).exp()
    place = torch.arange(len(vectors), device=vectors.device)
    rank = torch.empty_like(place)
    rank[density.argsort(descending=True, stable=True)] = place
    denser = torch.empty_like(density)
    for part in some:
        denser[part] = apart(part).masked_fill(rank >= rank[part, None], torch.inf).amin(1)
    far = torch.where(rank == 0, torch.stack(largest).max(), torch.inf)
    score = density * torch.minimum(denser, far)
    centres = score.argsort(descending=True, stable=True)[:count]
    cluster = torch.empty_like(place)
    for part in some:
        cluster[part] = apart(part, centres).argmin(1)
    cluster[centres] = place[:count]
    return centres, cluster


class _Apart:
    """Distances of `density_peaks` (P, P); rows of them are made on demand if all exceed a block.

    Rounding is not symmetric, so that the larger of both distances of a pair counts.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._points = vectors.float()
        self._table: Tensor | None = None
        if fits(len(vectors)):
            self._table = self._one_way(self._points, self._points)
            self._table = torch.maximum(self._table, self._table.T).fill_diagonal_(0)

    def __call__(self, part: slice, columns: Tensor | None = None) -> Tensor:
        """(R, C) distances of the points in ``part`` from those at ``columns``; None for all."""
        if self._table is not None:
            rows = self._table[part]
            return rows if columns is None else rows[:, columns]
        place = torch.arange(len(self._points), device=self._points.device)
        own, other = place[part], place if columns is None else columns
        points, against = self._points[part], self._points[other]
        distance = self._one_way(points, against)
        distance = torch.maximum(distance, self._one_way(against, points).T)
        return distance.masked_fill_(own[:, None] == other, 0)

    @staticmethod
    def _one_way(points: Tensor, others: Tensor) -> Tensor:
        distance: Tensor = torch.cdist(points, others) / points.shape[1] ** 0.5
        return distance


def recycling(count: int, kept: int, most: int, share: float) -> tuple[int, int, int]:
    """The numbers of kept tokens, of recycled tokens, and of clusters that these form.

    Of ``d`` dropped tokens, ``m = int(share * d) + 1`` (at most ``d``) are recycled into
    ``m // 10 + 1`` clusters (SparseVLM, arXiv 2410.04417).  If kept tokens and clusters exceed
    ``most``, fewer tokens are kept; if one kept token still exceeds it, fewer clusters are formed.

    Args:
        count: Number of tokens.
        kept: Maximum number of kept tokens, without clusters.
        most: Maximum number of kept tokens and clusters together.
        share: Share of the dropped tokens that is recycled; 0 for no clusters.
    """

    def clusters(dropped: int) -> tuple[int, int]:
        recycled = min(int(share * dropped) + 1, dropped) if share else 0
        return recycled, recycled // 10 + 1 if recycled else 0

    kept = max(1, min(kept, most))
    while kept > 1 and kept + clusters(count - kept)[1] > most:
        kept -= 1
    recycled, made = clusters(count - kept)
    return kept, recycled, min(made, most - kept)


def others(vectors: Tensor, centres: Tensor, cluster: Tensor) -> Tensor:
    """Mean of the members of each cluster of `density_peaks` other than its centre.

    Args:
        vectors: (P, D).
        centres: (C,) indices of the centres.
        cluster: (P,) cluster of each vector.

    Returns:
        (C, D) float32; the centre itself if there are no other members.
    """
    count = len(centres)
    rest = cluster.index_fill(0, centres, count)
    means = group_means(vectors, rest, count + 1)[:-1]
    alone = tally(rest, count + 1)[:-1] == 0
    return torch.where(alone[:, None], vectors[centres], means)
