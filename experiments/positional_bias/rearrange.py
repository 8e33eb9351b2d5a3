"""The same content at other places: crops or frames in reversed order, flipped images.

``selector`` level   the features and signals of an encoded image are moved, the encoder is taken
                     out: what is shown at each place is exactly what was shown at another.
``pipeline`` level   the pixels are moved and encoded again.

``reversed-crops``   the order of the crops in the sequence is reversed, and with it their position
                     ids (arXiv 2501.05179, figure 4).  Every token keeps its view, its place on the
                     canvas, and what the thumbnail says of it.
``reversed-frames``  the same with the frames of a video.
``flip-lr``          thumbnail, canvas of crops and frames are mirrored, each in itself.
``flip-tb``          the same top to bottom.
``exchanged-crops``  crops are exchanged under an unchanged thumbnail, which then speaks of other
                     crops than it shows.  Only at the selector level, and only where asked for.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from tokenprune.layout import Kind, TokenLayout
from tokenprune.pictures import picture
from tokenprune.tokens import VisualTokens

__all__ = [
    "CONDITIONS",
    "CROPS",
    "DEFAULT",
    "EXCHANGED",
    "LEVELS",
    "REVERSED",
    "Condition",
    "Level",
    "NotPossible",
    "Shown",
    "move_pixels",
    "move_tokens",
    "origins",
    "paired",
]


Condition = Literal["reversed-crops", "reversed-frames", "flip-lr", "flip-tb", "exchanged-crops"]


CONDITIONS: tuple[Condition, ...] = get_args(Condition)


EXCHANGED: Condition = "exchanged-crops"


DEFAULT = tuple(condition for condition in CONDITIONS if condition != EXCHANGED)
"""The conditions that leave crops and thumbnail as they belong together."""


REVERSED: tuple[Condition, ...] = ("reversed-crops", "reversed-frames")
"""Those of the order in the sequence, in which every token takes its view and place along."""


CROPS: tuple[Condition, ...] = ("reversed-crops", "exchanged-crops")
"""Those of crops, which leave the thumbnail where it is."""


Level = Literal["selector", "pipeline"]


LEVELS: tuple[Level, ...] = get_args(Level)


Shown = Image.Image | Sequence[Image.Image]
"""An image, or the frames of a video."""


class NotPossible(Exception):
    """An image cannot be rearranged this way, and why."""


def origins(layout: TokenLayout, condition: Condition) -> Tensor:
    """(N,) the entry that comes to each place of the sequence, or whose content does.

    Crops ``j`` and ``n-1-j`` change places patch by patch, the ``i``-th of one for the ``i``-th of
    the other; so do frames.  In ``reversed-crops`` a separator goes with the row that it ends; in
    all other conditions separators stay.

    Padding takes equally much of crops j and n-1-j, so that reversing the order of padded crops is
    possible as well: the kept part of a crop moves as a block, wherever in the crop it begins.

    Raises:
        NotPossible: There is nothing to reverse, or two crops to be exchanged have unlike shapes
            (as on some resampled canvases).
    """
    if condition in CROPS and layout.grid[0] * layout.grid[1] < 2:
        raise NotPossible("fewer than two crops")
    if condition == "reversed-frames" and (layout.modality != "video" or layout.frames < 2):
        raise NotPossible("fewer than two frames")
    if condition in CROPS:
        return _reversed_crops(layout, separators=condition in REVERSED)
    if condition == "reversed-frames":
        moved = replace(layout, view=layout.frames - 1 - layout.view)
    elif condition == "flip-lr":
        moved = replace(
            layout,
            col=layout.view_shape[1] - 1 - layout.col,
            canvas_col=layout.canvas_shape[1] - 1 - layout.canvas_col,
        )
    else:
        moved = replace(
            layout,
            row=layout.view_shape[0] - 1 - layout.row,
            canvas_row=layout.canvas_shape[0] - 1 - layout.canvas_row,
        )
    place, wanted, patches = _places(layout), _places(moved), layout.patches
    order = patches[place[patches].argsort()]
    found = torch.arange(len(layout), device=patches.device)
    found[patches] = order[torch.searchsorted(place[order], wanted[patches])]
    return found


def paired(layout: TokenLayout, condition: Condition) -> Tensor:
    """(N,) `origins` of the tokens that are moved by the condition, -1 of all others.

    Separators are not chosen, and where crops move, the thumbnail has no counterpart.
    """
    aside = layout.is_separator
    if condition in CROPS:
        aside = layout.kind != Kind.CROP
    return origins(layout, condition).masked_fill(aside, -1)


def move_tokens(tokens: VisualTokens, condition: Condition) -> VisualTokens:
    """An encoded image, rearranged.

    In the conditions of order (`REVERSED`) whole tokens move, with their layout; in all others
    features and signals move and the layout stays.
    """
    source = origins(tokens.layout, condition)
    # Another picture: strategies that draw must draw anew.
    mark = torch.tensor(
        [1 + CONDITIONS.index(condition)], dtype=torch.float32, device=tokens.features.device
    )
    seen = mark[:0] if tokens.fingerprint is None else tokens.fingerprint.flatten().to(mark)
    moved = replace(tokens.take(source), fingerprint=torch.cat([seen, mark]))
    return moved if condition in REVERSED else replace(moved, layout=tokens.layout)


def move_pixels(shown: Shown, condition: Condition, layout: TokenLayout, side: int) -> Shown:
    """An image or video with rearranged pixels, to be encoded anew.

    For ``reversed-crops`` the image is brought to the size of the crop canvas, as the processor
    would, and cut into crops that are put together in reversed order: every crop then shows the
    tower the very pixels that another one showed it before, and the thumbnail follows.  Unlike at
    the selector level crops change their places in the image as well.

    Args:
        shown: The image, or the frames of a video.
        condition: How to rearrange.
        layout: Of the image as it is.
        side: Of a view, in pixels.

    Raises:
        NotPossible: As `origins`, or the canvas is padded: crops would no longer meet the grid, or
            the condition keeps the thumbnail, which is made of the same pixels.
    """
    if condition == EXCHANGED:
        raise NotPossible("a thumbnail that shows what its crops do not")
    origins(layout, condition)  # raises where it is not possible
    if not isinstance(shown, Image.Image):
        frames = [picture(frame) for frame in shown]
        if condition == "reversed-frames":
            return frames[::-1]
        return [_flip(frame, condition) for frame in frames]
    shown = picture(shown)  # upright, before anything is flipped
    if condition != "reversed-crops":
        return _flip(shown, condition)
    (rows, cols), (width, height) = layout.grid, shown.size
    whole = (rows * layout.view_shape[0], cols * layout.view_shape[1])
    if layout.canvas_shape != whole and height * cols != width * rows:
        raise NotPossible("a padded canvas")
    canvas = shown.resize((cols * side, rows * side), Image.Resampling.BICUBIC)
    crops = rearrange(np.asarray(canvas), "(r h) (c w) x -> (r c) h w x", r=rows, c=cols)
    turned = rearrange(crops[::-1], "(r c) h w x -> (r h) (c w) x", r=rows)
    return Image.fromarray(turned)


def _flip(image: Image.Image, condition: Condition) -> Image.Image:
    return ImageOps.mirror(image) if condition == "flip-lr" else ImageOps.flip(image)


def _places(layout: TokenLayout) -> Tensor:
    """(N,) a number for each place: view, row and column, or row and column on the canvas."""
    canvas = layout.kind == Kind.CROP
    rows = max(layout.view_shape[0], layout.canvas_shape[0])
    cols = max(layout.view_shape[1], layout.canvas_shape[1])
    plane = torch.where(canvas, layout.view.max() + 1, layout.view)
    row = torch.where(canvas, layout.canvas_row, layout.row)
    col = torch.where(canvas, layout.canvas_col, layout.col)
    return (plane * rows + row) * cols + col


def _reversed_crops(layout: TokenLayout, separators: bool) -> Tensor:
    """(N,) `origins` of reversed crops: the i-th token of a crop for the i-th of its partner."""
    crops = (layout.kind == Kind.CROP).nonzero().squeeze(1)
    if not len(crops):
        raise NotPossible("no crop left of the padding")
    view, last = layout.view[crops], layout.views
    shapes = torch.zeros(last, 2, dtype=torch.int64, device=crops.device)
    for axis, values in enumerate((layout.canvas_row[crops], layout.canvas_col[crops])):
        reach = (last, int(values.max()) + 1)
        seen = torch.zeros(reach, dtype=torch.bool, device=crops.device)
        seen[view, values] = True
        shapes[:, axis] = seen.sum(1)
    sizes = torch.bincount(view, minlength=last)
    if not (torch.equal(shapes[1:], shapes[1:].flip(0)) and torch.equal(sizes, shapes.prod(1))):
        raise NotPossible("crops of unlike shapes")
    found = torch.arange(len(layout), device=crops.device)
    # Stable sorts by view keep the order within each: as the shapes agree, i-th meets i-th.
    here, partner = view.argsort(stable=True), (last - view).argsort(stable=True)
    found[crops[here]] = crops[partner]
    ends = layout.separators[layout.canvas_row[layout.separators] >= 0]
    if separators and len(ends):
        comes = torch.empty(layout.canvas_shape[0], dtype=torch.int64, device=crops.device)
        comes[layout.canvas_row[crops]] = layout.canvas_row[found[crops]]
        found[ends] = ends[comes[layout.canvas_row[ends]]]
    return found
