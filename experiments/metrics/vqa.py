"""The accuracy of VQA, TextVQA, VizWiz and OK-VQA."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from tokenprune.errors import UserError
from tokenprune.experiments.metrics.base import Metric, register
from tokenprune.experiments.metrics.normal import ARTICLES

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Vqa"]


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


_DIGITS_WITH_COMMA = re.compile(r"\d,\d")


_PERIOD = re.compile(r"\.(?!\d)")


_COUNTS = "zero one two three four five six seven eight nine ten"


_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_COUNTS.split())}}


# Without apostrophes. The official list is not complete: "youll" is "you'll", "ill" is not "i'll".
_SHORT = (
    "aint arent cant couldve couldnt couldntve didnt doesnt dont hadnt hadntve hasnt havent hed "
    "hedve hes howd howll hows isnt itd itdve itll maam mightnt mightntve mightve mustnt mustve "
    "neednt notve oclock oughtnt owsat shant shedve shouldve shouldnt shouldntve somebodyd "
    "somebodydve somebodyll somebodys someoned someonedve someonell someones somethingd "
    "somethingdve somethingll thats thered theredve therere theres theyd theydve theyll theyre "
    "theyve twas wasnt wedve weve werent whatll whatre whats whatve whens whered wheres whereve "
    "whod whodve wholl whos whove whyll whyre whys wont wouldve wouldnt wouldntve yall yallll "
    "yalldve youd youdve youll youre youve"
)


_CONTRACTIONS = frozenset(_SHORT.split())


@register("vqa")
class Vqa(Metric):
    """Agreement with annotators: min(matches / 3, 1), averaged over leaving out each annotator.

    Answers are compared after the official normalisation.  The formula gives 1 only with four or
    more annotators who agree; the official sets have ten.
    """

    source = "VQA (arXiv 1505.00468), official evaluation"

    def score(self, prediction: str, question: Question) -> float:
        said = official(prediction)
        matches = [official(answer) == said for answer in question.answers]
        # A match that is left out is not counted among the others.
        shares = [min((sum(matches) - match) / 3, 1.0) for match in matches]
        return sum(shares) / len(shares) if shares else 0.0

    def check(self, question: Question) -> None:
        if len(question.answers) < 2:
            raise UserError(
                "the metric vqa compares with several annotators, of whom it leaves out one at a "
                "time, but there is one answer; give 'answers' with all of theirs, or choose exact."
            )


@lru_cache(maxsize=16384)
def official(answer: str) -> str:
    """The official normal form: punctuation, then case, number words, articles and contractions.

    A punctuation mark with a space beside it anywhere in the answer is deleted everywhere, and so
    are all marks if a comma stands between digits; otherwise a mark becomes a space.  A period
    stays in front of a digit.

    >>> official("The T-shirt."), official("1,000"), official("dont")
    ('t shirt', '1000', 'dont')
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    digits = _DIGITS_WITH_COMMA.search(text) is not None
    marked = text
    for mark in _PUNCTUATION:
        apart = digits or f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if apart else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", marked).lower().split()]
    return " ".join(_contracted(word) for word in words if word not in ARTICLES)


def _contracted(word: str) -> str:
    """A contraction without apostrophes, so that "dont" and "don't" are equal."""
    bare = word.replace("'", "")
    return bare if bare in _CONTRACTIONS else word
