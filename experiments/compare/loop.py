"""The loop over cells and batches."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.errors import ContractError, UserError
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.failing import Failing, tried
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.compare.runner import FIRST_TOKEN, Runner, limited
from tokenprune.experiments.compare.shared_encodings import Encodings
from tokenprune.experiments.compare.sharing import Job, JobPlan, separate
from tokenprune.progress import ProgressCallback, silent
from tokenprune.signals import Signal

__all__ = [
    "batches",
    "run",
    "without_faulty",
]


# --- the loop -------------------------------------------------------------------------------------


def run(
    runner: Runner,
    cells: Iterable[Cell],
    questions: Sequence[Question],
    journal: Journal,
    *,
    batch_size: int,
    plan: JobPlan = separate,
    timeout: float | None = None,
    progress: ProgressCallback = silent,
    before: Sequence[Sequence[Question]] = (),
    failing: Failing | None = None,
) -> None:
    """Add to ``journal`` every answer that it lacks.

    Each image or video is encoded once for all cells and questions, and once more for every method
    that acts inside the vision encoder; ``plan`` says what else is computed together.
    A job that fails is run again by cell, then by question: a question that a cell cannot answer is
    missing there alone.  A cell that answers nothing has failed (`Failing`).  Answers of a cell
    that changed shared encodings do not count, and the encodings are computed again.

    Args:
        runner: Answers the questions.
        cells, questions: What to answer.
        journal: The journal, which must be open.
        batch_size: Questions per batch.
        plan: Makes the jobs, which compute several cells together.
        timeout: Seconds that encoding or answering one batch may take (`time_limit`).
        progress: Called before every step.
        before: If other questions come first: first batches of images that these show again.
        failing: Cells and questions that have failed; None for those of ``journal``.
    """
    todo = _by_key(cells)
    questions = without_faulty(questions, todo, journal)
    towers = {key: encoder_part(cell.compressor) for key, cell in todo.items()}
    ordered = batches(questions, batch_size)
    last_use = {item.image_id: i for i, batch in enumerate(ordered) for item in batch}
    encodings = Encodings(runner, _signals(todo, towers))
    failing = failing or Failing(journal, judged=UNCOMPRESSED in todo)
    warned, total = set[tuple[str, str]](), len(todo) * len(questions)
    for tower in dict.fromkeys(towers.values()) if before else ():
        _encode_before(encodings, tower, before, last_use, timeout)
    for index, batch in enumerate(ordered):
        lacking = [key for key in todo if any(failing.is_due(key, item) for item in batch)]
        for tower in dict.fromkeys(towers[key] for key in lacking):
            progress(len(journal.answers), total, _doing("vision encoder", journal))
            sharing = [key for key in lacking if towers[key] == tower]
            _encode(encodings, tower, batch, sharing, failing, timeout)
        entering = _Entering(runner, journal, batch, timeout, loyal=UNCOMPRESSED in todo)
        common = (timeout, warned, total, progress)
        # All cells, answered or not: resumed or not, the same jobs give bit-identical answers.
        for tower in dict.fromkeys(towers.values()):
            left = [key for key in todo if towers[key] == tower and key not in failing.out]
            there = [item for item in batch if (tower, item) in encodings]
            if there and not set(left).isdisjoint(lacking):
                desk = _Desk(entering, failing, encodings, tower, there, *common)
                desk.serve_all(plan, [todo[key] for key in left])
        encodings.keep({image for image, last in last_use.items() if last > index})
    failing.settle()
    progress(len(journal.answers), total, "")


def _by_key(cells: Iterable[Cell]) -> dict[str, Cell]:
    """The first cell of every key; at R = 1 all methods are the uncompressed model."""
    found: dict[str, Cell] = {}
    for cell in cells:
        found.setdefault(cell.key, cell)
    return found


def _doing(step: str, journal: Journal) -> str:
    """The current step, and how many answers and cells have failed."""
    return f"{step}, {len(journal.missing) + len(journal.failures)} failed"


def _signals(
    todo: Mapping[str, Cell], towers: Mapping[str, EncoderCompressor | None]
) -> dict[EncoderCompressor | None, frozenset[Signal]]:
    """Vision encoder, as compressed, to the signals that its cells need."""
    signals: dict[EncoderCompressor | None, frozenset[Signal]] = {}
    for key, cell in todo.items():
        needs = cell.compressor.needs if cell.compressor else frozenset()
        signals[towers[key]] = signals.get(towers[key], frozenset[Signal]()) | needs
    return signals


def without_faulty(
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


def _encode_before(
    encodings: Encodings,
    tower: EncoderCompressor | None,
    before: Sequence[Sequence[Question]],
    shown: Collection[str],
    timeout: float | None,
) -> None:
    """Encode the images that are ``shown`` again in their first batches: rounding depends on it."""
    for batch in before:
        if isinstance(tried(partial(encodings.encode, tower, batch), timeout), Failure):
            for item in batch:
                if item.image_id in shown:
                    tried(partial(encodings.encode, tower, [item]), timeout)
        encodings.keep(set(shown))


@dataclass
class _Desk:
    """Asks the cells that share one vision encoder a batch of questions."""

    entering: "_Entering"
    failing: Failing
    encodings: Encodings
    tower: EncoderCompressor | None
    batch: Sequence[Question]
    timeout: float | None
    warned: set[tuple[str, str]]
    total: int
    progress: ProgressCallback

    @property
    def runner(self) -> Runner:
        return self.entering.runner

    def serve_all(self, plan: JobPlan, cells: Sequence[Cell]) -> None:
        """Let the cells answer, by ``plan`` if they see the plain encoder's images."""
        several = [cell for cell in cells if self.tower is None and not cell.without_images]
        alone = [cell for cell in cells if cell not in several]
        while not self.serve(plan, several, alone):
            pass

    def serve(self, plan: JobPlan, several: Sequence[Cell], alone: Sequence[Cell]) -> bool:
        """Let the cells answer, ``several`` by ``plan``, and those ``alone`` one after the other.

        Returns:
            Whether that is done; False if a cell changed shared encodings, so that the jobs have to
            be made again.
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
                answered, changed = self._run_job(job.run, rows, cells)
            for cell in cells if not answered else ():
                changed |= self._answer_alone(cell)
            if changed:
                return False
        return True

    def _tell(self, doing: str) -> None:
        journal = self.entering.journal
        self.progress(len(journal.answers), self.total, _doing(doing, journal))

    def _run_job(
        self,
        run: Callable[[], Sequence[dict[str, Any]]],
        rows: Sequence[tuple[Cell, Question]],
        cells: Sequence[Cell],
    ) -> tuple[bool, bool]:
        """Enter the answers of ``run``; whether it answered, and whether it changed encodings."""
        self._tell(f"{len(cells)} cells together" if len(cells) > 1 else str(cells[0]))

        def answer() -> Sequence[dict[str, Any]]:
            with _warning_once(cells[0].key, self.warned):
                return run()

        found = tried(answer, self.timeout)
        changed = self._encode_changed(self.batch)
        if isinstance(found, Failure) or changed:
            why = (
                found.error
                if isinstance(found, Failure)
                else "it changed the input of other methods"
            )
            if len(cells) > 1 and ("", why) not in self.warned:
                self.warned.add(("", why))
                warnings.warn(
                    f"the shared work of cells cannot be computed once ({why}); running them one "
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

    def _answer_alone(self, cell: Cell) -> bool:
        """Let one cell answer, question by question if necessary; whether it changed encodings."""
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
            changed = self._encode_changed(group)
            ever |= changed
            if changed and not isinstance(found, Failure):
                found = Failure.of(
                    ContractError(
                        f"{cell} wrote to the input of other methods, in a way that PyTorch does "
                        "not detect (numpy, .data); work on a copy."
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

    def _encode_changed(self, group: Sequence[Question]) -> bool:
        """Encode again the images whose encodings changed; whether there are any."""
        changed = self.encodings.changed(self.tower, group)
        if changed:
            self.encodings.encode(self.tower, changed)
        return bool(changed)


def _answer(
    runner: Runner, cell: Cell, shown: Sequence[Sequence[Any]], batch: Sequence[Question]
) -> Sequence[dict[str, Any]]:
    """The answers of ``cell`` to a batch of questions, whose encoded images are ``shown``."""
    prompts = [item.question for item in batch]
    if cell.without_images:
        return runner.answer_without_images(shown, prompts)
    return runner.answer(cell.compressor, shown, prompts)


class _Loyalty:
    """Replaces distributions in records with their divergences, for the journal.

    Attributes:
        full: Question id to the uncompressed model's log-probabilities of the first token.
        unknown: Ids of questions on which the uncompressed model fails.
    """

    def __init__(self) -> None:
        self.full: dict[str, Tensor] = {}
        self.unknown: set[str] = set()

    def lacking(self, key: str, records: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """Questions with a distribution of cell ``key`` but none of the uncompressed model."""
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
    # Tokens of probability 0 in p add nothing; rounding must not make the sum negative.
    return max(0.0, float(terms.masked_fill(full == -torch.inf, 0.0).double().sum()))


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of questions, with questions about the same image next to each other.

    The answers to the questions of a batch have the same maximum length.  Consecutive batches,
    joined, give the same batches again.
    """
    alike: dict[int | None, list[Question]] = {}
    for item in questions:
        alike.setdefault(item.max_new_tokens, []).append(item)
    found = []
    for group in alike.values():
        first: dict[str, int] = {}
        for item in group:
            first.setdefault(item.image_id, len(first))
        ordered = sorted(group, key=lambda item: first[item.image_id])
        found += [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return found


def _jobs(plan: JobPlan, *arguments: Any) -> Iterator[Job]:
    """The jobs of ``plan``; if it fails, one job per cell."""
    try:
        yield from plan(*arguments)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException:  # each cell reports its own error
        yield from separate(*arguments)


class _Entering:
    """Enters the answers to one batch of questions into the journal."""

    def __init__(
        self,
        runner: Runner,
        journal: Journal,
        batch: Sequence[Question],
        timeout: float | None,
        *,
        loyal: bool,
    ) -> None:
        self.runner = limited(runner, batch)
        self.journal, self.batch, self.timeout = journal, batch, timeout
        self.loyal, self.loyalty = loyal, _Loyalty()

    def enter(self, key: str, records: dict[str, dict[str, Any]]) -> None:
        """The records of cell ``key``, question id to record."""
        if self.loyal:  # the uncompressed model answered in an earlier run
            self._recompute_reference(self.loyalty.lacking(key, records))
        self.journal.add(key, self.loyalty.entries(key, records))

    def _recompute_reference(self, names: set[str]) -> None:
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
    """Show the first warning of each category of a cell, not one for every image size."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        about = getattr(warning.message, "about", "") or key
        known = (about, warning.category.__name__)
        if known not in warned:
            warned.add(known)
            warning.message.about = about  # type: ignore[union-attr]  # for who shows it elsewhere
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
