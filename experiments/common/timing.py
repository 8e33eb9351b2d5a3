"""Time and memory of a computation on this device."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

from tokenprune.errors import UserError

__all__ = [
    "Timing",
    "allocations",
    "median_of",
    "peak_memory",
    "synchronise",
    "timed",
]


@dataclass(frozen=True)
class Timing:
    """The duration of a computation.

    Attributes:
        median: Seconds.
        spread: Interquartile range of the repeats, in seconds; 0 for a single one.
        runs: Seconds of every run, in order.
    """

    median: float
    spread: float
    runs: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{1000 * self.median:.3g} ± {1000 * self.spread / 2:.1g} ms"


def synchronise(device: torch.device | str = "cpu") -> None:
    """Block until ``device`` has finished all queued work; a CPU has none."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def timed(
    work: Callable[[], Any],
    *,
    warmup: int = 2,
    repeats: int = 7,
    device: torch.device | str = "cpu",
) -> Timing:
    """Run ``work`` ``warmup`` times without timing, then time it ``repeats`` times.

    The device is synchronised before and after every run, so that queued work counts for the run
    that queued it.

    Raises:
        UserError: ``repeats`` below 1 or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise UserError(f"timing needs repeats >= 1 and warmup >= 0, got {repeats} and {warmup}.")
    for _ in range(warmup):
        work()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return median_of(seconds)


def median_of(seconds: Sequence[float]) -> Timing:
    """The `Timing` of the given durations, at least one."""
    spread = 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = high - low
    return Timing(statistics.median(seconds), spread, tuple(seconds))


def peak_memory(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Peak bytes of the tensors that ``work`` allocates, beyond those that existed before.

    On CUDA, ``max_memory_allocated`` of the allocator.  On the CPU, the running sum over every
    allocation and release that PyTorch's profiler records.  This is exact for tensors, in contrast
    to the resident size of the process, which includes freed memory that the C library keeps.  On
    the CPU, releases of tensors from before ``work`` are not subtracted.

    Raises:
        UserError: Another kind of device.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if kind != "cpu":
        raise UserError(f"peak memory can be measured on cpu and cuda, not on {kind}.")
    with allocations() as seen:
        work()
    return seen.peak


@dataclass
class Allocations:
    """The result of `allocations`.

    Attributes:
        peak: Peak bytes, set when the context ends.
    """

    peak: int = 0


@contextmanager
def allocations() -> Iterator[Allocations]:
    """While open, it counts tensors on the CPU as in `peak_memory`."""
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # otherwise the profiler writes to standard error
    found = Allocations()
    with profile(use_device=None, profile_memory=True) as seen:
        yield found
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    for event in sorted(
        events, key=lambda one: one.start_ns()
    ):  # stable, so that ties keep their order
        held += event.nbytes()
        found.peak = max(found.peak, held)
