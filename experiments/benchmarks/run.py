"""Run the benchmarks."""

import dataclasses
import hashlib
import importlib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tokenprune
from tokenprune.errors import unknown
from tokenprune.experiments.benchmarks.record import (
    Figure,
    changes,
    check_comparable,
    save,
    table,
)
from tokenprune.experiments.common.files import check_file
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.request import Request
from tokenprune.experiments.common.result_folder import free_path
from tokenprune.models.checkpoints import device_of
from tokenprune.progress import ProgressCallback, silent

__all__ = ["BENCHMARKS", "BenchmarkRequest", "machine", "run"]

BENCHMARKS = ("startup", "context", "selection", "loops", "prefill", "growth", "sharing")
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

    Every benchmark is saved when it is done, beside the file of the figures
    (``<name>.part.csv``).  The same request with the same code and machine continues from there.

    Returns:
        With the table ``figures``: one row per figure, with the machine, versions and date; and
        ``changes``, as `record.changes` returns it, if there is an earlier file.  The status is
        ``failed`` if a figure is worse than in the earlier file.

    Raises:
        UserError: An unknown benchmark, a device that does not exist, a file that cannot be read or
            written, or toy sizes that would be compared with full ones.
    """
    path = request.out or free_path(Path("runs/benchmarks.csv"))
    for name in request.only:
        if name not in BENCHMARKS:
            raise unknown("benchmark", name, BENCHMARKS)
    device_of(request.device)
    check_file(path, new=not request.force)
    earlier = None
    if request.against is not None:
        earlier = table(request.against)
        check_comparable(request.against, earlier, request.quick)
    part = path.with_name(f"{path.name}.part.csv")
    setting = machine(request.device, request.quick)
    frames = _done(part, setting)
    for done, name in enumerate(request.only):
        if name in frames:
            continue

        def tell(doing: str, done: int = done, name: str = name) -> None:
            progress(done, len(request.only), f"{name}: {doing}")

        frames[name] = _measured(name, request, tell).assign(**setting)
        save(pd.concat(frames.values()), part)
    found = pd.concat([frames[name] for name in request.only], ignore_index=True)
    save(found, path)
    part.unlink(missing_ok=True)
    tables, status = {"figures": found}, "complete"
    if earlier is not None:
        tables["changes"] = changes(found, earlier)
        status = "failed" if tables["changes"]["worse"].any() else "complete"
    return Outcome(path.parent, status, tables=tables, files=(path.name,))


def _measured(name: str, request: BenchmarkRequest, tell: Callable[[str], None]) -> pd.DataFrame:
    """The figures of one benchmark."""
    measure: Callable[..., Iterable[Figure]] = importlib.import_module(
        f"tokenprune.experiments.benchmarks.{name}"
    ).measure
    rows: list[dict[str, Any]] = []
    for figure in measure(request.quick, request.device, tell):
        if request.quick:
            figure = dataclasses.replace(figure, goal=None)
        rows.append({"benchmark": name, **dataclasses.asdict(figure), "met": figure.met})
    return pd.DataFrame(rows).astype({"goal": float, "met": "boolean"})


def _done(part: Path, setting: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The benchmarks that an interrupted run with the same setting measured."""
    if not part.exists():
        return {}
    found = table(part).astype({"goal": float, "met": "boolean"})
    fixed = [name for name in setting if name != "date"]
    same = all(
        name in found and (found[name].astype(str) == str(setting[name])).all() for name in fixed
    )
    return {str(name): rows for name, rows in found.groupby("benchmark")} if same else {}


def machine(device: str, quick: bool) -> dict[str, Any]:
    """The device, versions, code and date, as every row of a file of figures has them."""
    cuda = device.startswith("cuda")
    versions = environment()["versions"]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
        "tokenprune": versions["tokenprune"],
        "code": _code(),
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _code() -> str:
    """The first digits of a hash of tokenprune's source."""
    hashed = hashlib.sha256()
    for folder, _, names in sorted(os.walk(Path(tokenprune.__file__).parent, followlinks=True)):
        for name in sorted(names):
            if name.endswith(".py"):
                hashed.update(Path(folder, name).read_bytes())
    return f"sha256:{hashed.hexdigest()[:12]}"
