"""Failures in a comparison, which affect as few other answers as possible.

A question that a cell cannot answer is missing in that cell alone.  A cell that answers nothing is
given up, so that a method that always fails is not run on five hundred questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from tokenprune.errors import ContractError
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.deadline import time_limit
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.run_folder import UNCOMPRESSED

__all__ = [
    "Failing",
    "tried",
]


T = TypeVar("T")


# The number of questions on which a cell without any answer may fail: of those that the
# uncompressed model answered, and of all, because the uncompressed model itself may fail.
_TRIES, _PATIENCE = 3, 20


def tried(compute: Callable[[], T], timeout: float | None = None) -> T | Failure:
    """The result of ``compute``, or why it failed; it may take ``timeout`` seconds.

    Everything that a method raises is a failure, including `SystemExit`, except an interrupt.
    """
    try:
        with time_limit(timeout):
            return compute()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        failure = Failure.of(error)
    # The traceback no longer refers to the tensors of a batch, which may have been too large.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


class Failing:
    """The cells and questions that have failed; they are not tried again in this run.

    Attributes:
        out: Keys of the cells that were given up.
    """

    def __init__(self, journal: Journal, *, judged: bool) -> None:
        """Enter failures into ``journal``.

        Args:
            journal: It must be open.
            judged: Whether the uncompressed model answers too, before the others.
        """
        self.journal, self.judged = journal, judged
        self.out: set[str] = set()
        self._here: set[tuple[str, str]] = set()
        self._cells: dict[str, set[str]] = {}  # question to the cells that fail on it
        for key, question in journal.missing:
            self._cells.setdefault(question, set()).add(key)
        self._answering = {key for key, _ in journal.answers}
        self._waiting: dict[str, list[tuple[str, Failure]]] = {}  # of cells without an answer
        self._plain: dict[str, Failure] = {}
        self._strikes: Counter[str] = Counter()

    def is_due(self, key: str, item: Question) -> bool:
        """Whether cell ``key`` has not failed on ``item`` yet."""
        row = key, item.id
        return key not in self.out and row not in self.journal.answers and row not in self._here

    def suspects(self, items: Iterable[Question]) -> bool:
        """Whether a question failed for a reason other than the method: in two cells, or in the
        uncompressed model."""
        found = (self._cells.get(item.id, set()) for item in items)
        return any(UNCOMPRESSED in cells or len(cells) > 1 for cells in found)

    def grouped(self, key: str, items: Sequence[Question]) -> list[list[Question]]:
        """The batches of ``key``: all questions at once, but those that failed before alone."""
        bad = [q for q in items if self.suspects([q]) or key in self._cells.get(q.id, ())]
        good = [item for item in items if item not in bad]
        return [group for group in (good, *([item] for item in bad)) if group]

    def add(self, key: str, item: Question, failure: Failure, *, innocent: bool = False) -> None:
        """Record that cell ``key`` failed on ``item`` alone.

        Args:
            key: The cell.
            item: The question.
            failure: Why.
            innocent: Whether other cells answered it, so that the question is not the cause.
        """
        about = f"question {item.id!r}, image {item.image_id!r}"
        named = replace(failure, error=f"{failure.error} ({about})")
        broke_contract = failure.error.startswith(ContractError.__name__)
        self._plain.setdefault(key, named if broke_contract else failure)
        self._here.add((key, item.id))
        self._cells.setdefault(item.id, set()).add(key)
        if key in self._answering:
            self.journal.fail(key, named, item.id)
            return
        self._waiting.setdefault(key, []).append((item.id, named))
        judged = innocent or not self.judged or (UNCOMPRESSED, item.id) in self.journal.answers
        self._strikes[key] += judged
        if self._strikes[key] >= _TRIES or len(self._waiting[key]) >= _PATIENCE:
            self._give_up(key)

    def answered(self, key: str) -> None:
        """Cell ``key`` answered, so the questions on which it failed are missing, not the cell."""
        self._answering.add(key)
        for question, failure in self._waiting.pop(key, ()):
            self.journal.fail(key, failure, question)

    def settle(self) -> None:
        """At the end of a run, give up the cells that failed on every question."""
        for key in list(self._waiting):
            self._give_up(key)

    def _give_up(self, key: str) -> None:
        self.out.add(key)
        for question, _ in self._waiting.pop(key):
            self._cells[question].discard(key)
        self.journal.fail(key, self._plain[key])
