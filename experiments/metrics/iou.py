"""Overlap of boxes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tokenprune.errors import UserError
from tokenprune.experiments.metrics.base import Metric, Sums, register
from tokenprune.experiments.metrics.normal import unified

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.common.questions import Question

__all__ = ["Iou"]


Box = tuple[float, float, float, float]


_HIT = 0.5


_NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?![\w])")


_GROUP = re.compile(r"[\[({]([^\[\](){}]*)[\])}]")


@register("iou")
class Iou(Metric):
    """Intersection over union of two boxes, [x1, y1, x2, y2]; the best one of several true boxes.

    Both boxes must have the same units.  An answer without a box of positive size scores 0.
    ``iou_hits`` of a set is the share of answers with at least 0.5.
    """

    source = "Pascal VOC; accuracy at 0.5 as in RefCOCO (arXiv 1608.00272)"

    def score(self, prediction: str, question: Question) -> float:
        said = box_in(prediction)
        truths = map(box_in, question.answers)
        if said is None:
            return 0.0
        return max((_overlap(said, truth) for truth in truths if truth is not None), default=0.0)

    def check(self, question: Question) -> None:
        for answer in question.answers:
            if box_in(answer) is None:
                raise UserError(
                    f"the answer {answer!r} is no box; write [x1, y1, x2, y2] with x1 < x2 and "
                    "y1 < y2."
                )

    def aggregates(self, answers: pd.DataFrame) -> Mapping[str, Sums]:
        return {"iou_hits": (answers["score"] >= _HIT, answers["score"].notna())}


def box_in(text: str) -> Box | None:
    """The first box in ``text``: four numbers in brackets or, without such, its only four numbers.

    None if there is none, or if its size is not positive.

    >>> box_in('{"bbox_2d": [10, 20, 30, 40]}')
    (10.0, 20.0, 30.0, 40.0)
    >>> box_in("<|box_start|>(1,2),(3,4)<|box_end|>")
    (1.0, 2.0, 3.0, 4.0)
    """
    plain = unified(text)
    groups = [_numbers(group[1]) for group in _GROUP.finditer(plain)]
    fours = [group for group in (*groups, _numbers(plain)) if len(group) == 4]
    for left, top, right, bottom in fours:
        if left < right and top < bottom:
            return left, top, right, bottom
    return None


def _numbers(text: str) -> list[float]:
    return [float(found[0]) for found in _NUMBER.finditer(text)]


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)


def _overlap(one: Box, other: Box) -> float:
    corners = (*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:]))
    shared = _area((corners[0], corners[1], corners[2], corners[3]))
    return shared / (_area(one) + _area(other) - shared)
