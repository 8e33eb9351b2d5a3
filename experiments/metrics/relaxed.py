"""The relaxed accuracy of ChartQA."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenprune.experiments.metrics.base import Metric, register
from tokenprune.experiments.metrics.normal import normal, plain_numbers, unified

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Relaxed"]


_TOLERANCE = 0.05


_ROUNDING = 1e-9  # 1.05 is 5 % from 1, although the difference of the floats is larger


_NUMBER = re.compile(r"([+-]?)[$€£¥]?((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*(%?)")


@register("relaxed")
class Relaxed(Metric):
    """1 if a number is within 5 % of the true one, or a text equals the true one.

    A number in percent is divided by 100, as in the code that published results use.  Texts are
    compared in the normal form of ``exact``.
    """

    source = "ChartQA (arXiv 2203.10244), after PlotQA (arXiv 1909.00997)"

    def score(self, prediction: str, question: Question) -> float:
        return float(any(_near(prediction, answer) for answer in question.answers))


def _near(prediction: str, answer: str) -> bool:
    said, truth = _number(prediction), _number(answer)
    if said is None or truth is None:
        return normal(prediction) == normal(answer)
    return abs(said - truth) <= (_TOLERANCE + _ROUNDING) * abs(truth)


def _number(text: str) -> float | None:
    """The number that ``text`` is; None for other texts, also for "nan" and "inf"."""
    found = _NUMBER.fullmatch(plain_numbers(unified(text).strip().rstrip(".")))
    if found is None:
        return None
    sign, digits, percent = found.groups()
    return float(f"{sign}{digits}") / (100 if percent else 1)
