"""Draws kept tokens over the image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from scipy.stats import rankdata
from torch import Tensor

from tokenprune.errors import UserError
from tokenprune.experiments.common.patch_boxes import (
    Box,
    Lattice,
    ViewSize,
    crop_boxes,
    frame_box,
    lattices,
)
from tokenprune.experiments.common.plots import FAINT, INK, style
from tokenprune.experiments.common.questions import normalise
from tokenprune.experiments.masks.look import SALIENCY, Mask, MaskedPrompt, Medium
from tokenprune.layout import TokenLayout
from tokenprune.units import percent

__all__ = [
    "Sheet",
    "Tile",
    "draw",
    "heat",
    "sheet",
]


_WIDTH = 11.0  # of a figure, in inches


_GAP = 0.06  # between crops, in sides of a crop


_FRAMES = 10  # of a strip


_SMALLEST = 0.5  # side of a crop in a figure, in inches


_PALE = np.array([0.86, 0.88, 0.91])  # colour of dropped patches


_RIM = np.array([0.05, 0.4, 0.95])  # colour of the line around kept patches


_PADDING = (150, 150, 150)


_HEAT = "inferno"


Pixels = NDArray[np.float64]


# --- layout of a sheet ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tile:
    """A view on a sheet.

    Attributes:
        view: The index of the view.
        picture: The picture that it is cut from.
        box: (left, top, right, bottom) of the part that it shows, in pixels of the picture.
        place: (x, y, width, height) on the sheet, in sides of a crop.
        lattice: The tokens.
    """

    view: int
    picture: Image.Image
    box: Box
    place: Box
    lattice: Lattice


@dataclass(frozen=True, eq=False)
class Sheet:
    """The views of an image or a video laid out for drawing, in sides of a crop."""

    tiles: tuple[Tile, ...]
    width: float
    height: float


def sheet(medium: Medium, view: ViewSize) -> Sheet:
    """The thumbnail beside the grid of crops without their padding, or frames in a row."""
    found = lattices(medium.layout, medium.size, view)
    if medium.layout.grid == (0, 0):
        whole = frame_box(medium.layout, medium.size, view)
        columns = min(len(found), _FRAMES)
        rows, step = -(-len(found) // columns), 1 + _GAP
        tiles = [
            Tile(i, picture, whole, (i % columns * step, i // columns * step, 1, 1), lattice)
            for i, (lattice, picture) in enumerate(zip(found, medium.pictures, strict=True))
        ]
        return Sheet(tuple(tiles), columns * step - _GAP, rows * step - _GAP)

    *_, canvas = found
    (picture,), (height, width) = medium.pictures, medium.size
    boxes = crop_boxes(medium.layout, medium.size, view)
    grid_rows, grid_cols = medium.layout.grid
    # Pixels of the image in a crop's side: the image fills the canvas one way or the other.
    side = max(height / grid_rows, width / grid_cols)
    wide = width / side + _GAP * (grid_cols - 1)
    tall = height / side + _GAP * (grid_rows - 1)
    thumb = max(1.0, min(tall / 2, wide))
    total = max(tall, thumb)
    left = thumb + 3 * _GAP
    tiles = [
        Tile(0, picture, (0, 0, width, height), (0, (total - thumb) / 2, thumb, thumb), found[0])
    ]
    for index, box in enumerate(boxes.tolist()):
        x0, y0, x1, y1 = box
        row, col = divmod(index, grid_cols)
        if x1 - x0 > 0 and y1 - y0 > 0:
            place = (
                left + x0 / side + _GAP * col,
                (total - tall) / 2 + y0 / side + _GAP * row,
                (x1 - x0) / side,
                (y1 - y0) / side,
            )
            tiles.append(Tile(1 + index, picture, (x0, y0, x1, y1), place, canvas))
    return Sheet(tuple(tiles), left + wide, total)


def _in_a_row(sheets: Iterable[Sheet]) -> tuple[list[float], float, float]:
    """The offsets of several sheets in a row, and the width and height of the row."""
    sheets = list(sheets)
    gap = (2 if all(one.height == 1 for one in sheets) else 6) * _GAP
    starts = np.cumsum([0.0, *(one.width + gap for one in sheets)]).tolist()
    return starts[:-1], starts[-1] - gap, max(one.height for one in sheets)


def _paint(one: Sheet, density: float, shade: Any) -> Pixels:
    """(height, width, 3) the sheet at ``density`` pixels a unit, white between the views.

    Args:
        one: The sheet.
        density: Pixels in a crop's side.
        shade: Called with the pixels (h, w, 3) of a tile in [0, 1] and their tokens (h, w); returns
            the shaded pixels.
    """
    canvas = np.ones((round(one.height * density), round(one.width * density), 3))
    for tile in one.tiles:
        x, y, wide, tall = tile.place
        left, top = round(x * density), round(y * density)
        right, bottom = round((x + wide) * density), round((y + tall) * density)
        size = max(right - left, 1), max(bottom - top, 1)
        pixels = np.asarray(_cut(tile.picture, tile.box, size), dtype=float) / 255
        x0, y0, x1, y1 = tile.box
        across = x0 + (np.arange(size[0]) + 0.5) / size[0] * (x1 - x0)
        down = y0 + (np.arange(size[1]) + 0.5) / size[1] * (y1 - y0)
        painted = shade(pixels, tile.lattice.at(down, across))
        room = canvas[top : top + size[1], left : left + size[0]]
        room[:] = painted[: room.shape[0], : room.shape[1]]
    return canvas


def _cut(picture: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """The part in ``box``, resized to ``size`` (width, height); grey outside the picture."""
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > picture.width or bottom > picture.height:
        square = Image.new("RGB", (round(right - left), round(bottom - top)), _PADDING)
        square.paste(picture, (round(-left), round(-top)))
        picture, box = square, (0, 0, square.width, square.height)
    return picture.resize(size, Image.Resampling.BICUBIC, box=box)


def _show_kept(pixels: Pixels, token: NDArray[np.int64], keep: NDArray[np.bool_]) -> Pixels:
    """Make dropped patches pale and grey, and draw a line around kept ones."""
    stays = keep[token] & (token >= 0)
    grey = pixels.mean(-1, keepdims=True)
    shown = np.where(stays[..., None], pixels, 0.22 * grey + 0.78 * _PALE)
    if keep.all() or keep[token[token >= 0]].all():  # only pixels without a token are pale
        return shown
    side = math.sqrt(token.size / len(np.unique(token)))  # of a patch, in pixels
    if side >= 8:
        width = int(np.clip(round(side / 14), 1, 4))
        shown[stays & ~_eroded(stays, width)] = _RIM
    return shown


def _eroded(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The pixels at least ``width`` pixels inside; the edge of the view does not count."""
    found = binary_erosion(inside, np.ones((3, 3)), iterations=width, border_value=1)
    return np.asarray(found, dtype=bool)


def _show_heat(pixels: Pixels, token: NDArray[np.int64], value: Pixels) -> Pixels:
    """The picture in grey under colours; unchanged where there is no value."""
    grey = np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    heat = np.where(token >= 0, value[token], np.nan)
    colours = colormaps[_HEAT](np.nan_to_num(heat))[..., :3]
    return np.where(
        np.isnan(heat)[..., None], 0.22 * grey + 0.78 * _PALE, 0.3 * grey + 0.7 * colours
    )


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Panel:
    """One panel of a figure: the shading of each medium, and the texts."""

    title: str
    lines: tuple[str, ...]
    shades: tuple[Any, ...]
    corners: tuple[dict[int, str], ...]
    row: int = 0


def draw(seen: MaskedPrompt) -> Figure:
    """What every method keeps: dropped patches are pale, each view shows the share kept.

    The first panel shows all tokens, with the number of patch tokens of each view.
    """
    ratios = list(dict.fromkeys(one.retention for one in seen.masks[1:]))
    panels = []
    for one in seen.masks:
        whole = one is seen.masks[0]
        shades, corners, total, left = [], [], 0, 0
        for medium, keep in zip(seen.media, one.keeps, strict=True):
            bits = np.zeros(len(medium.layout), dtype=bool)
            bits[keep.numpy()] = True
            shades.append(lambda pixels, token, bits=bits: _show_kept(pixels, token, bits))
            sizes, counts = medium.layout.view_sizes, medium.layout.take(keep).view_sizes
            corners.append(
                {
                    view: str(size) if whole else percent(count / size, 0) if size else ""
                    for view, (size, count) in enumerate(zip(sizes, counts, strict=True))
                }
            )
            total, left = total + sum(sizes), left + sum(counts)
        share = "" if whole else f", {percent(one.retention, None)}"
        tokens = f"{total} patch tokens" if whole else f"{left} of {total} tokens"
        where = f", {one.where}" if one.where else ""
        lines = (*_answer(one, seen.truth), f"{tokens}{where}")
        row = 0 if whole else ratios.index(one.retention)
        panels.append(_Panel(f"{one.label}{share}", lines, tuple(shades), tuple(corners), row))
    note = "In the corner: the number of patch tokens of a view, and the share that is kept."
    return _figure(seen, panels, note)


def heat(seen: MaskedPrompt) -> Figure:
    """The vision encoder's saliency and the scores of methods, as percentiles of all tokens.

    Raises:
        UserError: The vision encoder has no saliency and no method scores.
    """
    panels = []
    if seen.saliency:
        maps = [(medium.layout, medium.tokens[SALIENCY].float().cpu()) for medium in seen.media]
        panels.append(_heat_panel(seen, "saliency of the vision encoder", (seen.saliency,), maps))
    shown = set()
    for one in seen.masks:
        if one.scores and one.label not in shown:
            shown.add(one.label)  # scores do not depend on the retention ratio
            lines = (f"score, {one.where}",)
            panels.append(_heat_panel(seen, one.label, lines, list(one.scores)))
    if not panels:
        raise UserError(
            "there is no score to draw: this vision encoder has no known saliency, and none of the "
            "methods scores tokens."
        )
    figure = _figure(seen, panels, "Percentile of the score among all tokens shown.")
    bar = ScalarMappable(Normalize(0, 100), _HEAT)
    scale = figure.colorbar(bar, ax=figure.axes, shrink=0.6, aspect=30, pad=0.01, format="%d %%")
    scale.outline.set_visible(False)
    return figure


def _heat_panel(
    seen: MaskedPrompt,
    title: str,
    lines: tuple[str, ...],
    maps: Sequence[tuple[TokenLayout, Tensor]],
) -> _Panel:
    shades = []
    values = [_aligned(m.layout, *scored) for m, scored in zip(seen.media, maps, strict=True)]
    ranks = _percentiles(np.concatenate(values))
    for part in np.split(ranks, np.cumsum([len(value) for value in values])[:-1]):
        shades.append(lambda pixels, token, part=part: _show_heat(pixels, token, part))
    return _Panel(title, lines, tuple(shades), tuple({} for _ in seen.media))


def _aligned(full: TokenLayout, layout: TokenLayout, values: Tensor) -> Pixels:
    """(N,) the values at their indices in the full sequence, NaN elsewhere and at separators."""

    def places(one: TokenLayout) -> NDArray[np.int64]:
        parts = (one.kind, one.view, one.row, one.col, one.canvas_row, one.canvas_col)
        return np.stack([part.cpu().numpy() for part in parts], 1)

    where = {tuple(place): index for index, place in enumerate(places(full).tolist())}
    found = np.full(len(full), np.nan)
    index = [where[tuple(place)] for place in places(layout).tolist()]
    found[index] = values.numpy()
    found[full.is_separator.numpy()] = np.nan
    return found


def _percentiles(values: Pixels) -> Pixels:
    """Ranks in [0, 1], the mean rank where values are equal; NaN stays."""
    finite = ~np.isnan(values)
    ranks = np.full(len(values), np.nan)
    count = int(finite.sum())
    ranks[finite] = (rankdata(values[finite]) - 1) / max(count - 1, 1)
    return ranks


def _answer(one: Mask, truth: str | None) -> tuple[str, ...]:
    if one.answer is None:
        return ()
    verdict = ""
    if truth is not None:
        verdict = "  ✓" if normalise(one.answer) == normalise(truth) else "  ✗"
    return (f"“{one.answer}”{verdict}",)


def _figure(seen: MaskedPrompt, panels: Sequence[_Panel], note: str) -> Figure:
    sheets = [sheet(medium, seen.view) for medium in seen.media]
    starts, wide, tall = _in_a_row(sheets)
    columns, places = _arranged(panels, wide, tall)
    rows = max(row for row, _ in places) + 1
    width = _WIDTH / columns  # of a panel, in inches
    if rows * width * tall / wide > _WIDTH * 1.4:  # the height of a page
        width = _WIDTH * 1.4 / rows * wide / tall
    lines = max(len(panel.lines) for panel in panels)
    text = 0.36 + 0.2 * lines
    density = min(400.0, max(160.0, 1.1 * 200 * width / wide), 3000 / max(wide, tall))
    head = _heading(seen, note, columns * width)
    height = rows * (width * tall / wide + text) + 0.24 * len(head) + 0.25
    with style():
        figure = Figure(figsize=(columns * width + 0.3, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.08, wspace=0.02, hspace=0.01)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for panel, place in zip(panels, places, strict=True):
            _draw_panel(grid[place], panel, sheets, starts, (wide, tall), density, width / wide)
        figure.suptitle(
            "\n".join(head), x=0.01, ha="left", fontsize=11, color=INK, linespacing=1.4,
            parse_math=False,
        )  # fmt: skip
    return figure


def _arranged(
    panels: Sequence[_Panel], wide: float, tall: float
) -> tuple[int, list[tuple[int, int]]]:
    """Columns of a figure, and the row and column of every panel.

    A row for each retention where there are several; otherwise side by side as far as crops do
    not become too small.
    """
    aspect = wide / tall
    rows = max(panel.row for panel in panels) + 1
    if rows > 1 and aspect < 3:
        places, filled = (
            [],
            [1 if row else 0 for row in range(rows)],
        )  # nothing below the first panel
        for panel in panels:
            places.append((panel.row, filled[panel.row]))
            filled[panel.row] += 1
        return max(filled), places
    count = len(panels)
    if count <= 4 and aspect < 2 and _WIDTH / count >= _SMALLEST * wide:
        columns = count
    else:
        columns = min(range(1, count + 1), key=lambda c: _shape_error(c, count, wide, tall))
    return columns, [divmod(index, columns) for index in range(count)]


def _shape_error(columns: int, count: int, wide: float, tall: float) -> float:
    """How far a figure with this many columns is from the ratio 2:1 without gaps."""
    rows, width = -(-count // columns), _WIDTH / columns
    height = rows * (width * tall / wide + 0.7)
    cramped = columns > 1 and width < _SMALLEST * wide
    holes = (rows * columns - count) / count
    return abs(math.log(_WIDTH / height / 2)) + 0.6 * holes + (10.0 if cramped else 0.0)


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    sheets: Sequence[Sheet],
    starts: Sequence[float],
    extent: tuple[float, float],
    density: float,
    inches: float,
) -> None:
    """``inches`` is the side of a crop."""
    wide, tall = extent
    for one, start, shade, corners in zip(sheets, starts, panel.shades, panel.corners, strict=True):
        top = (tall - one.height) / 2
        painted = _paint(one, density, shade)
        axes.imshow(
            painted, extent=(start, start + one.width, top + one.height, top),
            interpolation="antialiased",
        )  # fmt: skip
        for tile in one.tiles:
            if corners.get(tile.view):
                x, y, tile_wide, _ = tile.place
                size = float(np.clip(72 * inches * tile_wide * 0.1, 3.5, 9))
                axes.text(
                    start + x + 0.04 * tile_wide, top + y + 0.04 * tile_wide, corners[tile.view],
                    size=size, color="white", va="top", ha="left",
                    bbox={"boxstyle": "round,pad=0.25", "fc": "black", "alpha": 0.7, "lw": 0},
                )  # fmt: skip
    axes.set_xlim(0, wide)
    axes.set_ylim(tall, 0)
    room = 10 * inches * wide  # characters of a title in full size
    axes.set_title(
        panel.title, loc="left", fontsize=11 * min(1.0, room / len(panel.title)),
        fontweight="bold", color=INK, pad=4, parse_math=False,
    )  # fmt: skip
    for index, line in enumerate(panel.lines):
        axes.annotate(
            line, (0, 0), (0, -6 - 14 * index), xycoords="axes fraction",
            textcoords="offset points", va="top", fontsize=10, parse_math=False,
            color=INK if line.startswith("“") else FAINT, annotation_clip=False,
        )  # fmt: skip


def _heading(seen: MaskedPrompt, note: str, inches: float) -> list[str]:
    width = max(30, int(inches * 12.5))
    asked = f"“{seen.question}”" if seen.question else ""
    truth = f"  True answer: {seen.truth}" if seen.truth is not None else ""
    lines = textwrap.wrap(f"{asked}{truth}", width) + textwrap.wrap(f"{seen.model}. {note}", width)
    return lines
