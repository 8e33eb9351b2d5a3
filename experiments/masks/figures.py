"""Draws kept tokens over the image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.patch_boxes import (
    Box,
    Lattice,
    ViewSize,
    crop_boxes,
    frame_box,
    lattices,
)
from tokenprune.experiments.common.plots import FAINT, INK, Canvas, canvas
from tokenprune.experiments.common.request import FIGURES, FigureOptions
from tokenprune.experiments.masks.look import SALIENCY, Mask, MaskedPrompt, Medium
from tokenprune.experiments.metrics.exact import is_exact
from tokenprune.layout import TokenLayout
from tokenprune.units import percent

__all__ = [
    "Sheet",
    "Tile",
    "draw",
    "heat",
    "heat_pages",
    "pages",
    "sheet",
]


_GAP = 0.06  # between crops, in sides of a crop


_FRAMES = 10  # of a strip


_TALLEST = 1.35  # height over width of a page; figures of more panels are divided
_COLUMN = 9.0  # height of a column of a journal, in inches


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


def sheet(medium: Medium, view: ViewSize, frames: int = _FRAMES) -> Sheet:
    """The thumbnail beside the grid of crops without their padding, or ``frames`` in a row."""
    found = lattices(medium.layout, medium.size, view)
    if medium.layout.grid == (0, 0):
        whole = frame_box(medium.layout, medium.size, view)
        columns = min(len(found), frames)
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


Shade = Callable[[Pixels, NDArray[np.int64]], Pixels]


@dataclass(frozen=True, eq=False)
class _Panel:
    """One panel of a figure: the shading of each medium, and the texts."""

    title: str
    lines: tuple[str, ...]
    shades: tuple[Shade, ...]
    corners: tuple[dict[int, str], ...]


def draw(seen: MaskedPrompt, options: FigureOptions = FIGURES) -> Figure:
    """What every method keeps: dropped patches are pale, each view shows the share kept.

    The first panel shows all tokens, with the number of patch tokens of each view.
    """
    return next(_figures(seen, _kept_panels(seen), _KEPT, options, divided=False))


def pages(seen: MaskedPrompt, options: FigureOptions = FIGURES) -> list[Figure]:
    """As `draw`, on several figures if one would be taller than a page."""
    return list(_figures(seen, _kept_panels(seen), _KEPT, options))


def heat(seen: MaskedPrompt, options: FigureOptions = FIGURES) -> Figure:
    """The vision encoder's saliency and the scores of methods, as percentiles of all tokens.

    Raises:
        UserError: The vision encoder has no saliency and no method scores.
    """
    return next(_figures(seen, _heat_panels(seen), _RANKS, options, divided=False))


def heat_pages(seen: MaskedPrompt, options: FigureOptions = FIGURES) -> list[Figure]:
    """As `heat`, on several figures if one would be taller than a page.  Raises `UserError`."""
    return list(_figures(seen, _heat_panels(seen), _RANKS, options))


_KEPT = "In the corner: the number of patch tokens of a view, and how many % of them are kept."
_RANKS = "Percentile of the score among all tokens shown."


def _kept_panels(seen: MaskedPrompt) -> list[_Panel]:
    """All tokens first, then the methods; the retention ratios of a method are neighbours."""
    first, *others = seen.masks
    order = list(dict.fromkeys((one.label, one.where) for one in others))
    others.sort(key=lambda one: order.index((one.label, one.where)))
    return [_kept_panel(seen, one, whole=one is first) for one in (first, *others)]


def _kept_panel(seen: MaskedPrompt, one: Mask, *, whole: bool) -> _Panel:
    shades: list[Shade] = []
    corners, total, left = [], 0, 0
    for medium, keep in zip(seen.media, one.keeps, strict=True):
        bits = np.zeros(len(medium.layout), dtype=bool)
        bits[keep.numpy()] = True
        shades.append(partial(_show_kept, keep=bits))
        sizes, counts = medium.layout.view_sizes, medium.layout.take(keep).view_sizes
        corners.append(
            {
                view: str(size) if whole else f"{100 * count / size:.0f}" if size else ""
                for view, (size, count) in enumerate(zip(sizes, counts, strict=True))
            }
        )
        total, left = total + sum(sizes), left + sum(counts)
    tokens = f"{total} patch tokens" if whole else f"{left} of {total} tokens"
    where = f", {one.where}" if one.where else ""
    lines = (*_answer(one, seen.truth), f"{tokens}{where}")
    share = "" if whole else f", {percent(one.retention, None)}"
    return _Panel(f"{one.label}{share}", lines, tuple(shades), tuple(corners))


def _heat_panels(seen: MaskedPrompt) -> list[_Panel]:
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
    return panels


def _heat_panel(
    seen: MaskedPrompt,
    title: str,
    lines: tuple[str, ...],
    maps: Sequence[tuple[TokenLayout, Tensor]],
) -> _Panel:
    shades: list[Shade] = []
    values = [_aligned(m.layout, *scored) for m, scored in zip(seen.media, maps, strict=True)]
    ranks = _percentiles(np.concatenate(values))
    for part in np.split(ranks, np.cumsum([len(value) for value in values])[:-1]):
        shades.append(partial(_show_heat, value=part))
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
        verdict = "  ✓" if is_exact(one.answer, [truth]) else "  ✗"
    return (f"“{one.answer}”{verdict}",)


def _figures(
    seen: MaskedPrompt,
    panels: Sequence[_Panel],
    note: str,
    options: FigureOptions,
    *,
    divided: bool = True,
) -> Iterator[Figure]:
    """Figures of the panels; each is as tall as a page at most if they are ``divided``."""
    count, taken = len(panels), 0
    while taken < count:
        asked = f"“{seen.question}”" if seen.question else seen.model
        truth = f" True answer: {seen.truth}" if seen.truth is not None else ""
        about = f"{seen.model}. {note}" if seen.question else note
        with canvas(options, f"{asked}{truth}", about) as made:
            grid = _Grid(made, seen, panels, scale=note == _RANKS)
            number = grid.fitting if divided else count
            if taken or number < count:
                made.subtitle += (
                    f" Part {len(range(0, taken, number)) + 1} of {-(-count // number)}."
                )
            grid.draw(panels[taken : taken + number])
        taken += number
        yield made.figure


class _Grid:
    """The panels of a figure, in equal rows and columns.

    Attributes:
        fitting: Number of panels that fit on a page.
    """

    def __init__(
        self, made: Canvas, seen: MaskedPrompt, panels: Sequence[_Panel], *, scale: bool
    ) -> None:
        self.made, self.scale = made, scale
        whole = made.size.width - (5 * made.line if scale else 0)
        label = 2.4 * made.width_of("100")  # in the corner of a crop, without hiding it
        frames = int(min(_FRAMES, 1.5 * whole / label))
        self.sheets = [sheet(medium, seen.view, frames) for medium in seen.media]
        self.starts, self.wide, self.tall = _in_a_row(self.sheets)
        widest = max(made.width_of(panel.title) for panel in panels) + made.line
        side = max(label * min(self.wide, 6), min(widest, whole / 2.1))
        self.columns = max(1, min(len(panels), int(whole / side)))
        rows = -(-len(panels) // self.columns)
        self.columns = -(-len(panels) // rows)
        # A few panels do not fill a page.
        most = 0.75 * made.size.height * self.wide / self.tall
        self.inside = min(whole / self.columns, most) - 0.14
        self.texts = max(self._lines(panel) for panel in panels)
        self.row = self.inside * self.tall / self.wide + (self.texts + 0.4) * made.line + 0.15
        tallest = min(_COLUMN, _TALLEST * max(made.size.width, 6.9))
        self.fitting = max(1, int(tallest / self.row)) * self.columns

    def _wrap(self, text: str, *, bold: bool = False) -> str:
        lines = wrapped(text, self.inside - 0.03, self.made.size.text, bold=bold).split("\n")
        return "\n".join([*lines[:2], f"{lines[2][:-1]}…"] if len(lines) > 3 else lines)

    def _lines(self, panel: _Panel) -> int:
        """Lines of text above and below a panel."""
        texts = [self._wrap(panel.title, bold=True), *map(self._wrap, panel.lines)]
        return sum(text.count("\n") + 1 for text in texts)

    def draw(self, panels: Sequence[_Panel]) -> None:
        rows = -(-len(panels) // self.columns)
        grid = self.made.subplots(rows * self.row, rows, self.columns).flatten()
        self.made.figure.get_layout_engine().set(wspace=0, hspace=0)  # type: ignore[union-attr,call-arg]
        for axes in grid:
            axes.set_axis_off()
        for axes, panel in zip(grid, panels, strict=False):
            self._panel(axes, panel)
        if self.scale:
            bar: Any = self.made.figure.colorbar(
                ScalarMappable(Normalize(0, 100), _HEAT), ax=list(grid), shrink=0.6,
                aspect=0.6 * rows * self.row / self.made.line, pad=0.01,
            )  # fmt: skip
            bar.ax.set_ylabel("percentile")
            bar.outline.set_visible(False)

    def _panel(self, axes: Axes, panel: _Panel) -> None:
        made, inches = self.made, self.inside / self.wide  # of the side of a crop
        density = min(
            400.0, max(160.0, 1.1 * made.size.dpi * inches), 3000 / max(self.wide, self.tall)
        )
        parts = zip(self.sheets, self.starts, panel.shades, panel.corners, strict=True)
        for one, start, shade, corners in parts:
            top = (self.tall - one.height) / 2
            axes.imshow(
                _paint(one, density, shade),
                extent=(start, start + one.width, top + one.height, top),
                interpolation="antialiased",
            )  # fmt: skip
            for tile in one.tiles:
                x, y, *size = tile.place
                text = corners.get(tile.view, "")
                fits = (
                    made.width_of(text) + 0.06 < size[0] * inches and made.line < size[1] * inches
                )
                if text and fits:
                    axes.text(
                        start + x + 0.03 / inches, top + y + 0.03 / inches, text, color="white",
                        va="top", ha="left",
                        bbox={"boxstyle": "square,pad=0.1", "fc": "black", "alpha": 0.7, "lw": 0},
                    )  # fmt: skip
        axes.set_xlim(0, self.wide)
        axes.set_ylim(self.tall, 0)
        axes.set_anchor("NW")
        axes.set_title(self._wrap(panel.title, bold=True))
        down = 3.0
        for line in panel.lines:
            text = self._wrap(line)
            axes.annotate(
                text, (0, 0), (0, -down), xycoords="axes fraction", textcoords="offset points",
                va="top", color=INK if line.startswith("“") else FAINT, annotation_clip=False,
                linespacing=1.15,
            )  # fmt: skip
            down += 72 * made.line * (text.count("\n") + 1)
