"""The figure of crop importance."""

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import Measure
from tokenprune.experiments.common.intervals import wilson
from tokenprune.experiments.common.plots import FAINT, INK, style, titles

__all__ = [
    "DROPPED",
    "figure",
    "holding",
    "uneven",
]


DROPPED = ("highest", "random", "lowest")
"""Which crop is dropped."""


_HUES = {"highest": "#c44e52", "random": "#8c8c8c", "lowest": "#4c72b0"}


def figure(
    table: pd.DataFrame,
    crops: pd.DataFrame,
    objects: pd.DataFrame,
    model: str,
    score: str,
    measure: Measure = "accuracy",
) -> Figure:
    """Scores by rank, locations of the objects, and the loss of accuracy without a crop.

    Args:
        table: As `drops` returns it.
        crops, objects: As `scored` returns them.
        model: Name of the model.
        score: Signal that scores the thumbnail.
        measure: What the table measures.
    """
    held = holding(objects)
    widths = [1.1, 0.9, 2.2] if len(held) else [1.1, 2.4]
    with style():
        figure = Figure(figsize=(3.9 * sum(widths), 5.6), layout="constrained")
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        _scores(panels[0], crops)
        if len(held):
            _objects(panels[1], held)
        _costs(panels[-1], table, measure)
        for axes in panels:
            axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)
            axes.xaxis.label.set_size(13)
            axes.yaxis.label.set_size(13)
        images = crops["image_id"].nunique()
        titles(
            figure,
            f"What a crop is worth to {model}",
            f"{images} images; score of a crop: {score} of the thumbnail, mean over its region "
            f"(of unequal sizes in {uneven(crops)} images); bars: 95 % confidence intervals",
        )
    return figure


def _scores(axes: Axes, crops: pd.DataFrame) -> None:
    count = crops.groupby("image_id")["crop"].transform("size")
    usual = crops[count == count.mode().iloc[0]]
    ranks = sorted(usual["rank"].unique())
    line = {"color": INK, "linewidth": 1.2}
    # Seaborn's version passes an argument that Matplotlib has deprecated.
    axes.boxplot(
        [usual["centred"][usual["rank"] == rank] for rank in ranks],
        positions=range(len(ranks)), widths=0.6, showfliers=False, patch_artist=True,
        boxprops={"facecolor": "#d9d9d9", "edgecolor": INK, "linewidth": 1.2},
        medianprops=line, whiskerprops=line, capprops=line,
    )  # fmt: skip
    sns.stripplot(
        usual, x="rank", y="centred", order=ranks, ax=axes, color=INK, size=2.5, alpha=0.35
    )
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set(xlabel="rank of the crop", ylabel="score minus the image's mean")
    axes.set_title(f"Scores ({usual['image_id'].nunique()} images)", loc="left", fontsize=13)


def _objects(axes: Axes, held: pd.DataFrame) -> None:
    errors = [held["share"] - held["low"], held["high"] - held["share"]]
    axes.bar(held["rank"], held["share"], 0.7, color="#d9d9d9", zorder=2)
    axes.errorbar(
        held["rank"], held["share"], yerr=errors, ls="", color=INK, elinewidth=1.3, zorder=3
    )
    chance = held["chance"].iloc[0]
    axes.axhline(chance, color=FAINT, lw=1.2, ls=(0, (5, 3)), zorder=4)
    axes.annotate(
        "chance", (1, chance), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom",
        fontsize=11, color=FAINT,
    )  # fmt: skip
    axes.set(xlabel="rank of the crop", ylabel="share of objects asked about")
    axes.set_xticks(held["rank"])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_title(f"Where the object is ({held['n'].iloc[0]} questions)", loc="left", fontsize=13)


def _costs(axes: Axes, table: pd.DataFrame, measure: Measure) -> None:
    groups = list(pd.unique(table["group"]))
    plots.grouped_bars(
        axes,
        table.assign(place=table["group"], shown=table["dropped"], value=table["drop"]),
        {group: group.replace(" ", "\n") for group in groups},
        DROPPED,
        _HUES,
    )
    axes.axhline(0, color=INK, lw=1.2)
    axes.set_ylabel("accuracy lost" if measure == "accuracy" else "answers changed")
    axes.legend(
        title="dropped crop", frameon=False, fontsize=12, title_fontsize=12, loc="upper left"
    )
    axes.set_title("What dropping one costs", loc="left", fontsize=13)


def uneven(crops: pd.DataFrame) -> int:
    """The number of images in which the crops' regions of the thumbnail differ in size."""
    return int((crops.groupby("image_id")["region"].nunique() > 1).sum()) if len(crops) else 0


def holding(objects: pd.DataFrame) -> pd.DataFrame:
    """How often the object of a question is in the crop of each rank.

    Args:
        objects: As `scored` returns it; only images with the most common number of crops count.

    Returns:
        ``rank``, ``n`` (questions about an object), ``share`` with its 95 % Wilson interval ``low``
        and ``high``, and ``chance``, the share of an arbitrary crop.
    """
    if objects.empty:
        return pd.DataFrame()
    crops = int(objects["crops"].mode().iloc[0])
    usual = objects[objects["crops"] == crops]
    rows = []
    for rank in range(1, crops + 1):
        found = int((usual["rank"] == rank).sum())
        low, high = wilson(found, len(usual))
        row = {"rank": rank, "n": len(usual), "share": found / len(usual)}
        rows.append(row | {"low": low, "high": high, "chance": 1 / crops})
    return pd.DataFrame(rows)
