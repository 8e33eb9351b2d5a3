"""Draws the patches that a selection keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tokenprune.layout import Kind, TokenLayout

__all__ = ["Fit", "draw_kept"]

Fit = Literal["stretch", "pad", "crop"]
"""How the processor makes a square view of an image without crops."""

_HEIGHT = 336  # pixels of a panel
_GAP = 12  # pixels between panels
_ACROSS = 8  # panels in a row
_PALE = 0.8  # opacity of the white over a dropped patch


def draw_kept(
    layout: TokenLayout, keep: Tensor, pictures: Sequence[Image.Image], fit: Fit = "stretch"
) -> Image.Image:
    """Draw the kept patches in colour and the dropped ones pale, one panel per plane.

    The planes are the thumbnail and the canvas of crops, or the frames of a video.  A plane is
    divided evenly into its patches.  An edge may be off by the part of a patch that the processor
    pads or cuts.

    Args:
        layout: Layout of the full packed sequence of N entries.
        keep: (M,) indices of the kept entries.
        pictures: The image, or all frames of the video.
        fit: As in `Fit`.
    """
    layout, kept = layout.host, np.zeros(len(layout), dtype=bool)
    kept[keep.cpu().numpy()] = True
    kind = layout.kind.numpy()
    alone = layout.grid == (0, 0) and layout.modality == "image"
    whole = (kind == Kind.THUMBNAIL) | (kind == Kind.FRAME)
    masks = np.zeros((len(pictures), *layout.view_shape), dtype=bool)
    place = layout.view.numpy(), layout.row.numpy(), layout.col.numpy()
    masks[tuple(index[whole] for index in place)] = kept[whole]
    panels = [
        _panel(_fitted(picture, fit) if alone else picture, mask)
        for picture, mask in zip(pictures, masks, strict=True)
    ]
    if 0 not in layout.canvas_shape:
        canvas, crops = np.zeros(layout.canvas_shape, dtype=bool), kind == Kind.CROP
        rows, columns = layout.canvas_row.numpy(), layout.canvas_col.numpy()
        canvas[rows[crops], columns[crops]] = kept[crops]
        panels.append(_panel(pictures[0], canvas))
    return _joined(panels)


def _fitted(picture: Image.Image, fit: Fit) -> Image.Image:
    """``picture`` as the square view shows it."""
    if fit == "stretch":
        return picture
    pick = max if fit == "pad" else min
    square = (pick(picture.size),) * 2
    make = ImageOps.pad if fit == "pad" else ImageOps.fit
    return make(picture, square)


def _panel(picture: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    width = max(1, round(_HEIGHT * picture.width / picture.height))
    shown = picture.convert("RGB").resize((width, _HEIGHT))
    pale = Image.blend(shown, Image.new("RGB", shown.size, "white"), _PALE)
    cover = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        shown.size, Image.Resampling.NEAREST
    )
    return Image.composite(shown, pale, cover)


def _joined(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels side by side, in rows of at most `_ACROSS`."""
    rows = [panels[start : start + _ACROSS] for start in range(0, len(panels), _ACROSS)]
    widths = [sum(panel.width + _GAP for panel in row) - _GAP for row in rows]
    size = max(widths), len(rows) * (_HEIGHT + _GAP) - _GAP
    sheet = Image.new("RGB", size, "white")
    for number, row in enumerate(rows):
        left = 0
        for panel in row:
            sheet.paste(panel, (left, number * (_HEIGHT + _GAP)))
            left += panel.width + _GAP
    return sheet
