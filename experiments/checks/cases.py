"""What a case of the fuzz script is, and how it is judged.

A case knows by construction whether its input must be accepted or refused.  A refusal is a
`UserError`, or a status of 2 from a command, with a sentence.
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

__all__ = ["LONGEST", "Area", "Case", "Hang", "Verdict", "Wrong", "command", "judge", "small_run"]

LONGEST = 10.0  # seconds that any case may take
_WORDY = 2000  # characters that a sentence may have

Expected = Literal["accepted", "refused", "either"]


class Wrong(Exception):
    """The input was taken, and what came out is not right."""


class Hang(BaseException):
    """A case took longer than `LONGEST`; not an `Exception`, lest a run notes it and goes on."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        what: The input, for a reader to repeat by hand.
        expected: What must become of it.
        run: Puts it in.  Raises `UserError` if it is refused, `Wrong` if what comes out is not
            right, and anything else if it is faulty.
    """

    what: str
    expected: Expected
    run: Callable[[], object]


class Area(ABC):
    """Cases of one kind.

    Attributes:
        name: As ``--area`` takes it.
        share: How many of a hundred cases are of this kind.
    """

    name: str
    share: int

    def __init__(self, folder: Path) -> None:
        """Prepare files in ``folder``, which is empty and the area's own."""
        self.folder = folder

    @abstractmethod
    def draw(self, rng: random.Random) -> Case:
        """One case; equal generators give equal cases."""


@dataclass(frozen=True)
class Verdict:
    """How a case ended: ``accepted``, ``refused`` or ``failed``, and what is wrong, if anything."""

    outcome: Literal["accepted", "refused", "failed"]
    fault: str = ""


_HANGS = Verdict("failed", f"took longer than {LONGEST:g} s")


def judge(case: Case) -> Verdict:
    """Run ``case`` and hold it against what must become of it.

    What takes too long is tried again: a busy machine may stand still for a while.
    """
    verdict = _judge(case)
    return _judge(case) if verdict == _HANGS else verdict


def _judge(case: Case) -> Verdict:
    started = time.monotonic()
    try:
        with _at_most(LONGEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
    except UserError as error:
        verdict = Verdict("refused", _unlike_a_sentence(str(error)))
    except Wrong as error:
        return Verdict("failed", f"wrong: {error}")
    except Hang:
        return _HANGS
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).partition("\n")[0][:200]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Verdict("failed", f"{type(error).__name__} at {where}: {said}")
    else:
        verdict = Verdict("accepted")
    if time.monotonic() - started > LONGEST:  # in code that no signal interrupts
        return _HANGS
    if case.expected not in ("either", verdict.outcome):
        said = f" ({verdict.fault})" if verdict.fault else ""
        return Verdict("failed", f"{verdict.outcome}, must be {case.expected}{said}")
    return Verdict("failed", verdict.fault) if verdict.fault else verdict


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block when the time is up."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _unlike_a_sentence(said: str) -> str:
    """Why what a refusal says is no sentence to put on a terminal; empty if it is one."""
    if not said.strip():
        return "refused without a word"
    if len(said) > _WORDY:
        return f"a refusal of {len(said)} characters: {said[:80]!r}..."
    if any(unicodedata.category(sign) in ("Cc", "Cs") and sign not in "\n\t" for sign in said):
        return f"a refusal with control characters: {said[:200]!r}"
    return ""


def command(*words: str) -> str:
    """What ``tokenprune words...`` prints, run in this process.

    Raises:
        UserError: It ends with the status of bad input.
        Wrong: It ends with a status that commands do not have.
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
    """The folder of a comparison on a few questions."""
    command(
        *("compare", "-m", "uniform", "fastv", "-r", "0.25", "--questions", "5"),
        *("--out", str(folder)),
    )
    return folder
