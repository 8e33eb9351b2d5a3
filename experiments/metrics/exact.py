"""Equality of normal forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.experiments.metrics.base import Metric, register
from tokenprune.experiments.metrics.normal import normal

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Exact", "is_exact"]


_VERDICTS = ("yes", "no")


def is_exact(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer equals one of the true ``answers`` by the rule of `Exact`."""
    said = normal(prediction)
    first, _, rest = said.partition(" ")
    accepted = {said}
    if first in _VERDICTS and rest.partition(" ")[0] not in _VERDICTS:
        accepted.add(first)
    return any(normal(answer) in accepted for answer in answers)


@register("exact")
class Exact(Metric):
    """1 if the answer equals a true one apart from case, articles, punctuation and number words.

    If the true answer is yes or no, the first word of an answer that begins with either decides:
    "Yes, it is" is "yes".  Two of them in a row, as in "yes no", decide nothing.
    """

    source = "own; after SQuAD (arXiv 1606.05250) and VQA (arXiv 1505.00468)"

    def score(self, prediction: str, question: Question) -> float:
        return float(is_exact(prediction, question.answers))
