"""The tables of the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import tokenprune as tp
from tokenprune.experiments.common.formatting import arrow, difference
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.summary import OVERALL, aggregated
from tokenprune.experiments.report.columns import Column
from tokenprune.grammar import names
from tokenprune.registry import strategies
from tokenprune.units import percent

__all__ = [
    "command",
    "costs",
    "facts",
    "failures_of",
    "kinds",
    "own_citation",
    "results",
    "sources",
    "title",
]


# --- tables and texts -----------------------------------------------------------------------------


def title(manifest: Mapping[str, Any]) -> str:
    experiment = manifest["experiment"]
    return f"{Path(experiment['model']).name}: {', '.join(experiment['methods'])}"


def command(manifest: Mapping[str, Any]) -> str:
    words = [str(word) for word in manifest.get("command") or []]
    return shlex.join(["tokenprune", *words[1:]]) if words else ""


def facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The facts that are needed to repeat the run."""
    experiment = manifest["experiment"]
    asked = manifest.get("request") or {}
    git = manifest.get("git") or {}
    sessions = manifest.get("sessions") or [{}]
    source = "the testbed's held-out questions"
    if asked.get("data") or asked.get("paths"):
        source = str(asked.get("data") or ", ".join(asked["paths"]))
    facts = {
        "model": experiment["model"],
        "questions": f"{experiment['questions']} ({', '.join(experiment['modality'])}), {source}",
        "seed": experiment["seed"],
        "device": f"{experiment['device']} ({manifest.get('device_name', 'unknown')})",
        "dtype": experiment["dtype"],
        "metric": asked.get("metric"),
        "longest answer": f"{experiment['max_new_tokens']} tokens",
        "started": sessions[0].get("started"),
        "took": f"{manifest['seconds']:.0f} s" if "seconds" in manifest else None,
        "platform": manifest.get("platform"),
        "python": manifest.get("python"),
        "commit": f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git else None,
        "weights (SHA-256)": experiment.get("weights"),
        "revision": experiment.get("revision"),
        "processor (SHA-256)": experiment.get("processor"),
        "data (SHA-256)": experiment.get("data"),
        "code (SHA-256)": experiment.get("code"),
    }
    versions = manifest.get("versions") or {}
    facts |= {f"{name} version": version for name, version in versions.items()}
    return {name: str(value) for name, value in facts.items() if value is not None}


def failures_of(manifest: Mapping[str, Any], journal: Journal) -> list[dict[str, str]]:
    """The failures in the manifest or, for a killed run, in the journal."""
    found = manifest.get("failures")
    if found is None:
        found = [
            {"cell": key, "error": why.error, "traceback": why.traceback}
            for key, why in journal.failures.items()
        ]
    return list(found)


def kinds(summary: pd.DataFrame) -> list[str]:
    return [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]


def results(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each method and retention, most tokens first; references come last."""
    rows = []
    ordered = summary.sort_values("retention", ascending=False, kind="stable")
    cells = ordered.groupby(["retention", "label"], sort=False, dropna=False)
    for (retention, label), group in cells:
        by_kind = {row["kind"]: row for _, row in group.iterrows()}
        overall = by_kind[OVERALL]
        rows.append(
            {
                "keep": "" if pd.isna(retention) else percent(float(retention), None),
                "label": label,
                "failed": overall["status"] != "ok",
                "n": _number(overall["n"], "{:.0f}"),
                "accuracy": _percent(overall["accuracy"], 1),
                "interval": _interval(overall, "accuracy"),
                "aggregated": [
                    {"value": _percent(overall[name], 1), "interval": _interval(overall, name)}
                    for name in aggregated(summary)
                ],
                "same": _percent(overall["agreement"], 1),
                "arrow": arrow(overall),
                "beside": "" if label == UNCOMPRESSED else _beside(overall),
                "kinds": [
                    {
                        "value": _percent(row["accuracy"], 0),
                        "interval": _interval(row, "accuracy"),
                    }
                    for kind in kinds(summary)
                    for row in [by_kind.get(kind, _MISSING)]
                ],
            }
        )
    return rows


def _beside(row: Any) -> str:
    """The paired difference from the uncompressed model in points, with its interval."""
    ends = [row[f"vs_uncompressed{end}"] for end in ("", "_low", "_high")]
    return "" if pd.isna(ends[0]) else difference(*ends)


_MISSING: Any = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), float("nan"))


def costs(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """The ledger of each cell, averaged over questions."""
    rows = []
    overall = summary[(summary["kind"] == OVERALL) & (summary["status"] == "ok")]
    for _, row in overall.sort_values("retention", ascending=False, kind="stable").iterrows():
        rows.append(
            {
                "keep": percent(float(row["retention"]), None),
                "label": row["label"],
                "realised": _percent(row["kept_patches"] / row["patch_tokens"], 1),
                "patches": f"{row['kept_patches']:.1f} of {row['patch_tokens']:.1f}",
                "separators": f"{row['kept_separators']:.1f} of {row['separators']:.1f}",
                "average": _number(row["layer_average"], "{:.1f}"),
                "kv": _number(row["kv_bytes"] / 2**20, "{:.3g}"),
                "flops": _number(row["flops"] / 1e9, "{:.4g}"),
                "selector": _number(row["selector_flops"] / 1e9, "{:.3g}"),
                "share": _percent(row["flops"] / row["uncompressed_flops"], 1),
            }
        )
    return rows


def _number(value: Any, form: str) -> str:
    return "" if pd.isna(value) else form.format(value)


def _percent(share: Any, decimals: int) -> str:
    return "" if pd.isna(share) else f"{100 * share:.{decimals}f}"


def _interval(row: Any, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"{100 * low:.1f}–{100 * high:.1f}"


def sources(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The cards of the methods that were run, with BibTeX entries of their papers."""
    found = []
    for name in dict.fromkeys(name for column in columns for name in names(column.label)):
        if name not in strategies.names():
            continue
        card = strategies.get(name).card
        found.append(
            {
                "name": name,
                "paper": card.paper,
                "arxiv": card.arxiv,
                "code": card.code,
                "verified": card.verified,
                "deviations": card.deviations,
                "bibtex": _bibtex(name, card.paper, card.arxiv) if card.arxiv else "",
            }
        )
    return found


def _bibtex(name: str, title: str, arxiv: str) -> str:
    """An entry for a paper; its year and month are in the identifier."""
    return (
        f"@misc{{{name},\n"
        f"  title         = {{{{{title}}}}},\n"
        f"  year          = {{20{arxiv[:2]}}},\n"
        f"  eprint        = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n"
        f"  url           = {{https://arxiv.org/abs/{arxiv}}}\n"
        f"}}"
    )


def own_citation(manifest: Mapping[str, Any]) -> str:
    """An entry for the version of the software that made the run."""
    version = (manifest.get("versions") or {}).get("tokenprune") or tp.__version__
    git = manifest.get("git") or {}
    note = f"version {version}"
    if git.get("commit"):
        note += f", commit {git['commit']}{' with changes' if git.get('dirty') else ''}"
    year = str((manifest.get("sessions") or [{}])[0].get("started") or "")[:4]
    return (
        "@software{tokenprune,\n"
        "  title   = {{tokenprune}},\n"
        + (f"  year    = {{{year}}},\n" if year else "")
        + f"  version = {{{version}}},\n"
        f"  note    = {{{note}}}\n"
        "}"
    )
