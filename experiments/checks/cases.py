"""Cases of the fuzz script, and their verdicts.

By construction, each case states whether its input must be accepted or refused.  A refusal is a
`UserError`, or exit status 2 of a command, with one sentence.
"""

from __future__ import annotations

import random
import signal
import time
import traceback
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenprune.console import BAD_INPUT, FAILED, OK
from tokenprune.errors import UserError

__all__ = [
    "LONGEST",
    "Area",
    "FuzzCase",
    "FuzzVerdict",
    "Hang",
    "Wrong",
    "command",
    "judge",
    "small_run",
]

LONGEST = 10.0  # seconds, limit of a case
_WORDY = 2000  # characters, limit of a message

Expected = Literal["accepted", "refused", "either"]


class Wrong(Exception):
    """The input was accepted, but the result is wrong."""


class Hang(BaseException):
    """A case took longer than `LONGEST`; no `Exception`, so that a run cannot record it."""


@dataclass(frozen=True)
class FuzzCase:
    """One input.

    Attributes:
        what: The input, in a form that can be repeated by hand.
        expected: The outcome that is required.
        run: Runs the code on the input.  Raises `UserError` if the input is refused, `Wrong` if the
            result is wrong; any other exception is a fault.
    """

    what: str
    expected: Expected
    run: Callable[[], object]


class Area(ABC):
    """Cases of one kind.

    Attributes:
        name: As ``--area`` takes it.
        share: Percentage of all cases.
    """

    name: str
    share: int

    def __init__(self, folder: Path) -> None:
        """Prepare files in ``folder``, which is empty and used by this area only."""
        self.folder = folder

    @abstractmethod
    def draw(self, rng: random.Random) -> FuzzCase:
        """Draw a case; equal generators give equal cases."""


@dataclass(frozen=True)
class FuzzVerdict:
    """How a case ended, and what is wrong; ``fault`` is empty if nothing is."""

    outcome: Literal["accepted", "refused", "failed"]
    fault: str = ""


_HANGS = FuzzVerdict("failed", f"took longer than {LONGEST:g} s")


def judge(case: FuzzCase) -> FuzzVerdict:
    """Run ``case`` and compare its outcome with the required one.

    A case that takes too long is run once more, as a busy machine may be slow for a while.
    """
    verdict = _judge(case)
    return _judge(case) if verdict == _HANGS else verdict


def _judge(case: FuzzCase) -> FuzzVerdict:
    started = time.monotonic()
    try:
        with _at_most(LONGEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
    except UserError as error:
        verdict = FuzzVerdict("refused", _unfit(str(error)))
    except Wrong as error:
        return FuzzVerdict("failed", f"wrong: {error}")
    except Hang:
        return _HANGS
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).partition("\n")[0][:200]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return FuzzVerdict("failed", f"{type(error).__name__} at {where}: {said}")
    else:
        verdict = FuzzVerdict("accepted")
    if time.monotonic() - started > LONGEST:  # in code that the signal does not interrupt
        return _HANGS
    if case.expected not in ("either", verdict.outcome):
        said = f" ({verdict.fault})" if verdict.fault else ""
        return FuzzVerdict("failed", f"{verdict.outcome}, must be {case.expected}{said}")
    return FuzzVerdict("failed", verdict.fault) if verdict.fault else verdict


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after ``seconds``."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _unfit(said: str) -> str:
    """Why the message of a refusal is unfit for a terminal; empty if it is fit."""
    if not said.strip():
        return "refused without a word"
    if len(said) > _WORDY:
        return f"a refusal of {len(said)} characters: {said[:80]!r}..."
    if any(unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" for sign in said):
        return f"a refusal with control characters: {said[:200]!r}"
    return ""


def command(*words: str) -> str:
    """Run ``tokenprune words...`` in this process and return its standard output.

    Raises:
        UserError: The exit status is that of bad input.
        Wrong: The exit status is none that commands document.
    """
    from typer.testing import CliRunner

    from tokenprune.cli import app

    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == BAD_INPUT:
        raise UserError(result.stderr)
    if result.exit_code not in (OK, FAILED):
        raise Wrong(f"status {result.exit_code}: {result.stderr[-300:]}")
    return result.stdout


def small_run(folder: Path) -> Path:
    """Run a comparison on a few questions into ``folder`` and return it."""
    command(
        *("compare", "-m", "uniform", "fastv", "-r", "0.25", "--questions", "5"),
        *("--out", str(folder)),
    )
    return folder
