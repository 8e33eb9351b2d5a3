"""Methods side by side: every method at every retention ratio, on one model and the same questions.

The outer loop runs over batches of questions, the inner one over cells (a method at a retention
ratio).  So the vision encoder sees every image once, and after an interruption all cells have
answered the same questions.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from tokenprune.compatibility import check_compatible
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import Cell, CellRecord, Failure
from tokenprune.experiments.common.files import WriteError
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.loading import options_of_answers
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    Files,
    answer_files,
    code_roots,
    digests,
    environment,
)
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.common.run_folder import (
    RunFolder,
    asked_for,
    folder_name,
    stored_path,
)
from tokenprune.experiments.common.setting import Setting, prepare, with_faults_noted
from tokenprune.experiments.common.summary import summarise
from tokenprune.experiments.compare import figures, loop
from tokenprune.experiments.compare.cut_short import warn_of_cut_answers
from tokenprune.experiments.compare.finished import FILES
from tokenprune.experiments.compare.matching import matched_cells
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.experiments.compare.sharing import separate, together
from tokenprune.models import testbed
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.registry import strategies

__all__ = [
    "accuracy_so_far",
    "answer",
    "run",
]


def run(
    request: CompareRequest,
    progress: ProgressCallback = silent,
    *,
    name: str = "",
    columns: Sequence[Cell] | None = None,
    setting: Setting | None = None,
) -> Outcome:
    """Compare methods, or resume a comparison that was interrupted.

    Args:
        request: What to compare.
        progress: Called before every step.
        name: Of another experiment that runs its cells here; the folder is named after it.
        columns: The cells of that experiment, instead of methods and retention ratios.  The
            uncompressed model and the references are added.
        setting: The model and its questions, if they are loaded already.

    Raises:
        UserError: Bad input, before the model answers a question.
    """
    setting = setting or prepare(request, progress, keep_faulty=True)
    setting = replace(setting, questions=with_faults_noted(setting, request.max_new_tokens))
    skipped: dict[str, str] = {}
    if columns is None:
        columns, skipped = _columns(request, setting, progress)
    beside = [Cell(), *references({item.modality for item in setting.questions})]
    columns = [*beside, *(cell for cell in columns if cell not in beside)]
    for cell in columns:
        if cell.compressor:
            check_compatible(setting.pipe.adapter.facts, cell.compressor)
    folder = _opened(request, _Work(setting, columns), name, skipped)
    try:
        outcome = _fill(folder, request, _Work(setting, columns), progress)
    except BaseException as error:
        with suppress(WriteError):  # reported by the first error
            folder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    failures = [{"cell": str(cell), **asdict(why)} for cell, why in outcome.failures.items()]
    folder.manifest["missing"] = {
        question: {str(cell): why.error for cell, why in cells_of.items()}
        for question, cells_of in outcome.missing.items()
    }
    folder.close(outcome.status, failures)
    return replace(outcome, skipped=skipped)


@dataclass(frozen=True)
class _Work:
    """What to answer: the questions of a setting, in every one of ``columns``."""

    setting: Setting
    columns: Sequence[Cell]

    @property
    def pipe(self) -> Pipeline:
        return self.setting.pipe

    @property
    def questions(self) -> Sequence[Question]:
        return self.setting.questions


def _columns(
    request: CompareRequest, setting: Setting, progress: ProgressCallback
) -> tuple[list[Cell], dict[str, str]]:
    """The cells of the methods, and why methods of ``all`` are not among them."""
    methods, skipped = expanded(
        request.methods, partial(check_compatible, setting.pipe.adapter.facts)
    )
    if request.match is None:
        return cells(methods, request.retention, request.seeds), skipped
    found, left_out = matched_cells(
        setting.pipe,
        [item for item in setting.questions if not item.fault],
        methods,
        request.retention,
        request.match,
        optional=set(methods) - set(request.methods),
        progress=progress,
    )
    return found, skipped | left_out


def _opened(
    request: CompareRequest, work: _Work, name: str, skipped: Mapping[str, str]
) -> RunFolder:
    """The folder of the run, which holds nothing else."""
    surroundings = environment()
    compressors = [cell.compressor for cell in work.columns if cell.compressor]
    roots = code_roots(compressors, [type(work.pipe.adapter), __name__])
    files = answer_files(work.pipe.path, compressors, roots)
    experiment = _experiment(request, work, surroundings["versions"], files)
    experiment |= {"name": name} if name else {}
    path = request.out or Path("runs") / folder_name(experiment)
    details = _details(request, work.pipe, path) | {"files": files} | surroundings
    details["cells"] = [asdict(CellRecord.of(cell)) for cell in work.columns]
    if request.match is None and not name:
        details["finished"] = {
            "code": roots,
            "skipped": skipped,
            "registered": strategies.names() if ALL in request.methods else None,
        }
    return RunFolder.open(path, experiment, details)


def answer(
    pipe: Pipeline,
    columns: Sequence[Cell],
    questions: Sequence[Question],
    journal: Journal,
    *,
    max_new_tokens: int,
    batch_size: int,
    shared: bool = True,
    timeout: float | None = None,
    progress: ProgressCallback = silent,
) -> None:
    """Add to ``journal`` every answer that it lacks.

    Args:
        pipe: Of the model.
        columns: The cells.
        questions: The questions.
        journal: The journal, which must be open.
        max_new_tokens: Maximum length of an answer.
        batch_size: Questions per batch.
        shared: Whether the shared work of cells is computed once.
        timeout: Time limit of one computation, in seconds.
        progress: Called before every step.
    """
    loop.run(
        ModelRunner(pipe, max_new_tokens),
        columns,
        questions,
        journal,
        batch_size=batch_size,
        plan=together if shared else separate,
        timeout=timeout,
        progress=progress,
    )


def accuracy_so_far(summary: pd.DataFrame, model: str) -> Figure:
    """The accuracy of a run that has drawn no figures yet; ``summary`` as in ``summary.csv``."""
    return figures.accuracy(summary, f"Accuracy of {model} so far")


def _fill(
    folder: RunFolder, request: CompareRequest, work: _Work, progress: ProgressCallback
) -> Outcome:
    """Compute missing answers, and write tables and plots of all answers."""
    columns, questions = work.columns, work.questions
    embedded = request.model in testbed.names()
    interrupted = False
    with Journal(folder.journal) as journal:
        before = len(journal.answers)
        try:
            answer(
                work.pipe,
                columns,
                questions,
                journal,
                max_new_tokens=request.max_new_tokens,
                batch_size=request.batch_size or (50 if embedded else 4),
                timeout=request.timeout_per_batch,
                progress=progress,
            )
        except KeyboardInterrupt:
            interrupted = True
    if interrupted or not journal.whole:
        journal = Journal(
            folder.journal
        )  # read from the file, as the interrupt may come at any point
    wanted = len({cell.key for cell in columns}) * len(questions)
    progress(len(journal.answers), wanted, "tables and plots")
    answers = answers_frame(request.model, columns, questions, journal)
    warn_of_cut_answers(journal, (cell.key for cell in columns), request.max_new_tokens)
    summary = summarise(answers, seed=request.seed)
    folder.write_tables(answers, summary)
    if (
        not interrupted and "name" not in folder.manifest["experiment"]
    ):  # other experiments draw their own
        figures.draw(folder, request.model, summary, request.figures)
    failures = {c: journal.failures[c.key] for c in columns if c.key in journal.failures}
    if not interrupted:
        failures = dict(_lacking(columns, questions, journal)) | failures
    missing: dict[str, dict[Cell, Failure]] = {}
    for item in questions:
        for cell in columns:
            if cell not in failures and (why := journal.missing.get((cell.key, item.id))):
                missing.setdefault(item.id, {})[cell] = why
    done = "failed" if failures or missing else "complete"
    return Outcome(
        status="interrupted" if interrupted else done,
        folder=folder.path,
        answered=len(journal.answers),
        wanted=wanted,
        new=len(journal.answers) - before,
        tables={"summary": summary},
        files=FILES,
        failures=failures,
        missing=missing,
    )


def _lacking(
    columns: Sequence[Cell], questions: Sequence[Question], journal: Journal
) -> Iterator[tuple[Cell, Failure]]:
    """Cells with missing answers but without a reported failure; they make the run incomplete."""
    for cell in columns:
        key = cell.key
        rows = {(key, item.id) for item in questions}
        missing = len(rows - journal.answers.keys() - journal.missing.keys())
        if missing:
            words = f"{missing} of {len(questions)} answers are not in the journal"
            yield cell, Failure(f"{words}; the same command tries them again.", "")


def _experiment(
    request: CompareRequest,
    work: _Work,
    versions: Mapping[str, str | None],
    files: Mapping[str, Files],
) -> dict[str, Any]:
    """Everything that the answers depend on; runs share a folder only if it is equal."""
    columns, questions, pipe = work.columns, work.questions, work.pipe
    methods = [cell.compressor for cell in columns if cell.compressor and not cell.name]
    return {
        "model": request.model,
        "methods": list(dict.fromkeys(compressor.label for compressor in methods)),
        "retention": list(dict.fromkeys(compressor.retention for compressor in methods)),
        "references": {cell.name: repr(cell.compressor) for cell in columns if cell.name},
        "questions": len(questions),
        "modality": sorted({item.modality for item in questions}),
        "data": fingerprint(questions),
        "seed": request.seed,
        "device": pipe.device.type,
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "max_new_tokens": request.max_new_tokens,
        **options_of_answers(request),
        **({} if request.match is None else {"match": _match(columns)}),
        **digests(files),
        "revision": getattr(pipe.model.config, "_commit_hash", None),
        **{package: versions[package] for package in DECISIVE},
    }


def _match(columns: Sequence[Cell]) -> list[dict[str, Any]]:
    """The target cost of every solved retention ratio."""
    return [
        {"method": cell.label, "retention": cell.retention, **asdict(cell.matched)}
        for cell in columns
        if cell.matched is not None
    ]


def _details(request: CompareRequest, pipe: Pipeline, folder: Path) -> dict[str, Any]:
    """Further entries of the manifest."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    details = {**asked_for(request, folder), "device_name": name}
    if request.model not in testbed.names() and Path(request.model).is_dir():
        details["model_folder"] = stored_path(Path(request.model), folder)
    return details
