"""The figures of benchmarks: writing, reading and comparing files of them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import read_csv, write_csv
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.timing import Timing

__all__ = ["Figure", "changes", "check_comparable", "noise_of", "save", "table"]

KEY = ["benchmark", "case", "figure"]
NOTICEABLE = 0.1  # relative change up to which two runs count as equal, if their noise is less


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        case: What was measured, e.g. a method.
        figure: Its name, e.g. ``time / prefill``.
        value: Its value.
        unit: ``ratio``, ``count``, ``exponent``, or a physical unit such as ``s``.
        better: Which direction is better; None for a figure that only explains another one.
        goal: The value not to exceed (``low``) or to reach (``high``), if there is one.
        note: How the value came about.
        noise: Relative standard error that its repeats show; 0 if unknown.
    """

    case: str
    figure: str
    value: float
    unit: str = "ratio"
    better: Literal["low", "high"] | None = None
    goal: float | None = None
    note: str = ""
    noise: float = 0.0

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "low" else self.value >= self.goal


def noise_of(*timings: Timing) -> float:
    """Relative standard error of a product or quotient of the medians of ``timings``.

    The interquartile range of normal numbers is 1.35 standard deviations, and the standard error of
    the median of ``n`` numbers is 1.25 of them over the root of ``n``.
    """
    errors = [
        1.25 / 1.35 * one.spread / one.median / math.sqrt(len(one.runs))
        for one in timings
        if one.median > 0
    ]
    return math.hypot(*errors)


def save(frame: pd.DataFrame, path: Path) -> None:
    """Write the figures as CSV, or as parquet if the file name ends in ``.parquet``."""
    with replace_file(path) as temporary:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            write_csv(frame, temporary)


def table(path: Path) -> pd.DataFrame:
    """Read what `save` wrote.

    Raises:
        UserError: The file is missing, unreadable, or not a file of figures.
    """
    try:
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read benchmark figures from {path}: {error}") from error
    missing = {*KEY, "value", "better"} - {*frame.columns}
    if missing:
        raise UserError(
            f"{path} is not a file of benchmark figures: it lacks {', '.join(sorted(missing))}."
        )
    return frame


def check_comparable(path: Path, earlier: pd.DataFrame, quick: bool) -> None:
    """Raise `UserError` if figures of toy sizes would be compared with full ones."""
    toy = "quick" in earlier and bool(earlier["quick"].astype(bool).any())
    if toy != quick:
        was, now = ("toy sizes (--quick)", "full sizes") if toy else ("full sizes", "toy sizes")
        choice = "give --quick too" if toy else "leave out --quick"
        raise UserError(
            f"{path} has figures of {was}, which cannot be compared with {now}; {choice}, or "
            "choose another file for --against."
        )


def changes(frame: pd.DataFrame, earlier: pd.DataFrame) -> pd.DataFrame:
    """The figures that changed since ``earlier``, by more than `NOTICEABLE` and twice their noise.

    Returns:
        The key columns, ``value``, ``earlier``, ``ratio`` (value / earlier), its relative ``noise``
        and ``worse``; first the worse ones, the largest change first.  Figures without ``better``,
        and those that one of the files lacks, are left out.
    """
    before = earlier.reindex(columns=[*KEY, "value", "noise"])
    both = frame.merge(before, on=KEY, suffixes=("", "_earlier"))
    both = both[both["better"].notna()].rename(columns={"value_earlier": "earlier"})
    noise = sum(both[name].fillna(0.0) ** 2 for name in ("noise", "noise_earlier") if name in both)
    same = both["value"] == both["earlier"]
    ratio = (both["value"] / both["earlier"]).where(~same, 1.0)  # infinite after 0
    both = both.assign(
        ratio=ratio, noise=noise**0.5, worse=(ratio > 1) == (both["better"] == "low")
    )
    size = ratio.map(lambda one: abs(math.log(one)) if one > 0 else math.inf)
    least = (2 * both["noise"]).clip(lower=NOTICEABLE)
    moved = both.assign(size=size)[(ratio > 1 + least) | (ratio < 1 / (1 + least))]
    moved = moved.sort_values(["worse", "size"], ascending=False, kind="stable")
    return moved[[*KEY, "value", "earlier", "ratio", "noise", "worse"]]
