"""Errors a user can act on.  Each carries a finished sentence: what was wrong, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "ContractError",
    "PictureWarning",
    "RetentionWarning",
    "UnknownNameError",
    "UserError",
    "shown",
    "unknown",
]

_MOST = 1500  # characters of a message
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class UserError(ValueError):
    """Bad input, found before compute was spent.

    Messages repeat what was given, which may be anything: control characters and lone surrogates
    are escaped, and of a very long text the middle is left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_legible(message))


def _legible(text: str) -> str:
    text = _UNSEEN.sub(lambda sign: sign[0].encode("unicode_escape").decode("ascii"), text)
    if len(text) <= _MOST:
        return text
    half = _MOST // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"


class ContractError(UserError):
    """A strategy did what none may do; the sentence says which, what, and of which image."""


class UnknownNameError(UserError, LookupError):
    """A name that nothing is registered under."""


class PictureWarning(UserWarning):
    """The values of a picture do not say which of them is black and which is white."""


class RetentionWarning(UserWarning):
    """The requested retention leaves a view without a single token.

    Attributes:
        about: `repr` of the strategy.
    """

    def __init__(self, message: str, about: str = "") -> None:
        super().__init__(message)
        self.about = about


def shown(value: object) -> str:
    """``value`` in a message: its `repr`, also where Python refuses to write a number out."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def unknown(what: str, name: str, known: Iterable[str], listing: str = "") -> UnknownNameError:
    """The error for an unknown ``name``, with the nearest known names and the whole list.

    Args:
        what: The noun.
        name: What was asked for.
        known: All names.
        listing: Said in place of the whole list where that is too long to read.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name[:100], known, 3, 0.5)  # takes long on long names
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = listing or f"Known: {', '.join(known)}."
    return UnknownNameError(f"no {what} is called {name!r}.{hint} {listed}")
