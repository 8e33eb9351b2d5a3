"""Converts a retention ratio to whole numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from tokenprune.deprecated import moved_names
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.tokens import VisualTokens

__all__ = [
    "Rounding",
    "apportion",
    "budget",
    "check_retention",
    "coarse_grid",
    "left_at",
    "rounded_up",
    "surplus",
]


Rounding = Literal["floor", "half-even", "half-up", "ceil"]


# A product this close to a whole number, relative to the number of tokens, is that number.
_QUOTIENT = Fraction(1, 10**12)


@lru_cache(maxsize=4096)  # a comparison calls it thousands of times with few arguments
def budget(tokens: int, retention: float, rounding: Rounding = "floor") -> int:
    """The number of tokens to keep of ``tokens``: at least one, unless there are none.

    The product is exact.  A decimal has its written value: ``0.29`` of 100 is 29, whereas
    ``int(100 * 0.29)`` is 28.  A quotient has its exact value: ``192 / 576`` of 576 is 192,
    although the float is slightly less than a third.
    """
    exact = tokens * Fraction(str(retention))
    if abs(exact - round(exact)) <= tokens * _QUOTIENT:
        exact = Fraction(round(exact))
    rounders: dict[Rounding, Callable[[Fraction], int]] = {
        "floor": math.floor,
        "half-even": round,
        "half-up": lambda number: math.floor(number + Fraction(1, 2)),
        "ceil": math.ceil,
    }
    return min(tokens, max(1, rounders[rounding](exact)))


def rounded_up(layout: TokenLayout, retention: float) -> int:
    """``R * P`` patch tokens, at least one, if every non-empty view may round up once."""
    sizes = [size for size in layout.view_sizes if size]
    if len(sizes) < 2:
        return budget(sum(sizes), retention, "ceil")
    return budget(sum(sizes), retention) + len(sizes)


def surplus(sizes: Sequence[int], retention: float) -> int:
    """The most tokens beyond R that views of ``sizes`` keep if their ratios are R on average.

    View ``j`` of ``N_j`` tokens keeps ``R (1 + s_j - mean s) N_j``, where ``s_j`` in [0, 1] add up
    to 1.  The sum is largest if the largest view has all of ``s``: ``R (sum N + max N - mean N)``.
    """
    return math.ceil(retention * (max(sizes) - sum(sizes) / len(sizes))) if sizes else 0


def coarse_grid(shape: tuple[int, int], count: int) -> tuple[int, int]:
    """(rows, columns) of at most ``count`` cells, with about the aspect ratio of ``shape``.

    Args:
        shape: (rows, columns); an upper bound for both sides.
        count: In [1, rows * columns].
    """
    height, width = shape
    # Enough rows for the columns to fit into the width, and at most ``count`` cells.
    rows = max(1, round(math.sqrt(count * height / width)), count // width)
    rows = min(rows, height, count)
    return rows, min(width, count // rows)


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` divided in proportion to ``sizes``, by the largest-remainder method.

    Of equal remainders, the earlier entry is served first.
    """
    quotas = [Fraction(total * size, max(sum(sizes), 1)) for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def left_at(tokens: VisualTokens, retention: float, share: float = 1.0) -> int:
    """The number of patch tokens to keep at one of several cuts inside the language model.

    It is ``floor(R ** share * P)``, where ``P`` tokens entered the language model, but at most the
    number of remaining tokens.

    Args:
        tokens: The sequence at the cut.
        retention: R, reached at the last cut.
        share: Progress towards R, in [0, 1].  Evenly spaced values drop the same share at every
            cut.
    """
    there = len(tokens.layout.patches)
    return min(budget(tokens.entered or there, round(retention**share, 12)), there)


def check_retention(retention: float) -> None:
    """Raise `UserError` unless ``retention`` is in (0, 1]."""
    if not 0 < retention <= 1:
        hint = f"; for {retention:g} % write {retention / 100:g}" if 1 < retention <= 100 else ""
        raise UserError(
            f"retention must be larger than 0 and at most 1 (the share of patch tokens kept), "
            f"got {retention:g}{hint}."
        )


__getattr__ = moved_names(__name__)
