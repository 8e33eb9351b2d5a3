"""Simulates a large comparison on a cluster, with the code that hands out shards.

    python -m tokenprune.experiments.checks.scale --questions 1000000 --cells 100 --workers 64

Workers are simulated on a clock of their own; they compute nothing and return journal lines of
usual length.  What is measured is the process in which `tokenprune compare --ray` starts: its
memory, and how many rows (a question in a cell) it enters per second.  What is simulated is how
much is lost with a node.
"""

from __future__ import annotations

import heapq
import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from tokenprune.cost.ledger import FIGURES
from tokenprune.experiments.cluster.run import Event, Pool
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.journal import Tally, lines
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.compare.shards import Answered, Work, enter_all

__all__ = [
    "Clock",
    "simulate",
]


_LARGEST = 2**30  # bytes of the file


# An answer with all figures, as of a decoder with 32 layers.
_RECORD = {
    "answer": "blue",
    **dict.fromkeys(FIGURES, 12345678.0),
    "visual_per_layer": [720] * 32,
    "kl": 0.0123456789,
}


@dataclass
class Clock:
    """A transport whose workers take simulated time.

    Attributes:
        size: Number of workers.
        per_node: Of them on a node; they die together.
        keys: Keys of the cells.
        row_seconds: Time that a worker needs for one row.
        load_seconds: Time until a worker has the model.
        fails_at: When a node dies; None for never.
        now: Simulated seconds.
        lost: Simulated seconds of workers whose results were lost.
    """

    size: int
    per_node: int
    keys: list[str]
    row_seconds: float
    load_seconds: float
    fails_at: float | None = None
    now: float = 0.0
    lost: float = 0.0
    _events: list[tuple[float, int, Event]] = field(default_factory=list)
    _began: dict[int, float] = field(default_factory=dict)
    _numbers: Iterator[int] = field(
        default_factory=itertools.count
    )  # of events: the order of equal ones
    _workers: Iterator[int] = field(default_factory=itertools.count)

    def start(self) -> int:
        worker = next(self._workers)
        self._later(self.load_seconds, Event(worker, "ready"))
        return worker

    def submit(self, worker: int, payload: Work) -> None:
        self._began[worker] = self.now
        rows = len(payload.questions) * len(self.keys)
        self._later(rows * self.row_seconds, Event(worker, "done", payload))

    def wait(self) -> Event:
        if self.fails_at is not None and self._events[0][0] > self.fails_at:
            self._kill_node()
        self.now, _, event = heapq.heappop(self._events)
        return Event(event.worker, "done", self._answers(event.value)) if event.value else event

    def _kill_node(self) -> None:
        """Let the workers of the first node die."""
        self.now, self.fails_at = float(self.fails_at or 0), None
        for index, (_, number, event) in enumerate(self._events):
            if event.worker < self.per_node:
                self.lost += self.now - self._began[event.worker]
                self._events[index] = self.now, number, Event(event.worker, "died")
        heapq.heapify(self._events)

    def _later(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _answers(self, work: Work) -> Answered:
        names = [item.id for item in work.questions]
        text = lines([{"cell": self.keys[0], "question": names[0], **_RECORD}]) * len(names)
        return Answered({key: (names, text) for key in self.keys}, events=self.keys)


@dataclass(frozen=True, kw_only=True)
class _Column(Cell):
    """A cell without a method."""

    number: int

    @property
    def key(self) -> str:
        return f"Method(number={self.number}, retention=0.25)"


class _Bounded(Tally):
    """A tally whose file begins anew when it is large."""

    written = 0

    def append(self, text: bytes) -> None:
        if self.path.stat().st_size > _LARGEST:
            os.truncate(self.path, 0)
        self.written += len(text)
        super().append(text)


def simulate(clock: Clock, columns: list[Cell], questions: list[Question], journal: Path) -> int:
    """Enter all answers into ``journal``; the number of bytes that were written."""
    with _Bounded(journal, clock.keys, [item.id for item in questions]) as tally:
        enter_all(Pool(clock), columns, questions, tally, batch_size=4)
        if tally.done != len(questions) * len(columns):
            raise AssertionError(f"{tally.done} answers were entered")
    return tally.written


def main(
    questions: Annotated[int, typer.Option(help="Number of questions.")] = 1_000_000,
    cells: Annotated[int, typer.Option(help="Number of cells.")] = 100,
    workers: Annotated[int, typer.Option(help="Number of workers.")] = 64,
    per_node: Annotated[int, typer.Option(help="Workers on a node.")] = 8,
    row_seconds: Annotated[float, typer.Option(help="Seconds of a worker for a row.")] = 0.1,
    load_seconds: Annotated[float, typer.Option(help="Seconds until a worker has a model.")] = 120,
) -> None:
    """Measure the driver, and simulate the loss of a node in the middle of the run."""
    before = _megabytes()
    pictures = [Picture(f"{i}.jpg", Path(f"/data/{i}.jpg")) for i in range(questions // 4 + 1)]
    asked = [
        Question(f"q{i}", (pictures[i // 4],), f"What is object {i}?", "yes", "kind")
        for i in range(questions)
    ]
    read = _megabytes()
    columns: list[Cell] = [_Column(number=number) for number in range(cells)]
    rows = questions * cells
    whole = rows * row_seconds / workers
    clock = Clock(
        size=workers,
        per_node=per_node,
        keys=[column.key for column in columns],
        row_seconds=row_seconds,
        load_seconds=load_seconds,
        fails_at=whole / 2 + 0.37 * row_seconds * cells * 64,
    )
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        written = simulate(clock, columns, asked, Path(folder) / "answers.jsonl")
    took = time.process_time() - began
    typer.echo(
        f"{questions:,} questions x {cells} cells x {workers} workers\n"
        f"memory: {_megabytes():.0f} MB, of which imports {before:.0f}, "
        f"questions {read - before:.0f}\n"
        f"rows per second: {rows / took:,.0f} ({took:.0f} s of one core, "
        f"{written / 2**30:.1f} GB of journal)\n"
        f"the run: {clock.now / 3600:.1f} h, without loss and loading {whole / 3600:.1f} h\n"
        f"lost with a node of {per_node} workers: {clock.lost / 3600:.2f} worker hours, "
        f"{100 * clock.lost / (rows * row_seconds):.4f} % of the work"
    )


def _megabytes() -> float:
    """The largest memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    typer.run(main)
