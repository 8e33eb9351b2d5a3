"""The figure of crop importance."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import Measure
from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.intervals import wilson
from tokenprune.experiments.common.plots import FAINT, INK, Canvas, canvas, errors, in_percent
from tokenprune.experiments.common.request import FIGURES, FigureOptions

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
    options: FigureOptions = FIGURES,
) -> Figure:
    """Scores by rank, locations of the objects, and the loss of accuracy without a crop.

    Args:
        table: As `drops` returns it.
        crops, objects: As `scored` returns them.
        model: Name of the model.
        score: Signal that scores the thumbnail.
        measure: What the table measures.
        options: Width and titles.
    """
    held = holding(objects)
    images = crops["image_id"].nunique()
    subtitle = (
        f"{images} images; rank 1: the crop with the highest score; score of a crop: {score} of "
        f"the thumbnail, mean over its region (of unequal sizes in {uneven(crops)} images); lines "
        "on bars: 95 % confidence intervals; boxes: quartiles"
    )
    with canvas(options, f"What a crop is worth to {model}", subtitle) as made:
        # The panel with a group for each kind of question is wide: below the others on paper.
        narrow = 2 if len(held) else 1
        above, below = made.rooms(*[0.7 * made.size.height + 4.5 * made.line] * 2)
        panels = above.subgridspec(1, narrow).subplots(squeeze=False)[0]
        _scores(made, panels[0], crops)
        if len(held):
            _objects(made, panels[1], held)
        _costs(made, made.figure.add_subplot(below), table, measure)
    return made.figure


def _scores(made: Canvas, axes: Axes, crops: pd.DataFrame) -> None:
    count = crops.groupby("image_id")["crop"].transform("size")
    usual = crops[count == count.mode().iloc[0]]
    ranks = sorted(usual["rank"].unique())
    groups = [usual["centred"][usual["rank"] == rank].to_numpy() for rank in ranks]
    line = {"color": INK, "linewidth": 0.6 * made.size.line}
    axes.boxplot(
        groups, positions=ranks, widths=0.6, showfliers=False, patch_artist=True,
        boxprops={"facecolor": "#d9d9d9", "edgecolor": INK, "linewidth": line["linewidth"]},
        medianprops=line, whiskerprops=line, capprops=line,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for rank, values in zip(ranks, groups, strict=True):
        places = rank + rng.uniform(-0.1, 0.1, len(values))
        axes.plot(places, values, "o", color=INK, ms=0.3 * made.size.marker, mew=0, alpha=0.35)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.set(xlabel="rank of the crop", ylabel="score minus\nthe image's mean")
    axes.set_title(f"Scores\n({usual['image_id'].nunique()} images)")


def _objects(made: Canvas, axes: Axes, held: pd.DataFrame) -> None:
    axes.bar(held["rank"], held["share"], 0.7, color="#d9d9d9", zorder=2)
    axes.errorbar(
        held["rank"], held["share"], yerr=errors(held, "share", "low", "high"), ls="", color=INK,
        elinewidth=0.7 * made.size.line, zorder=3,
    )  # fmt: skip
    chance = held["chance"].iloc[0]
    axes.axhline(chance, color=FAINT, lw=0.7 * made.size.line, ls=(0, (5, 3)), zorder=4)
    axes.set(xlabel="rank of the crop", ylabel="objects asked\nabout (%)")
    axes.set_xticks(held["rank"], [str(rank) for rank in held["rank"]])
    in_percent(axes.yaxis)
    title = f"Where the object is ({held['n'].iloc[0]} questions; dashed: chance)"
    axes.set_title(wrapped(title, made.size.width / 2 - 5 * made.line, made.size.text, bold=True))


def _costs(made: Canvas, axes: Axes, table: pd.DataFrame, measure: Measure) -> None:
    groups = list(pd.unique(table["group"]))
    plots.grouped_bars(
        made,
        axes,
        table.assign(place=table["group"], shown=table["dropped"], value=table["drop"]),
        {group: group.replace(" ", "\n") for group in groups},
        DROPPED,
        _HUES,
    )
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_ylabel("accuracy lost (points)" if measure == "accuracy" else "answers changed (%)")
    names = {"highest": "highest score", "random": "random", "lowest": "lowest score"}
    axes.legend(
        [bar for bar in axes.containers if bar.get_label() in names], list(names.values()),
        frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(names),
        handlelength=1.2, columnspacing=1.2, borderpad=0.1, borderaxespad=0.1,
    )  # fmt: skip
    axes.set_title("What dropping a crop costs", pad=1.7 * 72 * made.line)


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
