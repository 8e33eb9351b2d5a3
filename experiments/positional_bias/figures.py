"""Figures of the positional-bias analysis."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.plots import (
    FAINT,
    INK,
    Canvas,
    canvas,
    errors,
    in_percent,
    percent,
)
from tokenprune.experiments.common.request import FIGURES, FigureOptions
from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL, profiles
from tokenprune.experiments.positional_bias.rearrange import CONDITIONS, REVERSED

__all__ = [
    "by_place",
    "by_slot",
    "equivariance",
    "figures",
    "on_the_image",
]


_SIDES: tuple[Literal["left", "center", "right"], ...] = ("left", "center", "right")


_HUES = {"normal order": "#9ecae1", "reversed order": "#08519c"}


_LEVELS = {"selector": "selector alone", "pipeline": "whole pipeline"}


_NAMES = {
    "reversed-crops": "reversed crops",
    "reversed-frames": "reversed frames",
    "flip-lr": "left-right flip",
    "flip-tb": "top-bottom flip",
    "exchanged-crops": "crops exchanged under an unchanged thumbnail",
    ALL: "all together",
}


def figures(
    tokens: pd.DataFrame,
    statistics: pd.DataFrame,
    model: str,
    options: FigureOptions = FIGURES,
) -> Iterator[tuple[str, Figure]]:
    """Every figure with a name, for each retention and modality.

    Args:
        tokens: As `positional_bias` returns them.
        statistics: As `positional_bias` returns them.
        model: Name of the model.
        options: Width and titles.
    """
    for (retention, modality), part in tokens.groupby(
        ["retention", "modality"], sort=False, observed=True
    ):
        chosen = (statistics["retention"] == retention) & (statistics["modality"] == modality)
        suffix = f"{modality}-{100 * retention:.3g}"
        where = f"{model}, {percent(retention)} of the visual tokens kept"
        turned = part["condition"].isin(REVERSED) & (part["level"] == "selector")
        part = part.assign(method=part["method"].astype(str))
        both = part[(part["condition"] == NORMAL) | turned]
        usual = _most_common(both[both["slots"] > 1])
        if turned.any() and len(usual):
            yield f"slots-{suffix}", by_slot(usual, where, options)
            yield f"sequence-{suffix}", by_place(usual, where, options)
            yield f"map-{suffix}", on_the_image(usual, where, options)
        yield f"equivariance-{suffix}", equivariance(statistics[chosen], where, options)


def by_slot(tokens: pd.DataFrame, where: str, options: FigureOptions = FIGURES) -> Figure:
    """Keep share of every crop slot or frame, normal and reversed order, a panel per method.

    Args:
        tokens: Of one retention ratio and of images with equally many slots, in the normal and in a
            reversed condition.
        where: Model and retention ratio, for the subtitle.
        options: Width and titles.
    """
    slots = tokens[tokens["slot"] >= 0]
    shares = (
        slots.groupby(["method", "condition", "image", "slot"], sort=False, observed=True)["kept"]
        .mean()
        .reset_index()
    )
    what = _what(tokens)
    subtitle = (
        f"{where}. Equal bars of a pair: location decides; mirrored: content decides. "
        f"{_counted(tokens, what)}; lines: 95 % intervals over images."
    )
    methods = list(pd.unique(tokens["method"]))
    with canvas(options, f"Which {what}s keep their tokens", subtitle) as made:
        grid = _multiples(made, methods, 0.62)
        for axes, method in zip(grid, methods, strict=False):
            rows = shares[shares["method"] == method]
            for normal, shift in ((True, -0.2), (False, 0.2)):
                found = rows[(rows["condition"] == NORMAL) == normal]
                wide = found.pivot_table(index="image", columns="slot", values="kept")
                mean, ends = wide.mean().to_numpy(), _interval(wide.to_numpy())
                places = wide.columns.to_numpy() + 1 + shift
                colour = list(_HUES.values())[0 if normal else 1]
                axes.bar(places, mean, 0.38, color=colour, zorder=2)
                axes.errorbar(
                    places, mean, yerr=np.abs(ends - mean), ls="", color=INK,
                    elinewidth=0.6 * made.size.line, zorder=3,
                )  # fmt: skip
            axes.set_title(_title(made, grid, method))
            axes.set_xticks(sorted(shares["slot"].unique() + 1))
            in_percent(axes.yaxis, 5)
        made.figure.supxlabel(f"{what}, in the order of the sequence")
        made.figure.supylabel("share of its tokens kept (%)")
        made.legend(_entries(), blank=_blank(grid, methods))
    return made.figure


def by_place(tokens: pd.DataFrame, where: str, options: FigureOptions = FIGURES) -> Figure:
    """Keep probability along the packed sequence, normal and reversed order.

    Args:
        tokens: As for `by_slot`.
        where: As for `by_slot`.
        options: As for `by_slot`.
    """
    # About ten tokens per bin, so that the curves do not show differences in bin size.
    table = profiles(tokens, bins=int(np.clip(tokens["token"].max() / 10, 5, 20)))
    table = table[table["axis"] == "position"]
    methods = list(pd.unique(tokens["method"]))
    thumbnail = tokens["position"][tokens["slot"] < 0].max()
    what = _what(tokens)
    subtitle = f"{where}. {_counted(tokens, what)}; bands: 95 % intervals over images."
    with canvas(options, "Where in the sequence tokens are kept", subtitle) as made:
        grid = _multiples(made, methods, 0.6)
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
                width = made.size.line * (2.2 if condition == NORMAL else 0.8)
                axes.plot(rows["place"], rows["kept"], color=colour, lw=width)
            if not np.isnan(thumbnail):
                axes.axvspan(0, thumbnail, color=FAINT, alpha=0.12, lw=0)
            axes.set_xlim(0, 1)
            axes.set_ylim(0, 1.02)
            axes.set_title(_title(made, grid, method))
            in_percent(axes.yaxis, 4)
            axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
            for label, side in zip(axes.get_xticklabels(), _SIDES, strict=False):
                label.set_horizontalalignment(side)  # away from those of the next panel
        made.figure.supxlabel("position in the packed sequence (%)")
        made.figure.supylabel("share kept (%)")
        handles, labels = _entries()
        if not np.isnan(thumbnail):
            handles.append(Patch(color=FAINT, alpha=0.2))
            labels.append("thumbnail")
        made.legend((handles, labels), blank=_blank(grid, methods))
    return made.figure


def on_the_image(tokens: pd.DataFrame, where: str, options: FigureOptions = FIGURES) -> Figure:
    """Keep probability by row and column: a map of the crop canvas, or of all frames.

    Args:
        tokens: As for `by_slot`; the normal condition is shown.
        where: As for `by_slot`.
        options: As for `by_slot`.
    """
    shown = tokens[(tokens["condition"] == NORMAL) & (tokens["slot"] >= 0)]
    methods = list(pd.unique(tokens["method"]))
    what = _what(tokens)
    rows, cols = (1, 1) if what == "frame" else map(int, tokens["grid"].iloc[0].split("x"))
    lines = "all frames together" if what == "frame" else "lines separate the crops"
    subtitle = (
        f"{where}. Share kept by row and column, normal order; {lines}. {_counted(tokens, what)}."
    )
    maps = {
        method: shown[shown["method"] == method].pivot_table(
            index="y", columns="x", values="kept", aggfunc="mean"
        )
        for method in methods
    }
    tall, wide = next(iter(maps.values())).shape  # in tokens, which are square
    with canvas(options, "Where in the image tokens are kept", subtitle) as made:
        grid = _multiples(made, methods, tall / wide, beside=6 * made.line)
        largest = shown.groupby(["method", "y", "x"], observed=True)["kept"].mean().max()
        for axes, (method, cells) in zip(grid, maps.items(), strict=False):
            image = axes.imshow(
                cells, cmap="Blues", vmin=0, vmax=largest, extent=(0, cols, rows, 0),
                aspect=tall * cols / (wide * rows),
            )  # fmt: skip
            for row in range(1, rows):
                axes.axhline(row, color=INK, lw=0.7)
            for col in range(1, cols):
                axes.axvline(col, color=INK, lw=0.7)
            axes.set_title(_title(made, grid, method))
            axes.grid(visible=False)
            axes.set(xticks=[], yticks=[])
        bar: Any = made.figure.colorbar(image, ax=grid, shrink=0.8, pad=0.02, aspect=26)
        in_percent(bar.ax.yaxis)
        bar.outline.set_visible(False)
        bar.ax.set_ylabel("share kept (%)")
    return made.figure


def equivariance(statistics: pd.DataFrame, where: str, options: FigureOptions = FIGURES) -> Figure:
    """What the selection follows: a panel per condition, a line per method, both levels.

    Args:
        statistics: Rows of one retention ratio and modality.
        where: As for `by_slot`.
        options: As for `by_slot`.
    """
    there = statistics[statistics["condition"] != NORMAL]
    conditions = [one for one in (*CONDITIONS, ALL) if (there["condition"] == one).any()]
    methods = list(pd.unique(statistics["method"]))
    looks: dict[str, dict[str, Any]] = {
        "selector": {"color": "#08519c", "marker": "o", "shift": -0.15},
        "pipeline": {"color": "#c44e00", "marker": "D", "shift": 0.15},
    }
    subtitle = f"{where}. Equivariance, mean over images with 95 % interval"
    if there["equivariance"].isna().any():
        subtitle += "; no point where it is undefined"
    with canvas(options, "Does the selection follow content or location?", subtitle) as made:
        ticks = ["0\nlocation", "½\nneither", "1\ncontent"]
        names, row = made.rows(methods)
        least = 1.05 * sum(made.width_of(tick) for tick in ticks) + 1.5 * made.line
        room = made.size.width - made.width_of(*names) - made.line
        columns = max(1, min(len(conditions), int(room / least)))
        rows = -(-len(conditions) // columns) or 1
        columns = -(-len(conditions) // rows) or 1
        height = max(1.7 * made.line, row) * len(methods) + 5 * made.line
        grid = made.subplots(rows * height, rows, columns, sharey=True).flatten()
        for axes, condition in zip(grid, conditions, strict=False):
            axes.axvline(0.5, color=FAINT, lw=0.7 * made.size.line, ls=(0, (4, 3)), zorder=1)
            for level, look in looks.items():
                found = there[(there["condition"] == condition) & (there["level"] == level)]
                found = found.set_index("method").reindex(methods)
                axes.errorbar(
                    found["equivariance"], np.arange(len(methods)) + look["shift"],
                    xerr=errors(found, "equivariance", "equivariance_low", "equivariance_high"),
                    ls="", marker=look["marker"], color=look["color"], mec="white", mew=0.5,
                    elinewidth=0.8 * made.size.line, label=_LEVELS[level], zorder=3, clip_on=False,
                )  # fmt: skip
            axes.set_xlim(-0.12, 1.12)
            axes.set_ylim(len(methods) - 0.5, -0.5)
            axes.set_yticks(range(len(methods)), names)
            axes.set_xticks([0, 0.5, 1], ticks)
            axes.set_title(
                wrapped(_NAMES[condition], room / columns - made.line, made.size.text, bold=True),
                loc="center",
            )
        for axes in grid[len(conditions) :]:
            axes.set_axis_off()
        if conditions:
            blank = grid[len(conditions) :]
            made.legend(grid[0].get_legend_handles_labels(), blank=blank)
    return made.figure


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


def _what(tokens: pd.DataFrame) -> str:
    return "frame" if (tokens["modality"] == "video").any() else "crop slot"


def _interval(values: Any, resamples: int = 500) -> Any:
    """(2, slots) the 95 % bootstrap interval of the means of ``values`` (images, slots)."""
    images = len(values)
    counts = np.random.default_rng(0).multinomial(images, [1 / images] * images, resamples)
    return np.quantile(counts @ values / images, [0.025, 0.975], axis=0)


def _multiples(made: Canvas, methods: list[str], ratio: float, beside: float = 0.0) -> list[Axes]:
    """A panel per method.

    Args:
        made: The canvas.
        methods: Names of the methods.
        ratio: Height over width of a panel.
        beside: Width of a colour bar beside maps, which have no axes; 0 for panels with axes.
    """
    rows, columns = made.panels(len(methods), 10 * made.line)
    axes_room, below = (0.5 * made.line, 0.0) if beside else (2 * made.line, 3 * made.line)
    # A single panel does not fill a page.
    wide = min((made.size.width - beside) / columns, 1.2 * made.size.height / ratio) - axes_room
    height = rows * (wide * ratio + 2 * made.line) + below
    grid = made.subplots(height, rows, columns, sharex=True, sharey=True).flatten()
    for axes in grid[len(methods) :]:
        axes.set_axis_off()
    for axes in grid[max(0, len(methods) - columns) : len(methods)]:
        axes.tick_params(labelbottom=True)  # labels also above empty panels
    return list(grid)


def _blank(grid: list[Axes], methods: list[str]) -> list[Axes]:
    return grid[len(methods) :]


def _title(made: Canvas, grid: list[Axes], method: str) -> str:
    """A method's name on the width of a panel."""
    columns = len({axes.get_subplotspec().colspan.start for axes in grid})  # type: ignore[union-attr]
    room = made.size.width / columns - (5 if columns == 1 else 3) * made.line
    return wrapped(method, room, made.size.text, bold=True)


def _entries() -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend of the two orders."""
    return [Patch(color=colour) for colour in _HUES.values()], list(_HUES)
