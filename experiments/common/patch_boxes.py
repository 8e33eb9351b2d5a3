"""Where visual tokens lie in the image, in the image's own pixels.

The processor makes of an image a thumbnail, which is the whole image stretched to a square, and a
canvas of crops: the image resized with its proportions kept, centred on black.  The layout of a
packed sequence says which patch of which view a token is; here that is traced back through the
processor to the pixels the patch saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenprune.adapter import Adapter
from tokenprune.errors import UserError
from tokenprune.layout import Kind, TokenLayout, unpadded_box

__all__ = [
    "Box",
    "Lattice",
    "ViewSize",
    "crop_boxes",
    "frame_box",
    "lattices",
    "patch_boxes",
]


Floats = NDArray[np.float64]


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ViewSize:
    """What the vision tower makes of a view.

    Attributes:
        side: Of the square view, in pixels.
        seen: (height, width) of the view in pixels that its patches cover.  Where the side is not
            a multiple of the patch, the last pixels are seen by none: 27 patches of 14 pixels
            leave 6 of 384.
        fit: How an image without crops becomes a square view (`Adapter.fit`).
    """

    side: int
    seen: tuple[int, int]
    fit: Literal["stretch", "pad", "crop"] = "stretch"

    @classmethod
    def of(cls, adapter: Adapter) -> ViewSize:
        """The views of a model."""
        side = int(adapter.base.config.vision_config.image_size)
        (rows, cols), (height, width) = adapter.view_shape, adapter.facts.vision.patch_size
        return cls(side, (min(side, rows * height), min(side, cols * width)), adapter.fit)


@dataclass(frozen=True, eq=False)
class Lattice:
    """Tokens that lie in rows and columns over the image: a thumbnail, a frame, or all crops.

    Attributes:
        view: The view, or None for the canvas of crops.
        top, bottom: (rows,) where each row of tokens begins and ends, in pixels of the image.
        left, right: (columns,) the same of columns.
        index: (rows, columns) the token's index in the packed sequence.
    """

    view: int | None
    top: Floats
    bottom: Floats
    left: Floats
    right: Floats
    index: NDArray[np.int64]

    def at(self, y: Floats, x: Floats) -> NDArray[np.int64]:
        """(len(y), len(x)) index of the token that saw each place of the image, -1 for none."""
        rows, inside_rows = _which(y, self.top, self.bottom)
        cols, inside_cols = _which(x, self.left, self.right)
        if not self.index.size:
            return np.full((len(y), len(x)), -1)
        found = self.index[np.ix_(rows, cols)]
        return np.where(inside_rows[:, None] & inside_cols, found, -1)


def patch_boxes(layout: TokenLayout, image_size: tuple[int, int], view: ViewSize) -> Floats:
    """The rectangle of the image that each token saw.

    A token of a resampled canvas or of a pooled frame is a blend of neighbouring patches; its
    rectangle is its even share of them, so that rectangles tile what all patches saw.

    Args:
        layout: Of the full packed sequence.
        image_size: (height, width) of the original image in pixels.
        view: Of the model (`ViewSize.of`).

    Returns:
        (N, 4) left, top, right, bottom in pixels of the image, cut off at its edges: empty for a
        patch that saw padding alone, NaN for separators.

    Raises:
        UserError: The layout is not one of an image of this size.
    """
    boxes = np.full((len(layout), 4), np.nan)
    for lattice in lattices(layout, image_size, view):
        rows, cols = lattice.index.shape
        corners = [
            np.broadcast_to(lattice.left, (rows, cols)),
            np.broadcast_to(lattice.top[:, None], (rows, cols)),
            np.broadcast_to(lattice.right, (rows, cols)),
            np.broadcast_to(lattice.bottom[:, None], (rows, cols)),
        ]
        boxes[lattice.index] = np.stack(corners, -1)
    height, width = image_size
    return boxes.clip(0, (width, height, width, height))


def lattices(layout: TokenLayout, image_size: tuple[int, int], view: ViewSize) -> list[Lattice]:
    """The views without crops one by one, then the canvas of crops if there is one.

    Arguments and errors as of `patch_boxes`; nothing is cut off at the image's edges.
    """
    kind = layout.kind.cpu().numpy()
    found = []
    (height, width), (rows, cols) = image_size, layout.view_shape
    left, top, right, bottom = frame_box(layout, image_size, view)
    up = np.linspace(0, view.seen[0] / view.side, rows + 1) * (bottom - top) + top
    along = np.linspace(0, view.seen[1] / view.side, cols + 1) * (right - left) + left
    whole = np.flatnonzero((kind == Kind.THUMBNAIL) | (kind == Kind.FRAME))
    for number, index in enumerate(whole.reshape(-1, rows, cols)):
        found.append(Lattice(number, up[:-1], up[1:], along[:-1], along[1:], index))
    if layout.grid == (0, 0):
        return found

    # In patches where they are square, as unpadding counts; otherwise in shares of a view.
    extent = (height, width) if rows == cols else (height * rows, width * cols)
    first, last, start, end = unpadded_box(extent, (layout.grid[0] * rows, layout.grid[1] * cols))
    shape = layout.canvas_shape
    index = np.flatnonzero(kind == Kind.CROP)
    own = (last - first, end - start)
    if len(index) != math.prod(shape) or any(own[i] < shape[i] for i in (0, 1)):
        raise UserError(
            f"an image of {width}x{height} pixels has a canvas of {own[0]}x{own[1]} patches, but "
            f"the layout one of {shape[0]}x{shape[1]}; give the size the layout was made for."
        )
    vertical, horizontal = _placements(image_size, layout.grid, view.side)
    y = vertical.back(_edges(shape[0], (first, last), rows, view.seen[0], view.side))
    x = horizontal.back(_edges(shape[1], (start, end), cols, view.seen[1], view.side))
    return [*found, Lattice(None, y[0], y[1], x[0], x[1], index.reshape(shape))]


def frame_box(layout: TokenLayout, image_size: tuple[int, int], view: ViewSize) -> Box:
    """(left, top, right, bottom) of what a view without crops shows, in pixels of the image.

    The whole image; of one view alone that is padded to a square, more than the image, and of one
    that is cropped to a square, less.
    """
    height, width = image_size
    alone = layout.grid == (0, 0) and layout.modality == "image"
    if not alone or view.fit == "stretch":
        return 0, 0, width, height
    side = max(height, width) if view.fit == "pad" else min(height, width)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return left, top, left + side, top + side


def crop_boxes(layout: TokenLayout, image_size: tuple[int, int], view: ViewSize) -> Floats:
    """(crops, 4) left, top, right, bottom of each crop's share of the image, crop 0 is view 1.

    In pixels of the image, cut off at its edges: padding is left out, and a crop that is padding
    alone is empty.
    """
    rows, cols = layout.grid
    vertical, horizontal = _placements(image_size, layout.grid, view.side)
    y = vertical.back(np.arange(rows + 1.0) * view.side).clip(0, image_size[0])
    x = horizontal.back(np.arange(cols + 1.0) * view.side).clip(0, image_size[1])
    crops = [
        np.broadcast_to(part, (rows, cols)).reshape(-1)
        for part in (x[:-1], y[:-1, None], x[1:], y[1:, None])
    ]
    return np.stack(crops, -1)


@dataclass(frozen=True)
class _Placement:
    """Where one axis of the image lies on the canvas: ``length`` pixels become ``resized``."""

    length: int
    resized: int
    offset: int

    def back(self, canvas: Any) -> Any:
        """Pixels of the canvas as pixels of the image."""
        return (canvas - self.offset) * (self.length / self.resized)


def _placements(
    image_size: tuple[int, int], grid: tuple[int, int], side: int
) -> tuple[_Placement, _Placement]:
    """How the processor resizes the image and centres it on the canvas, vertically and across.

    As ``get_patch_output_size`` and ``_get_padding_size`` of ``transformers``' LLaVA-NeXT and
    LLaVA-OneVision processors.
    """
    (height, width), (rows, cols) = image_size, grid
    by_height, by_width = rows * side / height, cols * side / width
    if by_width < by_height:
        resized = min(math.ceil(height * by_width), rows * side), cols * side
    else:
        resized = rows * side, min(math.ceil(width * by_height), cols * side)
    return (
        _Placement(height, resized[0], (rows * side - resized[0]) // 2),
        _Placement(width, resized[1], (cols * side - resized[1]) // 2),
    )


def _edges(count: int, patches: tuple[int, int], per_view: int, seen: int, side: int) -> Floats:
    """(2, count) where each of ``count`` tokens that share ``patches`` begins and ends.

    Args:
        count: Tokens along the axis.
        patches: First and (exclusive) last patch of the canvas they stand for.
        per_view: Patches of a view.
        seen: Pixels of a view that they cover.
        side: Pixels of a view.
    """
    first, last = patches
    place = np.round(first + np.arange(count + 1) * (last - first) / max(count, 1), 9)
    start, end = place[:-1], place[1:]
    view = np.floor(start / per_view)  # an edge between two crops: what begins is in the second,
    before = np.ceil(end / per_view) - 1  # and what ends is in the first
    scale = seen / per_view
    return np.stack(
        [
            view * side + (start - view * per_view) * scale,
            before * side + (end - before * per_view) * scale,
        ]
    )


def _which(place: Floats, start: Floats, end: Floats) -> tuple[NDArray[np.int64], Any]:
    """For every place the interval it would lie in, and whether it does."""
    if not len(start):
        return np.zeros(len(place), dtype=np.int64), np.zeros(len(place), dtype=bool)
    found = (np.searchsorted(start, place, side="right") - 1).clip(0)
    return found, (place >= start[found]) & (place < end[found])
