"""Errors that a user can act on.  Each message says what is wrong and what to do."""

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
    """Bad input, refused before anything is computed.

    A message may quote any input.  Control characters and lone surrogates are escaped, and the
    middle of a message of more than 1500 characters is omitted.
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
    """A method broke the contract of `Compressor`."""


class UnknownNameError(UserError, LookupError):
    """An unknown name."""


class PictureWarning(UserWarning):
    """The range of values of an image is guessed."""


class RetentionWarning(UserWarning):
    """The requested retention leaves a view without any token.

    Attributes:
        about: `repr` of the method.
    """

    def __init__(self, message: str, about: str = "") -> None:
        super().__init__(message)
        self.about = about


def shown(value: object) -> str:
    """``value`` for a message: its `repr`, or a placeholder if Python refuses to convert it."""
    try:
        return repr(value)
    except ValueError:
        return "a number of thousands of digits"


def unknown(what: str, name: str, known: Iterable[str], listing: str = "") -> UnknownNameError:
    """The error for an unknown ``name``, with the nearest known names and all known names.

    Args:
        what: The noun.
        name: The unknown name.
        known: All names.
        listing: Replaces the list of all names if it would be too long.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name[:100], known, 3, 0.5)  # slow on long names
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = listing or f"Known: {', '.join(known)}."
    return UnknownNameError(f"no {what} is called {name!r}.{hint} {listed}")
