"""A time limit for the computations of a method.

`time_limit` sets an alarm.  Its handler raises `TimeLimit` in the main thread; the traceback shows
where.  The stack unwinds as with any exception, so hooks are removed.  The handler does not
interrupt ``__enter__`` and ``__exit__``, which would leave hooks half installed or half removed; it
tries again a moment later, for at most ten seconds.

It cannot interrupt a single call into C, such as a kernel that never returns.  It needs POSIX
signals and the main thread (`check_time_limit`).
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tokenprune.errors import UserError

__all__ = [
    "TimeLimit",
    "check_time_limit",
    "time_limit",
]


_PROTECTED = {"__enter__", "__exit__", "__del__"}


_AGAIN = 0.02  # seconds until a handler that must not interrupt tries again


_INSIST = 1.0  # seconds until it raises again, in case the exception was swallowed


_LONGEST = 1e6  # the largest limit in seconds


_PATIENCE = 10.0  # seconds for which it does not interrupt; installing hooks takes far less


class TimeLimit(BaseException):
    """The time limit is exceeded.  No `Exception`, so ``except Exception`` does not catch it."""


def check_time_limit(seconds: float | None) -> None:
    """Raise `UserError` unless ``seconds`` is None or a limit that works here."""
    if seconds is None:
        return
    if not 0 < seconds <= _LONGEST:
        raise UserError(
            f"--timeout-per-batch must be a number of seconds above 0 and at most {_LONGEST:g}, "
            f"got {seconds:g}."
        )
    if not hasattr(signal, "setitimer"):
        raise UserError(
            "--timeout-per-batch needs POSIX signals, which this system does not have; leave it "
            "out."
        )
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "--timeout-per-batch works in the main thread only, to which the system sends signals; "
            "leave it out, or run the comparison there."
        )


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` in the block when it has run for ``seconds``; None is no limit.

    An alarm that was set before continues afterwards.
    """
    if seconds is None:
        yield
        return
    done = False
    user: FrameType | None = sys._getframe(2)  # after the frame of contextlib

    def ring(number: int, frame: FrameType | None) -> None:
        if done:
            return
        late = time.monotonic() - began - seconds
        if late < _PATIENCE and _is_protected(frame, user):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN, _INSIST)
            return
        raise TimeLimit(f"took longer than {seconds:g} s (--timeout-per-batch)")

    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, _INSIST)
    try:
        yield
    finally:
        done, user = True, None
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            remaining = max(left - (time.monotonic() - began), _AGAIN)
            signal.setitimer(signal.ITIMER_REAL, remaining, interval)


def _is_protected(frame: FrameType | None, user: FrameType | None) -> bool:
    """Whether ``frame``, called by ``user`` at any depth, enters or leaves a context."""
    while frame is not None and frame is not user:
        if frame.f_code.co_name in _PROTECTED:
            return True
        frame = frame.f_back
    return False
