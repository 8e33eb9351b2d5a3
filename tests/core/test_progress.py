"""Progress without a terminal: a line at regular intervals."""

from __future__ import annotations

import re
import threading
import time
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from tokenprune.console import progress
from tokenprune.errors import UserError
from tokenprune.progress import logged, progress_line


def test_a_line_has_done_rate_time_left_and_failures() -> None:
    # By hand: 90 steps in 60 s are 1.5 per second; 4000 - 400 = 3600 at that rate are 40 min.
    line = progress_line(400, 4000, "fastv at 0.25, 2 failed", new=90, seconds=60)
    assert line == "400 of 4000 done, 1.5 per second, 40 min left: fastv at 0.25, 2 failed"
    # 10 in 100 s are 6 per minute; 20 more take 200 s.
    assert progress_line(10, 30, "x", new=10, seconds=100) == (
        "10 of 30 done, 6.0 per minute, 3 min left: x"
    )
    assert progress_line(0, 30, "x", new=0, seconds=100) == "0 of 30 done: x"
    assert progress_line(0, 0, "loading", new=0, seconds=100) == "loading"
    assert "left" not in progress_line(30, 30, "tables", new=20, seconds=10)


def test_lines_come_at_intervals_even_during_a_long_step() -> None:
    written: list[str] = []
    three = threading.Event()

    def write(line: str) -> None:
        written.append(line)
        if len(written) == 3:
            three.set()

    with logged(write, every=0.05) as report:
        report(500, 1000, "one long step, 0 failed")
        assert three.wait(10), "one step, several lines"
    number = len(written)
    time.sleep(0.15)
    assert len(written) == number, "none after the end"
    assert written[0] == "500 of 1000 done: one long step, 0 failed"


def test_the_rate_is_of_this_run_not_of_answers_that_were_there() -> None:
    written: list[str] = []
    with logged(written.append, every=0.2) as report:
        report(0, 0, "loading")
        report(900, 1000, "resumed")
        time.sleep(0.1)
        report(901, 1000, "next")
        time.sleep(0.25)
    rate = float(written[0].split(", ")[1].split()[0])
    assert rate < 20, "one step, not 901"


def test_deprecation_notices_of_libraries_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(), warnings.catch_warnings():
        warnings.simplefilter("always")
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.warn("use something else in v6", category, stacklevel=1)
        warnings.warn("of the run", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: of the run\n"


def test_a_log_file_gets_lines_with_the_time_and_warnings(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    with progress(log) as report:
        report(3, 9, "x, 1 failed")
        warnings.warn("of the run", UserWarning, stacklevel=1)
    with pytest.raises(KeyboardInterrupt), progress(log):
        raise KeyboardInterrupt
    lines = log.read_text().splitlines()
    assert [re.sub("^.{25} ", "", line).split(":")[0] for line in lines] == [
        *("started", "warning", "ended", "started", "stopped")
    ]
    assert all(datetime.fromisoformat(line[:25]).tzinfo for line in lines)
    with pytest.raises(UserError, match="cannot write the log"), progress(tmp_path / "no" / "log"):
        pass
