"""Runs the benchmarks, keeps their figures in a tidy file and compares two such files."""

import dataclasses
import importlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.csv_files import read_csv, write_csv
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.provenance import environment
from tokenprune.models.checkpoints import device_of
from tokenprune.progress import Report

__all__ = ["BENCHMARKS", "Figure", "changes", "record", "save", "table"]

BENCHMARKS = ("sharing", "selection", "prefill", "growth")
"""Modules of this package with ``measure(quick, device, report)``."""

KEY = ["benchmark", "case", "figure"]
NOTICEABLE = 0.1  # share by which a figure may move from run to run


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        case: What was measured, e.g. a method.
        figure: What about it.
        value: The figure.
        unit: ``ratio``, ``count``, ``exponent``, or a unit of what a ratio was made of.
        better: Which way is better; None where it only explains another figure.
        goal: The value not to exceed (``low``) or to reach (``high``), if there is one.
        note: What a reader must know.
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


def record(
    names: Sequence[str] = BENCHMARKS,
    *,
    quick: bool = False,
    device: str = "cpu",
    report: Report = lambda *_: None,
) -> pd.DataFrame:
    """Run benchmarks: one row per figure, with the machine, versions and date in every row.

    Args:
        names: Which of `BENCHMARKS`.
        quick: Toy sizes, to see that everything runs; the figures mean nothing.
        device: ``cpu`` or ``cuda``.
        report: Called with what is being measured.

    Raises:
        UserError: An unknown benchmark, or a device that is not there.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    device_of(device)
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(names):
        measure: Callable[..., Iterable[Figure]] = importlib.import_module(
            f"tokenprune.experiments.benchmarks.{name}"
        ).measure

        def tell(doing: str, done: int = done, name: str = name) -> None:
            report(done, len(names), f"{name}: {doing}")

        for figure in measure(quick, device, tell):
            if quick:
                figure = dataclasses.replace(figure, goal=None)
            rows.append({"benchmark": name, **dataclasses.asdict(figure), "met": figure.met})
    return (
        pd.DataFrame(rows)
        .assign(**_machine(device, quick))
        .astype({"goal": float, "met": "boolean"})
    )


def _machine(device: str, quick: bool) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    versions = environment()["versions"]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "tokenprune": versions["tokenprune"],
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(frame: pd.DataFrame, path: Path) -> None:
    """Write the figures as CSV, or as parquet where the name says so."""
    with replace_file(path) as temporary:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            write_csv(frame, temporary)


def table(path: Path) -> pd.DataFrame:
    """Read what `save` wrote.

    Raises:
        UserError: There is no such file, or it holds something else.
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
    """What moved noticeably since ``earlier``, worst first.

    Returns:
        The key columns, ``value``, ``earlier``, ``change`` (value / earlier - 1) and ``worse``.
        Figures that only explain others, and those that one of both lacks, are left out.
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
