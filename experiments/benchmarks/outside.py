"""Time of a computation in a process of its own, and the memory that the system reports."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from tokenprune.experiments.common.timing import Timing, median_of

UNIT = 1 if sys.platform == "darwin" else 1024  # of `ru_maxrss`, in bytes


@dataclass(frozen=True)
class Outside:
    """What a computation took.

    Attributes:
        timing: Its duration.
        bytes: Growth of the process's peak resident size.
    """

    timing: Timing
    bytes: int


def run_outside(
    work: Callable[[], Any], *, warm: Callable[[], Any], repeats: int = 3, enough: float = 1.0
) -> Outside:
    """Run ``work`` in a forked copy of this process, with one thread.

    The copy shares the inputs of ``work``, so that they do not count.  Unlike the allocator's own
    count, the resident size includes what libraries allocate behind it.

    Args:
        work: The computation.
        warm: Runs in front of it.  It loads the code, which would count otherwise.
        repeats: Number of timed runs.
        enough: Seconds after which ``work`` is not repeated.

    Raises:
        RuntimeError: The process failed; its error is on standard error.
    """
    _return_freed_memory()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _run(work, warm, repeats, enough, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if status:
        raise RuntimeError("a benchmark failed in a process of its own")
    found = json.loads(said)
    return Outside(median_of(found["seconds"]), UNIT * (usage.ru_maxrss - found["before"]))


def _run(
    work: Callable[[], Any], warm: Callable[[], Any], repeats: int, enough: float, writer: int
) -> NoReturn:
    status = 1
    try:
        torch.set_num_threads(1)  # the copy has no other threads
        warm()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds: list[float] = []
        while len(seconds) < repeats and sum(seconds) < enough:
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
        os.write(writer, json.dumps({"before": before, "seconds": seconds}).encode())
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # without the exit handlers of the parent


def _return_freed_memory() -> None:
    """Return freed memory to the system, which the copy could use without growing."""
    if sys.platform == "linux":
        getattr(CDLL(None), "malloc_trim", int)(0)
