"""The locations of visual tokens in the image, in its original pixels.

The processor turns an image into a thumbnail, which is the whole image stretched to a square, and
a canvas of crops: the image resized without distortion and centred on black.  The layout of a
packed sequence gives the view and the patch of a token; this module maps the patch back through the
processor to the pixels that it covers.
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
    """The geometry of a view in the vision encoder.

    Attributes:
        side: Side of the square view, in pixels.
        seen: (height, width) of the part that patches cover, in pixels.  If the side is not a
            multiple of the patch, no patch covers the last pixels: 27 patches of 14 pixels leave 6
            of 384.
        fit: How an image without crops becomes a square view (`Adapter.fit`).
    """

    side: int
    seen: tuple[int, int]
    fit: Literal["stretch", "pad", "crop"] = "stretch"

    @classmethod
    def of(cls, adapter: Adapter) -> ViewSize:
        """The view geometry of a model."""
        if adapter.facts.vision.native:  # the patches cover the whole image
            return cls(1, (1, 1), adapter.fit)
        size = adapter.base.config.vision_config.image_size  # one side, or height and width
        side = size if isinstance(size, int) else int(size[0])
        (rows, cols), (height, width) = adapter.view_shape, adapter.facts.vision.patch_size
        return cls(side, (min(side, rows * height), min(side, cols * width)), adapter.fit)


@dataclass(frozen=True, eq=False)
class Lattice:
    """Tokens in rows and columns over the image: a thumbnail, a frame, or all crops.

    Attributes:
        view: The view, or None for the canvas of crops.
        top, bottom: (rows,) edges of each row of tokens, in pixels of the image.
        left, right: (columns,) edges of each column.
        index: (rows, columns) the token's index in the packed sequence.
    """

    view: int | None
    top: Floats
    bottom: Floats
    left: Floats
    right: Floats
    index: NDArray[np.int64]

    def at(self, y: Floats, x: Floats) -> NDArray[np.int64]:
        """(len(y), len(x)) index of the token that covers each pixel of the image, -1 for none."""
        rows, inside_rows = _which(y, self.top, self.bottom)
        cols, inside_cols = _which(x, self.left, self.right)
        if not self.index.size:
            return np.full((len(y), len(x)), -1)
        found = self.index[np.ix_(rows, cols)]
        return np.where(inside_rows[:, None] & inside_cols, found, -1)


def patch_boxes(layout: TokenLayout, image_size: tuple[int, int], view: ViewSize) -> Floats:
    """The rectangle of the image that each token covers.

    A token of a resampled canvas or of a pooled frame blends neighbouring patches; its rectangle is
    its even share of them, so that the rectangles tile the area of all patches.

    Args:
        layout: Layout of the full packed sequence.
        image_size: (height, width) of the original image in pixels.
        view: View geometry of the model (`ViewSize.of`).

    Returns:
        (N, 4) left, top, right, bottom in pixels of the image, clipped to it: empty for a patch of
        padding alone, NaN for separators.

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
    """The views that are not crops, one by one, then the canvas of crops if there is one.

    Arguments and errors as for `patch_boxes`; nothing is clipped to the image.
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

    # In patches if they are square, as unpadding counts them; otherwise in shares of a view.
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
    """(left, top, right, bottom) of the area that a view other than a crop shows, in pixels.

    It is the whole image; for a single view it is larger if the image is padded to a square, and
    smaller if it is cropped to a square.
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

    In pixels of the image, clipped to it: padding is left out, and a crop of padding alone is
    empty.
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
    """One axis of the image on the canvas: ``length`` pixels become ``resized``."""

    length: int
    resized: int
    offset: int

    def back(self, canvas: Any) -> Any:
        """Convert pixels of the canvas to pixels of the image."""
        return (canvas - self.offset) * (self.length / self.resized)


def _placements(
    image_size: tuple[int, int], grid: tuple[int, int], side: int
) -> tuple[_Placement, _Placement]:
    """How the processor resizes the image and centres it on the canvas, along both axes.

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
    """(2, count) edges of ``count`` tokens that share ``patches`` evenly.

    Args:
        count: Tokens along the axis.
        patches: First and (exclusive) last patch of the canvas that they cover.
        per_view: Number of patches of a view.
        seen: Pixels of a view that its patches cover.
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
    """For every position, the index of its interval and whether it is inside."""
    if not len(start):
        return np.zeros(len(place), dtype=np.int64), np.zeros(len(place), dtype=bool)
    found = (np.searchsorted(start, place, side="right") - 1).clip(0)
    return found, (place >= start[found]) & (place < end[found])
