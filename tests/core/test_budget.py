"""Budgets: exact fractions, rounding, and the division between views."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.allocators import Proportional, ThumbnailCommand, ThumbnailPeak, TopK, allocator
from tokenprune.budget import budget
from tokenprune.errors import RetentionWarning, UnknownNameError, UserError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS
from tokenprune.tokens import VisualTokens

CLS = Signal("cls_logits")


def _tokens(layout: TokenLayout, thumbnail: Tensor | None = None, seed: int = 0) -> VisualTokens:
    """Random scores; those of the thumbnail given, (H, W)."""
    tokens = sample_tokens(frozenset({CLS}), layout, seed=seed)
    if thumbnail is not None:
        tokens.signals[CLS][layout.kind == Kind.THUMBNAIL] = thumbnail.flatten().float()
    return tokens


# -- one integer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "retention", "rounding", "kept"),
    [
        (100, 0.29, "floor", 29),  # int(100 * 0.29) is 28
        (1000, 0.001, "floor", 1),
        (100, 0.57, "floor", 57),  # int(100 * 0.57) is 56
        (2880, 0.1, "floor", 288),
        (10, 0.25, "floor", 2),
        (10, 0.25, "ceil", 3),
        (10, 0.25, "half-even", 2),
        (10, 0.35, "half-even", 4),
        (10, 0.25, "half-up", 3),
        (10, 0.35, "half-up", 4),
        (10, 0.3, "ceil", 3),  # math.ceil(10 * 0.3) is 3, but of 0.1 * 30 it is 4
        (30, 0.1, "ceil", 3),
        (7, 0.01, "floor", 1),  # at least one
        (7, 1.0, "ceil", 7),
        (0, 0.5, "floor", 0),
    ],
)
def test_budget_by_hand(tokens: int, retention: float, rounding: str, kept: int) -> None:
    assert budget(tokens, retention, rounding) == kept  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.integers(1, 1000))
def test_budget_is_exact_for_every_decimal(tokens: int, thousandths: int) -> None:
    exact = Fraction(tokens * thousandths, 1000)
    retention = thousandths / 1000
    assert budget(tokens, retention) == max(1, exact.numerator // exact.denominator)
    assert budget(tokens, retention, "ceil") == -(-exact.numerator // exact.denominator)
    for rounding in ("half-even", "half-up"):
        assert abs(budget(tokens, retention, rounding) - max(exact, 1)) <= Fraction(1, 2)


@given(st.integers(1, 60_000), st.data())
def test_the_budget_of_a_quotient_is_its_numerator(tokens: int, data: st.DataObject) -> None:
    """The field's "192" is 192 / 576, a float that is a little less than a third."""
    kept = data.draw(st.integers(1, tokens))
    for rounding in ("floor", "half-even", "half-up", "ceil"):
        assert budget(tokens, kept / tokens, rounding) == kept


# -- views share ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "retention", "counts"),
    [
        # Views of 16, 16 and 8 tokens.  0.3 * 40 = 12: quotas 4.8, 4.8, 2.4.
        ((0, 4, 0, 6), 0.3, [5, 5, 2]),
        # 0.5 * 40 = 20: quotas 8, 8, 4, nothing left over.
        ((0, 4, 0, 6), 0.5, [8, 8, 4]),
        # 0.05 * 40 = 2: quotas 0.8, 0.8, 0.4.
        ((0, 4, 0, 6), 0.05, [1, 1, 0]),
        # 0.1 * 48 = 4: three quotas of 4/3, the earlier view gets the rest.
        ((0, 4, 0, 8), 0.1, [2, 1, 1]),
    ],
)
def test_proportional_by_hand(
    box: tuple[int, int, int, int], retention: float, counts: list[int]
) -> None:
    tokens = _tokens(TokenLayout.anyres((1, 2), (4, 4), box))
    assert Proportional().counts(tokens, torch.empty(0), retention).tolist() == counts


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 100))
def test_proportional_keeps_the_total_and_every_share(name: str, percent: int) -> None:
    tokens = _tokens(LAYOUTS[name])
    sizes = tokens.layout.view_sizes
    counts = Proportional().counts(tokens, torch.empty(0), percent / 100).tolist()
    total = max(1, sum(sizes) * percent // 100)
    assert sum(counts) == total
    for count, size in zip(counts, sizes, strict=True):
        assert abs(count - Fraction(total * size, sum(sizes))) < 1
        assert 0 <= count <= size


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("retention", [0.1, 0.5, 0.9])
def test_top_k_counts_where_the_best_lie(name: str, retention: float) -> None:
    tokens = _tokens(LAYOUTS[name], seed=3)
    scores = tokens[CLS].tolist()
    total = max(1, math.floor(round(len(tokens.layout.patches) * retention, 9)))
    best = sorted(tokens.layout.patches.tolist(), key=lambda i: (-scores[i], i))[:total]
    wanted = [0] * tokens.layout.views
    for index in best:
        wanted[int(tokens.layout.view[index])] += 1
    assert TopK().counts(tokens, tokens[CLS], retention).tolist() == wanted


# -- the thumbnail commands ----------------------------------------------------------------------


def _slow_ratios(
    thumbnail: list[list[float]], grid: tuple[int, int], retention: float, tau: float
) -> list[float]:
    """GlobalCom2's retention ratios with Python floats and loops (methods.md 1.1)."""
    side_h, side_w = len(thumbnail), len(thumbnail[0])
    cell_h, cell_w = max(side_h // grid[0], 1), max(side_w // grid[1], 1)
    richness = [0.0] * (grid[0] * grid[1])
    for i in range(side_h):
        for j in range(side_w):
            row, col = min(i // cell_h, grid[0] - 1), min(j // cell_w, grid[1] - 1)
            richness[row * grid[1] + col] += thumbnail[i][j]
    weights = [math.exp((value - max(richness)) / tau) for value in richness]
    sigma = [weight / (sum(weights) + 1e-8) for weight in weights]
    mean = sum(sigma) / len(sigma)
    return [min(retention * (1 + value - mean), 1.0) for value in sigma]


GRIDS = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (5, 5), (5, 2)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("retention", [0.1, 0.25, 0.75, 0.9])
@pytest.mark.parametrize("tau", [0.1, 10.0])
def test_ratios_equal_a_slow_reference(grid: tuple[int, int], retention: float, tau: float) -> None:
    side = 24 if grid[0] < 5 else 12
    box = (0, side * grid[0], 0, side * grid[1])
    layout = TokenLayout.anyres(grid, (side, side), box)
    thumbnail = torch.randn(side, side, generator=torch.Generator().manual_seed(grid[0]))
    got = ThumbnailCommand(tau=tau).ratios(_tokens(layout, thumbnail), retention)
    assert got.dtype == torch.float64
    slow = _slow_ratios(thumbnail.tolist(), grid, retention, tau)
    torch.testing.assert_close(got, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-12)


def test_counts_truncate_ratio_times_unpadded_size() -> None:
    layout = LAYOUTS["2x2 padded"]  # crops of 3x4 tokens each
    tokens = _tokens(layout, seed=5)
    thumbnail = tokens[CLS][:16].reshape(4, 4).double().tolist()
    wanted = [math.floor(r * 12) for r in _slow_ratios(thumbnail, (2, 2), 0.4, 10.0)]
    counts = ThumbnailCommand().counts(tokens, tokens[CLS], 0.4)
    assert counts.tolist() == [6, *wanted]


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (1, 3), (4, 3), (6, 2)])
def test_equal_scores_give_every_crop_the_same_ratio(grid: tuple[int, int]) -> None:
    """methods.md 22.2, fact 1 (divisor grids)."""
    layout = TokenLayout.anyres(grid, (12, 12), (0, 12 * grid[0], 0, 12 * grid[1]))
    ratios = ThumbnailCommand().ratios(_tokens(layout, torch.full((12, 12), 0.7)), 0.3)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.3), rtol=0, atol=1e-12)


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.5]))
def test_ratios_sum_to_the_budget_unless_clipped(seed: int, retention: float) -> None:
    """methods.md 22.2, fact 2: at R <= 0.5 no ratio reaches 1, so their mean is R."""
    ratios = ThumbnailCommand(tau=1.0).ratios(_tokens(LAYOUTS["2x2"], seed=seed), retention)
    assert float(ratios.sum()) == pytest.approx(4 * retention, abs=1e-9)
    assert 0.75 * retention - 1e-9 <= float(ratios.min())
    assert float(ratios.max()) <= 1.75 * retention + 1e-9


def test_clipping_is_not_redistributed() -> None:
    thumbnail = torch.zeros(4, 4)
    thumbnail[:2, :2] = 100.0
    ratios = ThumbnailCommand(tau=1.0).ratios(_tokens(LAYOUTS["2x2"], thumbnail), 0.8)
    assert ratios.tolist() == pytest.approx([1.0, 0.6, 0.6, 0.6], abs=1e-6)


def test_a_single_crop_gets_the_retention() -> None:
    """methods.md 22.2, fact 3."""
    layout = TokenLayout.anyres((1, 1), (4, 4), (0, 4, 0, 4))
    assert ThumbnailCommand().ratios(_tokens(layout), 0.35).tolist() == pytest.approx([0.35])


def test_an_image_without_crops_is_cut_to_the_retention() -> None:
    tokens = _tokens(LAYOUTS["one view"])
    assert ThumbnailCommand().counts(tokens, tokens[CLS], 0.25).tolist() == [4]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_best_token_of_a_region_in_place_of_the_sum(grid: tuple[int, int]) -> None:
    side, tau = 12, 0.7
    layout = TokenLayout.anyres(grid, (side, side), (0, side * grid[0], 0, side * grid[1]))
    thumbnail = torch.randn(side, side, generator=torch.Generator().manual_seed(grid[1]))
    best = [-math.inf] * (grid[0] * grid[1])
    for i in range(side):
        for j in range(side):
            row = min(i // (side // grid[0]), grid[0] - 1)
            col = min(j // (side // grid[1]), grid[1] - 1)
            cell = row * grid[1] + col
            best[cell] = max(best[cell], float(thumbnail[i, j]))
    weights = [math.exp((value - max(best)) / tau) for value in best]
    sigma = [weight / (sum(weights) + 1e-8) for weight in weights]
    slow = [min(0.3 * (1 + value - sum(sigma) / len(sigma)), 1.0) for value in sigma]
    got = ThumbnailPeak(tau=tau).ratios(_tokens(layout, thumbnail), 0.3)
    torch.testing.assert_close(got, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-12)
    assert isinstance(allocator("max"), ThumbnailPeak)
    assert create("fastv", retention=0.5, allocator="max").label == "fastv:allocator=max"


def test_the_richest_frame_by_its_farthest_token() -> None:
    layout = LAYOUTS["video"]
    features = torch.ones(len(layout), 3)
    features[:, 1:] = 0
    features[5] = torch.tensor([0.0, 1.0, 0.0])  # one token of frame 1 is like no other
    tokens = VisualTokens(layout, features)
    assert int(ThumbnailPeak().richness(tokens).argmax()) == 1


# -- what users may get wrong --------------------------------------------------------------------


@pytest.mark.parametrize("retention", [0, -0.1, 1.0001, 25, math.nan])
def test_retention_outside_its_range(retention: float) -> None:
    with pytest.raises(UserError, match="larger than 0 and at most 1"):
        create("uniform", retention=retention)


def test_a_retention_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(UserError, match="retention='half' is not valid"):
        create("uniform", retention="half")


def test_unknown_allocator_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'proportional'"):
        allocator("proportionl")


def test_an_empty_view_gives_a_warning() -> None:
    tokens = _tokens(LAYOUTS["2x2"])
    with pytest.warns(RetentionWarning, match=r"of 80 patch tokens keeps 2, and nothing of views"):
        create("uniform", retention=0.03)(tokens)
