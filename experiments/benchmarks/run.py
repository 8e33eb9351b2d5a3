"""Run the benchmarks."""

import dataclasses
import importlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tokenprune.errors import unknown
from tokenprune.experiments.benchmarks.record import Figure, changes, save, table
from tokenprune.experiments.common.files import check_file
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.request import Request
from tokenprune.experiments.common.result_folder import free_path
from tokenprune.models.checkpoints import device_of
from tokenprune.progress import ProgressCallback, silent

__all__ = ["BENCHMARKS", "BenchmarkRequest", "run"]

BENCHMARKS = ("sharing", "selection", "prefill", "growth")
"""Modules of this package with ``measure(quick, device, tell)``."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(Request):
    """What to measure.

    Attributes:
        out: A CSV or parquet file for the figures; None for a new one in ``runs/``.
        force: Whether to replace ``out`` if it exists.
        only: Which of `BENCHMARKS`.
        quick: Toy sizes, to check that everything runs; the figures are meaningless.
        device: ``cpu`` or ``cuda``.
        against: An earlier file of figures to compare with.
    """

    only: Sequence[str] = BENCHMARKS
    quick: bool = False
    device: str = "cpu"
    against: Path | None = None
    force: bool = False


def run(request: BenchmarkRequest, progress: ProgressCallback = silent) -> Outcome:
    """Run benchmarks and write their figures.

    Returns:
        With the table ``figures``: one row per figure, with the machine, versions and date; and
        ``changes``, as `record.changes` returns it, if there is an earlier file.  The status is
        ``failed`` if a figure is worse than in the earlier file.

    Raises:
        UserError: An unknown benchmark, a device that does not exist, or a file that cannot be read
            or written.
    """
    path = request.out or free_path(Path("runs/benchmarks.csv"))
    for name in request.only:
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    device_of(request.device)
    check_file(path, new=not request.force)
    earlier = table(request.against) if request.against is not None else None
    rows: list[dict[str, Any]] = []
    for done, name in enumerate(request.only):
        measure: Callable[..., Iterable[Figure]] = importlib.import_module(
            f"tokenprune.experiments.benchmarks.{name}"
        ).measure

        def tell(doing: str, done: int = done, name: str = name) -> None:
            progress(done, len(request.only), f"{name}: {doing}")

        for figure in measure(request.quick, request.device, tell):
            if request.quick:
                figure = dataclasses.replace(figure, goal=None)
            rows.append({"benchmark": name, **dataclasses.asdict(figure), "met": figure.met})
    found = (
        pd.DataFrame(rows)
        .assign(**_machine(request.device, request.quick))
        .astype({"goal": float, "met": "boolean"})
    )
    save(found, path)
    tables, status = {"figures": found}, "complete"
    if earlier is not None:
        tables["changes"] = changes(found, earlier)
        status = "failed" if tables["changes"]["worse"].any() else "complete"
    return Outcome(path.parent, status, tables=tables, files=(path.name,))


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
