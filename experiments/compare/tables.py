"""The tables of a comparison, at most 80 columns wide, and sentences about them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from tokenprune.console import method_label, new_table
from tokenprune.experiments.common.formatting import arrow, arrows, measure
from tokenprune.units import bytes_unit, flops_unit, percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "beside_table",
    "matched_table",
    "misses",
    "realised_shares",
    "spreads",
    "tables",
    "times_table",
]

_FAR = 0.02  # relative difference of a mean cost from the matched one that is not reported


def tables(summary: pd.DataFrame) -> Iterator[Table]:
    """The comparison as tables of at most 80 columns: overall, then by kind of question."""
    from tokenprune.experiments.common.summary import OVERALL, aggregated

    # At R = 1 all methods are the uncompressed model, which has a separate row.
    rows = summary[(summary["retention"] < 1) | (summary["method"] == "uncompressed")]
    rows = _by_requested(rows)
    overall = rows[rows["kind"] == OVERALL]
    unit, scale = flops_unit(overall["uncompressed_flops"].max())

    table = new_table(
        title="All questions",
        caption=f"{measure(rows).capitalize()} in % with its 95 % confidence interval. "
        f"{arrows(rows)} Same: "
        "answers in % that equal those of the uncompressed model. Tokens: layer average of visual "
        "tokens, with separators. FLOPs: prefill of the decoder, selection included."
        + _matching(rows),
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    values = {"accuracy": None, "": None, "same": 2, "tokens": 3, unit: 1, "of all": 4}
    for name, value in values.items():
        table.add_column(name, justify="right", value=value)
    for retention, group in overall.groupby("keep", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            figures = ["FAILED", "", "", "", "", ""]
            if row["status"] == "ok":
                share = row["flops"] / row["uncompressed_flops"]
                figures = [
                    _accuracy(row, decimals=1),
                    arrow(row),
                    f"{100 * row['agreement']:.1f}",
                    f"{row['layer_average']:.1f}",
                    f"{row['flops'] / scale:.3g}",
                    percent(share, 0),
                ]
            keep = "" if position else percent(float(str(retention)), None)
            table.add_row(
                keep, method_label(row["name"]), *figures, end_section=position + 1 == len(group)
            )
    yield table

    if figures := aggregated(summary):
        yield _aggregates_table(rows, figures)
    yield _divergence_table(summary[summary["kind"] == OVERALL])
    kinds = [kind for kind in summary["kind"].unique() if kind != OVERALL]
    if kinds:
        yield _kinds_table(rows, kinds)


def _aggregates_table(rows: pd.DataFrame, names: list[str]) -> Table:
    """Figures of all questions together, such as F1, of every method."""
    from tokenprune.experiments.common.summary import OVERALL

    table = new_table(
        title="Figures of the set",
        caption=f"As the metric {', '.join(rows['metric'].dropna().unique())} defines them, in % "
        "with their 95 % intervals (whole images resampled).",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    for value, name in enumerate(names, 1):
        table.add_column(name.replace("_", " "), justify="right", value=value)
    for retention, group in rows[rows["kind"] == OVERALL].groupby("keep", sort=False):
        for position, row in enumerate(_rows(group)):
            failed = ["FAILED", *[""] * (len(names) - 1)]
            table.add_row(
                "" if position else percent(float(str(retention)), None),
                method_label(row["name"]),
                *(failed if row["status"] != "ok" else (_between(row, one, 0) for one in names)),
                end_section=position + 1 == len(group),
            )
    return table


def _divergence_table(rows: pd.DataFrame) -> Table:
    """Divergence from the uncompressed model, and accuracy on easy and hard questions."""
    counts = rows[["easy_n", "hard_n"]].max().fillna(0).astype(int)
    table = new_table(
        title="Loyalty and difficulty",
        caption="KL: divergence of the answer token from the uncompressed model's, in nats, and "
        f"its 95 % interval. Easy: accuracy in % on the {counts['easy_n']} questions answered "
        "correctly without the image or from the thumbnail alone; hard: on the other "
        f"{counts['hard_n']}.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    for name, value in {"accuracy": 1, "KL": 4, "easy": 2, "hard": 3}.items():
        table.add_column(name, justify="right", value=value)
    beside = rows["retention"].isna() | (rows["method"] == "uncompressed")
    ordered = _by_requested(rows[~beside & (rows["retention"] < 1)])
    references = rows[beside].assign(name=rows["label"])
    last = ""
    for position, row in enumerate([*_rows(references), *_rows(ordered)]):
        keep = "" if position < beside.sum() else percent(row["keep"], None)
        figures = ["FAILED", "", "", ""]
        if row["status"] == "ok":
            decimals = 3 if row["kl_high"] < 10 else 1
            figures = [_accuracy(row, decimals=0), _between(row, "kl", decimals, scale=1)]
            # The answers of the references define which questions are easy.
            parts = () if math.isnan(row["retention"]) else ("easy", "hard")
            figures += [_between(row, f"{part}_accuracy", 0) for part in parts]
        if keep != last:
            table.add_section()
        table.add_row("" if keep == last else keep, method_label(row["name"]), *figures)
        last = keep
    return table


def times_table(summary: pd.DataFrame) -> Table:
    """Time and memory of every method; ``summary`` is as `times.with_times` returns it."""
    from tokenprune.experiments.common.summary import OVERALL

    rows = _by_requested(summary[(summary["kind"] == OVERALL) & summary["prefill_ms"].notna()])
    rows = rows[(rows["retention"] < 1) | (rows["method"] == "uncompressed")]
    unit, scale = bytes_unit(rows["peak_bytes"].max())
    table = new_table(
        title="Time and memory",
        caption="In milliseconds, median ± half the interquartile range, of one question of median "
        "length. Prefill: until the first token, with the vision encoder and the selection; token: "
        "each one after it. Peak: weights and all tensors.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    for name, value in {"prefill": None, "token": 2, "total": 1, unit: 3}.items():
        table.add_column(name, justify="right", value=value)
    for retention, group in rows.groupby("keep", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            times = [
                f"{row[name]:.4g} ± {row[f'{name}_iqr'] / 2:.1g}"
                for name in ("prefill_ms", "token_ms", "total_ms")
            ]
            table.add_row(
                "" if position else percent(float(str(retention)), None),
                method_label(row["name"]),
                *times,
                f"{row['peak_bytes'] / scale:.3g}",
                end_section=position + 1 == len(group),
            )
    return table


def _kinds_table(rows: pd.DataFrame, kinds: list[str]) -> Table:
    table = new_table(title="Accuracy in % by kind of question", continued=True)
    table.add_column("keep", justify="right")
    table.add_column("method")
    for kind in kinds:
        table.add_column(escape(kind), justify="right", value=0)
    for retention, group in rows[rows["kind"].isin(kinds)].groupby("keep", sort=False):
        methods = list(group.groupby("label", sort=False))
        for position, (label, cell) in enumerate(methods):
            by_kind = cell.set_index("kind")
            texts = [_accuracy(by_kind.loc[kind], decimals=0) for kind in kinds]
            keep = "" if position else percent(float(str(retention)), None)
            table.add_row(
                keep, method_label(str(label)), *texts, end_section=position + 1 == len(methods)
            )
    return table


def matched_table(found: pd.DataFrame) -> Table:
    """How closely costs are matched; ``found`` is as `matching.realised` returns it."""
    kind, measured = found["match"].iloc[0], found["ratio"].notna().any()
    table = new_table(
        title=f"Matched: {kind}",
        caption="Wanted, got: on the prompt of median length, for which retentions were solved."
        + (
            " Of uniform's: the real cost of the method on the questions, divided by that of "
            "uniform; mean, least and most."
            if measured
            else ""
        ),
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    table.add_column("retention", justify="right")
    for value, name in enumerate(["wanted", "got", *(["of uniform's"] if measured else [])]):
        table.add_column(name, justify="right", value=value)
    for asked, group in found.groupby("asked", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            ratio = f"{row['ratio']:.3f} ({row['least']:.2f}–{row['most']:.2f})"
            table.add_row(
                "" if position else percent(float(str(asked)), None),
                method_label(row["label"]),
                f"{row['retention']:.4g}",
                *(_cost(row[name], kind) for name in ("target", "cost")),
                *([ratio] if measured else []),
                end_section=position + 1 == len(group),
            )
    return table


def beside_table(found: pd.DataFrame) -> Table:
    """Published averages beside measured ones; ``found`` is as `published.beside` returns it."""
    made = new_table(
        title="Published averages",
        caption="In % of the uncompressed model. Published: the mean over the benchmarks of the "
        "source. Prompts, data type, questions and evaluation code may differ from these, and "
        "sources may count tokens as an average over the layers; tokenprune published has the "
        "addresses.",
    )
    made.add_column("keep", justify="right")
    made.add_column("method")
    for value, name in enumerate(["measured", "published", "at"]):
        made.add_column(name, justify="right", value=value)
    made.add_column("source", value=3)
    for retention, group in found.groupby("retention", sort=False):
        for position, (_, row) in enumerate(group.sort_values("method").iterrows()):
            made.add_row(
                "" if position else percent(float(str(retention)), None),
                method_label(row["method"]),
                *(f"{100 * row[name]:.1f}" for name in ("measured", "published")),
                percent(row["at"], None),
                escape(f"{row['source']}, {row['table']}"),
                end_section=position + 1 == len(group),
            )
    return made


def _rows(table: pd.DataFrame) -> list[pd.Series]:
    return [row for _, row in table.iterrows()]


def _between(row: pd.Series, name: str, decimals: int, scale: float = 100) -> str:
    """A figure and its interval; a dash if there is none."""
    value, low, high = (scale * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "-"
    return f"{value:.{decimals}f} {low:.{decimals}f}–{high:.{decimals}f}"


def _matching(rows: pd.DataFrame) -> str:
    kinds = rows["match"].dropna().unique() if "match" in rows else []
    return "".join(
        f" Matched: every method has the {kind} of uniform at that retention; the number after "
        "its name is its own retention."
        for kind in kinds
    )


def misses(found: pd.DataFrame) -> Iterator[str]:
    """A sentence for every method whose cost is not that of uniform."""
    for row in _rows(found):
        name = f"{row['label']} does not have the cost of uniform at {row['asked']:g}"
        if row["coarse"]:
            yield (
                f"{name}: it goes in steps, of which {_cost(row['cost'], row['match'])} is the "
                f"nearest to {_cost(row['target'], row['match'])}."
            )
        elif abs(row["ratio"] - 1) > _FAR:
            yield (
                f"{name} on these questions, but {row['ratio']:.2f} times as much: content decides "
                "how much it keeps."
            )


def realised_shares(summary: pd.DataFrame) -> Iterator[str]:
    """A sentence for every method that keeps more or fewer tokens than requested.

    A difference of one token, the mean over the questions, is rounding.
    """
    from tokenprune.experiments.common.summary import OVERALL

    rows = summary[(summary["kind"] == OVERALL) & (summary["status"] == "ok")]
    off = (rows["kept_patches"] - rows["retention"] * rows["patch_tokens"]).abs() > 1
    for label, cells in rows[off].groupby("label", sort=False):
        shares = (
            f"{percent(row['kept_patches'] / row['patch_tokens'], 1)} where "
            f"{percent(row['retention'], None)} was requested"
            for row in _rows(cells.sort_values("retention", ascending=False))
        )
        yield f"{label} keeps another share of the patch tokens: {', '.join(shares)}."


def spreads(summary: pd.DataFrame) -> Iterator[str]:
    """A sentence for every method that ran with several seeds."""
    from tokenprune.experiments.common.summary import OVERALL

    for row in _rows(summary[(summary["kind"] == OVERALL) & (summary["seeds"] > 1)]):
        yield (
            f"{row['label']} at {row['retention']:g}: {row['seeds']:.0f} seeds, whose accuracies "
            f"have a standard deviation of {100 * row['seed_spread']:.1f} points"
        )


def _cost(cost: float, kind: str) -> str:
    """A cost of `matching.KINDS` in words."""
    if kind == "flops":
        return percent(cost, 2)
    return f"{cost:.1f}" if kind == "tokens" else f"{cost:.3g} ms"


def _by_requested(rows: pd.DataFrame) -> pd.DataFrame:
    """By requested retention (``keep``), most first; ``name`` adds a solved retention."""
    rows = rows.assign(keep=rows.get("asked_retention", rows["retention"]), name=_names(rows))
    return rows.sort_values("keep", ascending=False, kind="stable")


def _names(rows: pd.DataFrame) -> list[str]:
    """Labels, each with its retention ratio if that was solved for."""
    if "asked_retention" not in rows:
        return list(rows["label"])
    return [
        label if own == asked else f"{label}@{own:.3g}"
        for label, own, asked in zip(
            rows["label"], rows["retention"], rows["asked_retention"], strict=True
        )
    ]


def _accuracy(row: pd.Series, decimals: int) -> str:
    """Accuracy in percent and its interval."""
    if row["status"] != "ok":
        return "FAILED"
    if math.isnan(row["accuracy"]):  # all its answers are missing
        return "-"
    value, low, high = (
        f"{100 * row[name]:.{decimals}f}" for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    return f"{value} ({low}–{high})" if decimals else f"{value} {low}–{high}"
