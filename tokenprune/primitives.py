"""Shared maths of the strategies: small, vectorised, without a view of any model."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.tokens import Kind, TokenLayout

__all__ = [
    "cover",
    "density_peaks",
    "evenly_spaced",
    "max_min_diversity",
    "normalise",
    "patches_by_plane",
    "patches_by_view",
    "project_thumbnail",
    "region_sums",
    "summary_distance",
    "top_per_view",
]


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
        (M,) sorted indices into the N entries.
    """
    patches = layout.patches
    order = scores[patches].float().argsort(descending=True, stable=True)
    ranked = patches[order]
    view = layout.view[ranked]
    kept = _rank_in_group(view) < counts.to(view.device)[view]
    if counts.device.type != "cpu":
        return ranked[kept].sort().values
    # How many are kept is known here, so that nobody waits for the device to count them.
    total = sum(map(min, counts.tolist(), layout.view_sizes))
    return ranked[kept.int().argsort(descending=True, stable=True)[:total]].sort().values


def patches_by_view(layout: TokenLayout) -> list[Tensor]:
    """Of every view the indices of its patch tokens, row by row; empty where none is left."""
    patches = layout.patches
    ordered = patches[layout.view[patches].argsort(stable=True)]
    return list(ordered.split(list(layout.view_sizes)))


def patches_by_plane(layout: TokenLayout) -> list[Tensor]:
    """Of every plane that is not empty the indices of its patch tokens, in sequence order.

    The thumbnail is a plane, the crops together are one (their canvas), and so is every frame.
    """
    crop = (layout.kind == Kind.CROP)[layout.patches]
    plane = layout.view[layout.patches].masked_fill(crop, 1)
    sizes = torch.bincount(plane).tolist()
    ordered = layout.patches[plane.argsort(stable=True)]
    return [part for part in ordered.split(sizes) if len(part)]


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
        (M,) sorted indices into the N entries.
    """
    sizes = torch.tensor(layout.view_sizes)
    counts = counts.to(sizes.device)
    view = torch.arange(len(sizes)).repeat_interleave(counts)
    slot = (2 * _rank_in_group(view) + 1) * sizes[view] // (2 * counts[view])
    # A view's patches need not be neighbours in the sequence: crops share canvas rows.
    order = layout.patches[layout.view[layout.patches].argsort(stable=True)]
    first = sizes.cumsum(0) - sizes
    return order[(first[view] + slot).to(order.device)].sort().values


def region_sums(scores: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sum of a thumbnail's scores over the region each crop covers, crops in row-major order.

    Cells are ``side // n`` wide; the last row and column of cells take what is left over
    (official GlobalCom² code, ``generate_scale_for_crop_features``).

    Args:
        scores: (H, W).
        grid: (rows, columns) of crops.

    Returns:
        (rows * columns,) in the dtype of ``scores``.
    """
    cell = [
        (torch.arange(side, device=scores.device) // max(side // cells, 1)).clamp(max=cells - 1)
        for side, cells in zip(scores.shape, grid, strict=True)
    ]
    region = cell[0][:, None] * grid[1] + cell[1][None, :]
    sums = scores.new_zeros(grid[0] * grid[1])
    return sums.index_add_(0, region.flatten(), scores.flatten())


def project_thumbnail(layout: TokenLayout, scores: Tensor) -> Tensor:
    """The thumbnail's scores where each crop token lies (bilinear, ``align_corners=False``).

    The thumbnail is the whole image stretched to one view, so it maps onto the unpadded canvas.

    Args:
        layout: Geometry of the N entries.
        scores: (N,) per-entry scores.

    Returns:
        (N,) NaN outside the crops.
    """
    thumbnail = rearrange(
        scores[layout.places[Kind.THUMBNAIL]],
        "(h w) -> 1 1 h w",
        h=layout.view_shape[0],
        w=layout.view_shape[1],
    )
    canvas = F.interpolate(thumbnail, layout.canvas_shape, mode="bilinear", align_corners=False)
    crop = layout.kind == Kind.CROP
    values = canvas[0, 0, layout.canvas_row.clamp(min=0), layout.canvas_col.clamp(min=0)]
    return torch.where(crop, values, torch.nan)


def max_min_diversity(features: Tensor, count: int) -> Tensor:
    """A subset whose smallest pairwise cosine distance is large, chosen greedily.

    First the row whose nearest other row is farthest, then again and again the row that is farthest
    from all chosen ones.  Ties go to the earlier row (DivPrune, arXiv 2503.02175, algorithm 1).

    Args:
        features: (P, D); compared in float32.
        count: How many of the P rows, at most P.

    Returns:
        (count,) sorted indices.
    """
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    if count < 1:
        return chosen
    unit = F.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.T
    closest = distance.clone().fill_diagonal_(torch.inf).amin(0)
    for step in range(count):
        # As a vector of one: a number as an index would make the host wait for it.
        index = closest.argmax(0, keepdim=True)
        chosen[step : step + 1] = index
        row = distance.index_select(0, index).squeeze(0)
        closest = row if step == 0 else torch.minimum(closest, row)
        closest.index_fill_(0, index, -torch.inf)
    return chosen.sort().values


def density_peaks(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
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

    Returns:
        (count,) indices of the centres, best first, and (P,) cluster of every point.
    """
    points = vectors.float()
    distance = torch.cdist(points, points) / points.shape[1] ** 0.5
    distance = torch.maximum(distance, distance.T).fill_diagonal_(0)  # rounding is not symmetric
    density = (-distance.topk(count, largest=False).values.square().mean(-1)).exp()
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


def summary_distance(layout: TokenLayout, features: Tensor) -> Tensor:
    """How far each token of a video is from the summary of all frames at its place.

    The temporal summary is the mean of the unit-length features of all frames at one place; the
    distance is one minus the cosine to it.  What stands still is near the summary, what appears or
    moves is far from it.

    Args:
        layout: Geometry of the N entries.
        features: (N, D).

    Returns:
        (N,) float32 in [0, 2], NaN at separators.
    """
    patches = layout.patches
    place = layout.row[patches] * layout.view_shape[1] + layout.col[patches]
    unit = F.normalize(features[patches].float(), dim=-1)
    summary = unit.new_zeros(layout.view_shape[0] * layout.view_shape[1], unit.shape[1])
    summary = F.normalize(summary.index_add_(0, place, unit), dim=-1)
    distance = unit.new_full((len(layout),), torch.nan)
    distance[patches] = 1 - (unit * summary[place]).sum(-1)
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
        squares = scores.new_zeros(views).index_add_(0, view, scores.square())
        return scores / squares.sqrt().clamp(min=1e-12)[view]
    low = scores.new_full((views,), torch.inf).scatter_reduce(0, view, scores, "amin")
    high = scores.new_full((views,), -torch.inf).scatter_reduce(0, view, scores, "amax")
    return (scores - low[view]) / (high - low).clamp(min=1e-12)[view]
