"""Figures of an ablation."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.plots import INK, MARKERS, Canvas, canvas, errors, in_percent
from tokenprune.experiments.common.request import FIGURES, FigureOptions
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "figure",
]


def figure(
    table: pd.DataFrame,
    summary: pd.DataFrame,
    model: str,
    options: FigureOptions = FIGURES,
) -> Figure:
    """A panel for every sweep of one option, a heat map per retention for those of two.

    Args:
        table: As `ablation.run.differences` returns it.
        summary: As `summary.summarise` returns it; gives intervals and the uncompressed model.
        model: Name of the model.
        options: Width and titles.
    """
    overall = summary[summary["kind"] == OVERALL]
    ends = overall[["label", "retention", "accuracy_low", "accuracy_high"]]
    table = table.merge(ends, on=["label", "retention"], how="left")
    panels: list[pd.DataFrame] = []
    for _, sweep in table.groupby("sweep", sort=False):
        maps = [part for _, part in sweep.groupby("retention", sort=False)]
        panels += maps if sweep["second"].iloc[0] else [sweep]
    full = overall.loc[overall["method"] == UNCOMPRESSED, "accuracy"]
    reference = float(full.iloc[0]) if len(full) else np.nan
    with canvas(options, f"Effect of the options on {model}", _caption(table, panels)) as made:
        rows, columns = made.panels(len(panels), 13 * made.line, most=3)
        inches = made.size.width / columns - 5 * made.line
        height = min(made.size.height, 0.95 * made.size.width / columns + 3 * made.line)
        grid = made.subplots(rows * height, rows, columns).flatten()
        for axes, part in zip(grid, panels, strict=False):
            draw = _heat if part["second"].iloc[0] else _lines
            draw(made, axes, part, inches, reference)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        lines = [axes for axes in grid if axes.containers]
        limits = [end for axes in lines for end in axes.get_ylim()]
        for axes in lines:
            axes.set_ylim(min(limits), max(limits))
        if lines and table["retention"].nunique() > 1:
            made.legend(lines[0].get_legend_handles_labels(), blank=grid[len(panels) :])
    return made.figure


def _caption(table: pd.DataFrame, panels: list[pd.DataFrame]) -> str:
    """What the panels show: bars and lines only where there are some."""
    words = [f"accuracy on {int(table['n'].max())} questions"]
    if table["retention"].nunique() == 1:
        words[0] += f", {plots.percent(table['retention'].iloc[0])} kept"
    if any(not part["second"].iloc[0] for part in panels):
        words += ["bars: 95 % confidence intervals", "dashed: uncompressed"]
        words += ["shaded: the setting that others are compared with"]
    if any(part["second"].iloc[0] for part in panels):
        words += ["numbers in maps: accuracy in %"]
    return "; ".join(words)


def _numbers(values: Iterable[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def _ordered(values: Iterable[str]) -> list[str]:
    """Distinct values, numbers in ascending order, names in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if _numbers(distinct) else distinct


def _lines(made: Canvas, axes: Axes, part: pd.DataFrame, inches: float, full: float) -> None:
    """Accuracy at every value, joined by lines where values are numbers."""
    places = {value: place for place, value in enumerate(_ordered(part["first_value"]))}
    ratios = list(pd.unique(part["retention"]))
    offsets = np.linspace(-0.12, 0.12, len(ratios)) if len(ratios) > 1 else [0.0]
    for index, (ratio, colour) in enumerate(zip(ratios, plots.PALETTE, strict=False)):
        rows = part[part["retention"] == ratio]
        rows = rows.assign(place=rows["first_value"].map(places)).sort_values("place")
        axes.errorbar(
            rows["place"] + offsets[index], rows["accuracy"],
            yerr=errors(rows, "accuracy", "accuracy_low", "accuracy_high"), color=colour,
            mec="white", mew=0.5, elinewidth=0.8 * made.size.line, fmt=MARKERS[index],
            ls="-" if _numbers(places) else "", label=f"{plots.percent(ratio)} kept", zorder=3,
        )  # fmt: skip
    axes.axhline(full, color=INK, lw=0.7 * made.size.line, ls=(0, (5, 3)), zorder=1)
    base = places[part["first_value"].iloc[0]]
    axes.axvspan(base - 0.3, base + 0.3, color="black", alpha=0.06, lw=0)
    _name_ticks(made, axes, list(places), inches)
    axes.set_xlim(-0.5, len(places) - 0.5)
    place: Any = axes.get_subplotspec()
    axes.set(xlabel=part["first"].iloc[0], ylabel="accuracy (%)" if place.is_first_col() else "")
    in_percent(axes.yaxis)
    axes.set_title(wrapped(part["method"].iloc[0], inches, made.size.text, bold=True))


def _name_ticks(made: Canvas, axes: Axes, names: list[str], inches: float) -> None:
    """Label the values, upright where they are too long for one line."""
    room = 0.95 * inches / len(names)
    upright = made.width_of(*names) > room
    if upright:  # names with underscores can be broken there
        broken = [name.replace("_", "_\n") for name in names]
        if made.width_of(*broken) < room:
            names, upright = broken, False
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)


def _heat(made: Canvas, axes: Axes, part: pd.DataFrame, inches: float, full: float) -> None:
    """Accuracy at every pair of values."""
    rows, columns = _ordered(part["first_value"]), _ordered(part["second_value"])
    wide = 100 * part.pivot(index="first_value", columns="second_value", values="accuracy")
    wide = wide.loc[rows, columns]
    limits = float(np.nanmin(wide)), float(np.nanmax(wide))
    made.heat(axes, wide, "{:.1f}", limits if limits[0] < limits[1] else (0, 100))
    _name_ticks(made, axes, columns, inches)
    axes.set(xlabel=part["second"].iloc[0], ylabel=part["first"].iloc[0])
    title = f"{part['method'].iloc[0]}, {plots.percent(part['retention'].iloc[0])} kept"
    axes.set_title(wrapped(title, inches, made.size.text, bold=True))
