"""Reads the folder of a run; everything in it is validated.

Tables are made from the journal, or from ``answers.parquet`` if it is up to date; never from
``summary.csv``, which may be older than both.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame, read_answers, rescored
from tokenprune.experiments.common.cells import Cell, CellRecord, Matched, without_seed
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.own_images import is_group, own_questions
from tokenprune.experiments.common.questions import (
    Modality,
    Question,
    fingerprint,
    held_out,
)
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.run_folder import manifests
from tokenprune.experiments.datasets.wording import Wording
from tokenprune.experiments.metrics import with_metric

__all__ = [
    "answers_of",
    "cells_of",
    "check_folder",
    "experiment_of",
    "joined",
    "journaled",
    "manifest_of",
    "place_of",
    "questions_of",
]


_MANY = (
    10_000  # testbed questions beyond this number are drawn only if the journal has their answers
)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Experiment(_Part):
    model: str
    modality: list[str]


class _Match(_Part):
    method: str
    retention: Annotated[float, Field(gt=0, le=1)]
    kind: str
    asked: float
    target: float
    cost: float


class _Asked(_Experiment):
    methods: list[str]
    retention: list[Annotated[float, Field(gt=0, le=1)]]
    questions: Annotated[int, Field(ge=0)]
    data: str
    seed: Annotated[int, Field(ge=0)]
    device: str
    dtype: str
    max_new_tokens: int
    revision: str | None = None
    match: list[_Match] | None = None


class _Request(_Part):
    data: str | None = None
    paths: list[str] = []
    benchmark: str | None = None
    root: str | None = None
    split: str | None = None
    prompt: str | None = None
    template: str | None = None
    suffix: str | None = None
    modality: Modality | None = None
    questions: Annotated[int, Field(ge=1)] | None = None
    seeds: Annotated[int, Field(ge=1)] = 1
    metric: str | None = None


class _Session(_Part):
    started: str | None = None


class _Git(_Part):
    commit: str
    dirty: bool = False


class _Failure(_Part):
    cell: str
    error: str
    traceback: str


class _Solved(_Part):
    kind: str
    asked: float
    target: float
    cost: float


class _Cell(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")

    key: str
    method: str
    label: str
    parameters: str
    name: str
    retention: Annotated[float, Field(gt=0, le=1)] | None
    matched: _Solved | None = None


class _Manifest(_Part):
    experiment: _Asked
    cells: list[_Cell] = []
    request: _Request | None = None
    requests: list[_Request] = []
    model_folder: str | None = None
    status: str = "unknown"
    sessions: list[_Session] = []
    command: list[str] = []
    seconds: Annotated[float, Field(allow_inf_nan=False)] | None = None
    git: _Git | None = None
    versions: dict[str, str | None] = {}
    failures: list[_Failure] | None = None


class _Named(_Part):
    experiment: _Experiment


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a comparison, or its backup.

    Raises:
        UserError: It is missing or damaged.
    """
    return _checked(folder, _Manifest, {"questions", "data"})


def experiment_of(folder: Path) -> dict[str, Any]:
    """Model and modality of a run.  Raises `UserError` as `manifest_of`."""
    found: dict[str, Any] = _checked(folder, _Named, {"model", "modality"})["experiment"]
    return found


def check_folder(folder: Path) -> None:
    """Raise `UserError` if a file is given in place of a run folder."""
    if os.path.isfile(folder):  # accepts impossible file names, unlike Path.is_file
        raise UserError(
            f"{str(folder)!r} is a file; give the folder of a run, as tokenprune compare prints it "
            "at its end."
        )


def _checked(folder: Path, shape: type[BaseModel], needed: set[str]) -> dict[str, Any]:
    check_folder(folder)
    wrong = ""
    for found in manifests(folder):
        # Folders of other analyses also have a manifest, but no answers.
        if needed <= found["experiment"].keys():
            try:
                shape.model_validate(found)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                wrong = wrong or f"{where}: {first['msg']}"
            else:
                return found
    if wrong:
        raise UserError(
            f"the manifest of {str(folder)!r} is damaged ({wrong}); run the command again that "
            "made the folder, or restore manifest.json."
        )
    raise UserError(
        f"{str(folder)!r} is not the folder of a comparison (it has no readable manifest.json "
        "of one); give the folder that tokenprune compare printed after 'Written to'."
    )


def questions_of(
    folder: Path,
    manifest: Mapping[str, Any],
    journal: Journal,
    notes: list[str],
    moved: Path | None = None,
) -> list[Question] | None:
    """The questions of the run, or None if they are no longer available.

    Args:
        folder: The run folder.
        manifest: Its manifest (`manifest_of`).
        journal: Its journal.
        notes: Receives a sentence for everything that is missing.
        moved: New path of the data file, or of the folder of the benchmark; if given, an
            unreadable one raises `UserError`.
    """
    experiment = manifest["experiment"]
    requests = manifest.get("requests") or [manifest.get("request") or {}]
    own = any(one.get(name) for one in requests for name in ("data", "paths", "benchmark"))
    if not own and len({one.get("modality") for one in requests}) == 1:
        requests = requests[-1:]  # the testbed's first questions, as many as were asked at most
    found: list[Question] = []
    for asked in requests:
        count = experiment["questions"]
        if len(requests) > 1:
            count = asked.get("questions") or count
        some = _asked(folder, asked, (count, experiment["seed"]), journal, notes, moved)
        if some is None:
            return None
        found = joined(found, some)
    try:
        same = fingerprint(found) == experiment["data"]
    except (OSError, UserError):
        notes.append("Some images are missing, so it was not checked whether the data changed.")
    else:
        if not same:
            notes.append("The questions or images have changed since the run.")
    metric = requests[-1].get("metric")  # nothing that a run folder names is imported
    return found if metric is None else [replace(item, metric=metric) for item in found]


def _own_questions(
    folder: Path, asked: Mapping[str, Any], drawn: int, moved: Path | None
) -> list[Question]:
    """The questions of a request that are not the testbed's; ``drawn`` is the seed of the sample.

    Raises `UserError`.
    """
    file, root, benchmark = asked.get("data"), asked.get("root"), asked.get("benchmark")
    data = place_of(folder, str(file)) if file else None
    if benchmark is not None:
        data, root = None, moved or place_of(folder, str(root))
    elif moved is not None:
        data = moved
    return own_questions(
        [] if data or benchmark else [place_of(folder, path) for path in asked.get("paths") or []],
        data,
        asked.get("prompt"),
        benchmark=benchmark,
        root=root,
        split=asked.get("split"),
        count=asked.get("questions"),
        # Older runs asked the first questions of a file.
        seed=drawn if "suffix" in asked else None,
        modality=asked.get("modality"),
        check_images=False,
        wording=Wording(asked.get("template"), asked.get("suffix")),
    )


def joined(first: Sequence[Question], second: Sequence[Question]) -> list[Question]:
    """The questions of both, each once: in the order of ``second`` if it has them all."""
    names = {item.id for item in second}
    if names.issuperset(item.id for item in first):
        return list(second)
    known = {item.id for item in first}
    return [*first, *(item for item in second if item.id not in known)]


def _asked(
    folder: Path,
    asked: Mapping[str, Any],
    testbed: tuple[int, int],
    journal: Journal,
    notes: list[str],
    moved: Path | None,
) -> list[Question] | None:
    """The questions of one request of a run; other arguments as for `questions_of`.

    Args:
        asked: The request, as the manifest stores it.
        testbed: Number of the testbed's questions, and their seed.
    """
    file, paths = moved or asked.get("data"), asked.get("paths") or []
    count, seed = testbed
    if file is None and not paths and asked.get("benchmark") is None:
        answered = len({name for _, name in journal.answers})
        if count > max(_MANY, 2 * answered):
            notes.append(f"The manifest asks for {count} questions; {answered} were answered.")
            return None
        found = held_out(count, seed, asked.get("modality") or "image")
        wording = Wording(asked.get("template"), asked.get("suffix"))
        return [replace(item, question=wording.applied(item.question)) for item in found]
    try:
        return _own_questions(folder, asked, seed, moved)
    except UserError as error:
        if moved is not None:
            raise
        notes.append(f"No images: {error} Where it was moved, give its place with --data.")
        return None


def place_of(folder: Path, file: str) -> Path:
    """The target of a manifest's path or pattern, relative to the folder.

    In older runs it is relative to the working directory.
    """
    near = folder / file
    return near if near.exists() or is_group(near) else Path(file)


def journaled(
    manifest: Mapping[str, Any], questions: list[Question] | None, journal: Journal
) -> pd.DataFrame:
    """The table of `answers_frame`, from the journal.

    Raises:
        UserError: The questions are missing, or an older run has a method that is unknown here.
    """
    if questions is None:
        raise UserError("the questions are missing.")
    return answers_frame(manifest["experiment"]["model"], cells_of(manifest), questions, journal)


def cells_of(manifest: Mapping[str, Any]) -> list[Cell] | list[CellRecord]:
    """The cells of a comparison; no code of its methods is needed, except for older runs.

    Raises:
        UserError: An older run has a method that is unknown here.
    """
    if manifest.get("cells"):
        return [CellRecord.read(cell) for cell in manifest["cells"]]
    experiment = manifest["experiment"]
    columns = [*_columns(experiment, (manifest.get("request") or {}).get("seeds", 1))]
    columns[1:1] = references(set(experiment["modality"]))
    return columns


def _columns(experiment: Mapping[str, Any], seeds: int) -> Iterator[Cell]:
    """The cells of an older run, made of its methods."""
    if experiment.get("match"):
        yield Cell()
        for one in experiment["match"]:
            matched = Matched(**{item.name: one[item.name] for item in fields(Matched)})
            method, retention = one["method"], one["retention"]
            yield Cell(tp.parse(method, retention=retention), matched=matched)
        return
    for cell in cells(experiment["methods"], experiment["retention"]):
        pooled = False
        if cell.compressor is not None and seeds > 1:  # each ran with the seeds 0, 1, ...
            pooled = getattr(cell.compressor, "seed", seeds) in range(seeds)
            pooled &= without_seed(cell.compressor).label in experiment["methods"]
        yield replace(cell, pooled=pooled)


def answers_of(folder: Path, notes: list[str], metric: str | None = None) -> pd.DataFrame:
    """The answers of a run: ``answers.parquet``, or the journal if it has grown since.

    Args:
        folder: The run folder.
        notes: Receives a sentence if answers are missing from the result.
        metric: Scores the answers instead of the metric of the run (`metrics.with_metric`).

    Raises:
        UserError: No answers can be read, or the metric is unknown or cannot score them.
    """
    check_folder(folder)
    try:
        table, wrong = read_answers(folder), None
    except UserError as error:
        table, wrong = None, error
    file = folder / "answers.jsonl"
    size = file.stat().st_size if file.is_file() else None
    # If the journal is shorter than when the table was made, it has lost answers of the table.
    if table is not None and (size is None or table.attrs.get("journal", size) >= size):
        return rescored(table, metric)
    try:
        manifest, journal = manifest_of(folder), Journal(file)
        questions = questions_of(folder, manifest, journal, [])
        return journaled(manifest, questions and with_metric(questions, metric), journal)
    except UserError as error:
        if table is None:
            raise wrong or error from None
        notes.append(
            f"answers.parquet of {folder} is older than the journal; the command that made the "
            "folder brings it up to date."
        )
        return rescored(table, metric)
