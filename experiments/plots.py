"""Figures of a comparison, made from its summary table."""

from collections.abc import Iterator, Sequence
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

from tokenprune.experiments.results import replace_file
from tokenprune.experiments.statistics import OVERALL

__all__ = ["accuracy", "accuracy_by_kind", "save"]

_INK, _FAINT = "#262626", "#8c8c8c"
_MARKERS = "osD^vPX*"
_COLUMNS = 3  # of the small multiples


def accuracy(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy of every method against retention, with the uncompressed model as reference.

    Args:
        summary: As `statistics.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
    """
    table = _compressed(summary)
    with _style():
        figure = Figure(figsize=(9.6, 5.4), layout="constrained")
        axes = figure.subplots()
        _panel(axes, table, summary, OVERALL)
        _label_lines(axes, table, summary)
        axes.set_xlabel("visual tokens kept")
        axes.set_ylabel("accuracy")
        _titles(figure, title, subtitle)
    return figure


def accuracy_by_kind(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """The same, one panel for each kind of question."""
    table = _compressed(summary)
    kinds = [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]
    columns = min(_COLUMNS, len(kinds))
    cells = len(kinds) + (len(kinds) % columns == 0)  # a place for the legend
    rows = -(-cells // columns)
    with _style():
        figure = Figure(figsize=(1.2 + 3.9 * columns, 1.2 + 3.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes, kind in zip(grid, kinds, strict=False):
            _panel(axes, table, summary, kind)
            axes.set_title(kind, loc="left", fontweight="bold", fontsize=13)
        for axes in grid[len(kinds) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        grid[len(kinds)].legend(handles, labels, loc="center left", frameon=False, fontsize=13)
        figure.supxlabel("visual tokens kept", fontsize=13, color=_INK)
        figure.supylabel("accuracy", fontsize=13, color=_INK)
        _titles(figure, title, subtitle)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as ``path``.png and ``path``.pdf, each in one step."""
    for suffix in (".png", ".pdf"):
        with replace_file(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, dpi=200)


# --- parts ----------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    quiet: dict[str, Any] = {
        "axes.grid.axis": "y",
        "grid.linewidth": 0.7,
        "axes.spines.left": False,
        "pdf.fonttype": 42,
    }
    plain = {"axes.spines.top": False, "axes.spines.right": False}
    colours = {"text.color": _INK, "axes.labelcolor": _INK}
    with (
        sns.axes_style("whitegrid"),
        sns.plotting_context("talk", font_scale=0.85),
        rc_context(quiet | plain | colours),
    ):
        yield


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    figure.suptitle(
        f"{title}\n", x=0.01, ha="left", fontsize=17, fontweight="bold", linespacing=1.5
    )
    # Below the title, in the line that its line break makes room for.
    figure.text(0.01, 1 - 0.62 / figure.get_figheight(), subtitle, fontsize=12, color=_FAINT)


def _compressed(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that are points of a curve; every curve starts at the uncompressed model."""
    finished = summary[(summary["status"] == "ok") & summary["accuracy"].notna()]
    return finished[finished["method"] != "uncompressed"]


def _methods(table: pd.DataFrame) -> list[str]:
    return list(pd.unique(table["label"]))


def _positions(table: pd.DataFrame) -> dict[float, int]:
    """Retention to place on the axis, evenly spaced, most tokens first."""
    return {value: place for place, value in enumerate(sorted({1.0, *table["retention"]})[::-1])}


def _panel(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame, kind: str) -> None:
    methods, positions = _methods(table), _positions(table)
    chosen = table[table["kind"] == kind]
    full = _reference(summary, kind)
    if not np.isnan(full["accuracy"]):
        axes.axhspan(full["accuracy_low"], full["accuracy_high"], color="black", alpha=0.06, lw=0)
        axes.axhline(full["accuracy"], color=_INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.plot([0], [full["accuracy"]], "o", color=_INK, ms=7, zorder=4, label="uncompressed")
    # Side by side, so that no interval hides another.
    offsets = np.linspace(-0.09, 0.09, len(methods)) if len(methods) > 1 else [0.0]
    for method, offset, look in zip(methods, offsets, _looks(len(methods)), strict=True):
        # R = 1 is the reference line; the curves begin there.
        rows = chosen[(chosen["label"] == method) & (chosen["retention"] < 1)]
        rows = rows.sort_values("retention", ascending=False)
        places = rows["retention"].map(positions).to_numpy(float) + offset
        values = rows["accuracy"].to_numpy(float)
        curve = (np.append(0.0, places), np.append(full["accuracy"], values))
        axes.plot(*curve, color=look["color"], lw=2, alpha=0.9)
        errors = [values - rows["accuracy_low"], rows["accuracy_high"] - values]
        axes.errorbar(
            places, values, yerr=errors, ls="", ms=8, mec="white", mew=0.8, elinewidth=1.6,
            capsize=0, label=method, zorder=3, **look,
        )  # fmt: skip
    axes.set_xticks(list(positions.values()), [_percent(share) for share in positions])
    axes.set_xlim(-0.25, max(positions.values()) + 0.25)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=_INK)


def _reference(summary: pd.DataFrame, kind: str) -> pd.Series:
    """The summary row of the uncompressed model; missing values if it was not finished."""
    chosen = summary[(summary["method"] == "uncompressed") & (summary["kind"] == kind)]
    return chosen.iloc[0] if len(chosen) else pd.Series(np.nan, index=summary.columns)


def _percent(share: float, decimals: int | None = None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def _looks(count: int) -> list[dict[str, Any]]:
    colours = sns.color_palette("colorblind", max(count, 1))
    return [{"color": colours[i], "fmt": _MARKERS[i % len(_MARKERS)]} for i in range(count)]


def _label_lines(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Write every method's name at the end of its curve, moved apart where they would touch."""
    chosen = table[(table["kind"] == OVERALL) & (table["retention"] < 1)]
    methods = _methods(table)
    looks = dict(zip(methods, _looks(len(methods)), strict=True))
    ends: list[tuple[str, float, dict[str, Any]]] = []
    for method, rows in chosen.groupby("label", sort=False):
        level = rows["accuracy"][rows["retention"].idxmin()]
        style = {"color": looks[str(method)]["color"], "fontweight": "bold"}
        ends.append((str(method).replace(":", "\n", 1).replace(",", ", "), level, style))
    level = _reference(summary, OVERALL)["accuracy"]
    if not np.isnan(level):
        ends.append((f"uncompressed {_percent(level, 1)}", level, {"color": _INK}))
    low, high = axes.get_ylim()
    lines = max((name.count("\n") + 1 for name, *_ in ends), default=1)
    heights = _spread([level for _, level, _ in ends], 0.058 * lines * (high - low))
    place = max(_positions(table).values()) + 0.3
    for (name, _, style), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (place, height), va="center", fontsize=13, annotation_clip=False, **style
        )


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Values moved as little as needed for neighbours to be ``gap`` apart; the order stays."""
    order = np.argsort(values, kind="stable")
    # With i * gap taken off, "gap apart" means "not decreasing": an isotonic regression.
    from sklearn.isotonic import isotonic_regression

    shift = gap * np.arange(len(values))
    placed = np.empty(len(values))
    placed[order] = isotonic_regression(np.asarray(values)[order] - shift) + shift
    return [float(value) for value in placed]
