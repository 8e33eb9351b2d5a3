"""Runs of the same questions, made in several places, as one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.cells import CellRecord, ordered
from tokenprune.experiments.common.csv_files import write_csv, write_tables
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import digests
from tokenprune.experiments.common.reading import answers_of, cells_of, manifest_of, place_of
from tokenprune.experiments.common.request import FIGURES, FigureOptions, Request
from tokenprune.experiments.common.run_folder import (
    UNCOMPRESSED,
    RunFolder,
    asked_for,
    disagreements,
    folder_name,
    named_files,
    stored_path,
)
from tokenprune.experiments.common.summary import pairs, summarise
from tokenprune.experiments.common.times import TIMES, read_times, with_times
from tokenprune.experiments.compare.run import draw

__all__ = [
    "MergeRequest",
    "run",
]


_SAME = ("device", "attention", "dtype", "question_id", "new_tokens")
"""What measured times must share to be compared."""


@dataclass(frozen=True, kw_only=True)
class MergeRequest(Request):
    """Which runs to merge.

    Attributes:
        out: The folder of the merged run; None for a folder in ``runs/`` named after it.
        folders: The run folders, at least two.
        figures: How figures are drawn.
    """

    folders: Sequence[Path]
    figures: FigureOptions = FIGURES


@dataclass(frozen=True)
class _Run:
    """One of the runs."""

    folder: Path
    manifest: Mapping[str, Any]
    answers: pd.DataFrame

    @property
    def experiment(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.manifest["experiment"]
        return found

    @property
    def records(self) -> list[CellRecord]:
        cells = cells_of(self.manifest)
        return [one if isinstance(one, CellRecord) else CellRecord.of(one) for one in cells]

    def rows(self, record: CellRecord) -> pd.DataFrame:
        """The answers of a cell."""
        table = self.answers
        own = (table["label"] == record.label) & (table["parameters"] == record.parameters)
        ratio = table["retention"]
        own &= ratio.isna() if record.retention is None else ratio == record.retention
        return table[own]


def run(request: MergeRequest) -> Outcome:
    """Merge runs; nothing is computed by a model, and the runs stay as they are.

    A cell of several runs is taken from the one in which it has most answers, the first of equals.

    Returns:
        With the tables ``summary`` and ``pairs``; ``notes`` say what was not taken.

    Raises:
        UserError: A folder is not that of a comparison, or the runs differ in the model, the
            questions, the prompt or the code (the message names what differs), before anything is
            written.
    """
    notes: list[str] = []
    runs = _runs(request, notes)
    chosen = dict(_chosen(runs, notes))
    answers = pd.concat([one.rows(record) for record, one in chosen.items()], ignore_index=True)
    experiment, details = _described(request, runs, list(chosen))
    path = request.out or Path("runs") / folder_name(experiment)
    if path.resolve() in {one.folder.resolve() for one in runs}:
        raise UserError(f"{path} is one of the runs, which stay as they are; choose another --out.")
    details |= {**asked_for(request, path), "requests": _requests(runs, path)}
    details |= {"merged": [stored_path(one.folder, path) for one in runs]}
    details["request"] = details["requests"][0]
    folder = RunFolder.open(path, experiment, details)
    status = "failed"
    try:
        _write_journal(folder.journal, chosen)
        times = _times(chosen, notes)
        if times is not None:
            with replace_file(path / TIMES) as temporary:
                write_csv(times, temporary)
        seed = experiment["seed"]
        summary = with_times(summarise(answers, seed=seed), times)
        folder.write_tables(answers, summary)
        paired = pairs(answers, seed=seed)
        write_tables(path, {"pairs": paired})
        draw(folder, experiment["model"], summary, request.figures)
        status = "complete" if (answers["status"] == "ok").all() else "failed"
    finally:
        folder.close(status)
    files = ("answers.parquet", "summary.csv", "pairs.csv", "plots/")
    return Outcome(
        path,
        status,
        {"summary": summary, "pairs": paired},
        files,
        answered=int((read_answers(path)["status"] == "ok").sum()),
        wanted=len(chosen) * experiment["questions"],
        notes=tuple(notes),
    )


# --- what is merged -------------------------------------------------------------------------------


def _runs(request: MergeRequest, notes: list[str]) -> list[_Run]:
    """The runs, which agree.  Raises `UserError` as `run`."""
    folders = list({folder.resolve(): folder for folder in request.folders}.values())
    if len(folders) < 2:
        raise UserError("merge needs at least two runs; give their folders.")
    manifests = [manifest_of(folder) for folder in folders]
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if "name" in manifest["experiment"]:
            raise UserError(f"{folder} is not a run of tokenprune compare; leave it out.")
        if manifest["experiment"]["data"] != first["experiment"]["data"]:
            counts = [one["experiment"]["questions"] for one in (first, manifest)]
            raise UserError(
                f"{folder} has other questions than {folders[0]} ({counts[1]} and {counts[0]}, or "
                "others in text, answer or image); merge takes runs of the same questions."
            )
        differences = disagreements(first, manifest, growing=True)
        if differences:
            raise UserError(
                f"{folders[0]} and {folder} are different experiments ({differences}); run one of "
                "them again in the way of the other."
            )
        metrics = [(one.get("request") or {}).get("metric") for one in (first, manifest)]
        if metrics[0] != metrics[1]:
            raise UserError(
                f"{folders[0]} and {folder} are scored by different metrics ({metrics[0]} and "
                f"{metrics[1]}); give both the same --metric, which computes no answer again."
            )
        if manifest.get("status") != "complete":
            notes.append(f"{folder} is not complete ({manifest.get('status', 'unknown')}).")
    runs = [
        _Run(folder, manifest, answers_of(folder, notes))
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    _check_methods(runs)
    _check_match(runs)
    return runs


def _check_methods(runs: Sequence[_Run]) -> None:
    """Raise `UserError` if a method ran with different code."""
    known: dict[str, _Run] = {}
    for one in runs:
        for label in dict.fromkeys(record.label for record in one.records):
            other = known.setdefault(label, one)
            differing = _differing(label, other.manifest, one.manifest)
            if differing:
                words = named_files(differing, other.manifest, one.manifest)
                raise UserError(
                    f"{label} ran with different code in {other.folder} and {one.folder}: {words}; "
                    "run it again in one of them with compare --out."
                )


def _differing(label: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The files of a method that differ."""
    own = [set((one.get("own_code") or {}).get(label, ())) for one in (there, here)]
    files = [(one.get("files") or {}).get("code") or {} for one in (there, here)]
    return [name for name in sorted(own[0] | own[1]) if files[0].get(name) != files[1].get(name)]


def _check_match(runs: Sequence[_Run]) -> None:
    """Raise `UserError` if costs are matched in different ways."""
    known: dict[float, tuple[Any, Path]] = {}
    for one in runs:
        for record in one.records:
            if record.name or record.method == UNCOMPRESSED or record.asked is None:
                continue
            matched = record.matched
            target = None if matched is None else (matched.kind, matched.target)
            before, folder = known.setdefault(record.asked, (target, one.folder))
            if before != target:
                raise UserError(
                    f"{folder} and {one.folder} do not have the same cost at retention "
                    f"{record.asked:g} (--match); merge takes runs that are matched alike."
                )


def _chosen(runs: Sequence[_Run], notes: list[str]) -> Iterator[tuple[CellRecord, _Run]]:
    """Every cell, and the run from which it is taken."""
    for record in ordered(record for one in runs for record in one.records):
        having = [one for one in runs if record in one.records]
        best = max(having, key=lambda one: int((one.rows(record)["status"] == "ok").sum()))
        mine = best.rows(record).set_index("question_id")["answer"]
        for other in having:
            theirs = other.rows(record).set_index("question_id")["answer"].reindex(mine.index)
            unlike = int((mine.ne(theirs) & mine.notna() & theirs.notna()).sum())
            if unlike:
                notes.append(
                    f"{record.label}: {unlike} answers of {other.folder} differ from those of "
                    f"{best.folder}, which were taken."
                )
        yield record, best


# --- the merged run -------------------------------------------------------------------------------


def _described(
    request: MergeRequest, runs: Sequence[_Run], records: Sequence[CellRecord]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment of the merged run, and details of its manifest."""
    first = runs[0]
    files = {name: dict(some) for name, some in (first.manifest.get("files") or {}).items()}
    merged: dict[str, dict[str, Any]] = {"own_code": {}, "functions": {}}
    for one in runs:
        code = (one.manifest.get("files") or {}).get("code") or {}
        files["code"] = {**code, **files.get("code", {})}
        for name, found in merged.items():
            merged[name] = {**(one.manifest.get(name) or {}), **found}

    def all_of(name: str) -> list[Any]:
        return list(dict.fromkeys(value for one in runs for value in one.experiment[name]))

    experiment = {
        **first.experiment,
        "methods": all_of("methods"),
        "retention": all_of("retention"),
        "references": {k: v for one in runs for k, v in one.experiment["references"].items()},
        "code": digests({"code": dict(sorted(files["code"].items()))})["code"],
    }
    if "match" in first.experiment:
        solved = [dict(entry) for one in runs for entry in one.experiment.get("match") or ()]
        experiment["match"] = [one for i, one in enumerate(solved) if one not in solved[:i]]
    same = ("versions", "python", "platform", "git", "device_name", "model_folder")
    details = {name: first.manifest[name] for name in same if name in first.manifest}
    details |= {**merged, "files": files, "cells": [asdict(one) for one in records]}
    return experiment, {**details, "finished": None}


def _requests(runs: Sequence[_Run], path: Path) -> list[dict[str, Any]]:
    """The requests of all runs, with paths as the merged run in ``path`` stores them."""
    found: list[dict[str, Any]] = []
    for one in runs:
        for request in one.manifest.get("requests") or [one.manifest.get("request") or {}]:
            moved = dict(request)
            if moved.get("data"):
                moved["data"] = stored_path(place_of(one.folder, moved["data"]), path)
            if moved not in found:
                found.append(moved)
    return found


def _write_journal(path: Path, chosen: Mapping[CellRecord, _Run]) -> None:
    """Append the answers and failures of all cells, those that are there already excepted."""
    keys: dict[str, _Run] = {}
    for record, one in chosen.items():
        keys.setdefault(record.key, one)
    read = {one.folder: Journal(one.folder / "answers.jsonl") for one in keys.values()}
    with Journal(path) as journal:
        for key, one in keys.items():
            source = read[one.folder]
            journal.add(key, {q: dict(row) for (k, q), row in source.answers.items() if k == key})
            for (cell, question), failure in source.missing.items():
                if cell == key and (key, question) not in journal.missing:
                    journal.fail(key, failure, question)
            if key in source.failures and key not in journal.failures:
                journal.fail(key, source.failures[key])


def _times(chosen: Mapping[CellRecord, _Run], notes: list[str]) -> pd.DataFrame | None:
    """The measured times of all cells, if they were measured alike."""
    found: list[pd.DataFrame] = []
    read = {one.folder: read_times(one.folder) for one in chosen.values()}
    for record, one in chosen.items():
        times = read[one.folder]
        if times is not None:
            own = (times["label"] == record.label) & (times["retention"] == record.retention)
            found.append(times[own])
    if not found:
        return None
    table = pd.concat(found, ignore_index=True).drop_duplicates()
    unlike = [name for name in _SAME if table[name].nunique() > 1]
    if unlike:
        notes.append(
            f"Times and memory are left out: they were measured with another {', '.join(unlike)}. "
            "Measure them together with compare --out FOLDER --measure."
        )
        return None
    return table
