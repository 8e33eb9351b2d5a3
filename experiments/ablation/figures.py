"""Figures of an ablation."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenprune.experiments.common.plots import INK, MARKERS, style, titles
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "figure",
]


_PANELS = 3  # in a row


def figure(table: pd.DataFrame, summary: pd.DataFrame, model: str) -> Figure:
    """A panel for every sweep of one option, a heat map per retention for those of two.

    Args:
        table: As `ablation.run.differences` returns it.
        summary: As `summary.summarise` returns it; gives intervals and the uncompressed model.
        model: Name of the model.
    """
    overall = summary[summary["kind"] == OVERALL]
    ends = overall[["label", "retention", "accuracy_low", "accuracy_high"]]
    table = table.merge(ends, on=["label", "retention"], how="left")
    panels = []
    for _, sweep in table.groupby("sweep", sort=False):
        if sweep["second"].iloc[0]:
            panels += [part for _, part in sweep.groupby("retention", sort=False)]
        else:
            panels.append(sweep)
    columns = min(_PANELS, len(panels))
    rows = -(-len(panels) // columns)
    full = overall.loc[overall["method"] == UNCOMPRESSED, "accuracy"]
    with style():
        figure = Figure(figsize=(max(9.6, 5.2 * columns), 1.3 + 4.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, part in zip(grid, panels, strict=False):
            if part["second"].iloc[0]:
                _heat(axes, part)
            else:
                _lines(axes, part, float(full.iloc[0]) if len(full) else np.nan)
            axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)
            axes.xaxis.label.set_size(13)
            axes.yaxis.label.set_size(13)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        lines = [axes for axes in grid if axes.containers]
        limits = [end for axes in lines for end in axes.get_ylim()]
        for axes in lines:
            axes.set_ylim(min(limits), max(limits))
        if lines and table["retention"].nunique() > 1:
            handles, labels = lines[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        titles(
            figure,
            f"Effect of the options on {model}",
            f"accuracy on {int(table['n'].max())} questions; bars: 95 % confidence intervals; "
            "dashed: uncompressed; shaded: the setting that others are compared with",
        )
    return figure


def _numbers(values: Iterable[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def _ordered(values: Iterable[str]) -> list[str]:
    """Distinct values, numbers in ascending order, names in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if _numbers(distinct) else distinct


def _lines(axes: Axes, part: pd.DataFrame, full: float) -> None:
    """Accuracy at every value, joined by lines where values are numbers."""
    places = {value: place for place, value in enumerate(_ordered(part["first_value"]))}
    ratios = list(pd.unique(part["retention"]))
    offsets = np.linspace(-0.12, 0.12, len(ratios)) if len(ratios) > 1 else [0.0]
    colours = sns.color_palette("colorblind", len(ratios))
    for index, ratio in enumerate(ratios):
        rows = part[part["retention"] == ratio]
        rows = rows.assign(place=rows["first_value"].map(places)).sort_values("place")
        x = rows["place"] + offsets[index]
        errors = [rows["accuracy"] - rows["accuracy_low"], rows["accuracy_high"] - rows["accuracy"]]
        axes.errorbar(
            x, rows["accuracy"], yerr=np.abs(errors), color=colours[index], ms=8, mec="white",
            mew=0.8, elinewidth=1.6, fmt=MARKERS[index], ls="-" if _numbers(places) else "",
            lw=1.5, label=f"keeps {100 * ratio:.3g} %", zorder=3,
        )  # fmt: skip
    axes.axhline(full, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
    base = places[part["first_value"].iloc[0]]
    axes.axvspan(base - 0.3, base + 0.3, color="black", alpha=0.06, lw=0)
    broken = [value.replace("_", "_\n") for value in places]
    axes.set_xticks(list(places.values()), broken)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set(xlabel=part["first"].iloc[0], ylabel="accuracy")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # whole percents
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_title(part["method"].iloc[0], loc="left", fontsize=14, fontweight="bold")


def _heat(axes: Axes, part: pd.DataFrame) -> None:
    """Accuracy at every pair of values."""
    rows, columns = _ordered(part["first_value"]), _ordered(part["second_value"])
    wide = 100 * part.pivot(index="first_value", columns="second_value", values="accuracy")
    sns.heatmap(
        wide.loc[rows, columns], ax=axes, annot=True, fmt=".1f", cmap="crest", linewidths=2,
        cbar=False, annot_kws={"size": 13},
    )  # fmt: skip
    axes.set(xlabel=part["second"].iloc[0], ylabel=part["first"].iloc[0])
    axes.tick_params(axis="y", rotation=0)
    title = (
        f"{part['method'].iloc[0]}, keeps {100 * part['retention'].iloc[0]:.3g} %: accuracy in %"
    )
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
