"""Parts that the figures of several experiments share."""

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

from tokenprune.experiments.common.files import replace_file

__all__ = [
    "FAINT",
    "INK",
    "MARKERS",
    "bars",
    "grouped_bars",
    "legend_above",
    "looks",
    "method_labels",
    "percent",
    "save",
    "slide",
    "spread",
    "style",
    "titles",
]


INK, FAINT = "#262626", "#8c8c8c"


MARKERS = "osD^vPX*"


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
    """A figure of grouped bars with intervals; see `grouped_bars`."""
    with style():
        figure, axes = slide(title, subtitle)
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
    """Draw a group of bars for every place and a bar for every hue, with intervals, in percent.

    Args:
        axes: The axes to draw on.
        table: ``place``, ``shown`` (the hue), ``value``, ``low`` and ``high``.
        places: Places in order, with their labels.
        hues: Hues in order.
        colours: Colours of hues; other hues get those of the palette.
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
    """Write ``figure`` as ``path``.png and ``path``.pdf, each atomically."""
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
        "pdf.fonttype": 42,  # text stays editable in PDF files
        "text.color": INK,
        "text.parse_math": False,  # kinds and file names may contain dollar signs
    }
    with (
        sns.axes_style("whitegrid"),
        sns.plotting_context("talk", font_scale=0.85),
        rc_context(details),
    ):
        yield


def slide(title: str, subtitle: str) -> tuple[Figure, Axes]:
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
    # Below the title, in the line that its line break reserves.
    figure.text(0.01, 1 - 0.62 / figure.get_figheight(), subtitle, fontsize=12, color=FAINT)


def method_labels(table: pd.DataFrame) -> list[str]:
    return list(pd.unique(table["label"]))


def percent(share: float, decimals: int | None = None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def looks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Colour and marker of every method, the same in all figures of a comparison."""
    methods = method_labels(table)
    colours = sns.color_palette("colorblind", max(len(methods), 1))
    return {
        method: {"color": colours[i], "fmt": MARKERS[i % len(MARKERS)]}
        for i, method in enumerate(methods)
    }


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Values moved minimally so that neighbours are ``gap`` apart, in the same order."""
    order = np.argsort(values, kind="stable")
    # With i * gap taken off, "gap apart" means "not decreasing": an isotonic regression.
    from sklearn.isotonic import isotonic_regression

    shift = gap * np.arange(len(values))
    placed = np.empty(len(values))
    placed[order] = isotonic_regression(np.asarray(values)[order] - shift) + shift
    return [float(value) for value in placed]
