"""The same content at other locations: crops or frames in reversed order, flipped images.

``selector`` level   Moves the features and signals of an encoded image, so that the vision encoder
                     has no influence: each location shows exactly what another one showed before.
``pipeline`` level   Moves the pixels, and encodes them again.

``reversed-crops``   Reverses the order of the crops in the sequence, and with it their position ids
                     (arXiv 2501.05179, figure 4).  Every token keeps its view and its location on
                     the canvas, so the thumbnail still matches the crops.
``reversed-frames``  The same for the frames of a video.
``flip-lr``          Mirrors thumbnail, canvas and frames, each separately, left to right.
``flip-tb``          The same, top to bottom.
``exchanged-crops``  Exchanges crops under an unchanged thumbnail, which then does not match them.
                     Only at the selector level, and only on request.
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
"""The conditions in which the crops match their thumbnail."""


REVERSED: tuple[Condition, ...] = ("reversed-crops", "reversed-frames")
"""The conditions that change the order of tokens, each with its view and location."""


CROPS: tuple[Condition, ...] = ("reversed-crops", "exchanged-crops")
"""The conditions that move crops and leave the thumbnail in place."""


Level = Literal["selector", "pipeline"]


LEVELS: tuple[Level, ...] = get_args(Level)


Shown = Image.Image | Sequence[Image.Image]
"""An image, or the frames of a video."""


class NotPossible(Exception):
    """The condition does not apply to an image; the message says why."""


def origins(layout: TokenLayout, condition: Condition) -> Tensor:
    """For each index of the sequence, the entry (N,) that moves there, or whose content does.

    Crops ``j`` and ``n-1-j`` are exchanged patch by patch, the ``i``-th patch of one with the
    ``i``-th of the other; so are frames.  In ``reversed-crops`` a separator moves with the row that
    it ends; in all other conditions separators stay.

    Padding removes equally many patches of crops j and n-1-j, so padded crops can be reversed, too:
    the rest of a crop moves as a block, wherever it begins in the crop.

    Raises:
        NotPossible: There is nothing to reverse, or two crops to be exchanged differ in shape (as
            on some resampled canvases).
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
    """`origins` (N,) of the tokens that the condition moves, -1 for all others.

    Separators are not selected, and where crops move, the thumbnail has no counterpart.
    """
    aside = layout.is_separator
    if condition in CROPS:
        aside = layout.kind != Kind.CROP
    return origins(layout, condition).masked_fill(aside, -1)


def move_tokens(tokens: VisualTokens, condition: Condition) -> VisualTokens:
    """Rearrange an encoded image.

    In the conditions `REVERSED`, whole tokens move, with their layout; in all others, features and
    signals move and the layout stays.
    """
    source = origins(tokens.layout, condition)
    # A new fingerprint, so that random methods draw again.
    mark = torch.tensor(
        [1 + CONDITIONS.index(condition)], dtype=torch.float32, device=tokens.features.device
    )
    seen = mark[:0] if tokens.fingerprint is None else tokens.fingerprint.flatten().to(mark)
    moved = replace(tokens.take(source), fingerprint=torch.cat([seen, mark]))
    return moved if condition in REVERSED else replace(moved, layout=tokens.layout)


def move_pixels(shown: Shown, condition: Condition, layout: TokenLayout, side: int) -> Shown:
    """Rearrange the pixels of an image or video, which then has to be encoded.

    For ``reversed-crops`` the image is resized to the crop canvas, as by the processor, and cut
    into crops, which are joined in reversed order.  The vision encoder then gets the same crops in
    another order, and a thumbnail that matches them.  In contrast to the selector level, the crops
    also change their locations in the image.

    Args:
        shown: The image, or the frames of a video.
        condition: How to rearrange.
        layout: Of the original image.
        side: Side of a view, in pixels.

    Raises:
        NotPossible: As for `origins`; or the canvas is padded, so that crops would not match the
            grid; or the condition keeps the thumbnail, which consists of the same pixels.
    """
    if condition == EXCHANGED:
        raise NotPossible("a thumbnail that shows what its crops do not")
    origins(layout, condition)  # raises NotPossible
    if not isinstance(shown, Image.Image):
        frames = [picture(frame) for frame in shown]
        if condition == "reversed-frames":
            return frames[::-1]
        return [_flip(frame, condition) for frame in frames]
    shown = picture(shown)  # made upright before it is flipped
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
    """(N,) a number for each location: view, row and column, or canvas row and column."""
    canvas = layout.kind == Kind.CROP
    rows = max(layout.view_shape[0], layout.canvas_shape[0])
    cols = max(layout.view_shape[1], layout.canvas_shape[1])
    plane = torch.where(canvas, layout.view.max() + 1, layout.view)
    row = torch.where(canvas, layout.canvas_row, layout.row)
    col = torch.where(canvas, layout.canvas_col, layout.col)
    return (plane * rows + row) * cols + col


def _reversed_crops(layout: TokenLayout, separators: bool) -> Tensor:
    """`origins` (N,) of reversed crops: the i-th token of a crop for the i-th of its partner."""
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
    # Stable sorts by view keep the order in each; as the shapes agree, i-th tokens match.
    here, partner = view.argsort(stable=True), (last - view).argsort(stable=True)
    found[crops[here]] = crops[partner]
    ends = layout.separators[layout.canvas_row[layout.separators] >= 0]
    if separators and len(ends):
        comes = torch.empty(layout.canvas_shape[0], dtype=torch.int64, device=crops.device)
        comes[layout.canvas_row[crops]] = layout.canvas_row[found[crops]]
        found[ends] = ends[comes[layout.canvas_row[ends]]]
    return found
