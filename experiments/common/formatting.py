"""Differences, p-values and arrows, as tables show them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "arrow",
    "arrows",
    "difference",
    "measure",
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


def arrows(summary: pd.DataFrame) -> str:
    """What an arrow of `arrow` means, in words.

    Args:
        summary: As `summary.summarise` returns it.
    """
    matched = [] if "match" not in summary else list(summary["match"].dropna().unique())
    beside = f"at the same cost ({matched[0]})" if matched else "at the same retention"
    test = "exact McNemar test" if measure(summary) == "accuracy" else "paired test"
    return (
        f"↑ ↓ significantly better or worse than uniform {beside}, on the same questions ({test}, "
        "p < 0.05; with several seeds, the 95 % interval of the difference)."
    )


def measure(summary: pd.DataFrame) -> str:
    """What the accuracy of a summary is: ``accuracy``, or ``accuracy by`` metrics other than exact.

    Args:
        summary: As `summary.summarise` returns it.
    """
    named = [] if "metric" not in summary else list(summary["metric"].dropna().unique())
    metrics = dict.fromkeys(name for names in named for name in names.split(", "))
    return "accuracy" if set(metrics) <= {"exact"} else f"accuracy by {' and '.join(metrics)}"


def arrow(row: Mapping[str, Any]) -> str:
    """An arrow as `arrows` explains it, or nothing.

    Args:
        row: Of `summary.summarise`.
    """
    nan = float("nan")
    p, low, high = (float(row.get(f"vs_uniform{end}", nan)) for end in ("_p", "_low", "_high"))
    sure = low * high > 0 if math.isnan(p) else p < 0.05
    if not sure:
        return ""
    return "↑" if row["vs_uniform"] > 0 else "↓"
