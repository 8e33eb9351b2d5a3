"""The main job: methods x retentions on one model and one set of questions, side by side.

The outer loop runs over batches of questions, the inner one over cells (a method at a retention),
so that the vision tower sees every image once, and an interrupted run has the same questions
answered by every cell.
"""

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenprune.adapter import Adapter
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.files import WriteError
from tokenprune.experiments.common.grid import cells, expanded
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    Files,
    answer_files,
    digests,
    environment,
)
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.run_folder import RunFolder, asked_for
from tokenprune.experiments.common.setting import Outcome, Request, prepare, with_faults_noted
from tokenprune.experiments.common.summary import summarise
from tokenprune.experiments.compare.figures import draw
from tokenprune.experiments.compare.loop import run
from tokenprune.experiments.compare.matching import matched_cells
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.experiments.compare.sharing import together
from tokenprune.models import testbed
from tokenprune.progress import Report

if TYPE_CHECKING:
    from tokenprune.experiments.common.setting import Setting

__all__ = [
    "compare",
]


# --- the command ----------------------------------------------------------------------------------


def compare(
    request: Request,
    report: Report = lambda *_: None,
    *,
    name: str = "",
    columns: Sequence[Cell] | None = None,
    setting: "Setting | None" = None,
) -> Outcome:
    """Do what is asked, or what is left of it if it was begun before.

    Args:
        request: What to compare.
        report: Told how far it is.
        name: Of the experiment, if it is another one; the folder is named after it.
        columns: Cells of that experiment, in the place of methods and retentions.  The uncompressed
            model and the references are added.
        setting: The model and its questions, if they are there already.

    Raises:
        UserError: Bad input, found before the model answers a question.
    """
    setting = setting or prepare(request, report, keep_faulty=True)
    adapter = setting.adapter
    questions = with_faults_noted(setting, request.max_new_tokens)
    skipped: dict[str, str] = {}
    if columns is None:
        methods, skipped = expanded(request.methods, adapter.check)
        if request.match is None:
            columns = cells(methods, request.retention, request.seeds)
        else:
            columns, left_out = matched_cells(
                adapter,
                [item for item in questions if not item.fault],
                methods,
                request.retention,
                request.match,
                optional=set(methods) - set(request.methods),
                report=report,
            )
            skipped |= left_out
    beside = [Cell(), *references({item.modality for item in questions})]
    columns = [*beside, *(cell for cell in columns if cell not in beside)]
    for cell in columns:
        if cell.compressor:
            adapter.check(cell.compressor)

    surroundings = environment()
    files = answer_files(
        adapter.path,
        [cell.compressor for cell in columns if cell.compressor],
        [type(adapter), __name__],
    )
    experiment = _experiment(request, columns, questions, adapter, surroundings["versions"], files)
    experiment |= {"name": name} if name else {}
    path = request.out or Path("runs") / _folder_name(experiment)
    details = _details(request, adapter, path) | {"files": files} | surroundings
    folder = RunFolder.open(path, experiment, details)
    try:
        outcome = _fill(folder, request, columns, questions, adapter, report)
    except BaseException as error:
        with suppress(WriteError):  # the first error says it
            folder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    failures = [{"cell": str(cell), **asdict(why)} for cell, why in outcome.failures.items()]
    folder.manifest["missing"] = {
        question: {str(cell): why.error for cell, why in cells_of.items()}
        for question, cells_of in outcome.missing.items()
    }
    folder.close(outcome.status, failures)
    return replace(outcome, skipped=skipped)


def _fill(
    folder: RunFolder,
    request: Request,
    columns: Sequence[Cell],
    questions: Sequence[Question],
    adapter: Adapter,
    report: Report,
) -> Outcome:
    """Answer what is not answered yet, and write tables and plots of what there is."""
    embedded = request.model in testbed.names()
    interrupted = False
    with Journal(folder.journal) as journal:
        before = len(journal.answers)
        try:
            run(
                ModelRunner(adapter, request.max_new_tokens),
                columns,
                questions,
                journal,
                batch_size=request.batch_size or (50 if embedded else 4),
                plan=together,
                timeout=request.timeout_per_batch,
                report=report,
            )
        except KeyboardInterrupt:
            interrupted = True
    if interrupted or not journal.whole:
        journal = Journal(folder.journal)  # what is in the file, wherever the interrupt fell
    wanted = len({cell.key for cell in columns}) * len(questions)
    report(len(journal.answers), wanted, "tables and plots")
    answers = answers_frame(request.model, columns, questions, journal)
    summary = summarise(answers, seed=request.seed)
    folder.write_tables(answers, summary)
    if not interrupted and "name" not in folder.manifest["experiment"]:  # others draw their own
        draw(folder, request.model, summary)
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
        summary=summary,
        failures=failures,
        missing=missing,
    )


def _lacking(
    columns: Sequence[Cell], questions: Sequence[Question], journal: Journal
) -> Iterator[tuple[Cell, Failure]]:
    """Cells of which answers are missing, though nothing was reported; no run is complete then."""
    for cell in columns:
        key = cell.key
        rows = {(key, item.id) for item in questions}
        missing = len(rows - journal.answers.keys() - journal.missing.keys())
        if missing:
            words = f"{missing} of {len(questions)} answers are not in the journal"
            yield cell, Failure(f"{words}; the same command asks for them again.", "")


def _experiment(
    request: Request,
    columns: Sequence[Cell],
    questions: Sequence[Question],
    adapter: Adapter,
    versions: Mapping[str, str | None],
    files: Mapping[str, Files],
) -> dict[str, Any]:
    """All that the answers depend on; two runs may share a folder only if this is equal."""
    config = adapter.model.config
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
        "device": adapter.device.type,
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "max_new_tokens": request.max_new_tokens,
        **({} if request.match is None else {"match": _match(columns)}),
        **digests(files),
        "revision": getattr(config, "_commit_hash", None),
        **{package: versions[package] for package in DECISIVE},
    }


def _match(columns: Sequence[Cell]) -> list[dict[str, Any]]:
    """What every retention was solved for."""
    return [
        {"method": cell.label, "retention": cell.retention, **asdict(cell.matched)}
        for cell in columns
        if cell.matched is not None
    ]


def _details(request: Request, adapter: Adapter, folder: Path) -> dict[str, Any]:
    """What else a reader of the manifest will want to know."""
    device = adapter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**asked_for(request, folder), "device_name": name}


def _folder_name(experiment: dict[str, Any]) -> str:
    """Readable, and different for different experiments, so that none is refused its folder."""
    methods = experiment.get("name") or "+".join(experiment["methods"])
    if len(methods) > 60:
        methods = f"{len(experiment['methods'])}-methods"
    parts = [Path(experiment["model"]).name, methods, f"{experiment['questions']}-questions"]
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^\w.+=-]+", "-", "_".join([*parts, digest[:8]]))
