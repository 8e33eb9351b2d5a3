"""The style of all figures: widths, type, colours, titles, legends, labels and files."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FuncFormatter, MaxNLocator

from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.glyphs import FONT, families, legible, text_width, wrapped
from tokenprune.experiments.common.request import FIGURES, FigureOptions

__all__ = [
    "FAINT",
    "INK",
    "MARKERS",
    "PALETTE",
    "Canvas",
    "bars",
    "canvas",
    "colours",
    "errors",
    "grouped_bars",
    "in_percent",
    "label_ends",
    "looks",
    "method_labels",
    "percent",
    "save",
    "spread",
]


INK, FAINT = "#262626", "#666666"


PALETTE = (
    "#0072b2", "#c44e00", "#00815e", "#a8397f", "#4d4d4d", "#8a6100", "#6a4fb3", "#1f8299",
)  # fmt: skip
"""Colours that are distinct for readers who are colour-blind, and dark enough for text."""


MARKERS = "osD^vPX*"


_MARGIN = 0.05  # around everything, in inches


_LEADING = 1.3  # distance of lines, in font sizes


@dataclass(frozen=True)
class _Size:
    """A width of figures.

    Attributes:
        width: Width in inches.
        height: Height of a single panel, in inches.
        text, title: Font sizes in points.
        line, marker: Width of lines and size of markers, in points.
        dpi: Pixels an inch of PNG files.
    """

    width: float
    height: float
    text: float
    title: float
    line: float
    marker: float
    dpi: int


_SIZES = {
    "column": _Size(3.3, 2.3, 7, 8.5, 1.1, 3.8, 300),
    "page": _Size(6.9, 3.4, 8.5, 11.5, 1.5, 5.5, 220),
    "slide": _Size(9.6, 4.6, 12, 17, 2, 8, 200),
}


End = tuple[str, tuple[float, float] | None, float, dict[str, Any]]
"""Name, (x, y) of the end of a line or None for one that crosses the panel, height, and font."""


# --- figures --------------------------------------------------------------------------------------


@contextmanager
def canvas(options: FigureOptions, title: str, subtitle: str = "") -> Iterator["Canvas"]:
    """The style of a figure; the figure is laid out when the block ends.

    Args:
        options: Width, and whether the title is drawn.
        title: What was measured.
        subtitle: On what, in smaller letters.  It goes with the title.
    """
    size = _SIZES[options.width]
    with mpl.style.context("default"), rc_context(_settings(size)), _any_weight():
        made = Canvas(size, *((title, subtitle) if options.title else ("", "")))
        yield made
        made.settle()


class Canvas:
    """A figure in the making.

    Attributes:
        figure: The figure, once `subplots` is called.
        size: Its dimensions.
        title, subtitle: The texts above it, which may change until the end; empty for none.
    """

    figure: Figure

    def __init__(self, size: _Size, title: str, subtitle: str) -> None:
        self.size = size
        self.title, self.subtitle = title, subtitle
        self._ends: list[tuple[Axes, Sequence[Text]]] = []
        self._named: list[tuple[Axes, list[tuple[float, float, str]]]] = []
        self._legend: Any = None

    @property
    def line(self) -> float:
        """Height of a line of text, in inches."""
        return _LEADING * self.size.text / 72

    def width_of(self, *texts: str) -> float:
        """Width of the longest of ``texts``, in inches."""
        return max((text_width(text, self.size.text) for text in texts), default=0.0)

    def rows(self, labels: Sequence[str]) -> tuple[list[str], float]:
        """The labels of rows on at most 40 % of the width, and the height of a row in inches."""
        names = [wrapped(label, 0.4 * self.size.width, self.size.text) for label in labels]
        lines = max((name.count("\n") + 1 for name in names), default=1)
        return names, (lines + 0.12) * self.line

    def panels(self, count: int, least: float, most: int = 4) -> tuple[int, int]:
        """Rows and columns of ``count`` panels that are at least ``least`` inches wide."""
        columns = max(1, min(count, most, int((self.size.width + 0.01) / least)))
        rows = max(1, -(-count // columns))
        return rows, max(1, -(-count // rows))

    def subplots(self, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Any:
        """Panels in an array (``rows``, ``columns``), ``height`` inches high together."""
        return self._made(height).subplots(rows, columns, squeeze=False, **options)

    def rooms(self, *heights: float) -> list[Any]:
        """Subplot specifications below each other, of heights in inches, to be divided further."""
        grid = self._made(sum(heights)).add_gridspec(len(heights), 1, height_ratios=heights)
        return [grid[row, 0] for row in range(len(heights))]

    def _made(self, height: float) -> Figure:
        self.figure = Figure((self.size.width, height), layout="constrained", facecolor="white")
        engine: Any = self.figure.get_layout_engine()
        engine.set(w_pad=_MARGIN, h_pad=_MARGIN, wspace=0.03, hspace=0.03)
        return self.figure

    def legend(
        self, entries: tuple[Sequence[Any], Sequence[Any]], blank: Sequence[Axes] = ()
    ) -> None:
        """A legend between the titles and the panels, in as many lines as it needs.

        Args:
            entries: Handles and labels.
            blank: Empty panels, whose place it takes.
        """
        handles, labels = entries
        em = self.size.text / 72
        room = (self.size.width - 2 * _MARGIN) * (0.4 if len(blank) else 1)
        names = [wrapped(label, room - 3 * em, self.size.text) for label in labels]
        columns = int(max(1, room / (self.width_of(*names) + 3.4 * em)))
        columns = 1 if len(blank) else min(columns, len(names))
        # Filled line by line, while Matplotlib fills column by column.
        order = [i for first in range(columns) for i in range(first, len(names), columns)]
        if not order:
            return
        where: Any = blank[0] if len(blank) else self.figure
        made = where.legend(
            [handles[i] for i in order], [names[i] for i in order],
            loc="upper left", ncols=columns, frameon=False, handlelength=1.4, handletextpad=0.5,
            columnspacing=1.3, borderpad=0.1, borderaxespad=0.3, labelspacing=0.3,
            alignment="left",
        )  # fmt: skip
        self._legend = None if len(blank) else made

    def _head(self) -> None:
        """Make room for titles and legend above the panels, and draw them there."""
        figure, width = self.figure, self.size.width
        looks: list[dict[str, Any]] = [
            {"fontsize": self.size.title, "fontweight": "bold", "color": INK},
            {"fontsize": self.size.text, "color": FAINT},
        ]
        heads = []
        for text, look in zip((self.title, self.subtitle), looks, strict=True):
            bold = "fontweight" in look
            lines = wrapped(text, width - 2 * _MARGIN, look["fontsize"], bold=bold)
            used = (lines.count("\n") + 1) * _LEADING * look["fontsize"] / 72
            heads += [(lines, look, used)] if text else []
        above = sum(used for *_, used in heads) + (1.6 * _MARGIN if heads else 0)
        legend = 0.0
        if self._legend is not None:
            legend = self._legend.get_window_extent().height / figure.dpi + _MARGIN
        panels = figure.get_figheight()
        whole = panels + above + legend
        figure.set_size_inches(width, whole)
        engine: Any = figure.get_layout_engine()
        engine.set(rect=(0, 0, 1, panels / whole))
        place = whole - _MARGIN
        for lines, look, used in heads:
            figure.text(
                _MARGIN / width, place / whole, lines, va="top", linespacing=_LEADING / 1.17, **look
            )
            place -= used
        if self._legend is not None:
            self._legend.set_bbox_to_anchor((0, 0, 1, (panels + legend) / whole))
            self._legend.set_in_layout(False)

    def heat(self, axes: Axes, table: pd.DataFrame, form: str, limits: tuple[float, float]) -> None:
        """A map of ``table`` with the numbers in it; missing ones are left out."""
        values = table.to_numpy(float)
        axes.imshow(values, cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="auto")
        middle = sum(limits) / 2
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "white" if value < middle + 0.1 * (limits[1] - limits[0]) else INK
                axes.text(column, row, form.format(value), ha="center", va="center", color=ink)
        axes.set_xticks(range(table.shape[1]), list(map(str, table.columns)))
        axes.set_yticks(range(table.shape[0]), list(map(str, table.index)))
        axes.set_xticks(np.arange(1, table.shape[1]) - 0.5, minor=True)
        axes.set_yticks(np.arange(1, table.shape[0]) - 0.5, minor=True)
        axes.grid(visible=False)
        axes.grid(visible=True, which="minor", axis="both", color="white", lw=0.6)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)

    def number_points(self, axes: Axes, x: Any, y: Any, names: Any) -> None:
        """Write a name beside every point, where there is room for it."""
        self._named.append((axes, list(zip(x, y, names, strict=True))))

    def settle(self) -> None:
        """Lay the figure out once and for all."""
        self._head()
        for text in self.figure.findobj(Text):
            _make_legible(text)
        for axes in self.figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                _make_ticks_legible(axis)
        self.figure.draw_without_rendering()
        for axes, texts in self._ends:
            _place_ends(axes, texts)
        for axes, points in self._named:
            _place_names(axes, points)
        self.figure.set_layout_engine("none")


def _settings(size: _Size) -> Any:
    return {
        "axes.axisbelow": True,
        "axes.edgecolor": "#bdbdbd",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.labelcolor": INK,
        "axes.labelpad": 3,
        "axes.labelsize": size.text,
        "axes.linewidth": 0.8,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.titlepad": 4,
        "axes.titlesize": size.text,
        "axes.titleweight": "bold",
        "figure.labelsize": size.text,
        "font.family": [FONT],
        "font.size": size.text,
        "grid.color": "#e0e0e0",
        "grid.linewidth": 0.6,
        "legend.fontsize": size.text,
        "legend.title_fontsize": size.text,
        "lines.linewidth": size.line,
        "lines.markersize": size.marker,
        "text.color": INK,
        "text.parse_math": False,  # kinds and file names may contain dollar signs
        **{f"{axis}tick.color": INK for axis in "xy"},
        **{f"{axis}tick.labelsize": size.text for axis in "xy"},
        **{f"{axis}tick.major.size": 0 for axis in "xy"},
    }


def save(figure: Figure, path: Path, options: FigureOptions = FIGURES) -> list[str]:
    """Write ``figure`` to ``path`` in every format, each file atomically, and return their names.

    Fonts are embedded as TrueType, so that text can be searched and edited.  Equal figures give
    equal files.
    """
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    names = []
    with (
        _any_weight(),
        rc_context({"pdf.fonttype": 42, "svg.fonttype": "path", "svg.hashsalt": "tokenprune"}),
    ):
        for kind in options.formats:
            target = path.with_name(f"{path.name}.{kind}")
            with replace_file(target) as temporary:
                figure.savefig(
                    temporary, format=kind, dpi=_SIZES[options.width].dpi, facecolor="white",
                    metadata=dates.get(kind),
                )  # fmt: skip
            names.append(target.name)
    return names


# --- parts ----------------------------------------------------------------------------------------


def bars(
    table: pd.DataFrame,
    *,
    places: Mapping[str, str],
    hues: Sequence[str],
    title: str,
    subtitle: str,
    label: str,
    reference: float | None = None,
    colours: Mapping[str, Any] | None = None,
    options: FigureOptions = FIGURES,
) -> Figure:
    """A figure of grouped bars with intervals; see `grouped_bars`."""
    with canvas(options, title, subtitle) as made:
        axes = made.subplots(made.size.height)[0, 0]
        grouped_bars(made, axes, table, places, hues, colours)
        if reference is not None:
            axes.axhline(reference, color=INK, lw=0.8 * made.size.line, ls=(0, (5, 3)), zorder=1)
        axes.set_ylabel(label)
        made.legend(axes.get_legend_handles_labels())
    return made.figure


def grouped_bars(
    made: Canvas,
    axes: Axes,
    table: pd.DataFrame,
    places: Mapping[str, str],
    hues: Sequence[str],
    colours: Mapping[str, Any] | None = None,
    inches: float | None = None,
) -> None:
    """Draw a group of bars for every place and a bar for every hue, with intervals, in percent.

    Args:
        made: The canvas of the axes.
        axes: The axes to draw on.
        table: ``place``, ``shown`` (the hue), ``value``, ``low`` and ``high``.
        places: Places in order, with their labels.
        hues: Hues in order.
        colours: Colours of hues; other hues get those of the palette.
        inches: Width of the axes; None for that of the figure.
    """
    width = 0.8 / len(hues)
    chosen = dict(zip(hues, PALETTE, strict=False)) | dict(colours or {})
    for index, hue in enumerate(hues):
        rows = table[table["shown"] == hue].set_index("place").reindex(list(places))
        x = np.arange(len(places)) + (index - (len(hues) - 1) / 2) * width
        axes.bar(x, rows["value"], 0.92 * width, color=chosen[hue], label=hue, zorder=2)
        axes.errorbar(
            x, rows["value"], yerr=errors(rows, "value", "low", "high"), ls="", color=INK,
            elinewidth=0.7 * made.size.line, zorder=3,
        )  # fmt: skip
    room = (inches or made.size.width) - 5 * made.line
    names = list(places.values())
    level = made.width_of(*" ".join(names).split()) < 0.95 * room / len(names)
    wrap = [wrapped(name, 0.95 * room / len(names), made.size.text) for name in names]
    axes.set_xticks(
        range(len(places)), wrap if level else [name.replace("\n", " ") for name in names],
        rotation=0 if level else 90,
    )  # fmt: skip
    middle, half = (len(places) - 1) / 2, max(len(places), 3) / 2 + 0.1
    axes.set_xlim(middle - half, middle + half)
    in_percent(axes.yaxis)


def in_percent(axis: Axis, most: int = 6) -> None:
    """Label shares in percent, exactly: 0.975 is 97.5.  The axis label has the unit."""
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.6g}"))


def errors(rows: pd.DataFrame, value: str, low: str, high: str) -> Any:
    """(2, N) distances of the ends of intervals from the values, as Matplotlib wants them."""
    ends = [rows[value] - rows[low], rows[high] - rows[value]]
    return np.abs(np.asarray(ends, dtype=float))


def method_labels(table: pd.DataFrame) -> list[str]:
    return list(pd.unique(table["label"]))


def percent(share: float, decimals: int | None = None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method, the same in all figures of a comparison."""
    methods = method_labels(table)
    return {
        method: {"color": PALETTE[i % len(PALETTE)], "fmt": MARKERS[i % len(MARKERS)]}
        for i, method in enumerate(methods)
    }


def colours(steps: int) -> list[Any]:
    """Colours of ordered steps such as retention ratios, light to dark."""
    return [mpl.colormaps["viridis_r"](share) for share in np.linspace(0.25, 0.95, steps)]


# --- labels at the ends of lines ------------------------------------------------------------------


def label_ends(
    made: Canvas,
    axes: Axes,
    ends: Sequence[End],
) -> None:
    """Write a name beside the panel for every line, with a leader from the line's end.

    Args:
        made: The canvas of the axes.
        axes: The panel.
        ends: The lines.
    """
    texts: list[Text] = []
    most = 0.32 * made.size.width
    for name, end, level, font in ends:
        at_edge = end is None
        leader = {"arrowstyle": "-", "color": font["color"], "lw": 0.6, "relpos": (0, 0.5)}
        text = axes.annotate(
            wrapped(name, most, made.size.text, bold="fontweight" in font),
            end or (1, level),
            xycoords=axes.get_yaxis_transform() if at_edge else "data",
            xytext=(1.05, level), textcoords=axes.get_yaxis_transform(), va="center",
            annotation_clip=False, arrowprops=leader | {"shrinkA": 1, "shrinkB": 0},
            linespacing=1.1, zorder=1.5, **font,
        )  # fmt: skip
        texts.append(text)
    made._ends.append((axes, texts))


def _place_ends(axes: Axes, texts: Sequence[Text]) -> None:
    """Move the labels apart, as little as possible and within the panel."""
    if not texts:
        return
    box = axes.get_window_extent()
    figure: Any = axes.figure
    points = 72 / figure.dpi
    sizes = [text.get_window_extent().height * points + 1.5 for text in texts]
    low, high = axes.get_ylim()
    total = box.height * points
    wanted = [(text.get_position()[1] - low) / (high - low) * total for text in texts]
    for text, place in zip(texts, spread(wanted, sizes, total), strict=True):
        text.set_y(low + place / total * (high - low))


def spread(values: Sequence[float], sizes: Sequence[float], total: float) -> list[float]:
    """Centres of labels in (0, ``total``), moved as little as possible so that none overlap.

    Args:
        values: Wanted centres.
        sizes: Sizes of the labels.
        total: Size of the room.  If they do not fit, labels leave it on both sides.
    """
    from sklearn.isotonic import isotonic_regression

    order = np.argsort(values, kind="stable")
    size = np.asarray(sizes, dtype=float)[order]
    # With these offsets taken off, "apart" means "not decreasing": an isotonic regression.
    offset = np.cumsum(size) - size / 2
    spare = max(0.0, total - size.sum())
    start = min(0.0, (total - size.sum()) / 2)
    fitted = isotonic_regression(np.asarray(values)[order] - offset - start)
    placed = np.empty(len(values))
    placed[order] = np.clip(fitted, 0, spare) + offset + start
    return [float(value) for value in placed]


def _place_names(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write names beside points: at the nearest free place of several, with a leader if it is far.

    Names for which there is no place are left out.
    """
    figure: Any = axes.figure
    size = mpl.rcParams["font.size"] * figure.dpi / 72
    inside = axes.get_window_extent()
    spots = axes.transData.transform([(x, y) for x, y, _ in points])
    dot = 0.45 * mpl.rcParams["lines.markersize"] * figure.dpi / 72
    taken = [(x - dot, y - dot, x + dot, y + dot) for x, y in spots]
    for (x, y), (*at, name) in zip(spots, points, strict=True):
        wide, tall = 0.64 * size * len(name), 0.95 * size
        for radius, angle in _around(dot, size):
            left = x + radius * np.cos(angle) - wide / 2
            low = y + radius * np.sin(angle) - tall / 2
            box = (left, low, left + wide, low + tall)
            within = inside.x0 <= box[0] and box[2] <= inside.x1
            if within and inside.y0 <= box[1] and box[3] <= inside.y1 and not _hits(box, taken):
                taken.append(box)
                far = radius > 1.5 * size
                middle = axes.transData.inverted().transform((left + wide / 2, low + tall / 2))
                leader = {"arrowstyle": "-", "lw": 0.4, "color": FAINT, "shrinkA": 0, "shrinkB": 1}
                axes.annotate(
                    name, (at[0], at[1]), tuple(middle), ha="center", va="center", zorder=4,
                    arrowprops=leader if far else None,
                )  # fmt: skip
                break


def _around(dot: float, size: float) -> Iterator[tuple[float, float]]:
    """Distances and angles of places around a point, near ones first, in pixels."""
    for step in range(24):
        for angle in np.linspace(0, 2 * np.pi, 8 + 2 * step, endpoint=False):
            yield dot + size * (0.6 + 0.35 * step), angle


def _hits(box: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    left, low, right, top = box
    return any(left < x1 and x0 < right and low < y1 and y0 < top for x0, y0, x1, y1 in others)


# --- characters -----------------------------------------------------------------------------------


@contextmanager
def _any_weight() -> Iterator[None]:
    """No messages about fonts without a bold weight, which stand in for Matplotlib's own."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _make_legible(text: Text) -> None:
    shown = text.get_text()
    if not shown.isascii():
        text.set_text(legible(shown))
        text.set_fontfamily(families(shown))


def _make_ticks_legible(axis: Axis) -> None:
    formatter: Any = axis.get_major_formatter()
    if isinstance(formatter, FixedFormatter) and not "".join(formatter.seq).isascii():
        names = "".join(formatter.seq)
        formatter.seq = [legible(name) for name in formatter.seq]
        axis.set_tick_params(labelfontfamily=families(names))
