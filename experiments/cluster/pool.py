"""Hands tasks to workers, and repeats the tasks of workers that die.

The pool decides; a `Transport` starts workers and carries tasks.  So the same decisions are made on
a Ray cluster (`cluster.ray_workers`) and in a simulation of one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from tokenprune.errors import UserError

__all__ = [
    "Died",
    "Event",
    "Pool",
    "Transport",
]


ATTEMPTS = 3
"""The number of workers that a task may lose before it is given up."""


_FALSE_STARTS = 3  # workers that may die one after the other while they open, besides one of each


Task = TypeVar("Task", bound=Hashable)


@dataclass(frozen=True)
class Event:
    """What happened to a worker.

    Attributes:
        worker: As `Transport.start` returned it.
        kind: ``ready`` (it has opened), ``done`` (it has finished its task) or ``died``.
        value: What it returned, or why it died.
    """

    worker: Any
    kind: Literal["ready", "done", "died"]
    value: Any = None


@dataclass(frozen=True)
class Died:
    """Why a task has no result: every worker that tried it died."""

    why: str


class Transport(Protocol):
    """Starts workers and carries tasks to them."""

    @property
    def size(self) -> int:
        """The number of workers."""

    def start(self) -> Hashable:
        """Begin to start a worker, which may wait for room."""

    def submit(self, worker: Any, payload: Any) -> None:
        """Give a worker that is ready a task."""

    def wait(self) -> Event:
        """The next event.  Raises `UserError` where a worker reports one."""


class Pool(Generic[Task]):
    """A number of workers, each with at most one task.

    Attributes:
        ready: Number of workers that have opened and are alive.
        died: Number of workers that have died.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.ready = self.died = 0
        self._idle: list[Any] = []
        self._busy: dict[Any, Task] = {}
        self._opening: set[Any] = set()
        self._false_starts = 0

    def first(self) -> Any:
        """What the first worker that is ready returned; waits for it."""
        while True:
            self._start()
            event = self.transport.wait()
            self._note(event)
            if event.kind == "ready":
                return event.value

    def results(
        self, queue: deque[Task], pack: Callable[[Task], Any]
    ) -> Iterator[tuple[Task, Any | Died]]:
        """Every task with its result, in the order in which they finish.

        A worker that dies is replaced, and its task is repeated before the others.

        Args:
            queue: The tasks; more may be added until the iteration ends.
            pack: Makes what is sent to the worker, when a worker is ready for the task.

        Raises:
            UserError: A worker raises one, or worker after worker dies before it is ready.
        """
        deaths: Counter[Task] = Counter()
        while queue or self._busy:
            self._start()
            while self._idle and queue:
                worker, task = self._idle.pop(), queue.popleft()
                self._busy[worker] = task
                self.transport.submit(worker, pack(task))
            event = self.transport.wait()
            mine = self._busy.pop(event.worker, None)
            self._note(event)
            if mine is None:
                continue
            if event.kind == "done":
                yield mine, event.value
                continue
            deaths[mine] += 1
            if deaths[mine] < ATTEMPTS:
                queue.appendleft(mine)
            else:
                yield mine, Died(str(event.value))

    def _start(self) -> None:
        """Start workers until there are as many as wanted."""
        alive = len(self._idle) + len(self._busy) + len(self._opening)
        self._opening.update(self.transport.start() for _ in range(self.transport.size - alive))

    def _note(self, event: Event) -> None:
        """Keep account of the workers."""
        opening = event.worker in self._opening
        self._opening.discard(event.worker)
        if event.kind != "died":
            self._idle.append(event.worker)
            self.ready += opening
            self._false_starts = 0
            return
        self.died += 1
        if event.worker in self._idle:
            self._idle.remove(event.worker)
        self.ready -= not opening
        self._false_starts += opening
        if self._false_starts > self.transport.size + _FALSE_STARTS:
            raise UserError(
                f"{self._false_starts} workers died one after the other before they had the "
                f"model ({event.value}); give each more memory, or fewer of them a GPU."
            )
