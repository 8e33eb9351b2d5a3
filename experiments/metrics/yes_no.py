"""Yes or no: accuracy, F1 and yes-ratio of POPE, and the paired accuracy of MME."""

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

__all__ = ["YesNo", "verdict"]


@register("yes-no")
class YesNo(Metric):
    """1 if the answer says the same of yes and no as the true one.

    Figures of a set, with yes as the positive class: ``precision``, ``recall``, ``f1`` and
    ``yes_ratio``, the share of answers that say yes.  If images have two questions of one kind, as
    in MME, ``paired_accuracy`` is the share of such images with both right.
    """

    source = "POPE (arXiv 2305.10355) and MME (arXiv 2306.13394)"

    def score(self, prediction: str, question: Question) -> float:
        return float(verdict(prediction) in map(verdict, filter(verdict, question.answers)))

    def check(self, question: Question) -> None:
        if verdict(question.answer) is None or len(set(map(verdict, question.answers))) > 1:
            raise UserError(
                f"the metric yes-no needs the answer yes or no, got {', '.join(question.answers)}."
            )

    def aggregates(self, answers: pd.DataFrame) -> Mapping[str, Sums]:
        said = answers["answer"].map(verdict) == "yes"
        true = answers["truth"].map(verdict) == "yes"
        hits = (said & true).astype(float)
        found: dict[str, Sums] = {
            "precision": (hits, said),
            "recall": (hits, true),
            "f1": (2 * hits, said.astype(float) + true),
            "yes_ratio": (said, said.notna()),
        }
        return found | _paired(answers)


def _paired(answers: pd.DataFrame) -> dict[str, Sums]:
    """The paired accuracy; every one of the two questions of an image counts half."""
    images = answers.groupby(["parameters", "kind", "image_id"], dropna=False)["score"]
    pairs = images.transform("size") == 2
    if not pairs.any():
        return {}
    both = images.transform("min") == 1
    return {"paired_accuracy": ((pairs & both) / 2, pairs / 2)}


def verdict(text: str) -> str | None:
    """Whether a text says ``yes`` or ``no``; None if neither.

    A leading yes or no decides, as in MME.  Otherwise the words of the first sentence do, as in
    POPE: no, not and n't mean no.  POPE counts every other text as yes; here it must contain yes.

    >>> verdict("Yes, it is"), verdict("There is no dog."), verdict("I see a dog.")
    ('yes', 'no', None)
    """
    sentence = re.split(r"[.!?\n]", unified(text).strip(" \t\n.!?\"'*"), maxsplit=1)[0]
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", sentence)
    for leading in ("yes", "no"):
        if words[:1] == [leading]:
            return leading
    if any(word in ("no", "not", "cannot") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None
