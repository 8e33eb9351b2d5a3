"""The fuzz script: it detects every kind of fault, and its cases can be repeated."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenprune.errors import UserError
from tokenprune.experiments.checks import cases, fuzz
from tokenprune.experiments.checks.cases import Area, FuzzCase, FuzzVerdict, Wrong, judge


def refuse() -> None:
    raise UserError("this is not what it should be.")


def shout() -> None:
    error = UserError("")
    error.args = ("\x1b[31mred",)
    raise error


def mumble() -> None:
    raise UserError(" ")


def break_down() -> None:
    raise KeyError("x")


def leave() -> None:
    sys.exit(3)


def give_wrong() -> None:
    raise Wrong("4 is not 5")


def linger() -> None:
    time.sleep(5)


def swallow() -> None:
    with contextlib.suppress(Exception):  # like a run, which records the failure and continues
        time.sleep(5)


@pytest.mark.parametrize(
    ("run", "expected", "outcome", "fault"),
    [
        (lambda: None, "accepted", "accepted", ""),
        (lambda: None, "either", "accepted", ""),
        (lambda: None, "refused", "failed", "accepted, must be refused"),
        (refuse, "refused", "refused", ""),
        (refuse, "either", "refused", ""),
        (refuse, "accepted", "failed", "refused, must be accepted"),
        (shout, "refused", "failed", "control characters"),
        (mumble, "refused", "failed", "without a word"),
        (break_down, "either", "failed", "KeyError at test_fuzz.py"),
        (leave, "either", "failed", "SystemExit"),
        (give_wrong, "either", "failed", "4 is not 5"),
        (linger, "either", "failed", "took longer"),
        (swallow, "either", "failed", "took longer"),
    ],
)
def test_every_kind_of_fault_is_seen(
    run: Callable[[], None],
    expected: Any,
    outcome: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cases, "LONGEST", 0.1)
    verdict = judge(FuzzCase("x", expected, run))
    assert verdict.outcome == outcome
    assert fault in verdict.fault
    assert bool(fault) == bool(verdict.fault)


def test_a_single_hang_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LONGEST", 0.1)
    naps = iter([1.0, 0.0])
    assert judge(FuzzCase("x", "accepted", lambda: time.sleep(next(naps)))) == FuzzVerdict(
        "accepted"
    )


def test_commands_are_judged_by_their_status() -> None:
    assert "evenly spaced" in cases.command("list", "uniform")
    with pytest.raises(UserError, match="Did you mean"):
        cases.command("list", "unifrom")
    with pytest.raises(UserError):
        cases.command("nope")


class Unlucky(Area):
    name = "unlucky"
    share = 1

    def draw(self, rng: random.Random) -> FuzzCase:
        number = rng.randrange(10)
        return FuzzCase(
            f"number {number}", "either", (lambda: 1 / 0) if number == 7 else lambda: None
        )


def test_counts_failures_and_repeats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "AREAS", {"unlucky": Unlucky})
    assert fuzz.main(["--cases", "100", "--seed", "3"]) == 1
    said = capsys.readouterr().out
    failed = said.count("number 7")
    assert 1 < failed < 30
    assert f"unlucky: {100 - failed} accepted, 0 refused, {failed} failed" in said
    again = next(line for line in said.splitlines() if line.startswith("FAILED"))
    words = again.removeprefix("FAILED ").partition(":")[0].split()
    assert fuzz.main(words) == 1
    assert again in capsys.readouterr().out
    fine = [number for number in range(100) if f"--only {number}:" not in said][:1]
    assert fuzz.main(["--seed", "3", "--area", "unlucky", "--only", str(fine[0])]) == 0


@pytest.mark.parametrize("name", ["specs", "selections", "data", "images"])
def test_equal_seeds_give_equal_cases(name: str, tmp_path: Path) -> None:
    area = fuzz.AREAS[name](tmp_path)
    drawn = [[area.draw(random.Random(f"{seed}")).what for seed in range(40)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 20


@pytest.mark.parametrize("name", ["specs", "selections"])
def test_some_cases_pass(name: str) -> None:
    assert fuzz.fuzz(name, 150, seed=11) == []
