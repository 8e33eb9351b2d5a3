"""Figures of a comparison, made from its summary table."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenprune.experiments.intervals import OVERALL
from tokenprune.experiments.results import replace_file

__all__ = [
    "accuracy",
    "accuracy_by_cost",
    "accuracy_by_kind",
    "bars",
    "grouped_bars",
    "legend_above",
    "save",
]

INK, FAINT = "#262626", "#8c8c8c"
MARKERS = "osD^vPX*"
_COLUMNS = 3  # of the small multiples


def accuracy(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy of every method against retention, with the uncompressed model as reference.

    Args:
        summary: As `intervals.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
    """
    table = _by_retention(summary)
    with style():
        figure, axes = _slide(title, subtitle)
        _panel(axes, table, summary, OVERALL, start=0)
        _retention_axis(axes, table)
        _label_lines(axes, table, summary)
        axes.set_xlabel("visual tokens kept (retention)")
    return figure


def accuracy_by_cost(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy against what the prefill costs, which at one retention differs between methods."""
    table = _compressed(summary)
    table = table.assign(place=table["flops"] / table["uncompressed_flops"])
    with style():
        figure, axes = _slide(title, subtitle)
        _panel(axes, table, summary, OVERALL, start=1)
        axes.set_xlim(1.05, max(0, table["place"].min() - 0.05))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        _label_lines(axes, table, summary)
        axes.set_xlabel("prefill FLOPs of the language model, selection included")
    return figure


def accuracy_by_kind(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """The same, one panel for each kind of question."""
    table = _by_retention(summary)
    kinds = [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]
    columns = min(_COLUMNS, len(kinds))
    cells = len(kinds) + (len(kinds) % columns == 0)  # a place for the legend
    rows = -(-cells // columns)
    with style():
        figure = Figure(figsize=(1.2 + 3.9 * columns, 1.2 + 3.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes, kind in zip(grid, kinds, strict=False):
            _panel(axes, table, summary, kind, start=0)
            _retention_axis(axes, table)
            axes.set_title(kind, loc="left", fontweight="bold", fontsize=13)
        for axes in grid[len(kinds) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        grid[len(kinds)].legend(handles, labels, loc="center left", frameon=False, fontsize=13)
        figure.supxlabel("visual tokens kept (retention)", fontsize=13, color=INK)
        figure.supylabel("accuracy", fontsize=13, color=INK)
        titles(figure, title, subtitle)
    return figure


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
) -> Figure:
    """Groups of bars with intervals on a slide of its own; see `grouped_bars`."""
    with style():
        figure, axes = _slide(title, subtitle)
        grouped_bars(axes, table, places, hues, colours)
        if reference is not None:
            axes.axhline(reference, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.set_ylabel(label, fontsize=13)
        legend_above(axes)
    return figure


def legend_above(axes: Axes) -> None:
    """The legend in one line on top of the panel."""
    axes.legend(
        frameon=False, fontsize=12, ncols=10, loc="lower left", bbox_to_anchor=(0, 1),
        borderaxespad=0, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


def grouped_bars(
    axes: Axes,
    table: pd.DataFrame,
    places: Mapping[str, str],
    hues: Sequence[str],
    colours: Mapping[str, Any] | None = None,
) -> None:
    """One group of bars for every place, one bar for every hue, with intervals, in percent.

    Args:
        axes: Where to draw.
        table: ``place``, ``shown`` (the hue), ``value``, ``low`` and ``high``.
        places: Places in their order, and what to write below.
        hues: In their order.
        colours: Of hues; those of the palette for others.
    """
    width = 0.8 / len(hues)
    palette = sns.color_palette("colorblind", len(hues))
    chosen = dict(zip(hues, palette, strict=True)) | dict(colours or {})
    for index, hue in enumerate(hues):
        rows = table[table["shown"] == hue].set_index("place").reindex(list(places))
        x = np.arange(len(places)) + (index - (len(hues) - 1) / 2) * width
        errors = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
        axes.bar(x, rows["value"], 0.92 * width, color=chosen[hue], label=hue, zorder=2)
        axes.errorbar(
            x, rows["value"], yerr=np.abs(errors), ls="", color=INK, elinewidth=1.3, zorder=3
        )
    axes.set_xticks(range(len(places)), list(places.values()))
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as ``path``.png and ``path``.pdf, each in one step."""
    for suffix in (".png", ".pdf"):
        with replace_file(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=200)


# --- parts ----------------------------------------------------------------------------------------


@contextmanager
def style() -> Iterator[None]:
    details: Any = {
        "axes.grid.axis": "y",
        "axes.labelcolor": INK,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.linewidth": 0.7,
        "pdf.fonttype": 42,  # text stays text in PDF editors
        "text.color": INK,
        "text.parse_math": False,  # kinds and names of files may hold dollar signs
    }
    with (
        sns.axes_style("whitegrid"),
        sns.plotting_context("talk", font_scale=0.85),
        rc_context(details),
    ):
        yield


def _slide(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """A figure of one panel, 16:9."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("accuracy")
    titles(figure, title, subtitle)
    return figure, axes


def titles(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(
        f"{title}\n", x=0.01, ha="left", fontsize=17, fontweight="bold", linespacing=1.5
    )
    # Below the title, in the line that its line break makes room for.
    figure.text(0.01, 1 - 0.62 / figure.get_figheight(), subtitle, fontsize=12, color=FAINT)


def _compressed(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that are points of a curve; R = 1 is the reference, where every curve starts."""
    finished = (summary["status"] == "ok") & summary["accuracy"].notna()
    return summary[finished & (summary["retention"] < 1)]


def _by_retention(summary: pd.DataFrame) -> pd.DataFrame:
    """The points with their place on a retention axis."""
    table = _compressed(summary)
    methods, positions = _methods(table), _positions(table)
    # Side by side, so that no interval hides another.
    offsets = dict(zip(methods, np.linspace(-0.09, 0.09, max(len(methods), 2)), strict=False))
    if len(methods) == 1:
        offsets = {methods[0]: 0.0}
    place = table["retention"].map(positions) + table["label"].map(offsets).astype(float)
    return table.assign(place=place)


def _methods(table: pd.DataFrame) -> list[str]:
    return list(pd.unique(table["label"]))


def _positions(table: pd.DataFrame) -> dict[float, int]:
    """Retention to place on the axis, evenly spaced, most tokens first."""
    return {value: place for place, value in enumerate(sorted({1.0, *table["retention"]})[::-1])}


def _retention_axis(axes: Axes, table: pd.DataFrame) -> None:
    positions = _positions(table)
    axes.set_xticks(list(positions.values()), [_percent(share) for share in positions])
    axes.set_xlim(-0.25, max(positions.values()) + 0.25)


def _panel(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame, kind: str, start: float) -> None:
    """Curves of one kind of question; ``table`` has x in ``place``, and 100 % is at ``start``."""
    full = _reference(summary, kind)
    if not np.isnan(full["accuracy"]):
        axes.axhspan(full["accuracy_low"], full["accuracy_high"], color="black", alpha=0.06, lw=0)
        axes.axhline(full["accuracy"], color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.plot([start], [full["accuracy"]], "o", color=INK, ms=7, zorder=4, label="uncompressed")
    for method, look in _looks(table).items():
        rows = table[(table["kind"] == kind) & (table["label"] == method)]
        rows = rows.sort_values("retention", ascending=False)
        places, values = rows["place"].to_numpy(float), rows["accuracy"].to_numpy(float)
        curve = (np.append(start, places), np.append(full["accuracy"], values))
        axes.plot(*curve, color=look["color"], lw=2, alpha=0.9)
        errors = [values - rows["accuracy_low"], rows["accuracy_high"] - values]
        axes.errorbar(
            places, values, yerr=errors, ls="", ms=8, mec="white", mew=0.8, elinewidth=1.6,
            capsize=0, label=method, zorder=3, **look,
        )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)


def _reference(summary: pd.DataFrame, kind: str) -> pd.Series:
    """The summary row of the uncompressed model; missing values if it was not finished."""
    chosen = summary[(summary["method"] == "uncompressed") & (summary["kind"] == kind)]
    return chosen.iloc[0] if len(chosen) else pd.Series(np.nan, index=summary.columns)


def _percent(share: float, decimals: int | None = None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def _looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method, the same in all figures of a comparison."""
    methods = _methods(table)
    colours = sns.color_palette("colorblind", max(len(methods), 1))
    return {
        method: {"color": colours[i], "fmt": MARKERS[i % len(MARKERS)]}
        for i, method in enumerate(methods)
    }


def _label_lines(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Write every method's name beside its last point, moved apart where they would touch."""
    ends: list[tuple[str, float, dict[str, Any]]] = []
    for method, look in _looks(table).items():
        rows = table[(table["kind"] == OVERALL) & (table["label"] == method)]
        level = rows["accuracy"][rows["retention"].idxmin()]
        name = method.replace(":", "\n", 1).replace(",", ", ")
        ends.append((name, level, {"color": look["color"], "fontweight": "bold"}))
    level = _reference(summary, OVERALL)["accuracy"]
    if not np.isnan(level):
        ends.append((f"uncompressed {_percent(level, 1)}", level, {"color": INK}))
    low, high = axes.get_ylim()
    lines = max((name.count("\n") + 1 for name, *_ in ends), default=1)
    heights = _spread([level for _, level, _ in ends], 0.058 * lines * (high - low))
    for (name, _, style), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (1.015, height), xycoords=axes.get_yaxis_transform(), va="center", fontsize=13,
            annotation_clip=False, **style,
        )  # fmt: skip


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Values moved as little as needed for neighbours to be ``gap`` apart; the order stays."""
    order = np.argsort(values, kind="stable")
    # With i * gap taken off, "gap apart" means "not decreasing": an isotonic regression.
    from sklearn.isotonic import isotonic_regression

    shift = gap * np.arange(len(values))
    placed = np.empty(len(values))
    placed[order] = isotonic_regression(np.asarray(values)[order] - shift) + shift
    return [float(value) for value in placed]
