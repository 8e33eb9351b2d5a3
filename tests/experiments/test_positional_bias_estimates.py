"""Positional bias: slopes, sign flips and equivariance, on arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import Planted, encoded, printed, row
from scipy.stats import kstest

from tokenprune.experiments.positional_bias.analysis import selector_bias
from tokenprune.experiments.positional_bias.command import _p_value
from tokenprune.experiments.positional_bias.estimates import (
    agreement,
    equivariance,
    paired_bias,
    sign_flip,
    slope,
)


def test_slope_is_least_squares_within_images() -> None:
    draw = np.random.default_rng(0)
    image = np.repeat(["a", "b", "c"], [20, 35, 50])
    position, kept = draw.random(len(image)), draw.random(len(image)) < 0.4
    design = np.column_stack([position, *(image == name for name in "abc")]).astype(float)
    reference = np.linalg.lstsq(design, kept.astype(float), rcond=None)[0][0]
    found = slope(kept, position, image)
    assert found.value == pytest.approx(reference)
    assert found.low < found.value < found.high


def test_slope_of_the_last_quarter_is_nine_eighths() -> None:
    position = (np.tile(np.arange(4000), 2) + 0.5) / 4000
    found = slope(position > 0.75, position, np.repeat([0, 1], 4000))
    assert found.value == pytest.approx(9 / 8, abs=1e-4)
    assert found.low == pytest.approx(found.value)  # both images are equal


def test_slope_interval_covers_the_truth() -> None:
    draw = np.random.default_rng(1)
    hits = 0
    for seed in range(100):
        slopes = draw.normal(0.3, 0.2, 30)  # of the images: they differ
        position = np.tile(np.linspace(0, 1, 40), 30)
        chance = 0.3 + slopes.repeat(40) * (position - 0.5)
        kept = draw.random(1200) < chance
        found = slope(kept, position, np.arange(30).repeat(40), seed=seed, resamples=400)
        hits += found.low <= 0.3 <= found.high
    assert 86 <= hits <= 100


def test_slope_of_one_image_has_no_interval() -> None:
    found = slope([0, 1], [0.0, 1.0], ["a", "a"])
    assert found.value == 1
    assert np.isnan(found.low)
    assert np.isnan(slope([1, 1], [0.5, 0.5], ["a", "a"]).value)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=7))
def test_sign_flip_equals_enumeration(scores: list[int]) -> None:
    observed = abs(sum(scores))
    sums = [
        abs(sum(sign * abs(score) for sign, score in zip(signs, scores, strict=True)))
        for signs in itertools.product([1, -1], repeat=len(scores))
    ]
    # Rounding may break ties: the p-value is between those of > and of >=.
    shares = [np.mean([s > observed + d for s in sums]) for d in (0.01, -0.01)]
    assert shares[0] - 1e-9 <= sign_flip(scores) <= shares[1] + 1e-9


def test_sign_flip_reaches_far_tails_exactly() -> None:
    assert sign_flip(np.ones(25)) == pytest.approx(2.0**-24)
    assert sign_flip(-np.ones(60)) == pytest.approx(2.0**-59)


def test_sign_flip_without_evidence() -> None:
    assert sign_flip(np.zeros(30)) == 1
    assert sign_flip([3.0, -3.0]) == 1
    assert sign_flip([np.nan, 1.0, 0.0]) == 1
    for too_few in ([], [1.0], [np.nan, 1.0]):
        assert np.isnan(sign_flip(too_few))


def test_sign_flip_is_uniform_under_the_null() -> None:
    draw = np.random.default_rng(2)
    found = [sign_flip(draw.laplace(size=20) * np.arange(1, 21)) for _ in range(300)]
    assert kstest(found, "uniform").pvalue > 0.01


def test_paired_bias_by_hand() -> None:
    # Image a: a token moved from 0 to 1 and is kept now; image b: moved from 1 to 0, as before.
    found = paired_bias([0, 1], [1, 1], [0.0, 1.0], [1.0, 0.0], ["a", "b"])
    assert found.slope.value == pytest.approx(0.5)
    assert found.scores.tolist() == [1.0, 0.0]
    assert found.images.tolist() == ["a", "b"]
    assert found.p == 1  # a single score other than 0 is no evidence


def test_the_slope_and_its_p_value_are_of_one_sum() -> None:
    """Images of different sizes: the p-value tests the direction of the slope."""
    draw = np.random.default_rng(4)
    image = np.repeat(np.arange(9), draw.integers(1, 40, 9))
    x, moved = draw.random((2, len(image)))
    before, after = (draw.random((2, len(image))) < 0.5).astype(float)
    found = paired_bias(before, after, x, moved, image)
    change, move = after - before, moved - x
    sums = np.array([(change * move)[image == one].sum() for one in range(9)])
    assert found.slope.value == pytest.approx(sums.sum() / (move**2).sum())
    signs = np.array(list(itertools.product([1, -1], repeat=9)))
    reference = np.mean(np.abs(signs @ np.abs(sums)) >= abs(sums.sum()) - 1e-9)
    assert found.p == pytest.approx(reference, abs=0.01)


def test_one_image_has_no_p_value() -> None:
    found = selector_bias(["last"], encoded(1)).statistics
    assert found["p"].isna().all()
    assert row(found, "reversed-crops")["paired_slope"] > 0.5
    text = printed(found)
    assert "1.000" not in text
    assert "[-" not in text, "nor an interval"


def test_the_printed_p_value_belongs_to_its_slope() -> None:
    methods = [Planted(retention=0.25, late=late) for late in (0.0, 0.2, 4.0)]
    found = selector_bias(methods, encoded(24)).statistics
    lines = printed(found).splitlines()
    for method in methods:
        own = row(found, "reversed-crops", method=method.label)
        (line,) = (one for one in lines if f"{own['paired_slope']:+.2f} [" in one)
        assert _p_value(own["p"]) in line
        assert (own["p"] < 0.05) == (own["paired_slope_low"] > 0)


def test_paired_bias_ignores_tokens_that_did_not_move() -> None:
    found = paired_bias([0, 1], [1, 0], [0.5, 0.5], [0.5, 0.5], ["a", "b"])
    assert np.isnan(found.slope.value)
    assert len(found.scores) == 0


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.05, 0.95))
def test_equivariance_of_content_and_of_position(seed: int, size: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    content = draw.permutation(size)
    before = draw.random(size) < share
    by_content = np.array([before[content[i]] for i in range(size)])
    if (by_content == before).all():
        assert np.isnan(equivariance(before, before, content))
        return
    assert equivariance(before, by_content, content) == 1
    assert equivariance(before, before, content) == 0
    assert equivariance(before, np.ones(size), content) == 0.5
    found = agreement(before, by_content, content)
    assert found.content == 1
    assert found.position == (before & by_content).sum() / before.sum()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_equivariance_of_chance_is_a_half(share: float) -> None:
    draw, content = np.random.default_rng(3), np.arange(100)[::-1]
    found = [
        equivariance(draw.random(100) < share, draw.random(100) < share, content)
        for _ in range(2000)
    ]
    assert np.nanmean(found) == pytest.approx(0.5, abs=0.02)


def test_equivariance_ignores_tokens_without_counterpart() -> None:
    before, after = [1, 0, 1, 0], [0, 1, 0, 1]
    assert equivariance(before, after, [1, 0, 3, 2]) == 1
    assert equivariance(before, after, [1, 0, -1, -1]) == 1
    assert np.isnan(equivariance(before, after, [-1, -1, -1, -1]))
    assert np.isnan(equivariance([1] * 4, [1] * 4, [1, 0, 3, 2]))
