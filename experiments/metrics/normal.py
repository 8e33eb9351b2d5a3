"""The normal form in which answers are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

__all__ = [
    "ARTICLES",
    "normal",
    "plain_numbers",
    "unified",
]


ARTICLES = frozenset({"a", "an", "the"})


_LOOK_ALIKES = str.maketrans({"’": "'", "‘": "'", "−": "-", "–": "-", "—": "-"})


_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")


_APOSTROPHE = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")


_LEADING_POINT = re.compile(r"(?<![\w.])\.(?=\d)")


# Signs that carry meaning: in numbers ("3.5", "12:30", "-5"), and in "C++", "O-", "5%" and "$5".
_KEPT = re.compile(r"(?<=\d)[.,:/-](?=\d)|(?<!\w)-(?=[\d$])|(?<=\w)-(?=\s|$)|[%#&@]")


_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)


_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


_NUMBERS = {
    "none": 0,
    **{word: value for value, word in enumerate(_SMALL.split())},
    **{word: 10 * value for value, word in enumerate(_TENS.split(), 2)},
}


_POWERS = {"hundred": 100, "thousand": 1000}


@lru_cache(maxsize=16384)
def normal(text: str) -> str:
    """The normal form of an answer.

    Unicode NFKC, no case, no articles, no punctuation that carries no meaning, digits in place of
    number words, no thousands separators, and single spaces.

    >>> normal("The T-shirts!"), normal("Twenty-one"), normal("1,000")
    ('t shirts', '21', '1000')
    >>> normal("-5") == normal("5"), normal("3.5") == normal("35")
    (False, False)
    """
    folded = unified(text)
    whole = _APOSTROPHE.sub("", plain_numbers(folded))
    whole = re.sub(r"(?<=\d)\s+%", "%", _LEADING_POINT.sub("0.", whole))
    words = "".join(_spaced(whole)).split()
    found = [word for word in words if word not in ARTICLES] or words
    return " ".join(_counted(found)) or " ".join(folded.split())


def unified(text: str) -> str:
    """``text`` in Unicode NFKC without case, with plain apostrophes and minus signs."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_LOOK_ALIKES)


def plain_numbers(text: str) -> str:
    """``text`` without thousands separators.

    >>> plain_numbers("1,234,567.8 of 1,5")
    '1234567.8 of 1,5'
    """
    return _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


def _spaced(text: str) -> Iterable[str]:
    """The characters of ``text``, with spaces for punctuation without meaning."""
    kept = {place for found in _KEPT.finditer(text) for place in range(*found.span())}
    for place, character in enumerate(text):
        mark = unicodedata.category(character).startswith("P") or character in "`^~|=<>"
        yield " " if mark and place not in kept else character


def _counted(words: Iterable[str]) -> Iterable[str]:
    """The words, with digits for the numbers from zero to ninety-nine, hundreds and thousands."""
    found: list[str] = []
    last: int | None = None  # the value of the word before, if that is a number word
    for word in words:
        value = _NUMBERS.get(word, _POWERS.get(word))
        if value is None:
            found.append(word)
        elif last and (word in _POWERS or (last in range(20, 100, 10) and 0 < value < 10)):
            value = last * value if word in _POWERS else last + value
            found[-1] = str(value)
        else:
            found.append(str(value))
        last = value
    return found
