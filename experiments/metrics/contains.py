"""Whether an answer contains the true one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.experiments.metrics.base import Metric, register
from tokenprune.experiments.metrics.normal import normal

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Contains"]


@register("contains")
class Contains(Metric):
    """1 if the words of a true answer occur in the answer, in order and without a gap.

    Both are compared in the normal form of ``exact``.
    """

    source = "MM-Vet and OCRBench call it a match; whole words here (OCRBench: arXiv 2305.07895)"

    def score(self, prediction: str, question: Question) -> float:
        said = f" {normal(prediction)} "
        return float(any(f" {normal(answer)} " in said for answer in question.answers))
