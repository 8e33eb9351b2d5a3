"""What a metric is, and the registry of metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, TypeVar

from numpy.typing import ArrayLike

from tokenprune.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.common.questions import Question

__all__ = [
    "Metric",
    "Sums",
    "metrics",
    "register",
]


M = TypeVar("M", bound="type[Metric]")


Sums = tuple[ArrayLike, ArrayLike]
"""(n,) numerators and (n,) denominators of n answers; a figure is the ratio of their sums."""


class Metric(ABC):
    """Scores answers.  It has no state; one instance scores all questions.

    Attributes:
        name: The name in `metrics`; set by `register`.
        source: Where the definition comes from.
    """

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    @abstractmethod
    def score(self, prediction: str, question: Question) -> float:
        """The score of an answer, from 0 (wrong) to 1 (right).

        Args:
            prediction: What the model said.
            question: With one true answer or several.
        """

    def check(self, question: Question) -> None:  # noqa: B027  # most metrics accept every question
        """Raise `UserError` if no answer to ``question`` can be scored, before any is asked for."""

    def aggregates(self, answers: pd.DataFrame) -> Mapping[str, Sums]:
        """Figures of a set of answers beside their mean score, such as F1.

        Args:
            answers: Rows of ``answers.parquet``; all have a score of this metric.

        Returns:
            Name to numerators and denominators, one of each per row.
        """
        return {}


metrics: Registry[Metric] = Registry(
    "metric", "tokenprune.experiments.metrics", "tokenprune.metrics"
)


def register(name: str) -> Callable[[M], M]:
    """Class decorator: register a `Metric` as ``name``.

    Raises:
        UserError: Another class has the name.
    """

    def decorate(cls: M) -> M:
        metrics.add(name, cls)
        cls.name = name
        return cls

    return decorate
