"""Compressors that keep or drop whole views, for experiments about views.

They are not compression methods: the number of kept tokens follows from the image, not from R.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.compressor import Compressor, Selection, Separators
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.run_folder import IMAGE_FREE, THUMBNAIL_ONLY
from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops.spatial import regions
from tokenprune.tokens import VisualTokens

__all__ = [
    "CROPS_ONLY",
    "KeepViews",
    "references",
    "region_sizes",
]


CROPS_ONLY = "crops-only"


@dataclass(frozen=True, kw_only=True)
class KeepViews(Compressor):
    """Keep the thumbnail or the crops of every image that has both; other images stay whole.

    Args:
        views: The views to keep.
        separators: Those of kept canvas rows.
        retention: Has no effect.
    """

    views: Literal["thumbnail", "crops"]
    retention: float = 0.5
    separators: Separators = "rows"

    name = "views"

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)  # independent of R

    def select(self, tokens: VisualTokens) -> Selection:
        layout = tokens.layout
        crops = layout.kind == Kind.CROP
        if not crops.any():
            return Selection(layout.patches)
        wanted = crops if self.views == "crops" else layout.kind == Kind.THUMBNAIL
        return Selection(wanted.nonzero().squeeze(1))


def region_sizes(layout: TokenLayout) -> Tensor:
    """(n,) int64 on the CPU, the number of thumbnail patches in each crop's region."""
    rows, cols = layout.grid
    return torch.bincount(regions(layout.view_shape, layout.grid).flatten(), minlength=rows * cols)


def references(modalities: set[str]) -> list[Cell]:
    """The references of every comparison: the model without images, or with the thumbnail alone.

    Args:
        modalities: Modalities of the questions; only single images have a thumbnail and crops.
    """
    image_free = Cell(name=IMAGE_FREE, without_images=True)
    low = Cell(KeepViews(views="thumbnail"), name=THUMBNAIL_ONLY)
    return [image_free, low] if "image" in modalities else [image_free]
