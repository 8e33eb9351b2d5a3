"""Measured times and memory of the methods of a run: the file ``times.csv`` of its folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import read_csv
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "KINDS",
    "TIMES",
    "medians",
    "read_times",
    "with_times",
]


TIMES = "times.csv"


KINDS = ("prefill_ms", "total_ms", "token_ms")
"""The columns that hold times."""


_NUMBERS = (*KINDS, "retention", "peak_bytes")


def read_times(folder: Path) -> pd.DataFrame | None:
    """``times.csv`` of a run: one row per method, retention ratio and timed run; None without.

    Raises:
        UserError: It is damaged.
    """
    path = folder / TIMES
    if not path.is_file():
        return None
    try:
        table = read_csv(path)
        table = table.assign(**{name: pd.to_numeric(table[name]) for name in _NUMBERS})
        return table.astype({"label": str, "status": str})
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path} is damaged ({error}); remove it, and measure again with compare --measure."
        ) from error


def medians(times: pd.DataFrame) -> pd.DataFrame:
    """One row per method and retention ratio: medians, and interquartile ranges (``_iqr``).

    Args:
        times: As `read_times` returns them.
    """
    cells = times[times["status"] == "ok"].groupby(["label", "retention"], sort=False)
    found = cells[[*KINDS, "peak_bytes"]].median()
    spread = cells[list(KINDS)].quantile(0.75) - cells[list(KINDS)].quantile(0.25)
    return found.join(spread.add_suffix("_iqr")).reset_index()


def with_times(summary: pd.DataFrame, times: pd.DataFrame | None) -> pd.DataFrame:
    """``summary`` with the `medians`, in the rows over all questions; unchanged without times."""
    if times is None or times.empty:
        return summary
    found = medians(times).assign(kind=OVERALL)
    return summary.merge(found, how="left", on=["label", "retention", "kind"])
