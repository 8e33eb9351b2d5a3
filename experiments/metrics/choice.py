"""Multiple choice: the letter or the text of an option."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tokenprune.errors import UserError
from tokenprune.experiments.metrics.base import Metric, register
from tokenprune.experiments.metrics.normal import normal, unified

if TYPE_CHECKING:
    from tokenprune.experiments.common.questions import Question

__all__ = ["Choice", "chosen"]


_LETTERS = string.ascii_uppercase


# "B", "(B)", "B.", "B)", "**B**"
_ALONE = re.compile(r"[^\w]*([a-z])[^\w]*")


# "B. blue", "(B) blue", "B: blue", but not "e.g. blue"
_LEADING = re.compile(r"[^\w]*(?:\(([a-z])\)|([a-z])\s*(?:\.(?=\s|$)|[):,]))")


# "the answer is (B)", "Answer: B", "option B", but not "the answer is a dog"
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+is)?(?:\s+option)?)\s*:?\s*[^\w\s]*"
    r"(?:([B-HJ-Z])\b|([A-Za-z])(?=\W*$|\s*[).:,]))(?!['’])"
)


_SAID = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)\s*(.+)", re.DOTALL)


@register("choice")
class Choice(Metric):
    """1 if the answer names the right option, by its letter or by its text.

    Without ``choices``, only letters are compared.  An answer that names several options, or none,
    scores 0.
    """

    source = "MMBench (arXiv 2307.06281), ScienceQA (arXiv 2209.09513) and MMMU (arXiv 2311.16502)"

    def score(self, prediction: str, question: Question) -> float:
        said = chosen(prediction, question.choices)
        return float(said is not None and said in set(_truths(question)))

    def check(self, question: Question) -> None:
        choices = question.choices
        if choices is not None and not 2 <= len(choices) <= len(_LETTERS):
            raise UserError(f"the metric choice needs 2 to 26 choices, got {len(choices)}.")
        if choices is not None and len(set(map(normal, choices))) < len(choices):
            raise UserError(f"two of the choices are equal: {', '.join(choices)}.")
        if None in _truths(question):
            raise UserError(
                f"the answers {list(question.answers)} are not options; give the letters of "
                "options, or their texts as in 'choices'."
            )


def _truths(question: Question) -> list[int | None]:
    """The right options."""
    return [
        next(_first(answer, question.choices, (_letter_alone, _equal)), None)
        for answer in question.answers
    ]


def chosen(text: str, choices: Sequence[str] | None) -> int | None:
    """The place of the option that ``text`` names; None if it names none or several.

    The first that applies decides: a letter alone, the text of an option, a leading letter such as
    in "B. blue", "the answer is B" or "the answer is blue", the only option whose text occurs, the
    only letter that occurs.

    >>> [chosen(text, ("red", "blue")) for text in ("B", "(b)", "Blue.", "It is blue", "green")]
    [1, 1, 1, 1, None]
    """
    ways = (_letter_alone, _equal, _leading, _named, _said, _contained, _capital)
    return next(_first(text, choices, ways), None)


_Way = Callable[[str, Sequence[str] | None], int | None]


def _first(text: str, choices: Sequence[str] | None, ways: Sequence[_Way]) -> Iterator[int]:
    for way in ways:
        place = way(text, choices)
        if place is not None:
            yield place


def _place(letter: str, choices: Sequence[str] | None) -> int | None:
    """The place of an option's letter; None if there are fewer options."""
    place = _LETTERS.index(letter.upper())
    return place if choices is None or place < len(choices) else None


def _letter_alone(text: str, choices: Sequence[str] | None) -> int | None:
    found = _ALONE.fullmatch(unified(text))
    return None if found is None else _place(found[1], choices)


def _equal(text: str, choices: Sequence[str] | None) -> int | None:
    said = normal(text)
    return next((i for i, option in enumerate(choices or ()) if normal(option) == said), None)


def _leading(text: str, choices: Sequence[str] | None) -> int | None:
    found = _LEADING.match(unified(text))
    if found:
        return _place(found[1] or found[2], choices)
    # "B blue"
    letter, _, rest = text.strip().partition(" ")
    place = _letter_alone(letter, choices)
    return place if place is not None and _equal(rest, choices) == place else None


def _named(text: str, choices: Sequence[str] | None) -> int | None:
    found = _NAMED.search(unicodedata.normalize("NFKC", text))
    return None if found is None else _place(found[1] or found[2], choices)


def _said(text: str, choices: Sequence[str] | None) -> int | None:
    found = _SAID.search(unified(text))
    return None if found is None else _equal(found[1], choices)


def _contained(text: str, choices: Sequence[str] | None) -> int | None:
    """The only option whose text occurs; one inside another that occurs does not count."""
    said = f" {normal(text)} "
    forms = [f" {normal(option)} " for option in choices or ()]
    there = [form for form in forms if form in said]
    longest = [form for form in there if not any(form in other for other in there if other != form)]
    return forms.index(longest[0]) if len(longest) == 1 else None


def _capital(text: str, choices: Sequence[str] | None) -> int | None:
    """The only capital letter of an option; "A" and "I" are also words, and count at the end."""
    found = set(re.findall(r"(?<![\w'])(?:[B-HJ-Z]\b|[AI]\b(?=\W*$))(?!['’])", text))
    return _place(found.pop(), choices) if len(found) == 1 else None
