"""From a retention ratio to integers: how many tokens in all, and how many each view keeps."""

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


# Retentions this close to a quotient of whole numbers are it: no float of one is farther off.
_QUOTIENT = Fraction(1, 10**12)


@lru_cache(maxsize=4096)  # a comparison asks for few, thousands of times
def budget(tokens: int, retention: float, rounding: Rounding = "floor") -> int:
    """How many of ``tokens`` are kept, at least one of a non-empty sequence.

    The product is taken exactly, from the decimal that was written: ``0.29`` of 100 is 29, where
    ``int(100 * 0.29)`` gives 28.  A quotient is what was divided: ``192 / 576`` of 576 is 192,
    though the float is a little less than a third.
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
    """``R * P`` patch tokens where every view that has some may round up once, at least one."""
    sizes = [size for size in layout.view_sizes if size]
    if len(sizes) < 2:
        return budget(sum(sizes), retention, "ceil")
    return budget(sum(sizes), retention) + len(sizes)


def surplus(sizes: Sequence[int], retention: float) -> int:
    """How much more than R views of ``sizes`` may keep whose ratios are R on average only.

    View ``j`` of ``N_j`` tokens keeps ``R (1 + s_j - mean s) N_j`` with ``s_j`` in [0, 1] and of
    sum 1, together at most ``R (sum N + max N - mean N)``: the largest view then has all of ``s``.
    """
    return math.ceil(retention * (max(sizes) - sum(sizes) / len(sizes))) if sizes else 0


def coarse_grid(shape: tuple[int, int], count: int) -> tuple[int, int]:
    """(rows, columns) of at most ``count`` cells, of the aspect of ``shape`` as far as that goes.

    Args:
        shape: (rows, columns) of what is laid out; no side gets more cells.
        count: In [1, rows * columns].
    """
    height, width = shape
    # Wide enough that what is left for the columns fits, and never more cells than tokens are due.
    rows = max(1, round(math.sqrt(count * height / width)), count // width)
    rows = min(rows, height, count)
    return rows, min(width, count // rows)


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """``total`` shared out in proportion to ``sizes``, exactly.

    What rounding leaves over goes to the largest remainders, earlier entries first.
    """
    quotas = [Fraction(total * size, max(sum(sizes), 1)) for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def left_at(tokens: VisualTokens, retention: float, share: float = 1.0) -> int:
    """How many patch tokens are left at one of several cuts inside the language model.

    ``floor(R ** share * P)`` of the ``P`` that entered it, at most those that are still there.

    Args:
        tokens: What is there.
        retention: R, what is left at the last cut.
        share: How much of the way to R is gone, in [0, 1]; evenly spaced ones drop the same share
            at every cut.
    """
    there = len(tokens.layout.patches)
    return min(budget(tokens.entered or there, round(retention**share, 12)), there)


def check_retention(retention: float) -> None:
    """Raise `UserError` unless ``retention`` lies in (0, 1]."""
    if not 0 < retention <= 1:
        hint = f"; for {retention:g} % write {retention / 100:g}" if 1 < retention <= 100 else ""
        raise UserError(
            f"retention must be larger than 0 and at most 1 (the share of patch tokens kept), "
            f"got {retention:g}{hint}."
        )


__getattr__ = moved_names(__name__)
