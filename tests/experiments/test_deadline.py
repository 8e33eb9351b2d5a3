"""A method that takes too long is stopped, and its hooks are removed."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection
from tokenprune.errors import UserError
from tokenprune.experiments.common import deadline
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.deadline import TimeLimit, check_time_limit, time_limit
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run as compare
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


@dataclass(frozen=True, kw_only=True)
class Endless(Compressor):
    """Never returns, and catches every exception."""

    def select(self, tokens: VisualTokens) -> Selection:
        while True:
            try:
                time.sleep(0.001)
            except Exception:
                continue


def hooks(host: Host) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for module in host.model.modules()
    )


@pytest.fixture(scope="module")
def host() -> Host:
    found = Host.tiny("LLaVA-NeXT")
    found.logits(found.inputs([0]))  # transformers installs hooks when it first runs
    return found


def test_a_hanging_method_is_stopped_with_its_stack_and_without_its_hooks(host: Host) -> None:
    inputs, before = host.inputs([0]), hooks(host)

    def ask() -> None:
        with tp.compress(host.model, Endless(retention=0.5)):
            host.logits(inputs)

    found = tried(ask, 0.3)
    assert isinstance(found, Failure)
    assert found.error == "TimeLimit: took longer than 0.3 s (--timeout-per-batch)"
    assert "in select" in found.traceback
    assert "time.sleep" in found.traceback
    assert hooks(host) == before
    with tp.compress(host.model, "uniform", retention=0.5):
        host.logits(inputs)


def test_hooks_are_never_left_half_installed(host: Host) -> None:
    """Alarms at many moments of entering and leaving a context."""
    before, stopped = hooks(host), 0
    for step in range(60):
        try:
            with time_limit(0.0002 * (step + 1)):
                while True:
                    with tp.compress(host.model, "fastv", retention=0.5):
                        time.sleep(
                            0.001
                        )  # otherwise the alarm would be delayed until both are left
        except TimeLimit:
            stopped += 1
        assert hooks(host) == before, step
    assert stopped == 60


def test_the_limit_affects_no_code_that_ends_in_time_and_none_after_it() -> None:
    rung = []
    signal.signal(signal.SIGALRM, lambda *_: rung.append("own"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with time_limit(0.05):
            pass
        time.sleep(0.1)
        assert not rung
        time.sleep(0.2)
        assert rung == ["own"], "an alarm of the caller's rings as it would have"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_context_may_close_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    @contextmanager
    def slow() -> Iterator[None]:
        yield
        time.sleep(0.15)
        done.append("left")

    def runs_late() -> None:
        with slow():
            pass
        time.sleep(1)

    with pytest.raises(TimeLimit), time_limit(0.05):
        runs_late()
    assert done == ["left"]
    monkeypatch.setattr(deadline, "_PATIENCE", 0.0)
    with pytest.raises(TimeLimit), time_limit(0.05), slow():
        pass
    assert done == ["left"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_invalid_limits_are_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(UserError, match="number of seconds above 0"):
        check_time_limit(seconds)
    with pytest.raises(UserError, match="number of seconds above 0"):
        compare(CompareRequest(timeout_per_batch=seconds, out=tmp_path))


def test_platforms_without_signals_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []

    def ask() -> None:
        try:
            check_time_limit(1.0)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "main thread only" in said[0]
    check_time_limit(1.0)
    monkeypatch.delattr(signal, "setitimer")
    with pytest.raises(UserError, match="POSIX signals"):
        check_time_limit(1.0)
    check_time_limit(None)
