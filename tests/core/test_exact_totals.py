"""GlobalCom² with an exact total, and with the mean of a region, against hand computations."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from families import full_hosts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.allocators import ThumbnailCommand, ThumbnailMean, shared
from tokenprune.budget import apportion
from tokenprune.layout import Kind, TokenLayout
from tokenprune.signals import Signal
from tokenprune.spec import create, parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.model_checks import check_count_in_model, check_equals_reference
from tokenprune.testing.runner import run
from tokenprune.testing.strategy_checks import STRATEGY_CHECKS
from tokenprune.tokens import VisualTokens

CLS = Signal("cls_logits")
SQUARE = TokenLayout.anyres((2, 2), (24, 24), (0, 48, 0, 48))  # five views of 576 tokens
# A full crop between two halves: 288, 576 and 288 tokens.
UNLIKE = TokenLayout.anyres((1, 3), (24, 24), (0, 24, 12, 60))


def _tokens(layout: TokenLayout, rich: tuple[slice, slice]) -> VisualTokens:
    """The thumbnail's scores are 100 in ``rich`` and 0 elsewhere, so that its crop has it all."""
    tokens = sample_tokens(frozenset({CLS}), layout)
    thumbnail = torch.zeros(layout.view_shape)
    thumbnail[rich] = 100.0
    tokens.signals[CLS][layout.kind == Kind.THUMBNAIL] = thumbnail.flatten()
    return tokens


def _counts(tokens: VisualTokens, retention: float, total: str) -> list[int]:
    rule = ThumbnailCommand(tau=1.0, signal=CLS, total=total)  # type: ignore[arg-type]
    return rule.counts(tokens, tokens[CLS], retention).tolist()


def test_a_limited_crop_loses_budget_unless_the_total_is_exact() -> None:
    """At R = 0.9 the ratios are min(0.9 * 1.75, 1) and 0.9 * 0.75: 2258 of 2880 tokens, 78.4 %.

    Exactly 2592 stay: 518 of the thumbnail and all 576 of the rich crop, so that 1498 are left for
    three crops of one weight.
    """
    tokens = _tokens(SQUARE, (slice(12), slice(12)))
    assert _counts(tokens, 0.9, "official") == [518, 576, 388, 388, 388]
    assert pytest.approx(0.784, abs=5e-4) == 2258 / 2880
    assert _counts(tokens, 0.9, "exact") == [518, 576, 500, 499, 499]


def test_a_large_rich_crop_adds_budget_unless_the_total_is_exact() -> None:
    """At R = 0.5 the ratios are 1/3, 5/6 and 1/3: 960 of 1728 tokens, 0.056 more than R.

    The official 1e-8 in the softmax turns 480 into 479.  Of exactly 864, 576 are for crops of the
    weights 96, 480 and 96: 82.3, 411.4 and 82.3.
    """
    tokens = _tokens(UNLIKE, (slice(None), slice(8, 16)))
    assert _counts(tokens, 0.5, "official") == [288, 96, 479, 96]
    assert pytest.approx(0.056, abs=5e-4) == 960 / 1728 - 0.5
    assert _counts(tokens, 0.5, "exact") == [288, 82, 412, 82]


def test_weights_are_not_limited_only_counts_are() -> None:
    """At R = 0.7 the ratios are 0.467, 1.167 and 0.467, so that the weights are 134.4, 672, 134.4.

    Of 1209 tokens 403 are of the thumbnail.  In proportion, 806 are 115.1, 575.7 and 115.1.
    """
    tokens = _tokens(UNLIKE, (slice(None), slice(8, 16)))
    assert _counts(tokens, 0.7, "exact") == [403, 115, 576, 115]


def test_frames_and_regions_are_exact_too() -> None:
    """Two frames of 4 tokens at R = 0.4 tie and keep 1 each of 3; the exact total serves one."""
    video = sample_tokens(frozenset({CLS}), TokenLayout.video(2, (2, 2)))
    assert _counts(video, 0.4, "official") == [1, 1]
    assert _counts(video, 0.4, "exact") == [2, 1]
    own = TokenLayout.single((20, 26), native=True)  # regions of 10 x 13
    method = create("globalcom2", retention=0.3, total="exact", score="cls_logits", tau=1.0)
    for seed in range(4):
        kept = method.select(sample_tokens(method.needs, own, seed=seed)).keep
        assert len(kept) == 156 == method.count(own) - 1  # type: ignore[operator]


def _slowly(total: int, weights: list[float], most: list[int]) -> list[int]:
    """Fill in proportion to the weights; what full entries cannot take goes to the others."""
    quotas = [Fraction(0)] * len(most)
    open_, left = [i for i, size in enumerate(most) if size], Fraction(total)
    while open_ and left:
        weight = sum(Fraction(weights[i]) for i in open_)
        full = [i for i in open_ if left * Fraction(weights[i]) / weight >= most[i]]
        for i in full or open_:
            quotas[i] = Fraction(most[i]) if full else left * Fraction(weights[i]) / weight
        left = left - sum(most[i] for i in full) if full else Fraction(0)
        open_ = [i for i in open_ if i not in full]
    counts = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(most)), key=lambda i: (counts[i] - quotas[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(1, 99), st.integers(0, 40)), min_size=1), st.data())
def test_sharing_equals_filling_step_by_step(
    entries: list[tuple[int, int]], data: st.DataObject
) -> None:
    weights = [float(weight) * bool(size) for weight, size in entries]
    most = [size for _, size in entries]
    total = data.draw(st.integers(0, sum(most)))
    made = shared(total, torch.tensor(weights, dtype=torch.float64), torch.tensor(most))
    assert made.tolist() == _slowly(total, weights, most)


@given(st.integers(0, 60), st.lists(st.integers(1, 30), min_size=1, max_size=9))
def test_sharing_by_size_is_apportioning(total: int, sizes: list[int]) -> None:
    total = min(total, sum(sizes))
    most = torch.tensor(sizes)
    assert shared(total, most.double(), most).tolist() == apportion(total, sizes)


# -- the mean of a region ------------------------------------------------------------------------


def _ratios(rule: ThumbnailCommand, layout: TokenLayout, thumbnail: Tensor) -> list[float]:
    tokens = sample_tokens(frozenset({CLS}), layout)
    tokens.signals[CLS][layout.kind == Kind.THUMBNAIL] = thumbnail.flatten()
    return rule.ratios(tokens, 0.4).tolist()


def test_the_mean_does_not_prefer_large_regions() -> None:
    """7 x 7 tokens fall into regions of 9, 12, 12 and 16: of equal scores, the sum is 12 to 16."""
    layout = TokenLayout.anyres((2, 2), (7, 7), (0, 14, 0, 14))
    equal = torch.full((7, 7), 1.0)
    by_sum = _ratios(ThumbnailCommand(tau=1.0, signal=CLS), layout, equal)
    assert by_sum.index(max(by_sum)) == 3
    assert max(by_sum) > 0.6
    by_mean = _ratios(ThumbnailMean(tau=1.0, signal=CLS), layout, equal)
    assert by_mean == pytest.approx([0.4] * 4)
    bright = equal.clone()
    bright[:3, :3] = 3.0  # the smallest region; means 3, 1, 1, 1 times 49 / 4 tokens
    exact = [math.exp((mean - 3) * 49 / 4 / 10) for mean in (3, 1, 1, 1)]
    wanted = [0.4 * (1 + value / sum(exact) - 0.25) for value in exact]
    found = _ratios(ThumbnailMean(signal=CLS), layout, bright)
    assert found == pytest.approx(wanted, abs=1e-8)


def test_of_equal_regions_the_mean_is_the_sum() -> None:
    layout = TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8))
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    by_sum = _ratios(ThumbnailCommand(signal=CLS), layout, scores)
    assert _ratios(ThumbnailMean(signal=CLS), layout, scores) == pytest.approx(by_sum, abs=1e-12)


@pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")
def test_the_options_obey_the_contract() -> None:
    method = parse("globalcom2:richness=mean,total=exact@0.4")
    for check in (*STRATEGY_CHECKS, check_count_in_model, check_equals_reference):
        run(check, method, full_hosts(["llama"]))


def test_options_reach_the_allocator() -> None:
    default = create("globalcom2", retention=0.5)
    assert default.allocation == ThumbnailCommand()
    changed = parse("globalcom2:richness=mean,total=exact,tau=2@0.5")
    assert changed.allocation == ThumbnailMean(2.0, Signal("saliency"), "exact")
