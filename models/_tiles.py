"""Finds which views belong to which image, and how the crops of an image are arranged."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokenprune.errors import UserError

__all__ = ["grids", "views_by_image"]

_DETAIL = 4  # rows and columns of the coarse picture of a crop


def views_by_image(
    placeholders: Tensor | None, size: int, views: int, frames: Sequence[int] | None
) -> list[int]:
    """Number of views of every image and video, from the runs of placeholders in the prompts.

    Args:
        placeholders: (B, S) bool, on the CPU.
        size: Number of visual tokens of a view.
        views: Number of all views.
        frames: For every image and video its number of frames, 0 for an image; None if there are
            only images.  Each frame of a video is a run.

    Raises:
        UserError: The prompts are not known, or do not match the views or frames.
    """
    if placeholders is None:
        raise UserError(
            "the views of an image are found by the prompt, but no prompt came with these pixels; "
            "call model.generate(input_ids=...) or model(input_ids=...), or encode with "
            "pipe.encode."
        )
    edges = F.pad(placeholders.int(), (1, 1)).diff(dim=1)
    runs = ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()
    if sum(runs) != size * views or any(run % size for run in runs):
        raise UserError(
            f"the prompts have runs of {runs} image placeholders for {views} views of {size} "
            "tokens each; prepare images and prompts together."
        )
    counts = [run // size for run in runs]
    if frames is None:
        return counts
    left = iter(counts)
    joined = [sum(islice(left, number or 1)) for number in frames]
    wrong = [one for one, number in zip(joined, frames, strict=True) if one != (number or one)]
    if wrong or sum(joined) != views or 0 in joined:
        raise UserError(
            f"the runs of placeholders in the prompts stand for {counts} views, which do not match "
            f"images and videos of {[*frames]} frames (0 for an image); prepare images, videos and "
            "prompts together."
        )
    return joined


def grids(images: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """(rows, columns) of the crops of every image (views, 3, height, width), thumbnail last.

    None for an image with a single view.
    Of all grids with that number of crops, it is the one whose crops together look most like the
    thumbnail.  Among grids that look the same, as those of a blank image do, it is the squarest.
    """
    tried = [_factors(len(image) - 1) for image in images]
    apart = [
        _apart(image, grid) for image, some in zip(images, tried, strict=True) for grid in some
    ]
    left = torch.stack(apart).tolist() if apart else []
    found: list[tuple[int, int] | None] = []
    for some in tried:
        if not some:
            found.append(None)
            continue
        errors, left = left[: len(some)], left[len(some) :]
        most = 1.01 * min(errors) + 1e-6
        found.append(next(grid for grid, error in zip(some, errors, strict=True) if error <= most))
    return found


def _factors(crops: int) -> list[tuple[int, int]]:
    """All grids of ``crops`` crops, the squarest first."""
    sizes = [(rows, crops // rows) for rows in range(1, crops + 1) if crops % rows == 0]
    return sorted(sizes, key=max)


def _apart(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean square difference of the crops, joined as ``grid``, and the thumbnail."""
    rows, cols = grid
    crops = F.adaptive_avg_pool2d(image[: rows * cols].float(), _DETAIL)
    joined = rearrange(crops, "(r q) c h w -> c (r h) (q w)", r=rows)
    whole = F.adaptive_avg_pool2d(image[-1].float(), (rows * _DETAIL, cols * _DETAIL))
    return (joined - whole).square().mean()
