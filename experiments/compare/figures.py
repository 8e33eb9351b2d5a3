"""Figures of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.plots import (
    INK,
    MARKERS,
    legend_above,
    looks,
    method_labels,
    percent,
    slide,
    spread,
    style,
    titles,
)
from tokenprune.experiments.common.run_folder import RunFolder
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "accuracy",
    "accuracy_by_cost",
    "accuracy_by_kind",
    "by_cost",
    "by_kind",
    "by_retention",
    "draw",
]


CROWD = 8  # methods whose curves can still be distinguished


def accuracy(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy of every method against retention, with the uncompressed model as reference.

    Args:
        summary: As `intervals.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
    """
    table = _by_retention(summary)
    with style():
        figure, axes = slide(title, subtitle)
        _panel(axes, table, summary, OVERALL, start=0)
        _retention_axis(axes, table)
        _label_lines(axes, table, summary)
        axes.set_xlabel("visual tokens kept (retention)")
    return figure


def accuracy_by_cost(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy against the cost of the prefill, which differs between methods at one retention."""
    table = _compressed(summary)
    table = table.assign(place=table["flops"] / table["uncompressed_flops"])
    with style():
        figure, axes = slide(title, subtitle)
        _panel(axes, table, summary, OVERALL, start=1)
        axes.set_xlim(1.05, max(0, table["place"].min() - 0.05))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        _label_lines(axes, table, summary)
        axes.set_xlabel("prefill FLOPs of the language model, selection included")
    return figure


def accuracy_by_kind(summary: pd.DataFrame, title: str, subtitle: str = "") -> Figure:
    """Accuracy against retention, one panel for each kind of question."""
    table = _by_retention(summary)
    kinds = [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]
    columns = min(_COLUMNS, len(kinds))
    cells = len(kinds) + (len(kinds) % columns == 0)  # room for the legend
    rows = -(-cells // columns)
    with style():
        figure = Figure(figsize=(1.2 + 3.9 * columns, 1.2 + 3.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes, kind in zip(grid, kinds, strict=False):
            _panel(axes, table, summary, kind, start=0)
            _retention_axis(axes, table)
            axes.set_title(kind, loc="left", fontweight="bold", fontsize=13)
        for axes in grid[len(kinds) :]:
            axes.set_axis_off()
        handles, labels = grid[0].get_legend_handles_labels()
        grid[len(kinds)].legend(handles, labels, loc="center left", frameon=False, fontsize=13)
        figure.supxlabel("visual tokens kept (retention)", fontsize=13, color=INK)
        figure.supylabel("accuracy", fontsize=13, color=INK)
        titles(figure, title, subtitle)
    return figure


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
    """Accuracy against the prefill's FLOPs, with labels at the best points for each cost."""
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
            if all(abs(row["cost"] - cost) > 0.03 for cost in named):  # room for one label
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


def draw(folder: RunFolder, model: str, summary: pd.DataFrame) -> None:
    compressed = summary["retention"] < 1
    if not summary["accuracy"].notna().any() or not compressed.any():
        return
    per_kind = summary["n"][summary["kind"] != OVERALL].dropna()
    count = int(summary["n"].max())
    matched = summary["match"].dropna()
    # Matched methods share the position of the retention ratio of uniform whose cost they have.
    summary = summary.assign(retention=summary["asked_retention"])
    note = "bars and band: 95 % confidence intervals"
    if len(matched):
        note += f"; all at the {matched.iloc[0]} of uniform at that retention"
    title = f"Accuracy of {Path(model).name} with fewer visual tokens"
    drawn = (accuracy, accuracy_by_cost, accuracy_by_kind)
    if summary["label"][compressed].nunique() > CROWD:
        drawn = (by_retention, by_cost, by_kind)
    overall, against_cost, of_kinds = drawn
    figure = overall(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy")
    figure = against_cost(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy-by-cost")
    if len(per_kind):
        low, high = int(per_kind.min()), int(per_kind.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        figure = of_kinds(summary, title, f"{each} questions of a kind; {note}")
        plots.save(figure, folder.path / "plots" / "accuracy-by-kind")


def _points(summary: pd.DataFrame) -> pd.DataFrame:
    """The finished cells of methods, over all questions, most tokens first."""
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


_COLUMNS = 3  # of the small multiples


def _compressed(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows that are points of a curve; R = 1 is the reference, where every curve starts."""
    finished = (summary["status"] == "ok") & summary["accuracy"].notna()
    return summary[finished & (summary["retention"] < 1)]


def _by_retention(summary: pd.DataFrame) -> pd.DataFrame:
    """The points with their position on a retention axis."""
    table = _compressed(summary)
    methods, positions = method_labels(table), _positions(table)
    # Side by side, so that no interval hides another.
    offsets = dict(zip(methods, np.linspace(-0.09, 0.09, max(len(methods), 2)), strict=False))
    if len(methods) == 1:
        offsets = {methods[0]: 0.0}
    place = table["retention"].map(positions) + table["label"].map(offsets).astype(float)
    return table.assign(place=place)


def _positions(table: pd.DataFrame) -> dict[float, int]:
    """Retention to position on the axis, evenly spaced, most tokens first."""
    return {value: place for place, value in enumerate(sorted({1.0, *table["retention"]})[::-1])}


def _retention_axis(axes: Axes, table: pd.DataFrame) -> None:
    positions = _positions(table)
    axes.set_xticks(list(positions.values()), [percent(share) for share in positions])
    axes.set_xlim(-0.25, max(positions.values()) + 0.25)


def _panel(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame, kind: str, start: float) -> None:
    """Curves of one kind of question; ``table`` has x in ``place``, and 100 % is at ``start``."""
    full = _reference(summary, kind)
    if not np.isnan(full["accuracy"]):
        axes.axhspan(full["accuracy_low"], full["accuracy_high"], color="black", alpha=0.06, lw=0)
        axes.axhline(full["accuracy"], color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
        axes.plot([start], [full["accuracy"]], "o", color=INK, ms=7, zorder=4, label="uncompressed")
    for method, look in looks(table).items():
        rows = table[(table["kind"] == kind) & (table["label"] == method)]
        rows = rows.sort_values("retention", ascending=False)
        places, values = rows["place"].to_numpy(float), rows["accuracy"].to_numpy(float)
        curve = (np.append(start, places), np.append(full["accuracy"], values))
        axes.plot(*curve, color=look["color"], lw=2, alpha=0.9)
        errors = [values - rows["accuracy_low"], rows["accuracy_high"] - values]
        axes.errorbar(
            places, values, yerr=errors, ls="", ms=8, mec="white", mew=0.8, elinewidth=1.6,
            capsize=0, label=method, zorder=3, **look,
        )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)


def _reference(summary: pd.DataFrame, kind: str) -> pd.Series:
    """The summary row of the uncompressed model; NaN if it is not finished."""
    chosen = summary[(summary["method"] == "uncompressed") & (summary["kind"] == kind)]
    return chosen.iloc[0] if len(chosen) else pd.Series(np.nan, index=summary.columns)


def _label_lines(axes: Axes, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Write every method's name beside its last point, moved apart where they would touch."""
    ends: list[tuple[str, float, dict[str, Any]]] = []
    for method, look in looks(table).items():
        rows = table[(table["kind"] == OVERALL) & (table["label"] == method)]
        level = rows["accuracy"][rows["retention"].idxmin()]
        name = method.replace(":", "\n", 1).replace(",", ", ")
        ends.append((name, level, {"color": look["color"], "fontweight": "bold"}))
    level = _reference(summary, OVERALL)["accuracy"]
    if not np.isnan(level):
        ends.append((f"uncompressed {percent(level, 1)}", level, {"color": INK}))
    low, high = axes.get_ylim()
    lines = max((name.count("\n") + 1 for name, *_ in ends), default=1)
    heights = spread([level for _, level, _ in ends], 0.058 * lines * (high - low))
    for (name, _, font), height in zip(ends, heights, strict=True):
        axes.annotate(
            name, (1.015, height), xycoords=axes.get_yaxis_transform(), va="center", fontsize=13,
            annotation_clip=False, **font,
        )  # fmt: skip
