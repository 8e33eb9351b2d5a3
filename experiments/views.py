"""Whole views kept or dropped: what is shown to the model when an experiment asks about views.

These are no methods of compression: how many tokens stay follows from the picture, not from R.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenprune.budget import SALIENCY, ThumbnailCommand
from tokenprune.compressor import Compressor, Selection, Separators
from tokenprune.errors import UserError
from tokenprune.experiments.data import Picture
from tokenprune.experiments.results import IMAGE_FREE, THUMBNAIL_ONLY, Cell
from tokenprune.primitives import regions
from tokenprune.tokens import Kind, Signal, TokenLayout, VisualTokens

if TYPE_CHECKING:
    from tokenprune.experiments.compare import Setting

__all__ = [
    "CROPS_ONLY",
    "DropCrop",
    "KeepViews",
    "crop_of",
    "references",
    "region_sizes",
    "with_crops",
]

CROPS_ONLY = "crops-only"


@dataclass(frozen=True, kw_only=True)
class KeepViews(Compressor):
    """Keep the thumbnail or the crops of every image that has both; other images stay whole.

    Args:
        views: What to keep.
        separators: Those of the canvas rows that are kept.
        retention: Of no meaning here.
    """

    views: Literal["thumbnail", "crops"]
    retention: float = 0.5
    separators: Separators = "rows"

    name = "views"

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)  # R has no say

    def select(self, tokens: VisualTokens) -> Selection:
        layout = tokens.layout
        crops = layout.kind == Kind.CROP
        if not crops.any():
            return Selection(layout.patches)
        wanted = crops if self.views == "crops" else layout.kind == Kind.THUMBNAIL
        return Selection(wanted.nonzero().squeeze(1))


@dataclass(frozen=True, kw_only=True)
class DropCrop(Compressor):
    """Drop one crop: that of the highest or of the lowest score, or any.

    A crop's score is the mean of the thumbnail's scores over its region.  GlobalCom² takes their
    sum (`ThumbnailCommand`, arXiv 2501.05179), which ranks alike where all regions are of one size
    and otherwise prefers large ones.  Images of fewer than two crops stay whole.

    Args:
        which: The crop to drop.
        signal: The thumbnail's scores.
        seed: Of the random crop; together with the image it draws one.
        separators: Those of the canvas rows of which something is kept.
        retention: Of no meaning here.
    """

    which: Literal["highest", "lowest", "random"]
    signal: Signal = SALIENCY
    seed: int = 0
    retention: float = 0.5
    separators: Separators = "rows"

    name = "drop-crop"

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)  # R has no say

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(n,) float64 score of each crop."""
        sums = ThumbnailCommand(signal=self.signal).richness(tokens)
        return sums / region_sizes(tokens.layout).clamp(min=1).to(sums)

    def crop(self, tokens: VisualTokens) -> int | None:
        """Which crop is dropped, counted from 0; None where there are fewer than two."""
        count = tokens.layout.grid[0] * tokens.layout.grid[1]
        if count < 2:
            return None
        if self.which == "random":
            generator = torch.Generator("cpu").manual_seed(hash((self.seed, tokens.seed)) % 2**63)
            return int(torch.randint(count, (), generator=generator, device="cpu"))
        scores = self.scores(tokens)
        return int(scores.argmax() if self.which == "highest" else scores.argmin())

    def select(self, tokens: VisualTokens) -> Selection:
        patches, crop = tokens.layout.patches, self.crop(tokens)
        if crop is None:
            return Selection(patches)
        return Selection(patches[tokens.layout.view[patches] != 1 + crop])


def region_sizes(layout: TokenLayout) -> Tensor:
    """(n,) int64, on the CPU: how many of the thumbnail's patches each crop's region has."""
    rows, cols = layout.grid
    return torch.bincount(regions(layout.view_shape, layout.grid).flatten(), minlength=rows * cols)


def references(modalities: set[str]) -> list[Cell]:
    """What every comparison stands beside: the model that sees nothing, or the thumbnail alone.

    Args:
        modalities: Of the questions; only single images are cut into a thumbnail and crops.
    """
    blind = Cell(name=IMAGE_FREE, blind=True)
    low = Cell(KeepViews(views="thumbnail"), name=THUMBNAIL_ONLY)
    return [blind, low] if "image" in modalities else [blind]


def with_crops(setting: "Setting", least: int = 1) -> "tuple[Setting, int]":
    """The same with only those questions whose image is cut into ``least`` crops or more.

    Returns:
        The setting, and how many questions were left out.

    Raises:
        UserError: None is left.
    """

    @cache
    def crops(picture: Picture) -> int:
        width, height = picture.open().size
        rows, cols = setting.adapter.layout((height, width)).grid
        return rows * cols

    left = [
        item
        for item in setting.questions
        if item.modality == "image" and crops(item.images[0]) >= least
    ]
    if not left:
        raise UserError(
            f"{setting.adapter.name} cuts none of the images into {least} or more crops; give "
            "larger single images, or a model that cuts images into crops."
        )
    return replace(setting, questions=left), len(setting.questions) - len(left)


def crop_of(layout: TokenLayout, place: tuple[float, float]) -> int | None:
    """The crop that a place of the image lies in, counted from 0; None where there are no crops.

    Args:
        layout: Of the image's packed sequence.
        place: (x, y) as shares of the image's width and height, in [0, 1).
    """
    rows, cols = layout.canvas_shape
    if not rows or not cols:
        return None
    row, col = min(int(place[1] * rows), rows - 1), min(int(place[0] * cols), cols - 1)
    there = (layout.canvas_row == row) & (layout.canvas_col == col)
    return int(layout.view[there.nonzero()[0, 0]]) - 1
