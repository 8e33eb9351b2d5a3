"""Figures of what methods cost, made from the tables of `efficiency`."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from tokenprune.experiments.common import plots
from tokenprune.grammar import lines

__all__ = [
    "cost_by_retention",
    "tokens_by_layer",
]


_PANELS = 3  # maximum number of panels


def cost_by_retention(costs: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """FLOPs and KV cache, relative to the uncompressed model, against retention.

    Args:
        costs: As `efficiency.costs.costs` returns it.
        title: What was computed.
        subtitle: On what, in smaller letters.
    """
    full = costs[costs["method"] == "uncompressed"].iloc[0]
    table = costs[costs["method"] != "uncompressed"].copy()
    table["kv_share"] = table["kv_bytes"] / full["kv_bytes"]
    looks = plots.looks(table)
    with plots.style():
        figure = Figure(figsize=(11.5, 5.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, column, name in (
            (left, "flops_share", "prefill FLOPs, selection included"),
            (right, "kv_share", "KV cache"),
        ):
            ends = [0.0, 1.0]
            axes.plot(ends, ends, color=plots.FAINT, lw=1.2, ls=(0, (5, 3)), zorder=1)
            for label, look in looks.items():
                rows = table[table["label"] == label].sort_values("retention")
                axes.plot(
                    *([*rows[each], 1.0] for each in ("retention", column)),
                    color=look["color"], marker=look["fmt"], ms=8, mec="white", lw=2, label=label,
                )  # fmt: skip
            axes.set_title(name, loc="left", fontweight="bold", fontsize=13)
            axes.set_xlim(1.03, 0)
            axes.set_ylim(0, 1.05)
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
            _quiet(axes)
        left.set_ylabel("of the uncompressed model", fontsize=13)
        figure.supxlabel("patch tokens kept (retention)", fontsize=13, color=plots.INK)
        _legend(figure, left)
        plots.titles(figure, title, f"{subtitle}; dashed: cost equal to the share kept")
    return figure


def tokens_by_layer(layers: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Visual tokens that enter every decoder layer, a panel for each of a few retentions.

    Args:
        layers: As `efficiency.costs.layers` returns it.
        title: What was computed.
        subtitle: On what, in smaller letters.
    """
    full = layers[layers["label"] == "uncompressed"]
    table = layers[(layers["label"] != "uncompressed") & (layers["retention"] < 1)]
    kept = sorted(table["retention"].unique(), reverse=True)[-_PANELS:]
    looks = plots.looks(table)
    depth = int(layers["layer"].max()) + 1
    with plots.style():
        figure = Figure(figsize=(2.2 + 4.2 * max(1, len(kept)), 4.9), layout="constrained")
        panels = figure.subplots(1, max(1, len(kept)), sharey=True, squeeze=False)[0]
        for axes, share in zip(panels, kept or [1.0], strict=True):
            edges = [*range(depth), depth]
            level = [*full["visual_tokens"], full["visual_tokens"].iloc[-1]]
            axes.step(edges, level, where="post", color=plots.INK, lw=1.2, ls=(0, (5, 3)))
            for place, (label, look) in enumerate(looks.items()):
                rows = table[(table["label"] == label) & (table["retention"] == share)]
                if rows.empty:
                    continue
                counts = rows.sort_values("layer")["visual_tokens"].to_list()
                # Curves of methods in front of the language model coincide: later ones are thinner.
                width = 2 + 5 * (1 - (place + 1) / len(looks))
                axes.step(
                    edges, [*counts, counts[-1]], where="post", color=look["color"], lw=width,
                    label=label, alpha=0.9, zorder=2 + place,
                )  # fmt: skip
            axes.set_title(plots.percent(share), loc="left", fontweight="bold", fontsize=13)
            axes.set_ylim(0, 1.05 * full["visual_tokens"].max())
            axes.set_xlim(0, depth)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            _quiet(axes)
        panels[0].set_ylabel("visual tokens entering", fontsize=13)
        figure.supxlabel("decoder layer", fontsize=13, color=plots.INK)
        _legend(figure, panels[0])
        plots.titles(figure, title, f"{subtitle}; dashed: uncompressed")
    return figure


def _quiet(axes: Axes) -> None:
    axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=plots.INK)
    axes.tick_params(axis="x", pad=8)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        names = ["\n".join(lines(label)) for label in labels]
        figure.legend(
            handles, names, loc="outside right center", frameon=False, fontsize=12,
        )  # fmt: skip
