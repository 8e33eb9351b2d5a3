"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "ProgressCallback",
    "silent",
]


ProgressCallback = Callable[[int, int, str], None]
"""Called with the steps done, the number of steps (0: not known yet), and the current step."""


def silent(done: int, total: int, doing: str) -> None:
    """A `ProgressCallback` that shows nothing."""
