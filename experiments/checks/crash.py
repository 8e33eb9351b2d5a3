"""Kill runs, fill their disk, start them twice: no answer may be lost, duplicated or changed.

``python -m tokenprune.experiments.checks.crash [--quick] [--seed N]``

The script runs a comparison on a few questions in separate processes.  They

* are killed (``kill -9``) at every write event (`faults.Fault`), and at random moments;
* find the disk full from each event on, or find that one event fails;
* share one run folder with a second process.

After each, the journal must hold every recorded answer exactly once.  A run that was not killed
must be complete or end with a one-sentence error.  The same command must then give the tables of an
undisturbed run and leave no temporary file.  Prints counts; the exit status is 1 if a check fails.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from tokenprune.console import quiet
from tokenprune.errors import UserError
from tokenprune.experiments.checks.faults import Fault, Kind
from tokenprune.experiments.common import grid, setting
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare import run

__all__ = ["main"]

_QUICK = 3  # cases of each kind with --quick
_MOMENTS = 40  # kills at random moments, and pairs of writers, without --quick
_LIMIT = 120.0  # seconds, limit of a run


@dataclass(frozen=True)
class Ended:
    """How a run in a separate process ended.

    Attributes:
        status: The status of its outcome, or ``refused``, ``traceback`` or ``killed``.
        said: The message of the error, or the traceback.
        events: Number of write events.
        entered: (cell, question) of the answers that were added to the journal.
        seconds: Duration.
    """

    status: str
    said: str = ""
    events: int = 0
    entered: frozenset[tuple[str, str]] = frozenset()
    seconds: float = 0.0


class Started:
    """A run in a separate process."""

    def __init__(self, request: CompareRequest, setting: setting.Setting, fault: Fault) -> None:
        self.begun = time.monotonic()
        reader, writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.close(reader)
            _work(request, setting, fault, writer)
        os.close(writer)
        self._pipe = reader

    def kill(self) -> None:
        """Kill the process, which may have ended already."""
        os.kill(self.process, signal.SIGKILL)

    def ended(self) -> Ended:
        """Wait until the process ends."""
        with os.fdopen(self._pipe, "rb") as pipe:
            lines = [line for line in pipe.read().splitlines(keepends=True) if line.endswith(b"\n")]
        os.waitpid(self.process, 0)
        records = [json.loads(line) for line in lines]
        entered = frozenset(
            (cell, name) for one in records for cell, name in one.get("entered", ())
        )
        last = next((one for one in records if "status" in one), {"status": "killed"})
        seconds = time.monotonic() - self.begun
        return Ended(**{"entered": entered, "seconds": seconds, **last})


def _work(request: CompareRequest, setting: setting.Setting, fault: Fault, writer: int) -> None:
    """Run in the new process, write added answers and the outcome to the pipe, and exit."""

    def tell(**what: Any) -> None:
        os.write(writer, (json.dumps(what) + "\n").encode())

    add = Journal.add

    def adding(self: Journal, cell: str, records: Any) -> None:
        add(self, cell, records)
        tell(entered=[(cell, name) for name in records])

    signal.alarm(int(_LIMIT))
    Journal.add = adding  # type: ignore[method-assign]
    try:
        fault.install()
        outcome = run.run(request, name="crash", setting=setting, columns=_columns(request))
        tell(status=outcome.status, events=fault.events)
    except UserError as error:
        tell(status="refused", said=str(error), events=fault.events)
    except BaseException:
        tell(status="traceback", said=traceback.format_exc(), events=fault.events)
    finally:
        os._exit(0)


def _columns(request: CompareRequest) -> list[Any]:
    return grid.cells(request.methods, request.retention)


class Checks:
    """Runs cases and collects problems.

    Args:
        folder: For the runs.
        seed: Of the random moments and events.
        quick: Whether to run fewer cases.
    """

    def __init__(self, folder: Path, seed: int, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.random = random.Random(seed)
        self.problems: list[str] = []
        self.request = CompareRequest(
            methods=("uniform", "fastv"), retention=(0.5,), questions=6, batch_size=3, seed=seed
        )
        self.setting = setting.prepare(self.request)
        self.whole = self._start(folder / "whole").ended()
        if self.whole.status != "complete":
            raise RuntimeError(f"the undisturbed run is not complete: {self.whole.said}")
        self.table = read_answers(folder / "whole")
        self.answers = Journal(folder / "whole" / "answers.jsonl").answers

    def _start(self, out: Path, kind: Kind = "none", at: int = 0) -> Started:
        request = replace(self.request, out=out)
        return Started(request, self.setting, Fault(out, kind, at))

    def at_events(self, kind: Kind) -> None:
        """A fault at every event, or at some of them with ``quick``."""
        events = range(self.whole.events)
        if self.quick:
            events = sorted(self.random.sample(events, min(_QUICK, len(events))))  # type: ignore[assignment]
        for event in events:
            out = self.folder / f"{kind}-{event}"
            ended = self._start(out, kind, event).ended()
            self._look(f"{kind} at event {event}", out, [ended])
        self._say(f"{kind} at {len(events)} of {self.whole.events} events")

    def at_moments(self) -> None:
        """Kill a run at one to three random moments."""
        number = _QUICK if self.quick else _MOMENTS
        for case in range(number):
            out = self.folder / f"moment-{case}"
            ended = []
            for _ in range(self.random.randint(1, 3)):
                run = self._start(out)
                time.sleep(self.random.uniform(0, self.whole.seconds))
                run.kill()
                ended.append(run.ended())
            self._look(f"killed at random, case {case}", out, ended)
        self._say(f"kill at random moments, {number} cases")

    def two_writers(self) -> None:
        """Start two processes in one folder: one works, the other blocks or is refused."""
        number = _QUICK // 2 if self.quick else _MOMENTS
        for case in range(number):
            out = self.folder / f"two-{case}"
            first = self._start(out)
            time.sleep(self.random.uniform(0, self.whole.seconds / 2))
            ended = [self._start(out).ended(), first.ended()]
            if not any(one.status == "complete" for one in ended):
                self.problems.append(f"two writers, case {case}: neither was complete: {ended}")
            self._look(f"two writers, case {case}", out, ended)
        self._say(f"two writers at once, {number} cases")

    def _say(self, what: str) -> None:
        print(f"{what}: {len(self.problems)} problems so far", flush=True)

    def _look(self, case: str, out: Path, ended: list[Ended]) -> None:
        """Check that nothing is lost and that the same command completes the run."""
        entered = frozenset[tuple[str, str]]().union(*(one.entered for one in ended))
        found = [*self._lost(out, entered)]
        for one in ended:
            if one.status in ("traceback", "failed"):
                found.append(f"ended as {one.status}: {one.said}")
            if one.status == "complete" and set(Journal(out / "answers.jsonl").answers) != set(
                self.answers
            ):
                found.append("complete, but answers are missing")
        again = self._start(out).ended()
        if again.status != "complete":
            found.append(f"the same command ended as {again.status}: {again.said}")
        else:
            found += [*self._lost(out, frozenset(self.answers)), *self._unlike(out)]
        self.problems += [f"{case}: {problem}" for problem in found]
        for problem in found:
            print(f"{case}: {problem}", file=sys.stderr, flush=True)
        shutil.rmtree(out, ignore_errors=True)

    def _lost(self, out: Path, entered: frozenset[tuple[str, str]]) -> Iterator[str]:
        """Problems of the journal: answers that are lost, changed or duplicated."""
        journal = Journal(out / "answers.jsonl")
        if lost := entered - journal.answers.keys():
            yield f"{len(lost)} answers are lost"
        if any(journal.answers[key] != self.answers[key] for key in journal.answers):
            yield "an answer has changed"
        if not (out / "answers.jsonl").exists():
            return
        lines = (out / "answers.jsonl").read_bytes().split(b"\n")
        try:
            whole = [json.loads(line) for line in lines[:-1]]
        except ValueError:
            yield "a line before the last one is broken"
            return
        if len({(one["cell"], one["question"]) for one in whole}) != len(whole):
            yield "an answer is duplicated"

    def _unlike(self, out: Path) -> Iterator[str]:
        """Differences between a completed run and the undisturbed one."""
        try:
            pd.testing.assert_frame_equal(read_answers(out), self.table)
        except (AssertionError, UserError) as error:
            yield f"answers.parquet differs: {error}"
        if left := [path.name for path in out.rglob(".tokenprune-*")]:
            yield f"temporary files remain: {left}"
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest["status"] != "complete":
            yield f"the manifest says {manifest['status']}"


def main() -> int:
    """Run all checks and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, under a minute")
    parser.add_argument("--seed", type=int, default=0, help="seed of random moments and events")
    asked = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # a process with more threads cannot fork safely
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(folder), asked.seed, asked.quick)
        print(f"an undisturbed run: {len(checks.answers)} answers, {checks.whole.events} events")
        for kind in ("kill", "full", "once"):
            checks.at_events(kind)
        checks.at_moments()
        checks.two_writers()
    print(f"{len(checks.problems)} problems")
    return 1 if checks.problems else 0


if __name__ == "__main__":
    sys.exit(main())
