"""Average normalised Levenshtein similarity, as in DocVQA."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tokenprune.experiments.metrics.base import Metric, register

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Anls", "edit_distance"]


_THRESHOLD = 0.5


@register("anls")
class Anls(Metric):
    """1 - edit distance / length of the longer text, for the nearest true answer; 0 below 0.5.

    Case and repeated spaces do not count.  A similarity of exactly 0.5 counts, as in the official
    evaluation; the paper leaves it out.
    """

    source = "ST-VQA (arXiv 1905.13648) and DocVQA (arXiv 2007.00398), official evaluation"

    def score(self, prediction: str, question: Question) -> float:
        said = _folded(prediction)
        best = max((_similarity(said, _folded(answer)) for answer in question.answers), default=0.0)
        return best if best >= _THRESHOLD else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if longest else 1.0


@lru_cache(maxsize=16384)
def edit_distance(one: str, other: str) -> int:
    """The least number of insertions, deletions and substitutions of characters (Levenshtein).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(other) + 1))
    for place, character in enumerate(one, 1):
        before, row = row, [place]
        for index, wanted in enumerate(other):
            changed = before[index] + (character != wanted)
            row.append(min(changed, before[index + 1] + 1, row[index] + 1))
    return row[-1]
