"""Time and memory measurements, against work of known size."""

from __future__ import annotations

import time

import pytest
import torch

from tokenprune.errors import UserError
from tokenprune.experiments.common.timing import Timing, median_of, peak_memory, timed


def test_the_peak_of_known_allocations() -> None:
    """4 and 2 MB at once; the third MB comes when the first four are gone."""

    def work() -> None:
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(250_000)
        del second, third

    assert peak_memory(work) == 6_000_000


def test_what_was_there_before_does_not_count() -> None:
    before = [torch.empty(1_000_000)]
    assert peak_memory(lambda: torch.empty(1000)) == 4000
    assert len(before) == 1


def test_intermediates_of_an_operation_count() -> None:
    rows = torch.randn(500, 8)
    assert peak_memory(lambda: (rows @ rows.T).softmax(-1)) == 2 * 4 * 500 * 500


def test_no_operation_needs_no_memory() -> None:
    assert peak_memory(lambda: None) == 0


def test_peak_memory_refuses_other_devices() -> None:
    with pytest.raises(UserError, match="on cpu and cuda, not on meta"):
        peak_memory(lambda: None, "meta")


def test_the_stopwatch_runs_the_given_number_of_times_in_order() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(len(calls)), warmup=3, repeats=5)
    assert len(calls) == 8
    assert len(found.runs) == 5


def test_the_stopwatch_does_not_time_the_warm_up() -> None:
    naps = iter([0.2, 0.0, 0.0, 0.0])
    assert timed(lambda: time.sleep(next(naps)), warmup=1, repeats=3).median < 0.1


def test_a_known_sleep() -> None:
    assert timed(lambda: time.sleep(0.02), warmup=0, repeats=3).median >= 0.02


def test_median_and_interquartile_range() -> None:
    """Of 1..5: median 3, quartiles 2 and 4."""
    assert median_of([5.0, 1.0, 4.0, 2.0, 3.0]) == Timing(3.0, 2.0, (5.0, 1.0, 4.0, 2.0, 3.0))
    assert median_of([7.0]) == Timing(7.0, 0.0, (7.0,))


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 0), (-1, 3)])
def test_the_stopwatch_refuses_invalid_arguments(warmup: int, repeats: int) -> None:
    with pytest.raises(UserError, match="repeats >= 1"):
        timed(lambda: None, warmup=warmup, repeats=repeats)
