"""Tables made from the stored results in `experiments/results`; nothing is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TypeAlias

import pandas as pd

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "results"
Table: TypeAlias = pd.DataFrame
_MISSING = "–"


@cache
def _read(path: Path) -> Table:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


@cache
def comparisons() -> dict[str, Table]:
    """Title and overall rows of every stored comparison of all methods."""
    found = {}
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
        stored = [folder / name for name in ("summary-all.csv", "summary.csv")]
        path = next((path for path in stored if path.is_file()), None)
        if path is not None:
            table = _read(path)
            found[_title(folder.name)] = table[
                (table["kind"] == "overall") & (table["status"] == "ok")
            ]
    return found


def _title(folder: str) -> str:
    model, _, modality = folder.partition("-video")
    return f"{model}, videos" if modality or folder.endswith("-video") else f"{model}, images"


def labels_of(name: str) -> list[str]:
    """How the stored comparisons call a method, plain first, then with options."""
    tables = comparisons().values()
    labels = {label for table in tables for label in table["label"] if label.split(":")[0] == name}
    return sorted(labels)


def of_method(name: str) -> str:
    """Accuracy, agreement and cost of a method in every stored comparison."""
    rows = []
    for title, table in comparisons().items():
        for label in labels_of(name):
            mine = table[(table["label"] == label) & (table["retention"] < 1)]
            rows += [
                (
                    title,
                    f"`{label}`",
                    f"{100 * row.retention:g} %",
                    _interval(row),
                    f"{100 * row.agreement:.1f}",
                    f"{row.layer_average:.0f}",
                    f"{100 * row.flops / row.uncompressed_flops:.0f} %",
                )
                for row in mine.sort_values("retention", ascending=False).itertuples()
            ]
    head = ("data", "method", "R", "accuracy (%)", "agreement (%)", "layer average", "FLOPs")
    return markdown(head, rows)


def all_methods(_: str = "") -> str:
    """All methods in all stored comparisons: accuracies and, in brackets, decoder FLOPs."""
    tables = comparisons()
    labels = sorted({label for table in tables.values() for label in table["label"]})
    labels = ["uncompressed", *(one for one in labels if one != "uncompressed")]
    steps = {
        title: sorted({r for r in table["retention"] if r < 1}, reverse=True)
        for title, table in tables.items()
    }
    head = ["method"]
    head += [f"{title}: {' / '.join(f'{100 * r:g}' for r in steps[title])} %" for title in tables]
    rows = [
        [
            f"`{label}`",
            *(_cells(table[table["label"] == label], steps[t]) for t, table in tables.items()),
        ]
        for label in labels
        if not _is_reference(label)
    ]
    return markdown(head, rows)


def _is_reference(label: str) -> bool:
    return label in ("thumbnail-only", "image-free")


def _cells(rows: Table, steps: list[float]) -> str:
    if rows.empty:
        return _MISSING
    at = {row.retention: row for row in rows.itertuples()}
    there = [at[r] for r in (steps if set(steps) & set(at) else [1.0]) if r in at]
    accuracy = " / ".join(f"{100 * row.accuracy:.1f}" for row in there)
    flops = " / ".join(f"{100 * row.flops / row.uncompressed_flops:.0f}" for row in there)
    return f"{accuracy}<br>({flops})"


def comparison(argument: str) -> str:
    """One stored comparison, question kind by question kind, from ``FOLDER/FILE``."""
    table = _read(FOLDER / argument)
    table = table[table["status"] == "ok"]
    kinds = [kind for kind in dict.fromkeys(table["kind"]) if kind != "overall"]
    rows = []
    for (_, label, retention), part in table.groupby(
        [-table["retention"], "label", "retention"], sort=False
    ):
        by_kind = {row.kind: row for row in part.itertuples()}
        row = by_kind["overall"]
        rows.append(
            [
                f"{100 * retention:g} %",
                f"`{label}`",
                _interval(row),
                *(f"{100 * by_kind[kind].accuracy:.0f}" for kind in kinds),
                f"{100 * row.agreement:.1f}",
                f"{row.layer_average:.0f}",
                f"{100 * row.flops / row.uncompressed_flops:.0f} %",
            ]
        )
    rows.sort(key=lambda row: -float(row[0].split()[0]))
    head = ["R", "method", "accuracy (%)", *kinds, "agreement (%)", "layer average", "FLOPs"]
    return markdown(head, rows)


def complementarity(folder: str) -> str:
    """What thumbnail and crops are worth alone, kind by kind."""
    table = _read(FOLDER / folder / "complementarity.csv")
    rows = [
        (
            row.kind,
            row.shown,
            row.n,
            f"{100 * row.accuracy:.1f}",
            _points(row.difference, row.low, row.high),
            _p(row.p),
        )
        for row in table.itertuples()
    ]
    return markdown(("kind", "shown", "n", "accuracy (%)", "difference (points)", "p"), rows)


def crop_importance(argument: str) -> str:
    """Accuracy lost without one crop, from ``FOLDER/FILE``."""
    table = _read(FOLDER / argument)
    rows = [
        (
            row.group,
            row.dropped,
            row.n,
            f"{100 * row.accuracy:.1f}",
            _points(row.drop, row.low, row.high),
            _p(row.p),
            _points(row.vs_random, row.vs_random_low, row.vs_random_high),
            _p(row.vs_random_p),
        )
        for row in table.itertuples()
    ]
    head = ("kind", "dropped crop", "n", "accuracy (%)", "loss (points)", "p", "against any", "p")
    return markdown(head, rows)


def ablation(folder: str) -> str:
    """Every option that is swept, with its paired difference to the first value."""
    table = _read(FOLDER / folder / "ablation.csv")
    rows = [
        (
            f"`{row.label}`",
            row.n,
            f"{100 * row.accuracy:.1f}",
            _points(row.difference, row.low, row.high),
            _p(row.p),
            _p(row.p_holm),
        )
        for row in table.itertuples()
    ]
    return markdown(("method", "n", "accuracy (%)", "difference (points)", "p", "p (Holm)"), rows)


def positional_bias(folder: str) -> str:
    """What the selection follows when content moves."""
    table = _read(FOLDER / folder / "positional-bias.csv")
    table = table[table["condition"] != "normal"]
    rows = [
        (
            f"`{row.method}`",
            row.condition,
            row.level,
            row.images,
            f"{row.paired_slope:.3f}",
            _p(row.p),
            _plain(row.equivariance),
        )
        for row in table.itertuples()
    ]
    head = ("method", "condition", "level", "images", "slope", "p", "equivariance")
    return markdown(head, rows)


def benchmarks(argument: str) -> str:
    """Figures of one benchmark from the stored file."""
    table = _benchmark(argument)
    if table.empty:
        return "The stored file has no such figures."
    rows = [
        (row.case, row.figure, f"{row.value:.3g}", row.unit, _plain(row.goal), _text(row.note))
        for row in table.itertuples()
    ]
    return markdown(("case", "figure", "value", "unit", "goal", "note"), rows)


def selection_benchmark(_: str = "") -> str:
    """Time, memory and synchronisations of every method's selection, with the goals."""
    table = _benchmark("selection")
    time, memory = "time / prefill", "memory / prefill"
    wide = table.pivot_table(index="case", columns="figure", values="value", sort=False)
    goals = table.pivot_table(index="case", columns="figure", values="goal", sort=False)
    wide, goals = wide.loc[wide[time].notna()], goals.reindex(wide.index)
    rows = [
        (
            f"`{case}`",
            f"{100 * wide.loc[case, time]:.2g}",
            _percent(goals.loc[case, time]),
            f"{100 * wide.loc[case, memory]:.2g}",
            _percent(goals.loc[case, memory]),
            _plain(wide.loc[case, "host waits a stage"]),
        )
        for case in wide.index
    ]
    head = ("method", "time (%)", "goal", "memory (%)", "goal", "synchronisations per stage")
    return markdown(head, rows)


def growth_benchmark(_: str = "") -> str:
    """How time and memory of every method's selection grow with the number of tokens."""
    table = _benchmark("growth")
    names = table["case"].str.partition(", ")
    table = table.assign(method=names[0], where=names[2].where(names[2] != "", "video"))
    wide = table.pivot_table(index="method", columns=["where", "figure"], values="value")
    columns = [
        (where, figure, digits)
        for where in ("video", "one view")
        for figure, digits in (
            ("time", ".3g"), ("growth of time", ".2f"),
            ("memory", ".3g"), ("growth of memory", ".2f"),
        )
        if (where, figure) in wide
    ]  # fmt: skip
    rows = [
        (
            f"`{method}`",
            *(_number(wide.loc[method, (where, figure)], form) for where, figure, form in columns),
        )
        for method in wide.index
    ]
    units = {"time": "ms", "memory": "MiB"}
    heads = [
        f"{where}: {figure}" + (f" ({units[figure]})" if figure in units else "")
        for where, figure, _ in columns
    ]
    return markdown(("method", *heads), rows)


def _number(value: float, form: str) -> str:
    return _MISSING if pd.isna(value) else f"{value:{form}}"


def _benchmark(name: str) -> Table:
    table = _read(FOLDER / "benchmarks" / "cpu.csv")
    return table[table["benchmark"] == name]


def _percent(value: float) -> str:
    return _MISSING if pd.isna(value) else f"{100 * value:g} %"


def benchmark_setting(_: str = "") -> str:
    """When, where and with which versions the stored benchmark ran."""
    row = _read(FOLDER / "benchmarks" / "cpu.csv").iloc[0]
    return (
        f"`tokenprune benchmark` measured these figures on {str(row.date)[:10]}, on one machine "
        f"({row.machine}, device `{row.device}`, {row.threads} threads), with torch {row.torch} "
        f"and transformers {row.transformers}."
    )


def plots() -> list[Path]:
    """Every stored plot."""
    return sorted(FOLDER.glob("*/*.png"))


def plot(argument: str) -> str:
    """One stored plot, from ``FOLDER/FILE Caption``."""
    name, _, caption = argument.partition(" ")
    if not (FOLDER / name).is_file():
        raise FileNotFoundError(FOLDER / name)
    return f"![{caption}](/results/{name})"


def markdown(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = [str(name) for name in head]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows])


def _interval(row: object) -> str:
    low, high = row.accuracy_low, row.accuracy_high  # type: ignore[attr-defined]
    return f"**{100 * row.accuracy:.1f}** ({100 * low:.1f}–{100 * high:.1f})"  # type: ignore[attr-defined]


def _points(value: float, low: float, high: float) -> str:
    if pd.isna(value):
        return _MISSING
    if pd.isna(low):
        return f"{100 * value:+.1f}"
    return f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _p(value: float) -> str:
    return _MISSING if pd.isna(value) else f"{value:.2g}"


def _plain(value: float) -> str:
    return _MISSING if pd.isna(value) else f"{value:.3g}"


def _text(value: object) -> str:
    return "" if pd.isna(value) else re.sub(r"\|", r"\\|", str(value))


INSERTS: dict[str, Callable[[str], str]] = {
    "all-methods": all_methods,
    "comparison": comparison,
    "complementarity": complementarity,
    "crop-importance": crop_importance,
    "ablation": ablation,
    "positional-bias": positional_bias,
    "benchmark": benchmarks,
    "selection-benchmark": selection_benchmark,
    "growth-benchmark": growth_benchmark,
    "benchmark-setting": benchmark_setting,
    "plot": plot,
}
