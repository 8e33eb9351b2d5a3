"""Figures of comparisons of so many methods that their curves could not be told apart."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenprune.experiments.intervals import OVERALL
from tokenprune.experiments.plots import INK, MARKERS, legend_above, style, titles

__all__ = ["by_cost", "by_kind", "by_retention"]


def by_retention(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """A line per method, best first, and on it the accuracy at every retention.

    Args:
        summary: As `intervals.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
    """
    table, full = _points(summary), _full(summary, OVERALL)
    order = _ranked(table)
    place = {label: index for index, label in enumerate(order)}
    with style():
        figure = Figure(figsize=(9.6, 1.6 + 0.27 * len(order)), layout="constrained")
        axes = figure.subplots()
        for (retention, group), colour, marker in zip(
            table.groupby("retention", sort=False), _colours(table), MARKERS, strict=False
        ):
            axes.errorbar(
                group["accuracy"], group["label"].map(place),
                xerr=[group["accuracy"] - group["accuracy_low"],
                      group["accuracy_high"] - group["accuracy"]],
                fmt=marker, ms=7, mec="white", mew=0.6, color=colour, elinewidth=1, alpha=0.95,
                label=f"{100 * float(str(retention)):.3g} % kept",
            )  # fmt: skip
        if full is not None:
            axes.axvline(full, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=0, label="uncompressed")
        axes.set_yticks(range(len(order)), order, fontsize=11)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_xlabel("accuracy")
        axes.grid(axis="both", lw=0.5)
        axes.tick_params(length=0, labelcolor=INK)
        legend_above(axes)
        titles(figure, title, subtitle)
    return figure


def by_cost(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy against the prefill's FLOPs; the best at about every cost are named."""
    table = _points(summary)
    table = table.assign(cost=table["flops"] / table["uncompressed_flops"])
    best = table.sort_values(["cost", "accuracy"], ascending=[True, False])
    best = best[best["accuracy"] > best["accuracy"].shift(fill_value=-1).cummax()]
    with style():
        figure = Figure(figsize=(9.6, 6.4), layout="constrained")
        axes = figure.subplots()
        for (retention, group), colour, marker in zip(
            table.groupby("retention", sort=False), _colours(table), MARKERS, strict=False
        ):
            share = f"{100 * float(str(retention)):.3g} % kept"
            axes.plot(group["cost"], group["accuracy"], marker, ms=7, color=colour, mec="white",
                      mew=0.6, label=share)  # fmt: skip
        named: list[float] = []
        for _, row in best.iloc[::-1].iterrows():
            if all(abs(row["cost"] - cost) > 0.03 for cost in named):  # there is room for one
                named.append(row["cost"])
                axes.annotate(
                    f"{row['label']} {100 * row['retention']:.3g} %",
                    (row["cost"], row["accuracy"]), (0, 9), textcoords="offset points",
                    fontsize=10, color=INK, ha="center",
                )  # fmt: skip
        full = _full(summary, OVERALL)
        if full is not None:
            axes.axhline(full, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=0, label="uncompressed")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.set_xlim(1.02, max(0, table["cost"].min() - 0.05))
        axes.set_ylim(top=1.05)
        axes.set_xlabel("prefill FLOPs of the language model, selection included")
        axes.set_ylabel("accuracy")
        axes.tick_params(length=0, labelcolor=INK)
        legend_above(axes)
        titles(figure, title, subtitle)
    return figure


def by_kind(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy of every method on every kind of question, a map per retention."""
    table = _points(summary)
    order = _ranked(table)
    kinds = [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]
    every = summary[summary["kind"].isin(kinds) & summary["label"].isin(order)]
    steps = [step for step in pd.unique(table["retention"]) if not np.isnan(step)]
    with style():
        width = 3 + (0.4 + 0.72 * len(kinds)) * len(steps)
        figure = Figure(figsize=(width, 2 + 0.27 * len(order)), layout="constrained")
        grid = figure.subplots(1, len(steps), squeeze=False, sharey=True)[0]
        for axes, step in zip(grid, steps, strict=True):
            wide = every[every["retention"] == step].pivot_table(
                index="label", columns="kind", values="accuracy", sort=False
            )
            sns.heatmap(
                100 * wide.reindex(index=order, columns=kinds), ax=axes, vmin=0, vmax=100,
                annot=True, fmt=".0f", annot_kws={"fontsize": 9}, cmap="viridis", cbar=False,
                linewidths=0.5,
            )  # fmt: skip
            axes.set(xlabel="", ylabel="")
            axes.set_title(f"{100 * step:.3g} % kept", loc="left", fontsize=12, fontweight="bold")
            axes.tick_params(length=0, labelsize=10, labelcolor=INK)
        titles(figure, title, f"accuracy in %, {subtitle}" if subtitle else "accuracy in %")
    return figure


def _points(summary: pd.DataFrame) -> pd.DataFrame:
    """The finished cells of methods, all questions together, most tokens first."""
    fine = (summary["status"] == "ok") & summary["accuracy"].notna() & (summary["retention"] < 1)
    table = summary[fine & (summary["kind"] == OVERALL)]
    return table.sort_values("retention", ascending=False, kind="stable")


def _ranked(table: pd.DataFrame) -> list[str]:
    """Labels, the best mean over retentions first."""
    means = table.groupby("label", sort=False)["accuracy"].mean()
    return [str(label) for label in means.sort_values(ascending=False, kind="stable").index]


def _full(summary: pd.DataFrame, kind: str) -> float | None:
    found = summary[(summary["method"] == "uncompressed") & (summary["kind"] == kind)]["accuracy"]
    return None if found.dropna().empty else float(found.iloc[0])


def _colours(table: pd.DataFrame) -> list[tuple[float, ...]]:
    steps = table["retention"].nunique()
    return list(sns.color_palette("crest_r", steps))[::-1] if steps > 1 else [(0.0, 0.4, 0.6)]
