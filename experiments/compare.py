"""The main job: methods x retentions on one model and one set of questions, side by side.

The outer loop runs over batches of questions, the inner one over cells (a method at a retention),
so that the vision tower sees every image once, and an interrupted run has the same questions
answered by every cell.
"""

import hashlib
import json
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.budget import check_retention
from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.errors import ContractError, UserError, unknown
from tokenprune.experiments import crowd_plots, data, kept, plots
from tokenprune.experiments.data import Modality, Question
from tokenprune.experiments.deadline import check_time_limit
from tokenprune.experiments.efficiency import ALL, chosen, expanded
from tokenprune.experiments.failing import Failing, tried
from tokenprune.experiments.fingerprints import DECISIVE, Files, answer_files, digests
from tokenprune.experiments.intervals import OVERALL, summarise
from tokenprune.experiments.limits import check_lengths, check_number, with_long_ones
from tokenprune.experiments.matching import Kind, check_kind, matched_cells
from tokenprune.experiments.results import (
    UNCOMPRESSED,
    Cell,
    Failure,
    Journal,
    RunFolder,
    WriteError,
    answers_frame,
    asked_for,
    check_writable,
    environment,
    without_seed,
)
from tokenprune.experiments.shared_encodings import Encodings
from tokenprune.experiments.sharing import Job, Plan, separate, together
from tokenprune.experiments.views import references
from tokenprune.models import testbed
from tokenprune.models.adapter import Adapter, without_weights
from tokenprune.prefix import Prefix
from tokenprune.terminal import Report
from tokenprune.tokens import Signal

__all__ = [
    "Outcome",
    "Report",
    "Request",
    "Runner",
    "Setting",
    "cells",
    "check",
    "compare",
    "prepare",
    "run",
]

METHODS = ("uniform", "random", "fastv", "globalcom2")
RETENTION = (1.0, 0.5, 0.25, 0.1)
TESTBED_QUESTIONS = 500
CROWD = 8  # methods whose curves can still be told apart
FIRST_TOKEN = "first_token"


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
        seeds: How many seeds a method that draws at random runs with; reported together.
        device: None for CUDA where there is one, otherwise the CPU.
        dtype: As in `tokenprune.load`.
        trust_remote_code: As in `tokenprune.load`.
        out: Folder of the run; None for one in ``runs/`` named after the request.
        max_new_tokens: Longest answer.
        match: Bring every method to the cost of `uniform` at each retention: ``tokens``, ``flops``
            or ``prefill-ms`` (`matching.matched_cells`); None takes retentions as they are.  Times
            are measured anew by every call, so that such a run cannot be resumed.
        timeout_per_batch: Seconds that the model may take for what it computes at once; what takes
            longer has failed (`tokenprune.experiments.deadline`).  None is no limit.
    """

    model: str = "testbed-next"
    methods: Sequence[str] = METHODS
    retention: Sequence[float] = RETENTION
    questions: int | None = None
    modality: Modality | None = None
    data: Path | None = None
    batch_size: int | None = None
    seed: int = 0
    seeds: int = 1
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    out: Path | None = None
    max_new_tokens: int = 8
    match: Kind | None = None
    timeout_per_batch: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended.

    Attributes:
        status: ``complete``, ``failed`` (some answer could not be had) or ``interrupted``.
        folder: Where everything was written.
        answered, wanted: Answers in the journal, and answers in a complete one.
        new: Answers this call added.
        summary: As in ``summary.csv``.
        failures: Cell to why it failed, in the order of the cells.
        missing: Question id to the cells that failed on it alone, and why.
        skipped: Methods that ``all`` left out, and why.
    """

    status: str
    folder: Path
    answered: int
    wanted: int
    new: int
    summary: pd.DataFrame
    failures: dict[Cell, Failure] = field(default_factory=dict)
    missing: dict[str, dict[Cell, Failure]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """What answers questions: a model, or a stand-in for tests."""

    def encode(
        self,
        questions: Sequence[Question],
        signals: frozenset[Signal],
        encoder: EncoderCompressor | None = None,
    ) -> Sequence[Sequence[Any]]:
        """Run the vision tower, under ``encoder``; for every question its images or video."""

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        """Answer one batch.

        Returns:
            For every prompt its ``answer``, the figures of its ledger, and in `FIRST_TOKEN`, if it
            is known, (V,) the log-probabilities of the first token of the answer.
        """

    def answer_blind(
        self, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        """The same from the same prompts without a visual token."""


@dataclass(frozen=True)
class ModelRunner:
    """Greedy answers of a loaded model."""

    adapter: Adapter
    max_new_tokens: int

    def encode(
        self,
        questions: Sequence[Question],
        signals: frozenset[Signal],
        encoder: EncoderCompressor | None = None,
    ) -> Sequence[Sequence[Any]]:
        opened = [[picture.open() for picture in item.images] for item in questions]
        encode = self.adapter.encode
        # Single images, the common case, go through the vision tower together.
        alone = [index for index, item in enumerate(questions) if item.modality == "image"]
        single = iter(encode([opened[index][0] for index in alone], signals, encoder))
        found = []
        for item, images in zip(questions, opened, strict=True):
            if item.modality == "image":
                found.append([next(single)])
            elif item.modality == "video":
                found.append(self.adapter.encode_videos([images], signals, encoder))
            else:
                found.append(encode(images, signals, encoder, together=True))
        return found

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        return self.generate(compressor, self.adapter.assemble(images, prompts))

    def answer_blind(
        self, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        return self.generate(None, self.adapter.assemble(images, prompts, blind=True))

    def generate(
        self,
        compressor: Compressor | Sequence[Compressor] | None,
        inputs: Mapping[str, Any],
        prefix: Prefix | None = None,
    ) -> list[dict[str, Any]]:
        """The record of every row of ``inputs``; ``compressor`` and ``prefix`` as `tp.compress`."""
        with tp.compress(self.adapter.model, compressor, prefix=prefix) as trace:
            output = self.adapter.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        texts = self.adapter.decode(output.sequences, inputs)
        first = output.logits[0].float().log_softmax(-1)
        keeps = kept.packed_rows(trace.selections, len(texts))
        return [
            {
                "answer": text,
                FIRST_TOKEN: row,
                **ledger.figures,
                "visual_per_layer": list(ledger.visual_per_layer),
                **({"kept": keep} if keep else {}),
            }
            for text, row, ledger, keep in zip(texts, first, trace.ledgers, keeps, strict=True)
        ]


# --- the loop -------------------------------------------------------------------------------------


def run(
    runner: Runner,
    cells: Iterable[Cell],
    questions: Sequence[Question],
    journal: Journal,
    *,
    batch_size: int,
    plan: Plan = separate,
    timeout: float | None = None,
    report: Report = lambda *_: None,
) -> None:
    """Add to ``journal`` every answer that it lacks.

    Each image or video is encoded once, however many cells and questions need it, and once more for
    every method that acts inside the vision tower; ``plan`` says what else is computed together.

    What fails together is tried again cell by cell, and then question by question, so that a
    question that a cell cannot answer is entered as missing and costs no other answer.  A cell that
    answers nothing (`Failing`) is entered as failed and left alone until the next run.  Answers of
    a cell that changed what all cells look at do not count, and what it changed is encoded anew.

    Args:
        runner: Answers.
        cells: What to compare.
        questions: What to ask.
        journal: Where answers go; it must be open.
        batch_size: Questions answered at once.
        plan: What is computed together.
        timeout: Seconds that encoding or answering one batch may take (`time_limit`).
        report: Told how far it is.
    """
    todo: dict[str, Cell] = {}
    for cell in cells:
        todo.setdefault(cell.key, cell)  # R = 1 is what the uncompressed model answered already
    questions = _without_faulty(questions, todo, journal)
    towers = {key: encoder_part(cell.compressor) for key, cell in todo.items()}
    signals: dict[EncoderCompressor | None, frozenset[Signal]] = {}
    for key, cell in todo.items():
        needs = cell.compressor.needs if cell.compressor else frozenset()
        signals[towers[key]] = signals.get(towers[key], frozenset[Signal]()) | needs
    batches = _batches(questions, batch_size)
    last_use = {item.image_id: i for i, batch in enumerate(batches) for item in batch}
    encodings = Encodings(runner, signals)
    failing, warned = Failing(journal, judged=UNCOMPRESSED in todo), set[tuple[str, str]]()
    total = len(todo) * len(questions)

    for index, batch in enumerate(batches):
        lacking = [key for key in todo if any(failing.is_due(key, item) for item in batch)]
        for tower in dict.fromkeys(towers[key] for key in lacking):
            report(len(journal.answers), total, "vision tower")
            sharing = [key for key in lacking if towers[key] == tower]
            _encode(encodings, tower, batch, sharing, failing, timeout)
        entering = _Entering(runner, journal, batch, timeout, loyal=UNCOMPRESSED in todo)
        # All cells, answered or not: the same cells and questions are put together the same way and
        # give the same answers to the last bit, whether the run was interrupted or not.
        for tower in dict.fromkeys(towers.values()):
            left = [key for key in todo if towers[key] == tower and key not in failing.out]
            there = [item for item in batch if (tower, item) in encodings]
            if not there or not set(left).intersection(lacking):
                continue
            several = [todo[key] for key in left if tower is None and not todo[key].blind]
            alone = [todo[key] for key in left if todo[key] not in several]
            desk = _Desk(entering, failing, encodings, tower, there, timeout, warned, total, report)
            while not desk.serve(plan, several, alone):
                pass
        encodings.keep({image for image, last in last_use.items() if last > index})
    failing.settle()
    report(len(journal.answers), total, "")


def _without_faulty(
    questions: Sequence[Question], keys: Iterable[str], journal: Journal
) -> list[Question]:
    """The questions that can be asked; the others are entered as missing in all cells ``keys``."""
    for item in questions:
        for key in keys if item.fault else ():
            if (key, item.id) not in journal.missing:
                journal.fail(key, Failure.of(UserError(item.fault)), item.id)
    return [item for item in questions if not item.fault]


def _encode(
    encodings: Encodings,
    tower: EncoderCompressor | None,
    batch: Sequence[Question],
    keys: Sequence[str],
    failing: Failing,
    timeout: float | None,
) -> None:
    """Encode the images of a batch for cells ``keys``, one by one where they fail together."""
    new = encodings.lacking(tower, batch)
    failure = tried(partial(encodings.encode, tower, new), timeout) if new else None
    if failure is None:
        return
    for item in new:
        if failing.out.issuperset(keys):
            return
        if len(new) > 1:
            failure = tried(partial(encodings.encode, tower, [item]), timeout)
        if failure is None:
            continue
        innocent = tower is not None and (None, item) in encodings
        for question in (other for other in batch if other.image_id == item.image_id):
            for key in keys:
                if failing.is_due(key, question):
                    failing.add(key, question, failure, innocent=innocent)


@dataclass
class _Desk:
    """Asks the cells of one vision tower a batch of questions."""

    entering: "_Entering"
    failing: Failing
    encodings: Encodings
    tower: EncoderCompressor | None
    batch: Sequence[Question]
    timeout: float | None
    warned: set[tuple[str, str]]
    total: int
    report: Report

    @property
    def runner(self) -> Runner:
        return self.entering.runner

    def serve(self, plan: Plan, several: Sequence[Cell], alone: Sequence[Cell]) -> bool:
        """Let the cells answer, ``several`` by ``plan``, and those ``alone`` one after the other.

        Returns:
            Whether that is done; False where a cell changed what is shown, so that everything has
            to be put together anew from what was encoded again.
        """
        shown = self.encodings.shown(self.tower, self.batch)
        prompts = [item.question for item in self.batch]
        jobs = [(several, job) for job in _jobs(plan, self.runner, several, shown, prompts)]
        jobs += [(alone, job) for job in separate(self.runner, alone, shown, prompts)]
        for cells_of, job in jobs:
            rows = [(cells_of[cell], self.batch[question]) for cell, question in job.rows]
            if not any(self.failing.is_due(cell.key, item) for cell, item in rows):
                continue
            cells = list({cell.key: cell for cell, _ in rows}.values())
            answered, changed = False, False
            if job.run is not None and not self.failing.suspects(item for _, item in rows):
                answered, changed = self._at_once(job.run, rows, cells)
            for cell in cells if not answered else ():
                changed |= self._by_itself(cell)
            if changed:
                return False
        return True

    def _tell(self, doing: str) -> None:
        self.report(len(self.entering.journal.answers), self.total, doing)

    def _at_once(
        self,
        run: Callable[[], Sequence[dict[str, Any]]],
        rows: Sequence[tuple[Cell, Question]],
        cells: Sequence[Cell],
    ) -> tuple[bool, bool]:
        """Enter what ``run`` answers; whether it did, and whether it changed what is shown."""
        self._tell(f"{len(cells)} cells together" if len(cells) > 1 else str(cells[0]))

        def answer() -> Sequence[dict[str, Any]]:
            with _warning_once(cells[0].key, self.warned):
                return run()

        found = tried(answer, self.timeout)
        changed = self._mend(self.batch)
        if isinstance(found, Failure) or changed:
            why = found.error if isinstance(found, Failure) else "it changed what others are shown"
            if len(cells) > 1 and ("", why) not in self.warned:
                self.warned.add(("", why))
                warnings.warn(
                    f"what cells have in common cannot be computed once ({why}); trying them one "
                    "by one, which takes longer.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return False, changed
        by_cell: dict[str, dict[str, dict[str, Any]]] = {}
        for (cell, item), record in zip(rows, found, strict=True):
            by_cell.setdefault(cell.key, {})[item.id] = record
        for key, records in by_cell.items():
            self._enter(key, records)
        return True, False

    def _by_itself(self, cell: Cell) -> bool:
        """Let one cell answer, question by question where it must; whether it changed what is
        shown."""
        key, ever = cell.key, False
        groups = self.failing.grouped(key, self.batch)
        while groups:
            group = groups.pop(0)
            if not any(self.failing.is_due(key, item) for item in group):
                continue
            self._tell(str(cell))

            def answer(group: Sequence[Question] = group) -> Sequence[dict[str, Any]]:
                shown = self.encodings.shown(self.tower, group)
                with _warning_once(key, self.warned):
                    return _answer(self.runner, cell, shown, group)

            found = tried(answer, self.timeout)
            changed = self._mend(group)
            ever |= changed
            if changed and not isinstance(found, Failure):
                found = Failure.of(
                    ContractError(
                        f"{cell} wrote to what other methods are shown as well, in a way that "
                        "PyTorch does not see (numpy, .data); work on a copy."
                    )
                )
            if not isinstance(found, Failure):
                ids = (item.id for item in group)
                self._enter(key, dict(zip(ids, found, strict=True)))
            elif len(group) > 1:
                groups = [[item] for item in group] + groups
            else:
                self.failing.add(key, group[0], found)
        return ever

    def _enter(self, key: str, records: dict[str, dict[str, Any]]) -> None:
        self.entering.enter(key, records)
        self.failing.answered(key)

    def _mend(self, group: Sequence[Question]) -> bool:
        """Encode again what was written to; whether anything was."""
        changed = self.encodings.changed(self.tower, group)
        if changed:
            self.encodings.encode(self.tower, changed)
        return bool(changed)


def _answer(
    runner: Runner, cell: Cell, shown: Sequence[Sequence[Any]], batch: Sequence[Question]
) -> Sequence[dict[str, Any]]:
    """The answers of ``cell`` to a batch of questions, whose encoded images are ``shown``."""
    prompts = [item.question for item in batch]
    if cell.blind:
        return runner.answer_blind(shown, prompts)
    return runner.answer(cell.compressor, shown, prompts)


class _Loyalty:
    """What the journal takes in of records: divergences in the place of distributions.

    Attributes:
        full: Question id to the uncompressed model's log-probabilities of the first token.
        unknown: Ids of questions on which the uncompressed model fails.
    """

    def __init__(self) -> None:
        self.full: dict[str, Tensor] = {}
        self.unknown: set[str] = set()

    def lacking(self, key: str, records: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Questions of which cell ``key`` has a distribution but nothing to compare it with."""
        if key == UNCOMPRESSED:
            return set()
        wanted = {name for name, record in records.items() if FIRST_TOKEN in record}
        return wanted - self.full.keys() - self.unknown

    def entries(
        self, key: str, records: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """Question id to entry; those of the uncompressed model are remembered."""
        found = {}
        for name, record in records.items():
            first = record.get(FIRST_TOKEN)
            if key == UNCOMPRESSED and first is not None:
                self.full[name] = first
            found[name] = {what: value for what, value in record.items() if what != FIRST_TOKEN}
            if first is not None and name in self.full:
                found[name]["kl"] = divergence(self.full[name], first)
        return found


def divergence(full: Tensor, short: Tensor) -> float:
    """KL(p || q) in nats of two distributions given as log-probabilities (V,)."""
    terms = full.exp() * (full - short)
    # What the one holds impossible adds nothing; rounding must not make the sum negative.
    return max(0.0, float(terms.masked_fill(full == -torch.inf, 0.0).double().sum()))


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Cut into batches, with questions about the same image brought together."""
    first: dict[str, int] = {}
    for item in questions:
        first.setdefault(item.image_id, len(first))
    ordered = sorted(questions, key=lambda item: first[item.image_id])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _jobs(plan: Plan, *arguments: Any) -> Iterator[Job]:
    """What ``plan`` puts together; where it cannot, one cell after the other."""
    try:
        yield from plan(*arguments)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException:  # each cell will say by itself what is wrong
        yield from separate(*arguments)


class _Entering:
    """Takes the answers to one batch of questions into the journal."""

    def __init__(
        self,
        runner: Runner,
        journal: Journal,
        batch: Sequence[Question],
        timeout: float | None,
        *,
        loyal: bool,
    ) -> None:
        self.runner, self.journal, self.batch, self.timeout = runner, journal, batch, timeout
        self.loyal, self.loyalty = loyal, _Loyalty()

    def enter(self, key: str, records: dict[str, dict[str, Any]]) -> None:
        """The records of cell ``key``, question id to record."""
        if self.loyal:  # the uncompressed model answered in an earlier run
            self._refer(self.loyalty.lacking(key, records))
        self.journal.add(key, self.loyalty.entries(key, records))

    def _refer(self, names: set[str]) -> None:
        """Run the uncompressed model on the batch again, for its distributions on ``names``."""
        for group in (self.batch, *([item] for item in self.batch)):
            if names.isdisjoint(item.id for item in group):
                continue
            found = tried(partial(self._full, group), self.timeout)
            if not isinstance(found, Failure):
                ids = [item.id for item in group]
                self.loyalty.entries(UNCOMPRESSED, dict(zip(ids, found, strict=True)))
                names = names.difference(ids)
        self.loyalty.unknown |= names

    def _full(self, group: Sequence[Question]) -> Sequence[dict[str, Any]]:
        return _answer(self.runner, Cell(), self.runner.encode(group, frozenset()), group)


@contextmanager
def _warning_once(key: str, warned: set[tuple[str, str]]) -> Iterator[None]:
    """Let through the first warning of each category of a cell, not one for every image size."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        about = getattr(warning.message, "about", "") or key
        known = (about, warning.category.__name__)
        if known not in warned:
            warned.add(known)
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


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
    questions = _with_faults(setting, request.max_new_tokens)
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
        _draw(folder, request.model, summary)
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


@dataclass(frozen=True)
class Setting:
    """A loaded model and the questions it is to answer."""

    adapter: Adapter
    questions: list[Question]


def prepare(
    request: Request, report: Report = lambda *_: None, *, keep_faulty: bool = False
) -> Setting:
    """Check what is asked, read the questions and load the model.

    Args:
        request: What is asked.
        report: Told how far it is.
        keep_faulty: As in `data.read_jsonl`.

    Raises:
        UserError: As `compare`.
    """
    check_writable(request.out or Path("runs"))
    questions = _checked_questions(request, report, keep_faulty=keep_faulty)
    report(0, 0, f"loading {request.model}")
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = tp.load(
        request.model,
        device=device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    return Setting(adapter, questions)


def check(request: Request, report: Report = lambda *_: None) -> list[Question]:
    """The questions of a comparison, of which every one can be asked; nothing is computed.

    Images are decoded, the frames of a video are of one size, marks in a question are as many as
    its images, and the decoder knows as many positions as its prompt has tokens, for which the
    model's configuration and processor are read.

    Raises:
        UserError: As `compare`, for what is found without weights.
    """
    questions = _checked_questions(request, report)
    report(0, 0, f"reading the processor of {request.model}")
    adapter = without_weights(request.model)
    data.check_placeholders(questions, adapter)
    check_lengths(adapter, questions, request.max_new_tokens)
    return questions


def _with_faults(setting: Setting, new: int) -> list[Question]:
    """The questions, of which those that cannot be asked are told and left to fail alone.

    Args:
        setting: The model and its questions.
        new: Longest answer, in tokens.

    Raises:
        UserError: None of them can be asked.
    """
    adapter = setting.adapter
    questions = with_long_ones(adapter, data.with_faults(setting.questions, adapter), new)
    faulty = [item for item in questions if item.fault]
    if not faulty:
        return questions
    first = f"{faulty[0].id!r}: {faulty[0].fault}"
    if len(faulty) == len(questions):
        raise UserError(f"none of the questions can be asked; the first is {first}")
    warnings.warn(
        f"{len(faulty)} of {len(questions)} questions cannot be asked and will be missing, the "
        f"first is {first} `--check` looks at the questions alone.",
        RuntimeWarning,
        stacklevel=3,
    )
    return questions


def _checked_questions(
    request: Request, report: Report, *, keep_faulty: bool = False
) -> list[Question]:
    """The questions of ``request``, if it and they make sense by themselves."""
    _check_numbers(request)
    check_time_limit(request.timeout_per_batch)
    check_kind(request.match)
    cells([spec for spec in request.methods if spec != ALL], request.retention)
    report(0, 0, "checking the questions")
    return _questions(request, keep_faulty)


def cells(methods: Iterable[str], retention: Iterable[float], seeds: int = 1) -> list[Cell]:
    """The uncompressed model, then every method at every retention, most tokens first.

    Methods that say what they keep (``uniform@0.3``, ``globalcom2@0.5 + fastv@0.5``) are one cell.
    Those that draw at random and are given no seed are as many as there are ``seeds``.

    Raises:
        UserError: An unknown method or option, or a retention outside (0, 1].
    """
    wanted = [cell for one in chosen(methods, retention) for cell in _seeded(one, seeds)]
    distinct = {repr(cell.compressor): cell for cell in wanted}
    return [Cell(), *distinct.values()]


def _seeded(compressor: Compressor, seeds: int) -> list[Cell]:
    """The method with each of the seeds 0, 1, ... if it draws at random and has no other seed."""
    given = {item.name: getattr(compressor, item.name) for item in fields(compressor)}
    if seeds == 1 or "seed" not in given or compressor != without_seed(compressor):
        return [Cell(compressor)]
    changes: list[dict[str, Any]] = [{"seed": seed} for seed in range(seeds)]
    return [Cell(replace(compressor, **change), pooled=True) for change in changes]


def _check_numbers(request: Request) -> None:
    for name in ("questions", "batch_size", "max_new_tokens", "seed", "seeds"):
        check_number(name, getattr(request, name))
    for name in ("methods", "retention"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    if request.modality not in (None, *data.MODALITIES):
        raise unknown("modality", str(request.modality), data.MODALITIES)
    for value in request.retention:
        check_retention(value)


def _questions(request: Request, keep_faulty: bool) -> list[Question]:
    if request.data is None:
        count = request.questions or TESTBED_QUESTIONS
        return data.held_out(count, request.seed, request.modality or "image")
    return data.read_jsonl(
        request.data, request.questions, request.modality, keep_faulty=keep_faulty
    )


def _draw(folder: RunFolder, model: str, summary: pd.DataFrame) -> None:
    compressed = summary["retention"] < 1
    if not summary["accuracy"].notna().any() or not compressed.any():
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
    drawn = (plots.accuracy, plots.accuracy_by_cost, plots.accuracy_by_kind)
    if summary["label"][compressed].nunique() > CROWD:
        drawn = (crowd_plots.by_retention, crowd_plots.by_cost, crowd_plots.by_kind)
    overall, by_cost, by_kind = drawn
    figure = overall(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy")
    figure = by_cost(summary, title, f"{count} questions; {note}")
    plots.save(figure, folder.path / "plots" / "accuracy-by-cost")
    if len(per_kind):
        low, high = int(per_kind.min()), int(per_kind.max())
        each = f"{low}" if low == high else f"{low} to {high}"
        figure = by_kind(summary, title, f"{each} questions of a kind; {note}")
        plots.save(figure, folder.path / "plots" / "accuracy-by-kind")


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
        "data": data.fingerprint(questions),
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
