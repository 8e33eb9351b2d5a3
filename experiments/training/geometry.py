"""Views and labels of training scenes."""

import math
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


THINGS = (*scenes.SHAPES, "sign")

# Classes of a patch: nothing or a thing (with other classes for the smaller things of thumbnails),
# the colour of the object or of the background, or white; no digit or a digit; the row; the column.
SKILLS = {
    "shape": 1 + 2 * len(THINGS),
    "colour": len(scenes.COLOURS) + len(scenes.TINTS) + 1,
    "digit": 11,
    "row": SIDE,
    "column": SIDE,
}


@dataclass(frozen=True)
class Labels:
    """True labels of views.

    Attributes:
        patches: (b, v, 144, skills) class indices.
        sure: (b, v, 144, skills) bool; false where a thing covers too little of a patch.
        shown: (b, v, things) bool, whether a view shows an object, or the sign after the last one.
    """

    patches: Tensor
    sure: Tensor
    shown: Tensor


def overlap(centre: float, half: float, cells: int, side: int) -> NDArray[np.float64]:
    """Shares (cells,) of `cells` cells in a row that [centre - half, centre + half] covers."""
    edges = np.arange(cells) * side
    low, high = np.maximum(edges, centre - half), np.minimum(edges + side, centre + half)
    covered: NDArray[np.float64] = np.clip(high - low, 0, None) / side
    return covered


def thing_classes(batch: list[Scene], most: int) -> Tensor:
    """(b, most + 1, 2) thing and colour of every object and sign; the last row means "nothing"."""
    colours = list(scenes.COLOURS)
    table = torch.zeros(len(batch), most + 1, 2, dtype=torch.long)
    for i, scene in enumerate(batch):
        table[i, most, 1] = len(colours) + list(scenes.TINTS).index(scene.tint)
        for j, item in enumerate(scene.items):
            table[i, j, 0] = 1 + THINGS.index(item.shape)
            table[i, j, 1] = colours.index(item.colour)
        if scene.sign is not None:
            table[i, len(scene.items), 0] = len(THINGS)
            table[i, len(scene.items), 1] = SKILLS["colour"] - 1
    return table


def glyphs(scene: Scene) -> list[tuple[int, float, float]]:
    """Every digit of a scene and its centre (x, y) in pixels: those of objects, then the sign's."""
    found = [(item.digit, item.x, item.y) for item in scene.items]
    return found if scene.sign is None else found + scene.sign.places()


def written(
    batch: list[Scene], cells: tuple[int, int], side: int, offset: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Digit class of the cells of a canvas and the share of the cell that the digit covers.

    Args:
        batch: The scenes.
        cells: Rows and columns of the canvas.
        side: Pixels along a cell.
        offset: Pixels of the canvas above and left of the scene.

    Returns:
        Two tensors (b, rows, columns); the class is 0 where nothing is written.
    """
    digit = torch.zeros(len(batch), *cells, dtype=torch.long)
    share = torch.zeros(digit.shape)
    for i, scene in enumerate(batch):
        for value, x, y in glyphs(scene):
            down = overlap(y + offset[0], 5, cells[0], side)
            along = overlap(x + offset[1], 5, cells[1], side)
            cover = torch.from_numpy(down[:, None] * along).float()
            digit[i] = torch.where(cover > share[i], 1 + value, digit[i])
            share[i] = torch.maximum(share[i], cover)
    return digit, share


def masks_of(batch: list[Scene]) -> Tensor:
    """(b, things, height, width) 1 where a thing is; the sign comes after the last object."""
    most = max(len(scene.items) + (scene.sign is not None) for scene in batch)
    owner = torch.from_numpy(np.stack([scene.owner for scene in batch]))
    return (owner[:, None] == torch.arange(most)[:, None, None]).float()


def named(batch: list[Scene], cover: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What cells show, of the share of them that each thing covers (b, things, ...).

    Returns:
        (b, ...) each: the thing (the number of things for none), the classes of shape and colour,
        and bool, whether they are certain.
    """
    covered, which = cover.max(dim=1)
    which = which.where(covered >= 0.25, torch.tensor(cover.shape[1]))
    table = thing_classes(batch, cover.shape[1])
    shape, colour = (
        table[:, :, column].gather(1, which.flatten(1)).view_as(which) for column in (0, 1)
    )
    return which, shape, colour, (covered < 0.06) | (covered >= 0.25)


def legible(share: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a digit that covers `share` of a cell is its label, and whether that is certain."""
    return share >= 0.25, (share < 0.1) | (share >= 0.25)


def to_labels(batch: list[Scene], geo: Geometry, device: torch.device) -> Labels:
    """True labels of the views of scenes of one size."""
    (top, left), (rows, columns) = geo.padding, geo.grid
    height, width = batch[0].size

    def cut(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "... (R r) (C c) -> ... (R C) (r c)", R=rows, C=columns, r=SIDE)

    masks = masks_of(batch)
    padded = F.pad(masks, (left, columns * VIEW - width - left, top, rows * VIEW - height - top))
    thumbnail = F.adaptive_avg_pool2d(masks, SIDE).flatten(2)[:, :, None]
    cover = torch.cat([thumbnail, cut(F.avg_pool2d(padded, PATCH))], dim=2)
    which, shape, colour, clear = named(batch, cover)
    shape[:, 0] += len(THINGS) * (shape[:, 0] > 0)
    canvas = written(batch, (rows * SIDE, columns * SIDE), PATCH, geo.padding)
    inked, share = (F.pad(cut(part), (0, 0, 1, 0)) for part in canvas)
    read, sure = legible(share)
    sure[:, 0] = False  # half as large, digits of the thumbnail are not legible
    place = torch.arange(PER_VIEW).expand_as(shape)
    patches = torch.stack(
        [shape, colour, torch.where(read, inked, 0), place // SIDE, place % SIDE], dim=-1
    )
    certain = torch.stack([clear, clear, sure, clear | True, clear | True], dim=-1)
    things = torch.arange(cover.shape[1])[:, None, None]
    shown = (which[:, None] == things).any(-1).transpose(1, 2)
    return Labels(*(x.to(device) for x in (patches, certain, shown)))
