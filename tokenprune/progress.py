"""The type of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "Report",
]


Report = Callable[[int, int, str], None]
"""Called with how much is done, how much there is (0: not known yet), and what is being done."""
