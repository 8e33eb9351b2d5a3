"""Fuzzing with unusual and broken inputs of every kind, each with its required outcome.

    python -m tokenprune.experiments.checks.fuzz --seed 0 --cases 5000

Prints counts for every area, and every case that ends in a traceback, takes longer than ten
seconds, is wrongly accepted or refused, or gives a wrong result.  Equal seeds give equal cases;
``--area A --only N`` repeats a single one.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from tokenprune.console import quiet
from tokenprune.experiments.checks.cases import LONGEST, Area, judge
from tokenprune.experiments.checks.fuzz_files import DataFiles, ImageFiles
from tokenprune.experiments.checks.fuzz_folders import Checkpoints, RunFolders
from tokenprune.experiments.checks.fuzz_words import Options, Selections, Specs

__all__ = ["AREAS", "fuzz", "main"]

AREAS: dict[str, type[Area]] = {
    area.name: area
    for area in (Specs, Selections, Options, DataFiles, ImageFiles, Checkpoints, RunFolders)
}
_LONG = 300  # characters, limit of a printed input


def fuzz(
    name: str, count: int, seed: int, only: int | None = None, *, slowest: bool = False
) -> list[str]:
    """Run ``count`` cases of area ``name``, or the one numbered ``only``.

    Prints the counts, and every failing case with the options that repeat it.

    Returns:
        The faults.
    """
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    times: list[tuple[float, str]] = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        os.chdir(folder)  # commands write to runs/ where they are called
        try:
            area = AREAS[name](Path(folder))
            for number in range(count) if only is None else [only]:
                case = area.draw(random.Random(f"{seed} {name} {number}"))
                # If the alarm of `judge` has no effect, print the stack and exit.
                faulthandler.dump_traceback_later(10 * LONGEST, exit=True, file=2)
                started = time.monotonic()
                verdict = judge(case)
                times.append((time.monotonic() - started, case.what))
                faulthandler.cancel_dump_traceback_later()
                outcomes[verdict.outcome] += 1
                if verdict.fault:
                    faults.append(verdict.fault)
                    shown = case.what.encode("ascii", "backslashreplace").decode()
                    if len(shown) > _LONG and only is None:
                        shown = f"{shown[:_LONG]}... ({len(shown)} characters)"
                    print(f"FAILED --seed {seed} --area {name} --only {number}: {shown}")
                    print(f"    {verdict.fault}", flush=True)
        finally:
            os.chdir(before)
    counts = ", ".join(f"{outcomes[one]} {one}" for one in ("accepted", "refused", "failed"))
    print(f"{name}: {counts}; {sum(spent for spent, _ in times):.0f} s", flush=True)
    for spent, what in sorted(times, reverse=True)[:5] if slowest else ():
        print(f"    {spent:.2f} s: {what[:100]!a}")
    return faults


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 1 if a case fails."""
    parser = argparse.ArgumentParser(description="Fuzz the inputs of tokenprune.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases")
    parser.add_argument("--cases", type=int, default=5000, help="number of cases in all areas")
    parser.add_argument("--area", choices=sorted(AREAS), nargs="+", help="default: all")
    parser.add_argument("--only", type=int, help="run only the case with this number, of one area")
    parser.add_argument("--slowest", action="store_true", help="print the slowest cases")
    asked = parser.parse_args(words)
    if asked.only is not None and len(asked.area or ()) != 1:
        parser.error("--only needs the --area of the case")
    os.environ["HF_HUB_OFFLINE"] = "1"  # no network access
    torch.set_num_threads(1)
    quiet()
    names = asked.area or list(AREAS)
    whole = sum(AREAS[name].share for name in names)
    before = signal.getsignal(signal.SIGTERM)  # commands change it
    failed = 0
    for name in names:
        count = max(1, round(asked.cases * AREAS[name].share / whole))
        failed += len(fuzz(name, count, asked.seed, asked.only, slowest=asked.slowest))
    signal.signal(signal.SIGTERM, before)
    print(
        f"seed {asked.seed}: {failed} failed" if failed else f"seed {asked.seed}: all as required"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
