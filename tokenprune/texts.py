"""Checks and escapes text from users and files, so that it can be stored and displayed."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["first_line", "is_plain", "is_remote", "is_whole", "printable"]

_LONGEST = 300  # maximum number of characters of `first_line`


def is_whole(text: str) -> bool:
    """Whether ``text`` has no lone surrogate, which UTF-8 cannot encode."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def is_plain(text: str, allowed: str = "") -> bool:
    """Whether ``text`` has no control characters except those in ``allowed``."""
    return not any(unicodedata.category(sign) == "Cc" and sign not in allowed for sign in text)


def is_remote(path: str) -> bool:
    """Whether ``path`` is the address of something on another machine.

    >>> is_remote("https://example.com/cat.png"), is_remote("C:/cat.png"), is_remote("cat.png")
    (True, False, False)
    """
    # `Path` makes one slash of two.
    return re.match(r"(?!file:)[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE) is not None


def printable(text: str) -> str:
    r"""``text`` with control characters and lone surrogates escaped.

    >>> printable("a\x1b[31mb\n")
    'a\\x1b[31mb\n'
    """
    return "".join(
        sign
        if (is_plain(sign, "\n\t") and is_whole(sign))
        else sign.encode("unicode_escape", "surrogatepass").decode("ascii")
        for sign in text
    )


def first_line(error: str) -> str:
    """The first line of another library's error: at most 300 characters, no final full stop."""
    first = next((line for line in error.splitlines() if line.strip()), "")
    short = " ".join(first.split()).rstrip(".: ")
    return short if len(short) <= _LONGEST else f"{short[:_LONGEST].rstrip()} …"
