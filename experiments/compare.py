"""The main job: methods x retentions on one model and one set of questions, side by side.

The outer loop runs over batches of questions, the inner one over cells (a method at a retention),
so that the vision tower sees every image once, and an interrupted run has the same questions
answered by every cell.
"""

import hashlib
import json
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError, unknown
from tokenprune.experiments import data, plots
from tokenprune.experiments.data import Modality, Question
from tokenprune.experiments.efficiency import chosen
from tokenprune.experiments.intervals import OVERALL, summarise
from tokenprune.experiments.matching import Kind, check_kind, matched_cells
from tokenprune.experiments.results import (
    Cell,
    Failure,
    Journal,
    RunFolder,
    answers_frame,
    check_writable,
    code_fingerprint,
    environment,
    files_fingerprint,
)
from tokenprune.models import testbed
from tokenprune.models.adapter import Adapter
from tokenprune.registry import strategies
from tokenprune.terminal import Report
from tokenprune.tokens import Signal

__all__ = ["Outcome", "Report", "Request", "Runner", "cells", "compare", "run"]

METHODS = ("uniform", "random", "fastv", "globalcom2")
RETENTION = (1.0, 0.5, 0.25, 0.1)
TESTBED_QUESTIONS = 500
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare.

    Attributes:
        model: A testbed's name, a Hub id or a local folder.
        methods: Specs such as ``globalcom2:alpha=0.3,tau=5``; ``all`` stands for every registered
            method that the model has what it takes for.  ``uniform@0.3`` and chains such as
            ``globalcom2@0.5 + fastv@0.5`` say themselves what they keep.
        retention: Shares of patch tokens to keep, each in (0, 1].
        questions: How many; None for 500 of the testbed's or for all of ``data``.
        modality: ``image``, ``multi-image`` or ``video``; None for ``image`` of the testbed's or
            for all of ``data``.
        data: JSON lines with your own questions (`data.read_jsonl`); None for the testbed's.
        batch_size: Questions answered at once; None for 50 on a testbed, otherwise 4.
        seed: Draws the testbed's questions and the bootstrap samples.
        device: None for CUDA where there is one, otherwise the CPU.
        dtype: As in `tokenprune.load`.
        out: Folder of the run; None for one in ``runs/`` named after the request.
        max_new_tokens: Longest answer.
        match: Bring every method to the cost of `uniform` at each retention: ``tokens``, ``flops``
            or ``prefill-ms`` (`matching.matched_cells`); None takes retentions as they are.  Times
            are measured anew by every call, so that such a run cannot be resumed.
    """

    model: str = "testbed-next"
    methods: Sequence[str] = METHODS
    retention: Sequence[float] = RETENTION
    questions: int | None = None
    modality: Modality | None = None
    data: Path | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    out: Path | None = None
    max_new_tokens: int = 8
    match: Kind | None = None


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended.

    Attributes:
        status: ``complete``, ``failed`` (some cell could not be finished) or ``interrupted``.
        folder: Where everything was written.
        answered, wanted: Answers in the journal, and answers in a complete one.
        new: Answers this call added.
        summary: As in ``summary.csv``.
        failures: Cell to why it failed, in the order of the cells.
        skipped: Methods that ``all`` left out, and why.
    """

    status: str
    folder: Path
    answered: int
    wanted: int
    new: int
    summary: pd.DataFrame
    failures: dict[Cell, Failure] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """What answers questions: a model, or a stand-in for tests."""

    def encode(
        self, questions: Sequence[Question], signals: frozenset[Signal]
    ) -> Sequence[Sequence[Any]]:
        """Run the vision tower once; for every question its encoded images or video."""

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        """Answer one batch; for every prompt its ``answer`` and the figures of its ledger."""


@dataclass(frozen=True)
class ModelRunner:
    """Greedy answers of a loaded model."""

    adapter: Adapter
    max_new_tokens: int

    def encode(
        self, questions: Sequence[Question], signals: frozenset[Signal]
    ) -> Sequence[Sequence[Any]]:
        opened = [[picture.open() for picture in item.images] for item in questions]
        encode = self.adapter.encode
        # Single images, the common case, go through the vision tower together.
        alone = [index for index, item in enumerate(questions) if item.modality == "image"]
        single = iter(encode([opened[index][0] for index in alone], signals))
        found = []
        for item, images in zip(questions, opened, strict=True):
            if item.modality == "image":
                found.append([next(single)])
            elif item.modality == "video":
                found.append(self.adapter.encode_videos([images], signals))
            else:
                found.append(encode(images, signals, together=True))
        return found

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        inputs = self.adapter.assemble(images, prompts)
        with tp.compress(self.adapter.model, compressor) as trace:
            ids = self.adapter.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        texts = self.adapter.decode(ids, inputs)
        return [
            {
                "answer": text,
                "patch_tokens": ledger.patch_tokens,
                "kept_patches": ledger.kept_patches,
                "separators": ledger.separators,
                "kept_separators": ledger.kept_separators,
                "entered_patches": ledger.entered_patches,
                "entered_separators": ledger.entered_separators,
                "text_tokens": ledger.text_tokens,
                "visual_per_layer": list(ledger.visual_per_layer),
                "layer_average": ledger.layer_average,
                "layer_average_with_text": ledger.layer_average_with_text,
                "kv_entries": ledger.kv_entries,
                "kv_bytes": ledger.kv_bytes,
                "flops": ledger.flops,
                "selector_flops": ledger.selector_flops,
                "selector_bytes": ledger.selector_bytes,
                "uncompressed_flops": ledger.uncompressed_flops,
            }
            for text, ledger in zip(texts, trace.ledgers, strict=True)
        ]


# --- the loop -------------------------------------------------------------------------------------


def run(
    runner: Runner,
    cells: Iterable[Cell],
    questions: Sequence[Question],
    journal: Journal,
    *,
    batch_size: int,
    report: Report = lambda *_: None,
) -> None:
    """Add to ``journal`` every answer that it lacks.

    Each image or video is encoded once, however many cells and questions need it.  A cell that
    raises is entered as failed and left alone until the next run; the others go on.
    """
    todo: dict[str, Cell] = {}
    for cell in cells:
        todo.setdefault(cell.key, cell)  # R = 1 is what the uncompressed model answered already
    signals = frozenset[Signal]().union(
        *(cell.compressor.needs for cell in todo.values() if cell.compressor)
    )
    batches = _batches(questions, batch_size)
    last_use = {item.image_id: i for i, batch in enumerate(batches) for item in batch}
    encoded: dict[str, Any] = {}
    broken: set[str] = set()
    warned: set[tuple[str, str]] = set()
    total = len(todo) * len(questions)

    for index, batch in enumerate(batches):
        lacking = [
            key
            for key in todo
            if key not in broken and any((key, item.id) not in journal.answers for item in batch)
        ]
        if lacking:
            report(len(journal.answers), total, "vision tower")
            with _noting_failure(journal, lacking, broken):
                new = {i.image_id: i for i in batch if i.image_id not in encoded}
                found = runner.encode(list(new.values()), signals) if new else []
                encoded.update(zip(new, found, strict=True))
        for key in lacking:
            if key in broken:
                continue
            report(len(journal.answers), total, str(todo[key]))
            # A whole batch even if some of its answers are there already: the same batches give
            # the same answers to the last bit, whether the run was interrupted or not.
            with _noting_failure(journal, [key], broken), _warning_once(key, warned):
                records = runner.answer(
                    todo[key].compressor,
                    [encoded[item.image_id] for item in batch],
                    [item.question for item in batch],
                )
                ids = (item.id for item in batch)
                journal.add(key, dict(zip(ids, records, strict=True)))
        encoded = {name: value for name, value in encoded.items() if last_use[name] > index}
    report(len(journal.answers), total, "")


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Cut into batches, with questions about the same image brought together."""
    first: dict[str, int] = {}
    for item in questions:
        first.setdefault(item.image_id, len(first))
    ordered = sorted(questions, key=lambda item: first[item.image_id])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@contextmanager
def _noting_failure(journal: Journal, keys: Sequence[str], broken: set[str]) -> Iterator[None]:
    """Enter an exception of the block into the journal, for all cells ``keys``, and go on."""
    try:
        yield
    except Exception as error:
        failure = Failure.of(error)
    else:
        return
    # Here the traceback no longer holds on to the tensors of a batch that was too large.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for key in keys:
        journal.fail(key, failure)
        broken.add(key)


@contextmanager
def _warning_once(key: str, warned: set[tuple[str, str]]) -> Iterator[None]:
    """Let through the first warning of each category of a cell, not one for every image size."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        known = (key, warning.category.__name__)
        if known not in warned:
            warned.add(known)
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


# --- the command ----------------------------------------------------------------------------------


def compare(request: Request, report: Report = lambda *_: None) -> Outcome:
    """Do what is asked, or what is left of it if it was begun before.

    Raises:
        UserError: Bad input, found before the model answers a question.
    """
    _check_numbers(request)
    check_kind(request.match)
    cells([spec for spec in request.methods if spec != ALL], request.retention)
    check_writable(request.out or Path("runs"))
    report(0, 0, "checking the questions")
    questions = _questions(request)
    report(0, 0, f"loading {request.model}")
    adapter = tp.load(request.model, device=_device(request), dtype=request.dtype)
    methods, skipped = _expanded(request.methods, adapter)
    if request.match is None:
        columns = cells(methods, request.retention)
    else:
        columns, left_out = matched_cells(
            adapter,
            questions,
            methods,
            request.retention,
            request.match,
            optional=set(methods) - set(request.methods),
            report=report,
        )
        skipped |= left_out
    for cell in columns:
        if cell.compressor:
            adapter.check(cell.compressor)
    data.check_placeholders(questions, adapter.placeholder_texts)

    surroundings = environment()
    experiment = _experiment(request, columns, questions, adapter, surroundings["versions"])
    path = request.out or Path("runs") / _folder_name(experiment)
    folder = RunFolder.open(path, experiment, _details(request, adapter) | surroundings)
    try:
        outcome = _fill(folder, request, columns, questions, adapter, report)
    except BaseException as error:
        folder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    failures = [{"cell": str(cell), **asdict(why)} for cell, why in outcome.failures.items()]
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
                report=report,
            )
        except KeyboardInterrupt:
            interrupted = True
    journal = Journal(folder.journal)  # what is in the file, wherever the interrupt fell
    wanted = len({cell.key for cell in columns}) * len(questions)
    report(len(journal.answers), wanted, "tables and plots")
    answers = answers_frame(request.model, columns, questions, journal)
    summary = summarise(answers, seed=request.seed)
    folder.write_tables(answers, summary)
    if not interrupted:
        _draw(folder, request.model, summary)
    failures = {c: journal.failures[c.key] for c in columns if c.key in journal.failures}
    return Outcome(
        status="interrupted" if interrupted else "failed" if failures else "complete",
        folder=folder.path,
        answered=len(journal.answers),
        wanted=wanted,
        new=len(journal.answers) - before,
        summary=summary,
        failures=failures,
    )


def cells(methods: Iterable[str], retention: Iterable[float]) -> list[Cell]:
    """The uncompressed model, then every method at every retention, most tokens first.

    Methods that say what they keep (``uniform@0.3``, ``globalcom2@0.5 + fastv@0.5``) are one cell.

    Raises:
        UserError: An unknown method or option, or a retention outside (0, 1].
    """
    return [Cell(), *map(Cell, chosen(methods, retention))]


def _expanded(specs: Iterable[str], adapter: Adapter) -> tuple[list[str], dict[str, str]]:
    """``all`` replaced by the methods that run in the model, and why the others do not."""
    methods: list[str] = []
    skipped: dict[str, str] = {}
    for spec in specs:
        if spec != ALL:
            methods.append(spec)
            continue
        for name in strategies.names():
            try:
                adapter.check(tp.create(name, retention=0.5))
            except UserError as error:
                skipped[name] = str(error)
            else:
                methods.append(name)
    return methods, skipped


def _check_numbers(request: Request) -> None:
    for name in ("questions", "batch_size", "max_new_tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} must be at least 1, got {value}.")
    if request.seed < 0:
        raise UserError(f"--seed must not be negative, got {request.seed}.")
    for name in ("methods", "retention"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    if request.modality not in (None, *data.MODALITIES):
        raise unknown("modality", str(request.modality), data.MODALITIES)
    for value in request.retention:
        if not 0 < value <= 1:
            raise UserError(
                f"retention must be larger than 0 and at most 1 (the share of patch tokens kept), "
                f"got {value:g}{f'; for {value:g} % write {value / 100:g}' if value > 1 else ''}."
            )


def _questions(request: Request) -> list[Question]:
    if request.data is None:
        count = request.questions or TESTBED_QUESTIONS
        return data.held_out(count, request.seed, request.modality or "image")
    return data.read_jsonl(request.data, request.questions, request.modality)


def _device(request: Request) -> str:
    return request.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _draw(folder: RunFolder, model: str, summary: pd.DataFrame) -> None:
    if not summary["accuracy"].notna().any():
        return
    per_kind = summary["n"][summary["kind"] != OVERALL].dropna()
    count = int(summary["n"].max())
    matched = summary["match"].dropna()
    # Matched methods share a place on the axis, that of the retention whose cost they have.
    summary = summary.assign(retention=summary["asked_retention"])
    note = "bars and band: 95 % confidence intervals"
    if len(matched):
        note += f"; all at the {matched.iloc[0]} of uniform at that retention"
    title = f"Accuracy of {Path(model).name} with fewer visual tokens"
    figure = plots.accuracy(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy")
    figure = plots.accuracy_by_cost(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy-by-cost")
    if len(per_kind):
        low, high = int(per_kind.min()), int(per_kind.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        figure = plots.accuracy_by_kind(summary, title, f"{each} questions a panel; {note}")
        plots.save(figure, folder.path / "plots" / "accuracy-by-kind")


def _experiment(
    request: Request,
    columns: Sequence[Cell],
    questions: Sequence[Question],
    adapter: Adapter,
    versions: Mapping[str, str | None],
) -> dict[str, Any]:
    """All that the answers depend on; two runs may share a folder only if this is equal."""
    config = adapter.model.config
    compressors = [cell.compressor for cell in columns if cell.compressor]
    return {
        "model": request.model,
        "methods": list(dict.fromkeys(compressor.label for compressor in compressors)),
        "retention": list(dict.fromkeys(compressor.retention for compressor in compressors)),
        "questions": len(questions),
        "modality": sorted({item.modality for item in questions}),
        "data": data.fingerprint(questions),
        "seed": request.seed,
        "device": adapter.device.type,
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "max_new_tokens": request.max_new_tokens,
        **({} if request.match is None else {"match": _match(columns)}),
        **files_fingerprint(adapter.path),
        "revision": getattr(config, "_commit_hash", None),
        "code": code_fingerprint(compressors),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }


def _match(columns: Sequence[Cell]) -> list[dict[str, Any]]:
    """What every retention was solved for."""
    return [
        {"method": cell.label, "retention": cell.retention, **asdict(cell.matched)}
        for cell in columns
        if cell.matched is not None
    ]


def _details(request: Request, adapter: Adapter) -> dict[str, Any]:
    """What else a reader of the manifest will want to know."""
    device = adapter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"command": sys.argv, "request": asdict(request), "device_name": name}


def _folder_name(experiment: dict[str, Any]) -> str:
    """Readable, and different for different experiments, so that none is refused its folder."""
    methods = "+".join(experiment["methods"])
    if len(methods) > 60:
        methods = f"{len(experiment['methods'])}-methods"
    parts = [Path(experiment["model"]).name, methods, f"{experiment['questions']}-questions"]
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^\w.+=-]+", "-", "_".join([*parts, digest[:8]]))
