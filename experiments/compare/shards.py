"""A comparison on a cluster: workers answer shards of the questions, this process enters them.

A shard is some consecutive batches of `compare.loop` in all cells, so that every worker shares the
work that a single process shares, and computes in the same batches: the answers are bit-identical
on equal hardware.  Answers are entered as soon as a shard has finished.

Failures are judged in the order of the questions, as in a single process (`Failing`): the answers
of a cell wait in memory until it is known whether the cell answers or is given up, and its failures
until the questions in front of them are done.  The first shard nearly always decides.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tokenprune.experiments.cluster.run import Died, Pool
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.failing import Failing
from tokenprune.experiments.common.journal import Sheet, Tally, lines
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.compare import loop
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.experiments.compare.sharing import together
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "Answered",
    "Shard",
    "Work",
    "answer_shard",
    "enter_all",
    "server",
]


_PER_WORKER = 8  # shards that every worker gets at least, if there are enough batches


_MOST = 16  # batches of a shard; so much is computed again if a worker dies


Shard = tuple[int, int]
"""The first batch of a shard, and the one after its last."""


@dataclass(frozen=True)
class Work:
    """What is sent to a worker.

    Attributes:
        questions: Those of the shard.
        before: As for `loop.run`.
        answered, missing: Rows that the journal has.
        answering: Keys of cells that are known to answer.
        out: Keys of cells that were given up.
        keys: Keys of the cells that are asked.
    """

    questions: Sequence[Question]
    before: Sequence[Sequence[Question]]
    answered: frozenset[tuple[str, str]]
    missing: Mapping[tuple[str, str], Failure]
    answering: frozenset[str]
    out: frozenset[str]
    keys: frozenset[str]


@dataclass(frozen=True)
class Fault:
    """A cell that failed on a question, as `Failing.add` was told."""

    key: str
    question: str
    failure: Failure
    judged: bool


@dataclass(frozen=True)
class Answered:
    """What a worker sends back.

    Attributes:
        entries: Cell key to the ids of the questions that it answered, and their `lines`.
        events: In the order in which they happened: what failed, and the keys of cells that
            answered.
        stopped: Keys of cells that were given up within the shard.
        warned: Warnings as cell or method, category and text.
    """

    entries: Mapping[str, tuple[Sequence[str], bytes]]
    events: Sequence[Fault | str] = ()
    stopped: frozenset[str] = frozenset()
    warned: Sequence[tuple[str, type[Warning], str]] = ()


# --- in a worker ----------------------------------------------------------------------------------


class _Noting(Failing):
    """Notes what it is told."""

    def __init__(self, sheet: Sheet, work: Work, *, judged: bool) -> None:
        super().__init__(sheet, judged=judged)
        self.out |= work.out
        self._answering |= work.answering
        self.events: list[Fault | str] = []

    def add(self, key: str, item: Question, failure: Failure, *, innocent: bool = False) -> None:
        judged = innocent or not self.judged or (UNCOMPRESSED, item.id) in self.journal.answers
        self.events.append(Fault(key, item.id, failure, judged))
        super().add(key, item, failure, innocent=innocent)

    def answered(self, key: str) -> None:
        if key not in self._answering:
            self.events.append(key)
        super().answered(key)

    def settle(self) -> None:
        """Nothing: a part of the questions does not decide."""


def server(columns: Sequence[Cell], **options: Any) -> Any:
    """The function that answers shards in a worker, for `cluster.run.workers`.

    Args:
        columns: The cells.
        **options: ``max_new_tokens``, ``batch_size`` and ``timeout``, as for `compare.run.answer`.
    """
    return partial(_answered, tuple(columns), options)


def _answered(
    columns: Sequence[Cell], options: Mapping[str, Any], pipe: Pipeline, work: Work
) -> Answered:
    limits = {name: value for name, value in options.items() if name != "max_new_tokens"}
    runner = ModelRunner(pipe, options["max_new_tokens"])
    return answer_shard(runner, columns, work, plan=together, **limits)


def answer_shard(
    runner: Any, columns: Sequence[Cell], work: Work, *, batch_size: int, **options: Any
) -> Answered:
    """The answers of a shard that the journal lacks; arguments as of `loop.run`."""
    columns = [cell for cell in columns if cell.key in work.keys]
    sheet = Sheet(work.answered, work.missing)
    failing = _Noting(sheet, work, judged=UNCOMPRESSED in {cell.key for cell in columns})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.run(
            runner,
            columns,
            work.questions,
            sheet,
            batch_size=batch_size,
            before=work.before,
            failing=failing,
            **options,
        )
    return Answered(
        entries={
            key: (
                list(records),
                lines({"cell": key, "question": q, **r} for q, r in records.items()),
            )
            for key, records in sheet.added.items()
        },
        events=failing.events,
        stopped=frozenset(failing.out - work.out),
        warned=[
            (getattr(one.message, "about", ""), one.category, str(one.message)) for one in caught
        ],
    )


# --- in this process ------------------------------------------------------------------------------


def enter_all(
    pool: Pool[Shard],
    columns: Sequence[Cell],
    questions: Sequence[Question],
    tally: Tally,
    *,
    batch_size: int,
    progress: ProgressCallback = silent,
) -> None:
    """Add to ``tally`` every answer that it lacks.

    A shard whose workers die again and again is repeated batch by batch; the questions of a batch
    that still has no answers are entered as missing.

    Args:
        pool: Of workers that serve `Work`.
        columns: The cells.
        questions: The questions.
        tally: The journal, which must be open.
        batch_size: Questions per batch.
        progress: Called after every shard.

    Raises:
        UserError: As `Pool.results`.
    """
    keys = list(dict.fromkeys(cell.key for cell in columns))
    batches = loop.batches(loop.without_faulty(questions, keys, tally), batch_size)
    size = min(_MOST, max(1, len(batches) // (_PER_WORKER * pool.transport.size)))
    desk = _Desk(tally, keys, batches, judged=UNCOMPRESSED in keys)
    queue: deque[Shard] = deque()
    for first in range(0, len(batches), size):
        shard = first, min(first + size, len(batches))
        if desk.lacking(shard):
            queue.append(shard)
        else:
            desk.arrived(shard, Answered({}))
    total, done = len(keys) * len(questions), tally.done
    for shard, found in pool.results(queue, desk.work):
        if not isinstance(found, Died):
            done += sum(len(names) for names, _ in found.entries.values())
            queue.extend(desk.arrived(shard, found))
        elif shard[1] - shard[0] > 1:
            queue.extend((batch, batch + 1) for batch in range(*shard))
        else:
            desk.lost(shard, found)
        failed = len(tally.missing) + len(tally.failures)
        lost = f", {pool.died} workers replaced" if pool.died else ""
        progress(done, total, f"{pool.ready} workers{lost}, {failed} failed")
    desk.failing.settle()


@dataclass
class _Desk:
    """Enters what arrives, and judges failures in the order of the questions."""

    tally: Tally
    keys: Sequence[str]
    batches: Sequence[Sequence[Question]]
    judged: bool
    failing: Failing = field(init=False)

    def __post_init__(self) -> None:
        self.failing = Failing(self.tally, judged=self.judged)
        self._answering = {key for key in self.keys if self.tally.rows[key].any()}
        for key in self._answering:
            self.failing.answered(key)
        # The images that each batch is the first to show, and that batch by image.
        self._new: list[list[Question]] = []
        self._first: dict[str, int] = {}
        for index, batch in enumerate(self.batches):
            new = {item.image_id: item for item in batch if item.image_id not in self._first}
            self._new.append(list(new.values()))
            self._first |= dict.fromkeys(new, index)
        self._next = 0  # the first batch whose failures are not judged
        self._early: dict[int, tuple[Shard, Answered]] = {}  # by first batch
        self._held: dict[str, list[tuple[Sequence[str], bytes]]] = {}
        self._warned: set[tuple[str, str]] = set()

    def questions(self, shard: Shard) -> Iterator[Question]:
        for batch in self.batches[slice(*shard)]:
            yield from batch

    def lacking(self, shard: Shard) -> list[tuple[str, str]]:
        """The rows of the shard that are not answered."""
        names = [item.id for item in self.questions(shard)]
        there, out = self.tally.answered(names), self.failing.out
        every = ((key, name) for key in self.keys if key not in out for name in names)
        return [row for row in every if row not in there]

    def work(self, shard: Shard) -> Work:
        """What is sent to a worker."""
        here = list(self.questions(shard))
        missing = self.tally.missing
        rows = self.lacking(shard) if missing else ()
        return Work(
            questions=here,
            before=self._before(shard),
            answered=self.tally.answered([item.id for item in here]),
            missing={row: missing[row] for row in rows if row in missing},
            answering=frozenset(self._answering),
            out=frozenset(self.failing.out),
            keys=frozenset(self.keys),
        )

    def _before(self, shard: Shard) -> list[list[Question]]:
        """As for `loop.run`."""
        first = {self._first[item.image_id] for item in self.questions(shard)}
        return [self._new[index] for index in sorted(first) if index < shard[0]]

    def arrived(self, shard: Shard, found: Answered) -> list[Shard]:
        """Enter the answers; the shards that have to be asked again, now that more is known."""
        for key, entry in found.entries.items():
            self._held.setdefault(key, []).append(entry)
        self._warn(found.warned)
        self._early[shard[0]] = shard, found
        again = [] if shard[0] >= self._next else list(self._judge(shard[0]))
        while self._next in self._early:
            again += self._judge(self._next)
        self._enter_held()
        return again

    def lost(self, shard: Shard, died: Died) -> None:
        """Enter the rows of a shard that no worker survives as missing."""
        why = Failure(f"{died.why} (every worker that was asked died)", "")
        for key, name in self.lacking(shard):
            self.tally.fail(key, why, name)
        self.arrived(shard, Answered({}))

    def _judge(self, first: int) -> Iterator[Shard]:
        """Tell what happened to a shard; yields the shard if it has to be asked again."""
        shard, found = self._early.pop(first)
        self._next = max(self._next, shard[1])
        by_id = {item.id: item for item in self.questions(shard)} if found.events else {}
        for event in found.events:
            if isinstance(event, str):
                if event not in self.failing.out:  # a single process would not have asked it
                    self._answering.add(event)
                    self.failing.answered(event)
            elif self.failing.is_due(event.key, by_id[event.question]):
                item, judged = by_id[event.question], event.judged
                self.failing.add(event.key, item, event.failure, innocent=judged)
        # A cell that was given up in a part but answers elsewhere is asked the rest.
        if not self.failing.out.issuperset(found.stopped):
            yield shard

    def _enter_held(self) -> None:
        """Write the answers of cells that are known to answer; drop those of cells given up."""
        for key in list(self._held):
            if key in self._answering:
                for names, text in self._held.pop(key):
                    self.tally.enter(key, names, text)
            elif key in self.failing.out:
                del self._held[key]

    def _warn(self, warned: Iterable[tuple[str, type[Warning], str]]) -> None:
        """Show the first warning of each category of a cell."""
        for about, category, text in warned:
            known = about or text, category.__name__
            if known not in self._warned:
                self._warned.add(known)
                warnings.warn(text, category, stacklevel=3)
