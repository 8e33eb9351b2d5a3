"""Figures of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.formatting import measure
from tokenprune.experiments.common.glyphs import wrapped
from tokenprune.experiments.common.plots import (
    INK,
    MARKERS,
    Canvas,
    canvas,
    errors,
    in_percent,
    looks,
    method_labels,
    percent,
)
from tokenprune.experiments.common.request import FIGURES, FigureOptions
from tokenprune.experiments.common.run_folder import RunFolder
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "accuracy",
    "accuracy_by_cost",
    "accuracy_by_kind",
    "accuracy_by_time",
    "by_cost",
    "by_kind",
    "by_retention",
    "draw",
]


CROWD = 8  # methods whose curves can still be distinguished


_COST_AXIS = "prefill FLOPs of the language model, selection included (% of uncompressed)"


_TIME_AXIS = "time to the first token, vision encoder and selection included (ms)"


_MATCHED = {"tokens": "tokens per layer", "flops": "prefill FLOPs", "prefill-ms": "prefill time"}
"""What `compare --match` makes equal, in words."""


# --- few methods: curves --------------------------------------------------------------------------


def accuracy(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Accuracy of every method against retention, with the uncompressed model as reference.

    Args:
        summary: As `intervals.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
        options: Width and titles.
    """
    table = _by_retention(summary)
    with canvas(options, title, subtitle) as made:
        axes = made.subplots(made.size.height)[0, 0]
        _panel(made, axes, table, summary, OVERALL, start=0)
        _retention_axis(axes, table)
        axes.set_xlabel(_retention_label(made, summary))
        axes.set_ylabel(f"{measure(summary)} (%)")
        _name_lines(made, axes, table, summary)
    return made.figure


def accuracy_by_time(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Accuracy against the measured time of the prefill in milliseconds (`compare --measure`)."""
    table = _compressed(summary)
    table = table[table["prefill_ms"].notna()]
    table = table.assign(place=table["prefill_ms"])
    full = _reference(summary, OVERALL)["prefill_ms"]
    with canvas(options, title, subtitle) as made:
        axes = made.subplots(made.size.height)[0, 0]
        _panel(made, axes, table, summary, OVERALL, start=full)
        axes.set_xlim(1.05 * max(full, table["place"].max()), 0)
        axes.set_xlabel(wrapped(_TIME_AXIS, 0.62 * made.size.width, made.size.text))
        axes.set_ylabel(f"{measure(summary)} (%)")
        _name_lines(made, axes, table, summary)
    return made.figure


def accuracy_by_cost(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Accuracy against the cost of the prefill, which differs between methods at one retention."""
    table = _compressed(summary)
    table = table.assign(place=table["flops"] / table["uncompressed_flops"])
    with canvas(options, title, subtitle) as made:
        axes = made.subplots(made.size.height)[0, 0]
        _panel(made, axes, table, summary, OVERALL, start=1)
        axes.set_xlim(1.03, max(0, table["place"].min() - 0.05))
        in_percent(axes.xaxis)
        axes.set_xlabel(_cost_label(made))
        axes.set_ylabel(f"{measure(summary)} (%)")
        _name_lines(made, axes, table, summary)
    return made.figure


def accuracy_by_kind(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Accuracy against retention, one panel for each kind of question."""
    table = _by_retention(summary)
    kinds = _kinds(summary)
    with canvas(options, title, subtitle) as made:
        rows, columns = made.panels(len(kinds), 11 * made.line, most=3)
        height = min(0.8 * made.size.width / columns, 0.75 * made.size.height)
        grid = made.subplots(height * rows + 3 * made.line, rows, columns, sharey=True).flatten()
        for axes, kind in zip(grid, kinds, strict=False):
            _panel(made, axes, table, summary, kind, start=0)
            _retention_axis(axes, table)
            axes.set_title(kind)
        for axes in grid[len(kinds) :]:
            axes.set_axis_off()
        made.figure.supxlabel(_retention_label(made, summary, 0.85))
        made.figure.supylabel(f"{measure(summary)} (%)")
        made.legend(grid[0].get_legend_handles_labels(), blank=grid[len(kinds) :])
    return made.figure


# --- many methods: ranks and maps -----------------------------------------------------------------


def by_retention(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """A line per method, best first, and on it the accuracy at every retention.

    Args:
        summary: As `intervals.summarise` returns it.
        title: What was measured.
        subtitle: On what, in smaller letters.
        options: Width and titles.
    """
    table, full = _points(summary), _full(summary, OVERALL)
    order = _ranked(table)
    place = {label: index for index, label in enumerate(order)}
    with canvas(options, title, subtitle) as made:
        names, row = made.rows(order)
        axes = made.subplots(row * len(order) + 4 * made.line)[0, 0]
        steps = pd.unique(table["retention"])
        for step, colour, marker in zip(steps, plots.colours(len(steps)), MARKERS, strict=False):
            group = table[table["retention"] == step]
            axes.errorbar(
                group["accuracy"], group["label"].map(place),
                xerr=errors(group, "accuracy", "accuracy_low", "accuracy_high"),
                fmt=marker, mec="white", mew=0.5, color=colour, elinewidth=0.6 * made.size.line,
                label=_step(step, summary),
            )  # fmt: skip
        if full is not None:
            _reference_line(made, axes.axvline, full, label="uncompressed")
        axes.set_yticks(range(len(order)), names)
        axes.set_ylim(len(order) - 0.4, -0.6)
        in_percent(axes.xaxis)
        axes.set_xlabel(f"{measure(summary)} (%)")
        axes.grid(axis="both")
        made.legend(_points_first(axes))
    return made.figure


def by_cost(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
    *,
    time: bool = False,
) -> Figure:
    """Accuracy against the prefill's FLOPs, a panel per retention: numbers, and their key below.

    A line joins the methods that no other exceeds in accuracy at a lower or equal cost.  With
    ``time``, the cost is the measured time of the prefill.
    """
    table = _points(summary)
    if time:
        table = table[table["prefill_ms"].notna()]
    share = table["flops"] / table["uncompressed_flops"]
    table = table.assign(cost=table["prefill_ms"] if time else share)
    order, steps = _ranked(table), list(pd.unique(table["retention"]))
    numbers = {label: str(place) for place, label in enumerate(order, 1)}
    with canvas(options, title, subtitle) as made:
        rows, columns = made.panels(len(steps), 14 * made.line, most=3)
        high = min(1.1 * made.size.width / columns, 1.05 * made.size.height) * rows + 4 * made.line
        key_columns = _key_columns(made, order)
        below = (max(map(_key_lines, key_columns)) + 0.5) * made.line
        panels, key = made.rooms(high, below)
        grid = panels.subgridspec(rows, columns).subplots(squeeze=False).flatten()
        for axes, step in zip(grid, steps, strict=False):
            group = table[table["retention"] == step]
            _front(made, axes, group)
            axes.plot(group["cost"], group["accuracy"], "o", mec="white", mew=0.5, zorder=3)
            axes.margins(0.12)
            axes.invert_xaxis()
            if not time:
                in_percent(axes.xaxis, 5)
            in_percent(axes.yaxis)
            axes.set_title(_step(step, summary))
            made.number_points(axes, group["cost"], group["accuracy"], group["label"].map(numbers))
        for axes in grid[len(steps) :]:
            axes.set_axis_off()
        label = wrapped(_TIME_AXIS, 0.9 * made.size.width, made.size.text)
        if not time:
            label = _cost_label(made, 0.9)
        grid[(rows - 1) * columns + (columns - 1) // 2].set_xlabel(label)
        grid[(rows - 1) // 2 * columns].set_ylabel(f"{measure(summary)} (%)")
        _key(made, made.figure.add_subplot(key), key_columns)
    return made.figure


def by_kind(
    summary: pd.DataFrame,
    title: str,
    subtitle: str = "",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Accuracy of every method on every kind of question, a map per retention."""
    table = _points(summary)
    order, kinds = _ranked(table), _kinds(summary)
    every = summary[summary["kind"].isin(kinds) & summary["label"].isin(order)]
    steps = [step for step in pd.unique(table["retention"]) if not np.isnan(step)]
    with canvas(
        options, title, f"accuracy in %; {subtitle}" if subtitle else "accuracy in %"
    ) as made:
        names, row = made.rows(order)
        cell = 1.15 * made.width_of("100")
        fit = int(
            (made.size.width - made.width_of(*names) - made.line)
            / (cell * len(kinds) + 0.5 * made.line)
        )
        columns = max(1, min(len(steps), fit))
        rows = -(-len(steps) // columns)
        head = made.width_of(*kinds) + 2.5 * made.line
        grid = made.subplots(rows * (row * len(order) + head), rows, columns, sharey=True).flatten()
        for axes, step in zip(grid, steps, strict=False):
            wide = every[every["retention"] == step].pivot_table(
                index="label", columns="kind", values="accuracy", sort=False
            )
            made.heat(axes, 100 * wide.reindex(index=order, columns=kinds), "{:.0f}", (0, 100))
            axes.set_yticks(range(len(order)), names)
            axes.tick_params(axis="x", labelrotation=90)
            axes.set_title(_step(step, summary))
        for axes in grid[len(steps) :]:
            axes.set_axis_off()
    return made.figure


# --- all of a run ---------------------------------------------------------------------------------


def draw(
    folder: RunFolder, model: str, summary: pd.DataFrame, options: FigureOptions = FIGURES
) -> None:
    """Write the figures of a comparison to ``plots/``."""
    for name, figure in drawn(summary, model, options).items():
        plots.save(figure, folder.path / "plots" / name, options)


def drawn(summary: pd.DataFrame, model: str, options: FigureOptions = FIGURES) -> dict[str, Figure]:
    """Name to figure; none if nothing is finished.  Curves of few methods, ranks of many."""
    compressed = summary["retention"] < 1
    if not summary["accuracy"].notna().any() or not compressed.any():
        return {}
    # Matched methods share the position of the retention ratio of uniform whose cost they have.
    summary = summary.assign(retention=summary["asked_retention"])
    title = f"{measure(summary).capitalize()} of {Path(model).name} with fewer visual tokens"
    crowd = summary["label"][compressed].nunique() > CROWD
    matched = _match(summary)
    same = f"; all at the {_MATCHED[matched]} of uniform at that retention" if matched else ""
    asked = f"{int(summary['n'].max())} questions{same}"
    bars = "bars: 95 % confidence intervals"
    ranks = f"{asked}; {bars}; best mean first"
    curves = f"{asked}; {bars}, as is the band; dashed: uncompressed"
    front = f"{asked}; numbered by mean accuracy; line: no method is better at a lower cost"
    if crowd:
        found = {
            "accuracy": by_retention(summary, title, ranks, options),
            "accuracy-by-cost": by_cost(summary, title, front, options),
        }
    else:
        found = {
            "accuracy": accuracy(summary, title, curves, options),
            "accuracy-by-cost": accuracy_by_cost(summary, title, curves, options),
        }
    if "prefill_ms" in summary and summary["prefill_ms"][compressed].notna().any():
        found["accuracy-by-time"] = (
            by_cost(summary, title, front, options, time=True)
            if crowd
            else accuracy_by_time(summary, title, curves, options)
        )
    per_kind = summary["n"][summary["kind"] != OVERALL].dropna()
    if len(per_kind):
        low, high = int(per_kind.min()), int(per_kind.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        of_kinds = by_kind if crowd else accuracy_by_kind
        about = f"{each} questions of a kind{same}"
        about += "; best mean first" if crowd else f"; {bars}, as is the band; dashed: uncompressed"
        found["accuracy-by-kind"] = of_kinds(summary, title, about, options)
    return found


# --- parts ----------------------------------------------------------------------------------------


def _kinds(summary: pd.DataFrame) -> list[str]:
    return [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]


def _match(summary: pd.DataFrame) -> str | None:
    """The cost that was matched, or None."""
    found = summary.get("match", pd.Series(dtype=object)).dropna()
    return str(found.iloc[0]) if len(found) else None


def _retention_label(made: Canvas, summary: pd.DataFrame, share: float = 0.62) -> str:
    """The label of an axis of retention ratios on ``share`` of the width."""
    matched, label = _match(summary), "visual tokens kept (retention, %)"
    if matched:
        label = f"{_MATCHED[matched]}: those of uniform at this retention (%)"
    return wrapped(label, share * made.size.width, made.size.text)


def _step(retention: float, summary: pd.DataFrame) -> str:
    """One retention in a legend or a title."""
    matched = _match(summary)
    share = percent(retention)
    return f"{_MATCHED[matched]} of uniform at {share}" if matched else f"{share} kept"


def _cost_label(made: Canvas, share: float = 0.62) -> str:
    """The label of an axis of costs on ``share`` of the width."""
    return wrapped(_COST_AXIS, share * made.size.width, made.size.text)


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


def _reference_line(made: Canvas, draw: Any, at: float, **options: Any) -> None:
    draw(at, color=INK, lw=0.7 * made.size.line, ls=(0, (5, 3)), zorder=1, **options)


def _points_first(axes: Axes) -> tuple[list[Any], list[str]]:
    """The entries of a legend, those of points in front of those of lines."""
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "uncompressed")
    return [handles[i] for i in order], [labels[i] for i in order]


def _front(made: Canvas, axes: Axes, table: pd.DataFrame) -> None:
    """A staircase below which no method is the best at its cost."""
    rising = table.sort_values(["cost", "accuracy"], ascending=[True, False])
    best = rising[rising["accuracy"] > rising["accuracy"].cummax().shift(fill_value=-1.0)]
    axes.step(
        best["cost"], best["accuracy"], where="post", color="#a0a0a0", lw=0.8 * made.size.line,
        zorder=2,
    )  # fmt: skip


def _key_columns(made: Canvas, names: list[str]) -> list[list[str]]:
    """The names in as many columns of equal length as fit side by side."""
    names = [wrapped(name, made.size.width - 3 * made.line, made.size.text) for name in names]
    for count in range(min(5, len(names)), 0, -1):
        rows = -(-len(names) // count)
        columns = [names[start : start + rows] for start in range(0, len(names), rows)]
        if sum(made.width_of(*one) + 2.4 * made.line for one in columns) < made.size.width:
            break
    return columns


def _key_lines(names: list[str]) -> int:
    return sum(name.count("\n") + 1 for name in names)


def _key(made: Canvas, axes: Axes, columns: list[list[str]]) -> None:
    """The methods by number."""
    axes.set_axis_off()
    axes.set_xlim(0, made.size.width - 0.1)
    axes.set_ylim(max(map(_key_lines, columns)), 0)
    x, number = 0.0, 0
    for names in columns:
        place, line = x + 1.4 * made.line, 0
        for name in names:
            number += 1
            axes.text(place, line, str(number), ha="right", va="top", weight="bold")
            axes.text(place + 0.5 * made.line, line, name, va="top")
            line += name.count("\n") + 1
        x += made.width_of(*names) + 2.4 * made.line


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
    axes.set_xticks(list(positions.values()), [f"{100 * share:.4g}" for share in positions])
    axes.set_xlim(-0.2, max(positions.values()) + 0.2)


def _panel(
    made: Canvas,
    axes: Axes,
    table: pd.DataFrame,
    summary: pd.DataFrame,
    kind: str,
    start: float,
) -> None:
    """Curves of one kind of question; ``table`` has x in ``place``, and 100 % is at ``start``."""
    full = _reference(summary, kind)
    if not np.isnan(full["accuracy"]):
        axes.axhspan(full["accuracy_low"], full["accuracy_high"], color="black", alpha=0.06, lw=0)
        _reference_line(made, axes.axhline, full["accuracy"])
        axes.plot([start], [full["accuracy"]], "o", color=INK, zorder=4, label="uncompressed")
    for method, look in looks(table).items():
        rows = table[(table["kind"] == kind) & (table["label"] == method)]
        rows = rows.sort_values("retention", ascending=False)
        places, values = rows["place"].to_numpy(float), rows["accuracy"].to_numpy(float)
        curve = (np.append(start, places), np.append(full["accuracy"], values))
        axes.plot(*curve, color=look["color"], alpha=0.9)
        axes.errorbar(
            places, values, yerr=errors(rows, "accuracy", "accuracy_low", "accuracy_high"), ls="",
            mec="white", mew=0.5, elinewidth=0.8 * made.size.line, capsize=0, label=method,
            zorder=3, **look,
        )  # fmt: skip
    in_percent(axes.yaxis)


def _reference(summary: pd.DataFrame, kind: str) -> pd.Series:
    """The summary row of the uncompressed model; NaN if it is not finished."""
    chosen = summary[(summary["method"] == "uncompressed") & (summary["kind"] == kind)]
    return chosen.iloc[0] if len(chosen) else pd.Series(np.nan, index=summary.columns)


def _name_lines(made: Canvas, axes: Axes, table: pd.DataFrame, summary: pd.DataFrame) -> None:
    """Write every method's name beside its last point."""
    ends: list[plots.End] = []
    for method, look in looks(table).items():
        rows = table[(table["kind"] == OVERALL) & (table["label"] == method)]
        last = rows.loc[rows["retention"].idxmin()]
        font = {"color": look["color"], "fontweight": "bold"}
        ends.append((method, (last["place"], last["accuracy"]), last["accuracy"], font))
    level = _reference(summary, OVERALL)["accuracy"]
    if not np.isnan(level):
        ends.append((f"uncompressed {percent(level, 1)}", None, level, {"color": INK}))
    plots.label_ends(made, axes, ends)
