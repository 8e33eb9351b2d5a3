"""The figures of benchmarks: writing, reading and comparing files of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import read_csv, write_csv
from tokenprune.experiments.common.files import replace_file

__all__ = ["Figure", "changes", "save", "table"]

KEY = ["benchmark", "case", "figure"]
NOTICEABLE = 0.1  # relative change up to which two runs count as equal


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
    """

    case: str
    figure: str
    value: float
    unit: str = "ratio"
    better: Literal["low", "high"] | None = None
    goal: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "low" else self.value >= self.goal


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


def changes(frame: pd.DataFrame, earlier: pd.DataFrame) -> pd.DataFrame:
    """The figures that changed by more than `NOTICEABLE` since ``earlier``, worst first.

    Returns:
        The key columns, ``value``, ``earlier``, ``change`` (value / earlier - 1) and ``worse``.
        Figures without ``better``, and those that one of the files lacks, are left out.
    """
    both = frame.merge(earlier[[*KEY, "value"]], on=KEY, suffixes=("", "_earlier"))
    both = both.rename(columns={"value_earlier": "earlier"})[both["better"].notna()]
    change = both["value"] / both["earlier"].where(both["earlier"] != 0) - 1
    change = change.fillna((both["value"] != both["earlier"]).astype(float))
    both = both.assign(change=change, worse=(change > 0) == (both["better"] == "low"))
    moved = both[both["change"].abs() > NOTICEABLE]
    order = moved["change"].abs() * moved["worse"].map({True: 1.0, False: -1.0})
    columns = [*KEY, "value", "earlier", "change", "worse"]
    return moved.loc[order.sort_values(ascending=False).index, columns]
