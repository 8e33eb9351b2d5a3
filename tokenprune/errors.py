"""Errors a user can act on.  Each carries a finished sentence: what was wrong, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ContractError",
    "PictureWarning",
    "RetentionWarning",
    "UnknownNameError",
    "UserError",
    "unknown",
]


class UserError(ValueError):
    """Bad input, found before compute was spent."""


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


def unknown(what: str, name: str, known: Iterable[str], listing: str = "") -> UnknownNameError:
    """The error for an unknown ``name``, with the nearest known names and the whole list.

    Args:
        what: The noun.
        name: What was asked for.
        known: All names.
        listing: Said in place of the whole list where that is too long to read.
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = listing or f"Known: {', '.join(known)}."
    return UnknownNameError(f"no {what} is called {name!r}.{hint} {listed}")
