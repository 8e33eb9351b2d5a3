"""Operations on the locations of patches in views and on the canvas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.layout import Kind, TokenLayout, moved
from tokenprune.ops.merging import group_sums, tally
from tokenprune.ops.ranking import ROUNDING, top_per_view
from tokenprune.ops.similarity import parts

__all__ = [
    "dithered",
    "divided",
    "evenly_spaced",
    "nearest_places",
    "patch_table",
    "patches_by_plane",
    "patches_by_view",
    "pooled",
    "project_thumbnail",
    "region_sums",
    "regions",
    "summary_distance",
    "thumbnail_map",
]


def patches_by_view(layout: TokenLayout) -> list[Tensor]:
    """For every view, the indices of its patch tokens, row by row; may be empty."""
    patches = layout.patches
    ordered = patches[layout.view[patches].argsort(stable=True)]
    return list(ordered.split(list(layout.view_sizes)))


def patch_table(layout: TokenLayout) -> Tensor:
    """(V, P) index of the patch token at each location of every view, -1 if it was dropped."""
    rows, cols = layout.view_shape
    table = layout.kind.new_full((layout.views, rows * cols), -1)
    patches = layout.patches
    table[layout.view[patches], layout.row[patches] * cols + layout.col[patches]] = patches
    return table


def patches_by_plane(layout: TokenLayout) -> list[Tensor]:
    """For every non-empty plane, the indices of its patch tokens, in sequence order.

    The planes are the thumbnail, the canvas of all crops, and each frame.
    """
    host = layout.host
    crop = (host.kind == Kind.CROP)[host.patches]
    plane = host.view[host.patches].masked_fill(crop, 1)
    sizes = torch.bincount(plane).tolist()
    ordered = moved(host.patches[plane.argsort(stable=True)], layout.kind.device)
    return [part for part in ordered.split(sizes) if len(part)]


def evenly_spaced(layout: TokenLayout, counts: Tensor) -> Tensor:
    """``counts[v]`` evenly spaced patch tokens of every view, in the middle of equal intervals.

    If ``T`` of ``n`` tokens are kept, their indices are ``floor((i + 0.5) * n / T)``, ``i < T``.

    Returns:
        (M,) sorted indices into the N entries, on the CPU.
    """
    # NumPy takes a fraction of the time of PyTorch on short vectors.
    many, sizes = counts.cpu().numpy(), np.array(layout.view_sizes)
    view = np.repeat(np.arange(len(sizes)), many)
    rank = np.arange(len(view)) - (many.cumsum() - many)[view]
    slot = (2 * rank + 1) * sizes[view] // (2 * many[view])
    # Patches of one view are not always adjacent in the sequence: crops share canvas rows.
    patches = layout.host.patches.numpy()
    order = patches[layout.host.view.numpy()[patches].argsort(kind="stable")]
    return torch.from_numpy(np.sort(order[(sizes.cumsum() - sizes)[view] + slot]))


def dithered(layout: TokenLayout, counts: Tensor) -> Tensor:
    """``counts[v]`` patch tokens of every view, spread evenly over its rows *and* columns.

    The tokens of a view are taken in the order of a dispersed-dot dither (Bayer 1973), in which
    every token is far from all earlier ones.  The rank of ``(row, col)`` interleaves the bits of
    ``row xor col`` and ``row``, in reverse order.

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
    """Sum of a thumbnail's scores over the region that each crop covers, in row-major order.

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

    A patch that an earlier stage dropped gets the score of the nearest kept patch; ties go to the
    earlier one.

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
    nearest = nearest_places(index // cols, index % cols, layout.row[there], layout.col[there])
    return values[nearest].view(rows, cols)


def nearest_places(row: Tensor, col: Tensor, other_row: Tensor, other_col: Tensor) -> Tensor:
    """(P,) index of the nearest of other locations (Q,) to each location (P,), all int64.

    Ties go to the earlier one.
    """
    order, found = torch.arange(len(other_row), device=row.device), []
    for part in parts(len(row), len(other_row)):
        away = (row[part, None] - other_row).square() + (col[part, None] - other_col).square()
        found.append((away * len(order) + order).argmin(1))
    return torch.cat(found)


def regions(shape: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The crop that covers each token of a thumbnail, crops in row-major order.

    Cells are ``side // n`` wide; the last row and column of cells include the remainder (official
    GlobalCom² code, ``generate_scale_for_crop_features``).

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


def divided(layout: TokenLayout, side: int) -> TokenLayout:
    """The layout of an image of its own size, with regions as views.

    Args:
        layout: Geometry of the N entries, without crops.
        side: About how many rows and columns a region has; the number of regions is rounded.
    """
    host = layout.host
    rows, cols = (max(1, round(length / side)) for length in host.view_shape)
    region = regions(host.view_shape, (rows, cols))
    view = region[host.row.clamp(min=0), host.col.clamp(min=0)]
    made = replace(host, view=torch.where(host.is_separator, -1, view))
    made.__dict__.update(frames=rows * cols, modality="image")
    return made.to(layout.kind.device)


def pooled(layout: TokenLayout, scores: Tensor, side: int = 2) -> Tensor:
    """The mean score of the square of ``side`` x ``side`` tokens around each token.

    Args:
        layout: Geometry of the N entries, without crops.
        scores: (N,) per-entry scores.
        side: Side of the squares, which begin at the first row and column.

    Returns:
        (N,) NaN at separators.
    """
    patches, wide = layout.patches, -(-layout.view_shape[1] // side)
    square = layout.row[patches] // side * wide + layout.col[patches] // side
    squares = -(-layout.view_shape[0] // side) * wide
    sums = group_sums(scores[patches], square, squares)
    found = scores.new_full((len(layout),), torch.nan)
    found[patches] = (sums / tally(square, squares).clamp(min=1))[square]
    return found


def project_thumbnail(layout: TokenLayout, scores: Tensor) -> Tensor:
    """The thumbnail's scores at the location of each crop token, bilinearly interpolated.

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


def summary_distance(layout: TokenLayout, features: Tensor) -> Tensor:
    """Distance of each token of a video from the summary of all frames at its location.

    The temporal summary is the mean of the unit-length features of all frames at one location.  The
    distance is one minus the cosine to it: small for static content, large for content that appears
    or moves.  Two frames have equal distances from their summary.

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
    if layout.frames == 2:  # the distances differ only by rounding, which must not rank
        far = (group_sums(far, place, places) / tally(place, places))[place]
    distance = unit.new_full((len(layout),), torch.nan)
    distance[patches] = far
    return distance
