"""Numbers with units, for tables and figures."""

from __future__ import annotations

__all__ = [
    "CHUNK",
    "bytes_unit",
    "flops_unit",
    "percent",
]


CHUNK = 128
"""Number of queries whose attention is computed at a time, where a signal needs many queries."""


def percent(share: float, decimals: int | None) -> str:
    """``share`` in percent; None stands for three significant digits."""
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def flops_unit(largest: float) -> tuple[str, float]:
    """Name and size of the unit that suits FLOPs up to ``largest``."""
    for unit, scale in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if largest >= 0.1 * scale:
            return unit, scale
    return "MFLOPs", 1e6


def bytes_unit(largest: float) -> tuple[str, float]:
    """Name and size of the unit that suits bytes up to ``largest``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if largest >= scale:
            return unit, scale
    return "KiB", 2**10
