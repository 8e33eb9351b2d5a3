"""Figures of the positional-bias analysis."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from tokenprune.experiments.common.plots import FAINT, INK, style, titles
from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL, profiles
from tokenprune.experiments.positional_bias.rearrange import CONDITIONS, REVERSED

__all__ = [
    "by_place",
    "by_slot",
    "equivariance",
    "figures",
    "on_the_image",
]


_COLUMNS = 4  # of the small multiples


_HUES = {"normal order": "#9ecae1", "reversed order": "#08519c"}


_LEVELS = {"selector": "selector alone", "pipeline": "whole pipeline"}


_NAMES = {
    "reversed-crops": "reversed crops",
    "reversed-frames": "reversed frames",
    "flip-lr": "left-right flip",
    "flip-tb": "top-bottom flip",
    "exchanged-crops": "crops exchanged under\nan unchanged thumbnail",
    ALL: "all together",
}


def figures(
    tokens: pd.DataFrame, statistics: pd.DataFrame, model: str
) -> Iterator[tuple[str, Figure]]:
    """Every figure with a name, for each retention and modality.

    Args:
        tokens: As `positional_bias` returns them.
        statistics: As `positional_bias` returns them.
        model: Name of the model.
    """
    for (retention, modality), part in tokens.groupby(
        ["retention", "modality"], sort=False, observed=True
    ):
        chosen = (statistics["retention"] == retention) & (statistics["modality"] == modality)
        suffix = f"{modality}-{100 * retention:.3g}"
        where = f"{model}, {100 * retention:.3g} % of the visual tokens kept"
        turned = part["condition"].isin(REVERSED) & (part["level"] == "selector")
        part = part.assign(method=part["method"].astype(str))
        both = part[(part["condition"] == NORMAL) | turned]
        usual = _most_common(both[both["slots"] > 1])
        if turned.any() and len(usual):
            yield f"slots-{suffix}", by_slot(usual, where)
            yield f"sequence-{suffix}", by_place(usual, where)
            yield f"map-{suffix}", on_the_image(usual, where)
        yield f"equivariance-{suffix}", equivariance(statistics[chosen], where)


def by_slot(tokens: pd.DataFrame, where: str) -> Figure:
    """Keep share of every crop slot or frame, normal and reversed order, a panel per method.

    Args:
        tokens: Of one retention ratio and of images with equally many slots, in the normal and in a
            reversed condition.
        where: Model and retention ratio, for the subtitle.
    """
    slots = tokens[tokens["slot"] >= 0]
    shares = (
        slots.groupby(["method", "condition", "image", "slot"], sort=False, observed=True)["kept"]
        .mean()
        .reset_index()
    )
    shares["order"] = np.where(shares["condition"] == NORMAL, *_HUES)
    shares["slot"] += 1
    what = "frame" if (tokens["modality"] == "video").any() else "crop slot"
    with style():
        figure, grid = _multiples(list(pd.unique(tokens["method"])), height=2.7)
        for axes, (method, rows) in zip(grid, shares.groupby("method", sort=False), strict=False):
            sns.barplot(
                rows, x="slot", y="kept", hue="order", hue_order=list(_HUES), palette=_HUES,
                errorbar=("ci", 95), n_boot=500, seed=0, width=0.78, ax=axes, legend=False,
                err_kws={"color": INK, "linewidth": 1.1}, saturation=1,
            )  # fmt: skip
            _finish(axes, str(method))
        figure.supxlabel(f"{what} in the order of the sequence", fontsize=13, color=INK)
        figure.supylabel("share of its tokens kept", fontsize=13, color=INK)
        _legend(figure, [Patch(color=colour, label=name) for name, colour in _HUES.items()])
        titles(
            figure,
            f"Which {what}s keep their tokens",
            f"{where}. Equal bars of a pair: location decides; mirrored: content decides. "
            f"{_counted(tokens, what)}; 95 % intervals.",
        )
    return figure


def by_place(tokens: pd.DataFrame, where: str) -> Figure:
    """Keep probability along the packed sequence, normal and reversed order.

    Args:
        tokens: As for `by_slot`.
        where: As for `by_slot`.
    """
    # About ten tokens per bin, so that the curves do not show differences in bin size.
    table = profiles(tokens, bins=int(np.clip(tokens["token"].max() / 10, 5, 20)))
    table = table[table["axis"] == "position"]
    methods = list(pd.unique(tokens["method"]))
    thumbnail = tokens["position"][tokens["slot"] < 0].max()
    what = "frame" if (tokens["modality"] == "video").any() else "crop slot"
    with style():
        figure, grid = _multiples(methods, height=2.5)
        for axes, method in zip(grid, methods, strict=False):
            for condition, rows in table[table["method"] == method].groupby(
                "condition", sort=False, observed=True
            ):
                colour = _HUES["normal order" if condition == NORMAL else "reversed order"]
                axes.fill_between(
                    rows["place"], rows["kept_low"], rows["kept_high"],
                    color=colour, alpha=0.2, lw=0,
                )  # fmt: skip
                # The lower curve is wider, so that both are visible where they coincide.
                width = 4.5 if condition == NORMAL else 1.6
                axes.plot(rows["place"], rows["kept"], color=colour, lw=width)
            if not np.isnan(thumbnail):
                axes.axvspan(0, thumbnail, color=FAINT, alpha=0.12, lw=0)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=""))
            _finish(axes, method)
        figure.supxlabel("position in the packed sequence, %", fontsize=13, color=INK)
        figure.supylabel("share kept", fontsize=13, color=INK)
        handles = [Patch(color=colour, label=name) for name, colour in _HUES.items()]
        if not np.isnan(thumbnail):
            handles.append(Patch(color=FAINT, alpha=0.2, label="thumbnail"))
        _legend(figure, handles)
        titles(
            figure,
            "Where in the sequence tokens are kept",
            f"{where}. {_counted(tokens, what)}; bands: 95 % intervals over images.",
        )
    return figure


def on_the_image(tokens: pd.DataFrame, where: str) -> Figure:
    """Keep probability by row and column: a map of the crop canvas, or of all frames.

    Args:
        tokens: As for `by_slot`; the normal condition is shown.
        where: As for `by_slot`.
    """
    shown = tokens[(tokens["condition"] == NORMAL) & (tokens["slot"] >= 0)]
    methods = list(pd.unique(tokens["method"]))
    what = "frame" if (tokens["modality"] == "video").any() else "crop slot"
    rows, cols = (1, 1) if what == "frame" else map(int, tokens["grid"].iloc[0].split("x"))
    with style():
        figure, grid = _multiples(methods, height=2.7)
        largest = shown.groupby(["method", "y", "x"], observed=True)["kept"].mean().max()
        for axes, method in zip(grid, methods, strict=False):
            cells = shown[shown["method"] == method].pivot_table(
                index="y", columns="x", values="kept", aggfunc="mean"
            )
            image = axes.imshow(
                cells, cmap="Blues", vmin=0, vmax=largest, extent=(0, cols, rows, 0), aspect="auto"
            )
            for row in range(1, rows):
                axes.axhline(row, color=INK, lw=0.9)
            for col in range(1, cols):
                axes.axvline(col, color=INK, lw=0.9)
            _finish(axes, method)
            axes.set(xticks=[], yticks=[])
        bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.015, aspect=26)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=11.5, labelcolor=INK)
        lines = "all frames together" if what == "frame" else "lines separate the crops"
        titles(
            figure,
            "Where in the image tokens are kept",
            f"{where}. Share kept by row and column, normal order; {lines}. "
            f"{_counted(tokens, what)}.",
        )
    return figure


def equivariance(statistics: pd.DataFrame, where: str) -> Figure:
    """What the selection follows: a panel per condition, a line per method, both levels.

    Args:
        statistics: Rows of one retention ratio and modality.
        where: As for `by_slot`.
    """
    there = statistics[statistics["condition"] != NORMAL]
    conditions = [one for one in (*CONDITIONS, ALL) if (there["condition"] == one).any()]
    methods = list(pd.unique(statistics["method"]))
    looks: dict[str, dict[str, Any]] = {
        "selector": {"color": "#08519c", "marker": "o", "shift": -0.13},
        "pipeline": {"color": "#e6863b", "marker": "D", "shift": 0.13},
    }
    with style():
        figure = Figure(
            figsize=(2.2 + 2.9 * max(len(conditions), 2), 2.0 + 0.42 * len(methods)),
            layout="constrained",
        )
        grid = figure.subplots(1, max(len(conditions), 1), sharey=True, squeeze=False).flatten()
        for axes, condition in zip(grid, conditions, strict=False):
            axes.axvline(0.5, color=FAINT, lw=1.2, ls=(0, (4, 3)), zorder=1)
            for level, look in looks.items():
                rows = there[(there["condition"] == condition) & (there["level"] == level)]
                rows = rows.set_index("method").reindex(methods)
                value = rows["equivariance"].to_numpy(float)
                errors = np.abs(
                    rows[["equivariance_low", "equivariance_high"]].T.to_numpy(float) - value
                )
                axes.errorbar(
                    value, np.arange(len(methods)) + look["shift"], xerr=errors, ls="",
                    marker=look["marker"], color=look["color"], ms=7, mec="white", mew=0.8,
                    elinewidth=1.6, label=_LEVELS[level], zorder=3, clip_on=False,
                )  # fmt: skip
            axes.set_xlim(-0.12, 1.12)
            axes.set_ylim(len(methods) - 0.5, -0.5)
            axes.set_yticks(range(len(methods)), methods)
            axes.set_xticks([0, 0.5, 1], ["0\nlocation", "½\nneither", "1\ncontent"])
            axes.grid(axis="y", color="#e5e5e5", lw=0.7)
            axes.tick_params(length=0, labelsize=11.5, labelcolor=INK)
            axes.set_title(_NAMES[condition], fontsize=13, fontweight="bold")
        if conditions:
            _legend(figure, grid[0].get_legend_handles_labels()[0])
        titles(
            figure,
            "Does the selection follow content or location?",
            f"{where}. Equivariance, mean over images with 95 % interval; none where it is "
            "undefined.",
        )
    return figure


# --- parts ----------------------------------------------------------------------------------------


def _most_common(tokens: pd.DataFrame) -> pd.DataFrame:
    """Tokens of the images that share the most common grid and length."""
    if not len(tokens):
        return tokens
    sizes = tokens.groupby("image", observed=True).agg(grid=("grid", "first"), n=("token", "max"))
    usual = sizes.value_counts().index[0]
    return tokens[tokens["image"].isin(sizes.index[(sizes == list(usual)).all(axis=1)])]


def _counted(tokens: pd.DataFrame, what: str) -> str:
    number = tokens["image"].nunique()
    slots = int(tokens["slots"].iloc[0])
    if what == "frame":
        return f"{number} videos of {slots} frames"
    rows, cols = tokens["grid"].iloc[0].split("x")
    return f"{number} images of {rows}×{cols} crops"


def _multiples(methods: list[str], height: float) -> tuple[Figure, list[Axes]]:
    rows = -(-len(methods) // _COLUMNS)
    columns = -(-len(methods) // rows)
    figure = Figure(
        figsize=(max(1.2 + 3.1 * columns, 9.6), 1.7 + height * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[len(methods) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(methods) - columns) : len(methods)]:
        axes.tick_params(labelbottom=True)  # labels also above empty panels
    return figure, list(grid)


def _finish(axes: Axes, method: str) -> None:
    axes.set_title(method, loc="left", fontweight="bold", fontsize=13)
    axes.set(xlabel="", ylabel="")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.tick_params(axis="both", length=0, labelsize=11.5, labelcolor=INK)


def _legend(figure: Figure, handles: list[Any]) -> None:
    """Place the legend in the upper right corner, next to the left-aligned titles."""
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(0.995, 0.995), ncols=len(handles),
        frameon=False, fontsize=12, borderaxespad=0, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
