"""Figures of what methods cost, made from the tables of `efficiency`."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.plots import FAINT, INK, MARKERS, Canvas, canvas, in_percent
from tokenprune.experiments.common.request import FIGURES, FigureOptions

__all__ = [
    "cost_by_retention",
    "tokens_by_layer",
]


_PANELS = 3  # maximum number of panels


_CROWD = 8  # methods whose curves can still be distinguished


def cost_by_retention(
    costs: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """FLOPs and KV cache, relative to the uncompressed model: curves, or points of many methods.

    Args:
        costs: As `efficiency.costs.costs` returns it.
        title: What was computed.
        subtitle: On what, in smaller letters.
        options: Width and titles.
    """
    full = costs[costs["method"] == "uncompressed"].iloc[0]
    table = costs[costs["method"] != "uncompressed"].copy()
    table["kv_share"] = table["kv_bytes"] / full["kv_bytes"]
    crowd = table["label"].nunique() > _CROWD
    if not crowd:
        subtitle = f"{subtitle}; dashed: cost equal to the share kept"
    with canvas(options, title, subtitle) as made:
        _points(made, table) if crowd else _curves(made, table)
    return made.figure


_COSTS = {"flops_share": "prefill FLOPs, selection included", "kv_share": "KV cache"}
"""Columns of shares, and their names."""


def _curves(made: Canvas, table: pd.DataFrame) -> None:
    panels = made.subplots(0.9 * made.size.height, 1, 2, sharey=True)[0]
    for axes, (column, name) in zip(panels, _COSTS.items(), strict=True):
        axes.plot([0, 1], [0, 1], color=FAINT, lw=0.7 * made.size.line, ls=(0, (5, 3)), zorder=1)
        for label, look in plots.looks(table).items():
            rows = table[table["label"] == label].sort_values("retention")
            axes.plot(
                *([*rows[each], 1.0] for each in ("retention", column)),
                color=look["color"], marker=look["fmt"], mec="white", mew=0.5, label=label,
            )  # fmt: skip
        axes.set_title(wrapped(name, made.size.width / 2 - 4 * made.line, made.size.text))
        axes.set_xlim(1.03, 0)
        axes.set_ylim(0, 1.05)
        in_percent(axes.xaxis)
        in_percent(axes.yaxis)
    panels[0].set_ylabel("% of the uncompressed model")
    made.figure.supxlabel("patch tokens kept (retention, %)")
    made.legend(panels[0].get_legend_handles_labels())


def _points(made: Canvas, table: pd.DataFrame) -> None:
    """A line per method, the cheapest first, and on it the cost at every retention."""
    table = table[table["retention"] < 1].sort_values("retention", ascending=False)
    order = list(table.groupby("label", sort=False)["flops_share"].mean().sort_values().index)
    place = {label: index for index, label in enumerate(order)}
    steps = list(pd.unique(table["retention"]))
    names, row = made.rows(order)
    panels = made.subplots(row * len(order) + 4 * made.line, 1, 2, sharey=True)[0]
    room = (made.size.width - made.width_of(*names)) / 2 - 2 * made.line
    for axes, (column, name) in zip(panels, _COSTS.items(), strict=True):
        looks = zip(steps, plots.colours(len(steps)), MARKERS, strict=False)
        for step, colour, marker in looks:
            rows = table[table["retention"] == step]
            axes.plot(
                rows[column], rows["label"].map(place), marker, color=colour, mec="white", mew=0.5,
                label=f"{plots.percent(step)} kept",
            )  # fmt: skip
        axes.set_title(wrapped(name, room, made.size.text, bold=True))
        axes.set_xlim(0, max(1.0, table[column].max()) * 1.04)
        in_percent(axes.xaxis, 5)
        axes.grid(axis="both")
    panels[0].set_yticks(range(len(order)), names)
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    made.figure.supxlabel("% of the uncompressed model")
    made.legend(panels[0].get_legend_handles_labels())


def tokens_by_layer(
    layers: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Visual tokens that enter every decoder layer, a panel for each of a few retentions.

    Args:
        layers: As `efficiency.costs.layers` returns it.
        title: What was computed.
        subtitle: On what, in smaller letters.
        options: Width and titles.
    """
    full = layers[layers["label"] == "uncompressed"]["visual_tokens"]
    table = layers[(layers["label"] != "uncompressed") & (layers["retention"] < 1)]
    kept = sorted(table["retention"].unique(), reverse=True)[-_PANELS:]
    crowd = table["label"].nunique() > _CROWD
    about = f"colour: share of the {full.max():.0f} tokens" if crowd else "dashed: uncompressed"
    with canvas(options, title, f"{subtitle}; {about}" if subtitle else about) as made:
        draw = _layer_maps if crowd else _layer_steps
        draw(made, table, list(kept), full)
        made.figure.supxlabel("decoder layer")
    return made.figure


def _layer_steps(
    made: Canvas, table: pd.DataFrame, kept: list[float], full: "pd.Series[float]"
) -> None:
    depth, looks = len(full), plots.looks(table)
    rows, columns = made.panels(max(1, len(kept)), 12 * made.line, most=_PANELS)
    height = min(made.size.height, made.size.width / columns) * rows
    grid = made.subplots(height, rows, columns, sharey=True, sharex=True).flatten()
    for axes, share in zip(grid, kept or [1.0], strict=False):
        edges = np.arange(depth + 1)
        axes.step(
            edges, [*full, full.iloc[-1]], where="post", color=INK, lw=0.7 * made.size.line,
            ls=(0, (5, 3)),
        )  # fmt: skip
        for place, (label, look) in enumerate(looks.items()):
            counts = _counts(table, label, share)
            if not len(counts):
                continue
            # Curves of methods in front of the language model coincide: later ones are thinner.
            width = made.size.line * (1 + 2 * (1 - (place + 1) / len(looks)))
            axes.step(
                edges, [*counts, counts[-1]], where="post", color=look["color"], lw=width,
                label=label, alpha=0.9, zorder=2 + place,
            )  # fmt: skip
        if kept:
            axes.set_title(f"{plots.percent(share)} kept")
        axes.set_ylim(0, 1.05 * full.max())
        axes.set_xlim(0, depth)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for axes in grid[max(1, len(kept)) :]:
        axes.set_axis_off()
    for axes in grid[max(1, len(kept)) - columns :]:
        axes.tick_params(labelbottom=True)  # labels also above empty panels
    made.figure.supylabel("visual tokens entering")
    made.legend(grid[0].get_legend_handles_labels(), blank=grid[max(1, len(kept)) :])


def _layer_maps(
    made: Canvas, table: pd.DataFrame, kept: list[float], full: "pd.Series[float]"
) -> None:
    """A row per method, those that enter the fewest tokens first."""
    order = list(table.groupby("label", sort=False)["visual_tokens"].mean().sort_values().index)
    names, row = made.rows(order)
    columns = max(
        1,
        min(
            len(kept),
            int((made.size.width - made.width_of(*names) - 5 * made.line) / (4.5 * made.line)),
        ),
    )
    rows = -(-len(kept) // columns)
    height = rows * (row * len(order) + 3 * made.line)
    grid = made.subplots(height, rows, columns, sharex=True, sharey=True).flatten()
    for axes, share in zip(grid, kept, strict=False):
        counts = [_counts(table, label, share) for label in order]
        cells = [row if len(row) else [np.nan] * len(full) for row in counts]
        image = axes.imshow(
            np.asarray(cells, dtype=float) / full.max(), cmap="viridis_r", vmin=0, vmax=1,
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{plots.percent(share)} kept")
        axes.set_yticks(range(len(order)), names)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axes in grid[len(kept) :]:
        axes.set_axis_off()
    bar: Any = made.figure.colorbar(image, ax=list(grid), aspect=height / made.line, pad=0.02)
    in_percent(bar.ax.yaxis)
    bar.ax.set_ylabel("visual tokens entering (%)")
    bar.outline.set_visible(False)


def _counts(table: pd.DataFrame, label: str, share: float) -> list[float]:
    rows = table[(table["label"] == label) & (table["retention"] == share)]
    return list(rows.sort_values("layer")["visual_tokens"])
