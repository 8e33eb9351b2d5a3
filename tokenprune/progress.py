"""Progress of long computations: the type of callbacks, and lines for logs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = [
    "ProgressCallback",
    "duration",
    "logged",
    "progress_line",
    "silent",
]


ProgressCallback = Callable[[int, int, str], None]
"""Called with the steps done, the number of steps (0: not known yet), and the current step."""


def silent(done: int, total: int, doing: str) -> None:
    """A `ProgressCallback` that shows nothing."""


@contextmanager
def logged(write: Callable[[str], None], every: float = 60.0) -> Iterator[ProgressCallback]:
    """While open, write a line about the latest step at regular intervals, even during a long step.

    Args:
        write: Called with every line, in another thread.
        every: Seconds between two lines.
    """
    began = time.monotonic()
    phase = latest = (began, 0, 0, "starting")  # when it was reported, and what
    ended = threading.Event()

    def report(done: int, total: int, doing: str) -> None:
        nonlocal phase, latest
        if total != latest[2] or done < latest[1]:  # other steps, which may have another rate
            phase = time.monotonic(), done, total, doing
        latest = time.monotonic(), done, total, doing

    def keep_writing() -> None:
        while not ended.wait(every):
            seconds = time.monotonic() - phase[0]
            write(progress_line(*latest[1:], new=latest[1] - phase[1], seconds=seconds))

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        ended.set()
        thread.join()


def progress_line(done: int, total: int, doing: str, *, new: int, seconds: float) -> str:
    """One line about a computation.

    Args:
        done: Steps done.
        total: Number of steps; 0 if it is not known yet.
        doing: The current step.
        new: Steps done within the last ``seconds``; the others were done before.
        seconds: See ``new``.

    >>> progress_line(120, 600, "fastv at 0.25, 3 failed", new=100, seconds=50)
    '120 of 600 done, 2.0 per second, 4 min left: fastv at 0.25, 3 failed'
    """
    parts = [f"{done} of {total} done"] if total else []
    if new > 0 and seconds > 0:
        rate = new / seconds
        parts.append(f"{rate:.1f} per second" if rate >= 1 else f"{60 * rate:.1f} per minute")
        if total > done:
            parts.append(f"{duration((total - done) / rate)} left")
    return f"{', '.join(parts)}: {doing}" if parts else doing


def duration(seconds: float) -> str:
    """A number of seconds in words.

    >>> duration(59.6), duration(600), duration(20_000)
    ('60 s', '10 min', '5.6 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
