"""Differences and p-values, as tables show them."""

from __future__ import annotations

import math

__all__ = [
    "difference",
    "p_value",
]


def difference(value: float, low: float, high: float, *, decimals: int = 1) -> str:
    """A difference of accuracies in points and its interval, whose ends have ``decimals``."""

    def points(share: float, digits: int) -> str:
        return f"{round(100 * share, digits) + 0.0:+.{digits}f}"  # no minus in front of zero

    return f"{points(value, 1)} ({points(low, decimals)} to {points(high, decimals)})"


def p_value(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
