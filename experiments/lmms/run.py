"""Turns logs of lmms-eval into a run folder, as if ``tokenprune compare`` had asked the questions.

Every run of lmms-eval is a cell: a method at a retention ratio.  Answers to the same document are
answers to the same question, so that paired statistics, plots and report apply.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import CellRecord
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.questions import Picture, Question, fingerprint
from tokenprune.experiments.common.request import FIGURES, FigureOptions, Request
from tokenprune.experiments.common.run_folder import (
    UNCOMPRESSED,
    RunFolder,
    asked_for,
    stored_path,
)
from tokenprune.experiments.common.summary import summarise
from tokenprune.experiments.compare.run import draw
from tokenprune.experiments.lmms.samples import Log, Sample, read_logs
from tokenprune.progress import ProgressCallback, silent
from tokenprune.texts import is_plain

__all__ = ["ImportRequest", "run"]


QUESTIONS = "questions.jsonl"


@dataclass(frozen=True, kw_only=True)
class ImportRequest(Request):
    """Which logs to import.

    Attributes:
        logs: Folders with logs of lmms-eval.
        metrics: Task to the metric that scores its answers; the first one of a task by default.
        images: The folder of ``save_images``, for the masks of the report; None if there is none.
        seed: Of the bootstrap.
        figures: How figures are drawn.
    """

    logs: Sequence[Path]
    metrics: Mapping[str, str] = field(default_factory=dict)
    images: Path | None = None
    seed: int = 0
    figures: FigureOptions = FIGURES


def run(request: ImportRequest, progress: ProgressCallback = silent) -> Outcome:
    """Import the logs.

    If a method answered a task in several runs of lmms-eval, the latest run counts.

    Returns:
        With the table ``summary``; ``notes`` say what is missing.

    Raises:
        UserError: As `read_logs`; or the logs are of different models or settings, or the
            documents of a task differ.
    """
    check_number("seed", request.seed)
    progress(0, 0, "reading the logs")
    notes: list[str] = []
    logs = _latest(read_logs(request.logs, request.metrics), notes)
    setting = _setting(logs)
    cells = _cells(logs)
    path = request.out or Path("runs") / _folder_name(logs, setting)
    stored = stored_path(request.images, path) if request.images else "images"
    questions = _questions(logs, request.images or path / "images", stored)
    _note(logs, cells, questions, notes)
    experiment = _experiment(request, setting, cells, questions, logs)
    details = asked_for(request, path) | environment()
    details["cells"] = [asdict(cell) for cell in cells]
    details["request"] |= {"data": QUESTIONS}
    folder = RunFolder.open(path, experiment, details)
    _write_questions(path / QUESTIONS, questions)
    with Journal(folder.journal) as journal:
        before = len(journal.answers)
        for log in logs:
            records = {_name(log, sample): _record(sample) for sample in log.samples}
            journal.add(log.cell.key, records)
    progress(0, 0, "tables and plots")
    answers = answers_frame(experiment["model"], cells, questions, journal)
    summary = summarise(answers, seed=request.seed)
    folder.write_tables(answers, summary)
    draw(folder, experiment["model"], summary, request.figures)
    folder.close("complete")
    return Outcome(
        folder.path,
        answered=len(journal.answers),
        wanted=len(cells) * len(questions),
        new=len(journal.answers) - before,
        tables={"summary": summary},
        files=("answers.parquet", "summary.csv", "plots/"),
        notes=tuple(notes),
    )


# --- the logs -------------------------------------------------------------------------------------


def _latest(logs: Sequence[Log], notes: list[str]) -> list[Log]:
    """Of every cell and task, the latest log."""
    found: dict[tuple[str, str], Log] = {}
    for log in logs:
        key = log.cell.key, log.task
        if key not in found or found[key].date <= log.date:
            found[key] = log
    if len(found) < len(logs):
        notes.append(
            f"{len(logs) - len(found)} logs are left out, because a later run repeats them."
        )
    return list(found.values())


def _setting(logs: Sequence[Log]) -> Mapping[str, str | None]:
    """The setting of all logs.  Raises `UserError` if they differ."""
    first = logs[0]
    for log in logs[1:]:
        for name, value in log.setting.items():
            if value != first.setting.get(name):
                raise UserError(
                    f"{log.path} has {name} {value}, but {first.path} has "
                    f"{first.setting.get(name)}; import runs of one {name} at a time."
                )
    return first.setting


def _cells(logs: Sequence[Log]) -> list[CellRecord]:
    """The cells of the logs, the uncompressed model first."""
    found = {log.cell.key: log.cell for log in logs}
    return sorted(found.values(), key=lambda cell: cell.key != UNCOMPRESSED)


def _name(log: Log, sample: Sample) -> str:
    return f"{log.task}/{sample.number}"


def _questions(logs: Sequence[Log], images: Path, stored: str) -> list[Question]:
    """The questions of all logs.

    Args:
        logs: The logs.
        images: The folder of images.
        stored: The same as the run folder stores it.

    Raises:
        UserError: A document differs between logs.
    """
    found: dict[str, Question] = {}
    first: dict[str, tuple[Log, Sample]] = {}
    for log in logs:
        for sample in log.samples:
            name = _name(log, sample)
            other, known = first.setdefault(name, (log, sample))
            if (known.digest, known.prompt) != (sample.digest, sample.prompt):
                raise UserError(
                    f"document {sample.number} of {log.task} differs between {other.path} and "
                    f"{log.path}; import runs of the same task and model id."
                )
            if name not in found or (sample.media and not known.media):
                # A question without images is a cluster of its own.
                media = [f"{one}.png" for one in sample.media or (sample.digest,)]
                shown = tuple(Picture(f"{stored}/{one}", images / one) for one in media)
                texts = _plain(sample.prompt) or "-", _plain(sample.truth)
                found[name] = Question(name, shown, *texts, kind=log.task)
                first[name] = log, sample
    return list(found.values())


def _plain(text: str) -> str:
    """``text`` as a data file can hold it: whole characters, no control characters."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(sign if is_plain(sign, "\t\n\r") else " " for sign in whole).strip()


def _note(
    logs: Sequence[Log],
    cells: Sequence[CellRecord],
    questions: Sequence[Question],
    notes: list[str],
) -> None:
    """Say what the tables cannot show."""
    if all(cell.key != UNCOMPRESSED for cell in cells):
        notes.append(
            "No log is of the uncompressed model, so agreement is unknown; run method=none."
        )
    for task in dict.fromkeys(log.task for log in logs):
        samples = [sample for log in logs if log.task == task for sample in log.samples]
        if bare := sum(sample.score is None for sample in samples):
            notes.append(
                f"{bare} of {len(samples)} answers to {task} have no score from 0 to 1 in the log, "
                "so they are compared with the true answer as texts."
            )
    answers = sum(len(log.samples) for log in logs)
    if answers < len(cells) * len(questions):
        notes.append(
            f"{len(cells) * len(questions) - answers} answers are missing, because not every "
            "method ran on every document."
        )


def _record(sample: Sample) -> dict[str, Any]:
    """The entry of an answer in the journal.

    A colon in the name of its metric says that it is not one of `tokenprune.experiments.metrics`.
    """
    scored = {"score": sample.score, "metric": f"lmms-eval:{sample.metric}"}
    given = {} if sample.score is None else scored
    return {"answer": sample.answer, **given, **sample.figures}


# --- the folder -----------------------------------------------------------------------------------


def _experiment(
    request: ImportRequest,
    setting: Mapping[str, str | None],
    cells: Sequence[CellRecord],
    questions: Sequence[Question],
    logs: Sequence[Log],
) -> dict[str, Any]:
    """What the tables depend on."""
    methods = [cell for cell in cells if cell.key != UNCOMPRESSED]
    return {
        **setting,
        "methods": list(dict.fromkeys(cell.label for cell in methods)),
        "retention": list(dict.fromkeys(cell.retention for cell in methods)),
        "references": {},
        "questions": len(questions),
        "modality": sorted({item.modality for item in questions}),
        "tasks": list(dict.fromkeys(log.task for log in logs)),
        "metrics": dict(request.metrics),
        "data": _fingerprint(questions),
        "logs": _digest(logs),
        "seed": request.seed,
        "max_new_tokens": 0,  # of each task
    }


def _digest(logs: Sequence[Log]) -> str:
    """SHA-256 of the logs."""
    content = hashlib.sha256()
    for log in sorted(logs, key=lambda one: (one.task, one.cell.key)):
        content.update(log.path.read_bytes())
    return content.hexdigest()


def _folder_name(logs: Sequence[Log], setting: Mapping[str, str | None]) -> str:
    """The model, the tasks, and a digest of the logs."""
    tasks = list(dict.fromkeys(log.task for log in logs))
    named = "+".join(tasks) if len(tasks) < 4 else f"{len(tasks)}-tasks"
    parts = [Path(str(setting["model"])).name, f"lmms-{named}", _digest(logs)[:8]]
    return re.sub(r"[^\w.+=-]+", "-", "_".join(parts))


def _fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of the questions, with the content of images where they are at hand."""
    try:
        return fingerprint(questions)
    except (OSError, UserError):
        names = [[picture.id for picture in item.images] for item in questions]
        texts = [[item.id, item.question, item.answer] for item in questions]
        return hashlib.sha256(json.dumps([names, texts]).encode()).hexdigest()


def _write_questions(path: Path, questions: Sequence[Question]) -> None:
    """The questions as a data file, which ``tokenprune report`` reads."""
    lines = []
    for item in questions:
        line = {"id": item.id, "images": [one.id for one in item.images]}
        line |= {"question": item.question, "kind": item.kind}
        line |= {"answer": item.answer} if item.answer else {}
        lines.append(json.dumps(line, ensure_ascii=False))
    with replace_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
