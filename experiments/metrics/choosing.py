"""Which metric scores a question: that of the run, of the question, or of its form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from tokenprune.errors import UserError
from tokenprune.experiments.metrics.base import Metric, metrics

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = [
    "check_metrics",
    "metric_names",
    "metric_of",
    "scored",
    "with_metric",
]


_OWN: dict[str, Metric] = {}
"""Metrics that ``module:function`` and ``module:Class`` named."""


def with_metric(questions: Sequence[Question], name: str | None) -> list[Question]:
    """The questions, all scored by the metric ``name``; None leaves the choice to each question.

    Args:
        questions: All of them.
        name: Of a registered metric, or ``module:function`` or ``module:Class``; the module is
            imported.

    Raises:
        UserError: There is no such metric.
    """
    if name is None:
        return list(questions)
    if ":" in name:
        _OWN[name] = _own(name)
    else:
        metrics.get(name)
    return [replace(item, metric=name) for item in questions]


def metric_of(question: Question) -> Metric:
    """The metric that scores ``question``.

    It is that of the run or of the question; otherwise ``choice`` if the question has choices, and
    ``exact`` if not.

    Raises:
        UserError: There is no such metric here.  The ``module:function`` of a data file is never
            imported.
    """
    return _instance(question.metric or ("choice" if question.choices else "exact"))


def metric_names(questions: Iterable[Question]) -> list[str]:
    """The names of the metrics that score ``questions``, in order of appearance."""
    return list(dict.fromkeys(metric_of(item).name for item in questions))


def check_metrics(questions: Iterable[Question]) -> None:
    """Raise `UserError` unless every question with a true answer can be scored by its metric.

    The true answer itself is scored, so that a metric that fails is found before anything is asked.
    """
    for item in questions:
        try:
            metric = metric_of(item)
            if item.answer:
                metric.check(item)
                scored(metric, item.answer, item)
        except UserError as error:
            raise UserError(f"the question {item.id!r} cannot be scored: {error}") from error


def _instance(name: str) -> Metric:
    if name in _OWN:
        return _OWN[name]
    if ":" in name:
        raise UserError(
            f"the metric {name!r} is code of your own, which only --metric imports; give "
            f"--metric {name}."
        )
    return _made(metrics.get(name))


@cache
def _made(cls: Callable[[], Metric]) -> Metric:
    return cls()


def _own(path: str) -> Metric:
    """The metric at ``module:name``, a function or a class.  Raises `UserError`."""
    from tokenprune.plugins import own_object

    found = own_object(path)
    if isinstance(found, type) and issubclass(found, Metric):
        metric = _made(found)
        if not metric.name:
            metric.name = path  # type: ignore[misc]  # of this instance; the class has none
        return metric
    if isinstance(found, type) or not callable(found):
        raise UserError(
            f"{path!r} is neither a function (prediction, question) -> score nor a class derived "
            "from Metric."
        )
    return _Function(path, found)


class _Function(Metric):
    """A metric made of a function."""

    def __init__(self, name: str, function: Callable[[str, Question], Any]) -> None:
        self.name = name  # type: ignore[misc]  # every function has its own
        self.function = function

    def score(self, prediction: str, question: Question) -> float:
        return float(self.function(prediction, question))


def scored(metric: Metric, prediction: str, question: Question) -> float:
    """The score of an answer.

    Raises:
        UserError: The metric raises, or its score is not a number from 0 to 1.
    """
    try:
        score = float(metric.score(prediction, question))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the metric {metric.name!r} failed on {prediction!r}, an answer to "
            f"{question.id!r}: {type(error).__name__}: {error}"
        ) from error
    if not (math.isfinite(score) and 0 <= score <= 1):
        raise UserError(
            f"the metric {metric.name!r} scored {prediction!r}, an answer to {question.id!r}, "
            f"with {score}; a score is from 0 to 1."
        )
    return score
