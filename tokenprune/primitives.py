"""Shared maths of the strategies: small, vectorised, without a view of any model."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.tokens import Kind, TokenLayout, listed, moved

__all__ = [
    "ROUNDING",
    "ROUNDS",
    "Matching",
    "best_per_view",
    "bipartite_matching",
    "central_members",
    "cosine_distances",
    "cover",
    "density_peaks",
    "dispersed",
    "dithered",
    "dpp_greedy_map",
    "evenly_spaced",
    "group_means",
    "group_sums",
    "kernel_density",
    "least_cutoff",
    "lengths",
    "max_min_diversity",
    "merge_weighted",
    "normalise",
    "patch_table",
    "patches_by_plane",
    "patches_by_view",
    "project_thumbnail",
    "region_sums",
    "regions",
    "segments",
    "spread",
    "summary_distance",
    "tally",
    "thumbnail_map",
    "top",
    "top_per_view",
]


ROUNDS = 16
"""Of `dispersed`, before the host asks whether all points are decided; few need as many."""

ROUNDING = 2.0**-19
"""Cosine distances up to this are 0: of equal vectors no more is left in float32.

What is equal must tie, and ties go by place; left as they are, roundings would rank.
"""


def _rank_in_group(group: Tensor) -> Tensor:
    """(P,) how many earlier entries have the same group."""
    order = group.argsort(stable=True)
    grouped = group[order]
    index = torch.arange(len(group), device=group.device)
    first = torch.searchsorted(grouped, grouped)
    rank = torch.empty_like(index)
    rank[order] = index - first
    return rank


def top_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[v]`` highest-scored patch tokens of every view ``v``.

    Ranks in float32 and breaks ties by position, so that the result does not depend on the
    backend; bfloat16 scores tie often.

    Args:
        layout: Geometry of the N entries.
        scores: (N,) higher is kept first; values at separators are ignored.
        counts: (V,) int64.

    Returns:
        (M,) sorted indices into the N entries; on the CPU where the counts are on another device,
        which has to be waited for to learn how many they are.
    """
    ranked, kept = _ranked_per_view(layout, scores, counts)
    if counts.device.type != "cpu":
        return listed(_as_mask(ranked, kept, len(layout)))
    total = sum(map(min, counts.tolist(), layout.view_sizes))
    return ranked[kept.int().argsort(descending=True, stable=True)[:total]].sort().values


def best_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> Tensor:
    """(N,) bool which entries `top_per_view` lists, on the device of the scores, without a wait."""
    return _as_mask(*_ranked_per_view(layout, scores, counts), len(layout))


def _ranked_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) indices of the patch tokens, best first, and which are among the best of their view."""
    layout = layout.to(scores.device)
    order = scores[layout.patches].float().argsort(descending=True, stable=True)
    ranked = layout.patches[order]
    view = layout.view[ranked]
    return ranked, _rank_in_group(view) < moved(counts, view.device)[view]


def _as_mask(index: Tensor, which: Tensor, size: int) -> Tensor:
    """(size,) bool, ``which`` (P,) at ``index`` (P,)."""
    mask = torch.zeros(size, dtype=torch.bool, device=index.device)
    mask[index] = which
    return mask


def top(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the ``count`` highest of the scores (P,), earlier ones first on ties."""
    order = scores.float().argsort(descending=True, stable=True)
    return order[:count].sort().values


def lengths(vectors: Tensor) -> Tensor:
    """(P,) Euclidean norms of ``vectors`` (P, D), summed up in float32 without a copy of them."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=torch.float32)
    return norms


def group_means(vectors: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, D) mean of the vectors (P, D) of every group (P,) in float32, 0 of an empty one."""
    sums = group_sums(vectors.float(), group, groups)
    return sums / tally(group, groups).clamp(min=1)[:, None]


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, ...) sum of the values (P, ...) of every group (P,), added up in their order.

    The same in every run: on a GPU `index_add_` adds up as it comes, and `index_put_` sorts first.
    """
    sums = values.new_zeros(groups, *values.shape[1:])
    if values.device.type == "cpu":
        return sums.index_add_(0, group, values)
    return sums.index_put_((group,), values, accumulate=True)


def tally(group: Tensor, groups: int) -> Tensor:
    """(groups,) how many entries of ``group`` (P,) name each.  `bincount`, but waits for nobody."""
    return group.new_zeros(groups).index_add_(0, group, torch.ones_like(group))


def patches_by_view(layout: TokenLayout) -> list[Tensor]:
    """Of every view the indices of its patch tokens, row by row; empty where none is left."""
    patches = layout.patches
    ordered = patches[layout.view[patches].argsort(stable=True)]
    return list(ordered.split(list(layout.view_sizes)))


def patch_table(layout: TokenLayout) -> Tensor:
    """(V, P) index of the patch token at each place of every view, -1 where none is left."""
    rows, cols = layout.view_shape
    table = layout.kind.new_full((layout.views, rows * cols), -1)
    patches = layout.patches
    table[layout.view[patches], layout.row[patches] * cols + layout.col[patches]] = patches
    return table


def patches_by_plane(layout: TokenLayout) -> list[Tensor]:
    """Of every plane that is not empty the indices of its patch tokens, in sequence order.

    The thumbnail is a plane, the crops together are one (their canvas), and so is every frame.
    """
    host = layout.host
    crop = (host.kind == Kind.CROP)[host.patches]
    plane = host.view[host.patches].masked_fill(crop, 1)
    sizes = torch.bincount(plane).tolist()
    ordered = moved(host.patches[plane.argsort(stable=True)], layout.kind.device)
    return [part for part in ordered.split(sizes) if len(part)]


def central_members(cluster: Tensor, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Of every cluster the member nearest to the mean place of its members, the earlier of equals.

    Args:
        cluster: (M,) int64 identifier of each member's cluster.
        row, col: (M,) int64 its place.

    Returns:
        (C,) index of each cluster's member, by identifier, and (C,) numbers of members.
    """
    _, place, members = cluster.unique(return_inverse=True, return_counts=True)
    distance = torch.zeros_like(place)  # squared and times the number of members squared: exact
    for axis in (row, col):
        total = torch.zeros_like(members).index_add_(0, place, axis)
        distance += (members[place] * axis - total[place]).square()
    near = distance.argsort(stable=True)
    order = near[place[near].argsort(stable=True)]
    return order[members.cumsum(0) - members], members


def cover(alike: Tensor, worth: Tensor, count: int) -> Tensor:
    """A subset that covers all rows well, chosen greedily (facility location).

    Again and again the row ``j`` with the largest ``worth_j * sum_i max(0, alike_ij - c_i)``, where
    ``c_i``, at first 0, is the largest ``alike`` of row ``i`` to a chosen one.  Ties go to the
    earlier row (SCOPE, arXiv 2510.24214).

    Args:
        alike: (P, P) similarities.
        worth: (P,) not negative.
        count: How many of the P rows, at most P.

    Returns:
        (count,) sorted indices.
    """
    chosen = torch.empty(count, dtype=torch.long, device=alike.device)
    covered = alike.new_zeros(len(alike))
    free = torch.zeros_like(covered)
    for step in range(count):
        gain = (alike - covered[:, None]).clamp(min=0).sum(0) * worth + free
        # As a vector of one: a number as an index would make the host wait for it.
        index = gain.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        covered = torch.maximum(covered, alike.index_select(1, index).squeeze(1))
        free.index_fill_(0, index, -torch.inf)
    return chosen.sort().values


def evenly_spaced(layout: TokenLayout, counts: Tensor) -> Tensor:
    """``counts[v]`` evenly spaced patch tokens of every view, in the middle of equal intervals.

    Of ``n`` tokens of which ``T`` are kept, those at ``floor((i + 0.5) * n / T)``, ``i < T``.

    Returns:
        (M,) sorted indices into the N entries, on the CPU.
    """
    layout, counts = layout.host, counts.cpu()
    sizes = torch.tensor(layout.view_sizes, device="cpu")
    view = torch.arange(len(sizes), device="cpu").repeat_interleave(counts)
    slot = (2 * _rank_in_group(view) + 1) * sizes[view] // (2 * counts[view])
    # A view's patches need not be neighbours in the sequence: crops share canvas rows.
    order = layout.patches[layout.view[layout.patches].argsort(stable=True)]
    first = sizes.cumsum(0) - sizes
    return order[first[view] + slot].sort().values


def dithered(layout: TokenLayout, counts: Tensor) -> Tensor:
    """``counts[v]`` patch tokens of every view, spread evenly over its rows *and* columns.

    A view's tokens are taken in the order of a dispersed-dot dither (Bayer 1973): every further
    token lies far from all earlier ones.  The rank of ``(row, col)`` is the reversed interleaving
    of the bits of ``row xor col`` and ``row``.

    Returns:
        (M,) sorted indices into the N entries, on the CPU.
    """
    layout, counts = layout.host, counts.cpu()
    row, col = layout.row.clamp(min=0), layout.col.clamp(min=0)
    rank = torch.zeros_like(row)
    for bit in range(max(layout.view_shape).bit_length()):
        rank = 4 * rank + 2 * ((row ^ col) >> bit & 1) + (row >> bit & 1)
    return top_per_view(layout, -rank.double(), counts)


def region_sums(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum of a thumbnail's scores over the region each crop covers, crops in row-major order.

    Args:
        scores: (H, W).
        grid: (rows, columns) of crops.

    Returns:
        (rows * columns,) in the dtype of ``scores``.
    """
    height, width = scores.shape
    region = moved(regions((height, width), grid), scores.device)
    return group_sums(scores.flatten(), region.flatten(), grid[0] * grid[1])


def thumbnail_map(layout: TokenLayout, scores: Tensor) -> Tensor:
    """The thumbnail's scores as a map.

    Where an earlier stage took patches out, the nearest one that is left stands in, the earlier of
    equally near ones.

    Args:
        layout: Geometry of the N entries.
        scores: (N,) per-entry scores.

    Returns:
        (rows, columns) of a view.
    """
    there = layout.places[Kind.THUMBNAIL]
    rows, cols = layout.view_shape
    values = scores[there]
    if len(there) == rows * cols:
        return values.view(rows, cols)
    if not len(there):
        return scores.new_zeros(rows, cols)
    index = torch.arange(rows * cols, device=there.device)
    away = (index[:, None] // cols - layout.row[there]).square()
    away += (index[:, None] % cols - layout.col[there]).square()
    nearest = (away * len(there) + index[: len(there)]).argmin(1)
    return values[nearest].view(rows, cols)


def regions(shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Which crop covers each token of a thumbnail, crops in row-major order.

    Cells are ``side // n`` wide; the last row and column of cells take what is left over
    (official GlobalCom² code, ``generate_scale_for_crop_features``).

    Args:
        shape: (H, W) of the thumbnail.
        grid: (rows, columns) of crops.

    Returns:
        (H, W) int64 in [0, rows * columns).
    """
    row, col = (
        (torch.arange(side, device="cpu") // max(side // cells, 1)).clamp(max=cells - 1)
        for side, cells in zip(shape, grid, strict=True)
    )
    return row[:, None] * grid[1] + col[None, :]


def project_thumbnail(layout: TokenLayout, scores: Tensor) -> Tensor:
    """The thumbnail's scores where each crop token lies (bilinear, ``align_corners=False``).

    The thumbnail is the whole image stretched to one view, so it maps onto the unpadded canvas.

    Args:
        layout: Geometry of the N entries.
        scores: (N,) per-entry scores.

    Returns:
        (N,) NaN outside the crops.
    """
    thumbnail = thumbnail_map(layout, scores)[None, None]
    canvas = F.interpolate(thumbnail, layout.canvas_shape, mode="bilinear", align_corners=False)
    crop = layout.kind == Kind.CROP
    values = canvas[0, 0, layout.canvas_row.clamp(min=0), layout.canvas_col.clamp(min=0)]
    return torch.where(crop, values, torch.nan)


def max_min_diversity(features: Tensor, count: int) -> Tensor:
    """A subset whose smallest pairwise cosine distance is large, chosen greedily.

    First the row whose nearest other row is farthest, then again and again the row that is farthest
    from all chosen ones.  Ties go to the earlier row (DivPrune, arXiv 2503.02175, algorithm 1): of
    equal rows, and of two that are nearest to each other.

    Args:
        features: (P, D); compared in float32.
        count: How many of the P rows, at most P.

    Returns:
        (count,) indices in the order of the choice.
    """
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    if count < 1:
        return chosen
    distance = cosine_distances(features)
    others = distance.clone().fill_diagonal_(torch.inf)
    closest = torch.minimum(others.amin(0), others.amin(1))  # rounding is not symmetric
    del others
    for step in range(count):
        # As a vector of one: a number as an index would make the host wait for it.
        index = closest.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        row = distance.index_select(0, index).squeeze(0)
        closest = row if step == 0 else torch.minimum(closest, row)
        closest.index_fill_(0, index, -torch.inf)
    return chosen


def cosine_distances(features: Tensor) -> Tensor:
    """(P, P) float32 one minus the cosine of the rows (P, D); 0 up to `ROUNDING`."""
    unit = F.normalize(features.float(), dim=-1)
    return torch.threshold_(1 - unit @ unit.T, ROUNDING, 0.0)


def dpp_greedy_map(kernel: Tensor, count: int) -> Tensor:
    """The most probable subset of a determinantal point process, chosen greedily.

    Again and again the row that multiplies ``det(kernel[S, S])`` by most.  That factor, the row's
    gain, is at first ``kernel_jj`` and is kept up to date by one more row of a Cholesky
    decomposition for every choice, in O(P * count) (Chen et al., arXiv 1709.05135, algorithm 1, as
    in the official code of CDPruner).  Ties go to the row whose entries sum to least.

    Gains below 1e-5 of ``kernel_jj`` are rounding: the subset spans such a row already.  They
    count as nothing, and where only such rows are left the largest ``kernel_jj`` go first.

    Args:
        kernel: (P, P) symmetric, positive semidefinite; computed in float32.
        count: How many of the P rows, at most P; may exceed the rank.

    Returns:
        (count,) indices in the order chosen.
    """
    order = kernel.float().sum(1).argsort(stable=True)
    kernel = kernel.float()[order][:, order]
    worth = kernel.diagonal()
    gain = worth.clone()
    place = torch.arange(len(kernel), device=kernel.device)
    last = torch.empty_like(gain)  # below every gain, the largest diagonal entry first
    last[worth.argsort(descending=True, stable=True)] = -1 - place.float()
    factor = kernel.new_zeros(count, len(kernel))
    chosen = torch.empty(count, dtype=torch.long, device=kernel.device)
    taken = torch.zeros_like(gain)
    for step in range(count):
        spent = gain <= 1e-5 * worth
        # One entry, not a number: nothing waits for the device.
        index = (torch.where(spent, last, gain) + taken).argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        row = kernel.index_select(0, index)[0]
        row = row - factor[:step].index_select(1, index)[:, 0] @ factor[:step]
        row = row / gain.index_select(0, index).sqrt()
        factor[step] = torch.where(spent.index_select(0, index), 0, row)
        gain = gain - factor[step].square()
        taken.index_fill_(0, index, -torch.inf)
    return order[chosen]


def kernel_density(distance: Tensor, width: float = 2.0) -> Tensor:
    """(P,) ``sum_j exp(-(d_ij / width)²)`` of distances (P, P)."""
    return (-(distance / width).square()).exp().sum(1)


def dispersed(distance: Tensor, density: Tensor, cutoff: float) -> Tensor:
    """The points that, densest first, are farther than ``cutoff`` from all chosen before.

    Every other point lies within ``cutoff`` of a chosen one.  Found in rounds over all points, of
    which there are few: whoever is denser than all undecided points nearby is chosen, and decides
    them.  That gives what a walk from point to point gives (the centres of DBDPC, arXiv 2504.08966,
    algorithm 2; the earlier of equally dense points counts as denser).

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

    Found by halving [``least``, largest distance] 16 times.  The host waits for the device once,
    at the end, to learn whether `ROUNDS` were enough.

    Args:
        distance, density: As in `dispersed`.
        count: At least 1.
        least: Where to begin.

    Returns:
        The cutoff, () on the device, and on the CPU what `dispersed` gives for it.
    """
    rounds, denser = ROUNDS, _denser(density)
    while True:
        low = torch.full((), least, dtype=torch.float64, device=distance.device)
        high = distance.max().double().clamp(min=least)
        first, undecided = _rounds(distance, denser, low, rounds)
        found, more = _rounds(distance, denser, high, rounds)
        fits, undecided = first.sum() <= count, undecided | more
        high, found = torch.where(fits, low, high), torch.where(fits, first, found)
        for _ in range(16):
            middle = (low + high) / 2
            tried, more = _rounds(distance, denser, middle, rounds)
            few, undecided = tried.sum() <= count, undecided | more
            low, high = torch.where(few, low, middle), torch.where(few, middle, high)
            found = torch.where(few, tried, found)
        found, undecided = torch.stack([found, undecided]).cpu()
        if not undecided.any():
            return high, found
        rounds *= 2


def _denser(density: Tensor) -> Tensor:
    """(P, P) bool, whether ``j`` is denser than ``i``; of equally dense points the earlier one."""
    place = torch.arange(len(density), device=density.device)
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(place).scatter_(0, order, place)
    return rank[None] < rank[:, None]


def _any(mask: Tensor) -> Tensor:
    """(P,) ``mask.any(1)`` of (P, Q), which on a CPU takes many times as long."""
    return mask.view(torch.uint8).amax(1).bool()


def _rounds(
    distance: Tensor, denser: Tensor, cutoff: Tensor | float, rounds: int
) -> tuple[Tensor, Tensor]:
    """(P,) bool each: what `dispersed` has chosen after some rounds, and what is undecided."""
    near = (distance <= cutoff).fill_diagonal_(False)
    before = near & denser
    chosen = torch.zeros_like(near[0])
    free = ~chosen
    for _ in range(rounds):
        if free.device.type == "cpu" and not free.any():  # on a GPU this would be a wait
            break
        new = free & ~_any(before & free)
        chosen |= new
        free &= ~new & ~_any(near & new)
    return chosen, free


def segments(gain: Tensor) -> list[tuple[int, int]]:
    """The cut of a sequence of F into runs whose gains sum to the most (dynamic programming).

    Args:
        gain: (F, F), of the run from ``s`` to ``e`` inclusive at ``[s, e]``; 0 of a single entry.

    Returns:
        First and last entry of every run, in order.  Of equally good ones the shortest last run.
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


def density_peaks(
    vectors: Tensor, count: int, neighbours: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cluster around points that are dense and far from denser ones.

    With ``d`` the Euclidean distance over the root of the dimension, the density of a point is
    ``exp(-mean d²)`` over its ``count`` nearest, itself included; its score is the density times
    the distance to the nearest denser point (the largest distance of all where there is none).  The
    ``count`` best are centres, every other point joins the nearest (density peaks with k nearest
    neighbours, as in SparseVLM's ``cluster_and_merge``, where noise breaks ties; here the earlier
    of equally dense points counts as denser).

    Args:
        vectors: (P, D); compared in float32.
        count: Number of clusters, in [1, P].
        neighbours: How many nearest points make the density instead, at most ``count``.

    Returns:
        (count,) indices of the centres, best first, and (P,) cluster of every point.
    """
    points = vectors.float()
    distance = torch.cdist(points, points) / points.shape[1] ** 0.5
    distance = torch.maximum(distance, distance.T).fill_diagonal_(0)  # rounding is not symmetric
    nearest = count if neighbours is None else min(neighbours, count)
    density = (-distance.topk(nearest, largest=False).values.square().mean(-1)).exp()
    rank = torch.empty_like(density, dtype=torch.long)
    place = torch.arange(len(points), device=points.device)
    rank[density.argsort(descending=True, stable=True)] = place
    denser = rank[None] < rank[:, None]
    far = torch.where(rank == 0, distance.max(), torch.inf)
    score = density * torch.minimum(distance.masked_fill(~denser, torch.inf).amin(1), far)
    centres = score.argsort(descending=True, stable=True)[:count]
    cluster = distance[:, centres].argmin(1)
    cluster[centres] = place[:count]
    return centres, cluster


class Matching(NamedTuple):
    """Which of ``n`` entries merge, for each of ``V`` sequences, and where everything goes.

    Attributes:
        unmerged: (V, a - r) entries of even index that stay alone, halved, in output order.
        source: (V, r) entries of even index that merge away, halved, the most alike first.
        target: (V, r) the entry of odd index that receives each, halved.
        group: (V, n) place of every entry in the output of n - r.
    """

    unmerged: Tensor
    source: Tensor
    target: Tensor
    group: Tensor

    @property
    def left(self) -> int:
        """Entries of the output."""
        return self.group.shape[1] - self.source.shape[1]


def bipartite_matching(
    vectors: Tensor, count: int, *, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Pair the entries of even index with their likes of odd index, and merge the best pairs.

    Every entry of even index finds the one of odd index with the largest cosine; the ``count``
    with the largest cosines merge into what they found, several into one if it so happens.  A class
    token (entry 0) never merges, a distillation token (entry 1) never receives.

    The output has the unmerged entries of even index, the most alike first (in their own order
    where there is a class token), then all of odd index; the first of both lead where there is a
    distillation token (ToMe, arXiv 2210.09461, section 3; official ``tome/merge.py``).

    Args:
        vectors: (V, n, d); compared in float32.
        count: How many merge; at most half of the entries that are not protected do.
        class_token: Whether entry 0 is one.
        distill_token: Whether entry 1 is one.
    """
    views, entries, _ = vectors.shape
    count = max(0, min(count, (entries - class_token - distill_token) // 2))
    unit = F.normalize(vectors.float(), dim=-1)
    alike = unit[:, ::2] @ unit[:, 1::2].mT
    if class_token:
        alike[:, 0] = -torch.inf
    if distill_token:
        alike[:, :, :1] = -torch.inf
    even, odd = alike.shape[1:]
    best, partner = alike.max(-1) if odd else (alike.new_zeros(views, even), None)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source, unmerged = order[:, :count], order[:, count:]
    if class_token:
        unmerged = unmerged.sort(dim=-1).values
    place = torch.arange(entries, device=vectors.device)
    if not count or partner is None:  # nothing moves either
        return Matching(unmerged, source, source, place.expand(views, -1))
    target = partner.gather(1, source)
    alone = even - count
    first, second = place[:alone].clone(), place[alone : alone + odd].clone()
    if distill_token:
        first[1:] += 1
        second[0] = min(alone, 1)
    group = place.repeat(views, 1)
    group[:, 1::2] = second
    group[:, ::2] = (
        torch.empty_like(order)
        .scatter_(1, unmerged, first.expand(views, -1))
        .scatter_(1, source, second[target])
    )
    return Matching(unmerged, source, target, group)


def merge_weighted(
    vectors: Tensor, size: Tensor, group: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Average the entries of each group, weighted by their sizes, which add up.

    Args:
        vectors: (V, n, C); averaged in float32.
        size: (V, n) how much each entry counts.
        group: (V, n) where it goes, in [0, count); -1 drops it.
        count: How many groups; none of them empty.

    Returns:
        (V, count, C) in the dtype of ``vectors``, and (V, count) sizes.
    """
    slot = torch.where(group < 0, count, group)  # what is dropped meets in one more slot
    total = size.new_zeros(len(size), count + 1).scatter_add(1, slot, size)
    weighted = vectors.float() * size[..., None]
    sums = weighted.new_zeros(len(size), count + 1, vectors.shape[-1])
    sums = sums.scatter_add(1, slot[..., None].expand_as(weighted), weighted)
    merged = sums[:, :count] / total[:, :count, None]
    return merged.to(vectors.dtype), total[:, :count]


def spread(vectors: Tensor, group: Tensor) -> Tensor:
    """(V, n, ...) every entry's group's row of ``vectors`` (V, m, ...), zeros where it is -1."""
    index = group.to(vectors.device).reshape(*group.shape, *[1] * (vectors.ndim - 2))
    rows = vectors.gather(1, index.clamp(min=0).expand(*group.shape, *vectors.shape[2:]))
    return rows.masked_fill(index < 0, 0)


def summary_distance(layout: TokenLayout, features: Tensor) -> Tensor:
    """How far each token of a video is from the summary of all frames at its place.

    The temporal summary is the mean of the unit-length features of all frames at one place; the
    distance is one minus the cosine to it.  What stands still is near the summary, what appears or
    moves is far from it.  Two frames are equally far from their summary, everywhere.

    Args:
        layout: Geometry of the N entries.
        features: (N, D).

    Returns:
        (N,) float32 in [0, 2], NaN at separators.
    """
    patches = layout.patches
    place = layout.row[patches] * layout.view_shape[1] + layout.col[patches]
    places = layout.view_shape[0] * layout.view_shape[1]
    unit = F.normalize(features[patches].float(), dim=-1)
    summary = F.normalize(group_sums(unit, place, places), dim=-1)
    far = torch.threshold_(1 - (unit * summary[place]).sum(-1), ROUNDING, 0.0)
    if layout.frames == 2:  # equal but for rounding, which must not rank
        far = (group_sums(far, place, places) / tally(place, places))[place]
    distance = unit.new_full((len(layout),), torch.nan)
    distance[patches] = far
    return distance


def normalise(
    scores: Tensor, view: Tensor, views: int, how: Literal["l2", "minmax", "none"] = "l2"
) -> Tensor:
    """Bring the scores of every view to a common scale.

    Args:
        scores: (P,).
        view: (P,) view of each entry.
        views: Number of views.
        how: ``l2`` divides by the view's Euclidean norm (at least 1e-12), ``minmax`` maps the
            view to [0, 1], ``none`` changes nothing.
    """
    if how == "none":
        return scores
    if how == "l2":
        squares = group_sums(scores.square(), view, views)
        return scores / squares.sqrt().clamp(min=1e-12)[view]
    low = scores.new_full((views,), torch.inf).scatter_reduce(0, view, scores, "amin")
    high = scores.new_full((views,), -torch.inf).scatter_reduce(0, view, scores, "amax")
    return (scores - low[view]) / (high - low).clamp(min=1e-12)[view]
