"""Reads the logs of lmms-eval: ``*_samples_TASK.jsonl``, written with ``--log_samples``.

This module does not import lmms-eval.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import CellRecord

__all__ = ["Log", "Sample", "read_logs"]


_NAME = re.compile(r"(\d{8}_\d{6})_samples_(.+)\.jsonl")


_OWN = {
    *("doc_id", "doc", "doc_hash", "target", "input", "input_media", "arguments"),
    *("resps", "filtered_resps", "token_counts"),
}
"""Fields of a line that are not scores."""


class _Cell(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    key: str
    method: str
    label: str
    parameters: str
    name: str
    retention: Annotated[float, Field(gt=0, le=1)] | None
    matched: None = None


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow")

    cell: _Cell
    setting: dict[str, str | None]
    media: list[str]


class _Counts(BaseModel):
    tokenprune: _Record


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    doc_id: int | str
    doc_hash: str
    target: str
    input: str = ""
    filtered_resps: Any
    token_counts: list[_Counts | None] = []


@dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        number: The document in its task.
        digest: Hash of the document, by lmms-eval.
        prompt, truth, answer: Texts; the answer of a multiple-choice task is the number of the
            likeliest choice.
        score, metric: The score of lmms-eval, from 0 to 1, and the name of its metric; None if
            the answer has none.
        media: Digests of its images and videos.
        figures: The other fields of its record: the ledger, and what was kept.
    """

    number: str
    digest: str
    prompt: str
    truth: str
    answer: str
    score: float | None
    metric: str | None
    media: tuple[str, ...]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Log:
    """The answers to one task in one run of lmms-eval.

    Attributes:
        path: The file.
        date: When the run began, as text that sorts by time.
        task: Name of the task.
        cell: Method and retention ratio.
        setting: Model, dtype and device.
        samples: The answers, one per document.
    """

    path: Path
    date: str
    task: str
    cell: CellRecord
    setting: Mapping[str, str | None]
    samples: Sequence[Sample]


def read_logs(folders: Iterable[Path], metrics: Mapping[str, str]) -> list[Log]:
    """Every log of samples below ``folders``, in the order of the folders and by date.

    Args:
        folders: Given to lmms-eval as ``--output_path``, or folders of them.
        metrics: Task to the metric that scores it.  The first metric scores the other tasks.

    Raises:
        UserError: There is no log, a line is malformed, or a log was not written by a model of
            tokenprune.
    """
    found = []
    for folder in folders:
        # os.path: no error for a name that is too long.
        inside = folder.rglob("*.jsonl") if os.path.isdir(folder) else ()
        files = [(path, _NAME.fullmatch(path.name)) for path in inside]
        named = sorted((name[1], name[2], path) for path, name in files if name)
        if not named:
            raise UserError(
                f"{str(folder)!r} holds no log of samples; give the folder that lmms-eval received "
                "as --output_path, and run it with --log_samples."
            )
        found += [_read(path, date, task, metrics.get(task)) for date, task, path in named]
    tasks = {log.task for log in found}
    if unknown := sorted(metrics.keys() - tasks):
        raise UserError(
            f"--metric names the task {unknown[0]!r}, but the logs have {', '.join(sorted(tasks))}."
        )
    return found


def _read(path: Path, date: str, task: str, metric: str | None) -> Log:
    lines: dict[str, _Line] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        line = _line(path, number, text)
        lines.setdefault(str(line.doc_id), line)  # further filters of a task repeat its documents
    records = {name: next(filter(None, line.token_counts), None) for name, line in lines.items()}
    first = next((counts.tokenprune for counts in records.values() if counts), None)
    if first is None:
        raise UserError(
            f"{path} does not say which method was run: it was not written by a model "
            "tokenprune_..., or all its answers came from --use_cache. Run the uncompressed model "
            "with method=none."
        )
    samples = []
    for name, line in lines.items():
        counts = records[name]
        samples.append(_sample(path, line, counts.tokenprune if counts else None, metric))
    cell = CellRecord(**first.cell.model_dump())
    return Log(path, date, task, cell, first.setting, samples)


def _line(path: Path, number: int, text: bytes) -> _Line:
    try:
        return _Line.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        why = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else error
        said = f"{why['loc']}: {why['msg']}" if isinstance(why, Mapping) else why
        raise UserError(
            f"{path}, line {number} is not a sample of lmms-eval ({said}); run lmms-eval again."
        ) from error


def _sample(path: Path, line: _Line, record: _Record | None, metric: str | None) -> Sample:
    name, score = _score(path, line.model_extra or {}, metric)
    return Sample(
        number=str(line.doc_id),
        digest=line.doc_hash,
        prompt=line.input,
        truth=line.target,
        answer=_answer(line.filtered_resps),
        score=score,
        metric=name,
        media=tuple(record.media) if record else (),
        figures=dict(record.model_extra or {}) if record else {},
    )


def _answer(given: Any) -> str:
    """The answer of a task; of a multiple-choice task, the number of the choice of least loss."""
    while isinstance(given, list) and len(given) == 1:
        given = given[0]
    pairs = isinstance(given, list) and all(isinstance(one, list) for one in given)
    if pairs and all(one and isinstance(one[0], int | float) for one in given):
        losses = [one[0] for one in given]
        return str(losses.index(min(losses)))
    if isinstance(given, list) and given and isinstance(given[0], str):
        return given[0]
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _score(
    path: Path, fields: Mapping[str, Any], metric: str | None
) -> tuple[str | None, float | None]:
    """Name and score of the metric, or of the first one that has a number.

    A metric is a number, or an object with the number ``score``.
    """
    scores = dict(_scores(fields))
    if metric is None:
        return next(iter(scores.items()), (None, None))
    if metric not in fields:
        known = ", ".join(name for name in fields if name not in _OWN) or "none"
        raise UserError(f"{path} has no metric {metric!r}; its metrics: {known}.")
    return (metric, scores[metric]) if metric in scores else (None, None)


def _scores(fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in fields.items():
        number = value.get("score") if isinstance(value, dict) else value
        if name not in _OWN and isinstance(number, bool | int | float) and 0 <= number <= 1:
            yield name, float(number)
