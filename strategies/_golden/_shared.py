"""Functions that several replays use: views with their canvas padding, as in official code."""

from typing import Any

import torch
from torch import Tensor

from tokenprune.layout import TokenLayout


def padded(maps: Tensor, params: dict[str, Any]) -> TokenLayout:
    """Views with all their canvas padding and without separators, as in some official code."""
    side = int(params["patches"] ** 0.5)
    if len(maps) == 1:
        return TokenLayout.single((side, side), newline=False)
    grid = params.get("num_patch_height", 0), params.get("num_patch_width", 0)
    if len(maps) != 1 + grid[0] * grid[1]:  # views without a thumbnail
        return TokenLayout.video(len(maps), (side, side))
    box = (0, grid[0] * side, 0, grid[1] * side)
    return TokenLayout.anyres(grid, (side, side), box, newlines=False)


def places(layout: TokenLayout) -> Tensor:
    """(N,) index of every entry within its view."""
    return layout.row * layout.view_shape[1] + layout.col


def packed(layout: TokenLayout, maps: Tensor) -> Tensor:
    """(N, ...) values of maps (views, patches, ...), NaN at separators."""
    values = maps[layout.view, places(layout).clamp(min=0)]
    values[layout.is_separator] = torch.nan
    return values


def ranked(layout: TokenLayout, scores: Tensor, keep: Tensor) -> Tensor:
    """(M,) indices of the kept tokens within their view: view by view, largest scores first."""
    order = keep[scores[keep].argsort(descending=True, stable=True)]
    order = order[layout.view[order].argsort(stable=True)]
    return places(layout)[order]


def mask_like(like: Tensor, code: Tensor) -> Tensor:
    """A mask of the shape of ``like`` that is true at the flat indices ``code``."""
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[code] = True
    return mask.view_as(like)
