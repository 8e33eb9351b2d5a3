"""Kill runs, fill their disk, start them twice: no answer may be lost, doubled or another.

``python -m tokenprune.experiments.checks.crash [--quick] [--seed N]``

A comparison on a few questions is run in processes of its own, which

* are killed (``kill -9``) at every event of writing (`faults.Fault`), and at random moments;
* find the disk full from every event on, or one event failing;
* are two at once in one folder.

After each the journal must hold, readable and once, every answer that had been entered; what ended
by itself must have said so in a sentence, or be complete; and the same command must then give the
tables of an undisturbed run, with no temporary file left.  Prints counts; exit status 1 if anything
went wrong.
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

_QUICK = 3  # cases of each sort in a reduced run
_MOMENTS = 40  # kills at random moments, and pairs of writers, in a full one
_LIMIT = 120.0  # seconds that a run may take


@dataclass(frozen=True)
class Ended:
    """How a run in a process of its own ended.

    Attributes:
        status: Its outcome's, ``refused`` with a sentence, ``traceback``, or ``killed``.
        said: The sentence, or the traceback.
        events: How many events of writing there were.
        entered: (cell, question) of the answers that were entered into the journal.
        seconds: How long it took.
    """

    status: str
    said: str = ""
    events: int = 0
    entered: frozenset[tuple[str, str]] = frozenset()
    seconds: float = 0.0


class Started:
    """A run in a process of its own."""

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
        """Now; the process may have ended."""
        os.kill(self.process, signal.SIGKILL)

    def ended(self) -> Ended:
        """Wait for the end."""
        with os.fdopen(self._pipe, "rb") as pipe:
            lines = [line for line in pipe.read().splitlines(keepends=True) if line.endswith(b"\n")]
        os.waitpid(self.process, 0)
        told = [json.loads(line) for line in lines]
        entered = frozenset((cell, name) for one in told for cell, name in one.get("entered", ()))
        last = next((one for one in told if "status" in one), {"status": "killed"})
        seconds = time.monotonic() - self.begun
        return Ended(**{"entered": entered, "seconds": seconds, **last})


def _work(request: CompareRequest, setting: setting.Setting, fault: Fault, writer: int) -> None:
    """Run in the new process, tell the pipe what was entered and how it ended, and exit."""

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
    """Runs cases and remembers what went wrong.

    Args:
        folder: For the runs.
        seed: Of the moments and choices.
        quick: Fewer cases.
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
        """A fault at every event, or at some in a reduced run."""
        events = range(self.whole.events)
        if self.quick:
            events = sorted(self.random.sample(events, min(_QUICK, len(events))))  # type: ignore[assignment]
        for event in events:
            out = self.folder / f"{kind}-{event}"
            ended = self._start(out, kind, event).ended()
            self._look(f"{kind} at event {event}", out, [ended])
        self._say(f"{kind} at {len(events)} of {self.whole.events} events")

    def at_moments(self) -> None:
        """Killed at random moments, up to three times before the run may end."""
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
        """Two processes with one folder: one works, the other waits or is refused."""
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
        """Whether nothing is lost, and whether the same command brings the run to its end."""
        entered = frozenset[tuple[str, str]]().union(*(one.entered for one in ended))
        found = [*self._lost(out, entered)]
        for one in ended:
            if one.status in ("traceback", "failed"):
                found.append(f"ended as {one.status}: {one.said}")
            if one.status == "complete" and set(Journal(out / "answers.jsonl").answers) != set(
                self.answers
            ):
                found.append("called complete with answers missing")
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
        """What of the ``entered`` answers the journal does not hold once and as it was."""
        journal = Journal(out / "answers.jsonl")
        if lost := entered - journal.answers.keys():
            yield f"{len(lost)} answers are lost"
        if any(journal.answers[key] != self.answers[key] for key in journal.answers):
            yield "an answer is another"
        if not (out / "answers.jsonl").exists():
            return
        lines = (out / "answers.jsonl").read_bytes().split(b"\n")
        try:
            whole = [json.loads(line) for line in lines[:-1]]
        except ValueError:
            yield "a line amid others is broken"
            return
        if len({(one["cell"], one["question"]) for one in whole}) != len(whole):
            yield "an answer is doubled"

    def _unlike(self, out: Path) -> Iterator[str]:
        """What of a run that was completed differs from the undisturbed one."""
        try:
            pd.testing.assert_frame_equal(read_answers(out), self.table)
        except (AssertionError, UserError) as error:
            yield f"answers.parquet differs: {error}"
        if left := [path.name for path in out.rglob(".tokenprune-*")]:
            yield f"temporary files are left: {left}"
        manifest = json.loads((out / "manifest.json").read_text())
        if manifest["status"] != "complete":
            yield f"the manifest says {manifest['status']}"


def main() -> int:
    """Run all checks; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer cases, under a minute")
    parser.add_argument("--seed", type=int, default=0, help="of moments and choices")
    asked = parser.parse_args()
    quiet()
    torch.set_num_threads(1)  # a process that has started more cannot be copied safely
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
