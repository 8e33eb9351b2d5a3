"""Views and labels of training scenes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from tokenprune.experiments.training.model import PATCH, PER_VIEW, SIDE
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import VIEW, Scene, Size

# --- scenes as tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How an image of one size is cut into views and packed into a sequence.

    `order` (N,) is the index of each packed token's patch, counted through the thumbnail and then
    the crops, or -1 for a separator; `row` (N,) counts the rows of thumbnail and crop canvas.
    """

    grid: tuple[int, int]  # crops along height and width
    padding: tuple[int, int]  # above and left of the image, in pixels
    order: Tensor
    row: Tensor

    @property
    def views(self) -> int:
        return 1 + self.grid[0] * self.grid[1]


@cache
def geometry(size: Size) -> Geometry:
    """The geometry of an image (height, width) that fits a pinpoint after symmetric padding."""
    fitting = [p for p in scenes.GRID_PINPOINTS if p[0] >= size[0] and p[1] >= size[1]]
    height, width = min(fitting, key=math.prod)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    rows, columns = height // VIEW, width // VIEW
    crops = PER_VIEW + torch.arange(rows * columns * PER_VIEW)
    canvas = rearrange(crops, "(R C r c) -> (R r) (C c)", R=rows, C=columns, r=SIDE, c=SIDE)
    canvas = canvas[top // PATCH :, left // PATCH :]
    canvas = canvas[: size[0] // PATCH, : size[1] // PATCH]
    canvas = F.pad(canvas, (0, 1), value=-1)  # the separator after each row
    row = torch.cat(
        [
            torch.arange(SIDE).repeat_interleave(SIDE),
            SIDE + torch.arange(canvas.shape[0]).repeat_interleave(canvas.shape[1]),
        ]
    )
    order = torch.cat([torch.arange(PER_VIEW), canvas.flatten()])
    return Geometry((rows, columns), (top, left), order, row)


def to_views(batch: list[Scene], geo: Geometry, device: torch.device) -> Tensor:
    """Pixels of all views of scenes of one size, as the processor makes them: (b, v, 3, 56, 56)."""
    images = rearrange(torch.from_numpy(np.stack([s.pixels for s in batch])), "b h w c -> b c h w")
    images = images.to(device)
    bicubic = InterpolationMode.BICUBIC
    thumbnails = tvf.resize(images, [VIEW, VIEW], interpolation=bicubic, antialias=True)
    (top, left), (rows, columns) = geo.padding, geo.grid
    bottom = rows * VIEW - images.shape[2] - top
    right = columns * VIEW - images.shape[3] - left
    crops = rearrange(
        F.pad(images, (left, right, top, bottom)),
        "b c (R h) (C w) -> b (R C) c h w",
        R=rows,
        C=columns,
    )
    views = torch.cat([thumbnails[:, None], crops], dim=1)
    return (views.float() / 255 - 0.5) / 0.25


# Classes of a patch: no shape or a shape (with other classes for the smaller shapes of thumbnails),
# the colour of the shape or of the background, no digit or a digit, the row, and the column.
SKILLS = {
    "shape": 1 + 2 * len(scenes.SHAPES),
    "colour": len(scenes.COLOURS) + len(scenes.TINTS),
    "digit": 11,
    "row": SIDE,
    "column": SIDE,
}


PAIRS = len(scenes.SHAPES) * len(scenes.COLOURS)


TAGS = PAIRS + len(scenes.TINTS) + 10


@dataclass(frozen=True)
class Labels:
    """True labels of views.

    Attributes:
        patches: (b, v, 49, skills) class indices.
        sure: (b, v, 49, skills) bool; false where an item covers too little of a patch.
        tags: (b, v, TAGS) 0 or 1, whether the view shows what the tag names.
        known: (b, v, TAGS) bool, whether the tag is known.
    """

    patches: Tensor
    sure: Tensor
    tags: Tensor
    known: Tensor


def overlap(centre: float, half: float, cells: int) -> NDArray[np.float64]:
    """Shares (cells,) of patches in a row that [centre - half, centre + half] covers."""
    edges = np.arange(cells) * PATCH
    low, high = np.maximum(edges, centre - half), np.minimum(edges + PATCH, centre + half)
    covered: NDArray[np.float64] = np.clip(high - low, 0, None) / PATCH
    return covered


def item_classes(batch: list[Scene], most: int) -> Tensor:
    """(b, most + 1, 3) shape, colour and digit of every item; the last row means "no item"."""
    table = torch.zeros(len(batch), most + 1, 3, dtype=torch.long)
    for i, scene in enumerate(batch):
        table[i, most, 1] = len(scenes.COLOURS) + list(scenes.TINTS).index(scene.tint)
        for j, item in enumerate(scene.items):
            table[i, j, 0] = 1 + scenes.SHAPES.index(item.shape)
            table[i, j, 1] = list(scenes.COLOURS).index(item.colour)
            table[i, j, 2] = 1 + item.digit
    return table


def to_labels(batch: list[Scene], geo: Geometry, device: torch.device) -> Labels:
    """True labels of the views of scenes of one size."""
    (top, left), (rows, columns) = geo.padding, geo.grid
    height, width = batch[0].size
    most = max(len(scene.items) for scene in batch)
    b, v = len(batch), geo.views

    def cut(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "... (R r) (C c) -> ... (R C) (r c)", R=rows, C=columns, r=SIDE)

    # The share of each patch that each item, and its digit, covers: (b, items, v, 49).
    owner = torch.from_numpy(np.stack([scene.owner for scene in batch]))
    masks = (owner[:, None] == torch.arange(most)[:, None, None]).float()
    padded = F.pad(masks, (left, columns * VIEW - width - left, top, rows * VIEW - height - top))
    thumbnail = F.adaptive_avg_pool2d(masks, SIDE).flatten(2)[:, :, None]
    cover = torch.cat([thumbnail, cut(F.avg_pool2d(padded, PATCH))], dim=2)
    ink = torch.zeros(b, most, rows * SIDE, columns * SIDE)
    for i, scene in enumerate(batch):
        for j, item in enumerate(scene.items):
            ink[i, j] = torch.from_numpy(
                overlap(item.y + top, 5, rows * SIDE)[:, None]
                * overlap(item.x + left, 5, columns * SIDE)
            ).float()
    inked = torch.cat([torch.zeros_like(thumbnail), cut(ink)], dim=2)

    covered, which = cover.max(dim=1)
    which = which.where(covered >= 0.25, torch.tensor(most))
    written, writer = inked.max(dim=1)
    writer = writer.where(written >= 0.25, torch.tensor(most))

    table = item_classes(batch, most)

    def look_up(index: Tensor, column: int) -> Tensor:
        return table[:, :, column].gather(1, index.flatten(1)).view_as(index)

    shape, colour, digit = look_up(which, 0), look_up(which, 1), look_up(writer, 2)
    shape[:, 0] += len(scenes.SHAPES) * (shape[:, 0] > 0)
    place = torch.arange(PER_VIEW).expand_as(shape)
    patches = torch.stack([shape, colour, digit, place // SIDE, place % SIDE], dim=-1)

    clear = (covered < 0.06) | (covered >= 0.25)
    legible = (written < 0.1) | (written >= 0.25)
    legible[:, 0] = False  # half as large, digits of the thumbnail are not legible
    sure = torch.stack([clear, clear, legible, clear | True, clear | True], dim=-1)

    tags = torch.zeros(b, v, TAGS)
    known = torch.ones(b, v, TAGS, dtype=torch.bool)
    known[:, 0, -10:] = False
    for i, scene in enumerate(batch):
        tags[i, :, PAIRS + list(scenes.TINTS).index(scene.tint)] = 1
        for j, item in enumerate(scene.items):
            pair = scenes.SHAPES.index(item.shape) * len(scenes.COLOURS)
            pair += list(scenes.COLOURS).index(item.colour)
            tags[i, :, pair] = (which[i] == j).any(-1).float()
            tags[i, :, item.digit - 10] += (writer[i] == j).any(-1).float()
    tags = tags.clamp(max=1)
    return Labels(*(x.to(device) for x in (patches, sure, tags, known)))


def scene_batches(
    count: int, seed: int, *, items: tuple[int, int] = (1, 4), alike: float = 0.0
) -> Iterator[tuple[list[Scene], np.random.Generator]]:
    """Endless batches of `count` scenes of one size, each with the generator that draws them.

    A share of `alike` scenes has few colours and shapes (see `scenes.render`).
    """
    rng = np.random.default_rng(seed)
    sizes, shares = list(scenes.SIZES), list(scenes.SIZES.values())
    while True:
        size = sizes[rng.choice(len(sizes), p=shares)]
        yield (
            [
                scenes.render(rng, size=size, items=items, alike=alike > 0 and rng.random() < alike)
                for _ in range(count)
            ],
            rng,
        )
