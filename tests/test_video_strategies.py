"""DyCoke and HoliTom against hand computations and slow loops written from the specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.compressor import create
from tokenprune.tokens import TokenLayout, VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


def _video(frames: int, shape: tuple[int, int] = (2, 3), seed: int = 0) -> VisualTokens:
    """A video that stands still here and there."""
    draw = torch.Generator().manual_seed(seed)
    layout = TokenLayout.video(frames, shape)
    size = shape[0] * shape[1]
    features = torch.randn(len(layout), 5, generator=draw)
    for frame in range(1, frames):
        still = torch.rand(size, generator=draw) < 0.6
        now, before = (slice(f * size, (f + 1) * size) for f in (frame, frame - 1))
        moved = features[before] + 0.3 * torch.randn(size, 5, generator=draw)
        features[now] = torch.where(still[:, None], moved, features[now])
    return VisualTokens(layout, features)


def _cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.tolist(), b.tolist()
    dot = sum(p * q for p, q in zip(x, y, strict=True))
    return dot / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))


def _per_frame(keep: Tensor, frames: int, size: int) -> list[list[int]]:
    return [[k % size for k in keep.tolist() if k // size == frame] for frame in range(frames)]


# -- DyCoke --------------------------------------------------------------------------------------


def test_dycoke_by_hand() -> None:
    """Four frames of four places; 1 - k = 1/2, so that frames 1, 2 and 3 keep two places each."""
    layout = TokenLayout.video(4, (2, 2))
    features = torch.zeros(17, 2)
    features[:16, 0] = 1.0  # nothing moves, but for
    for frame, places in ((1, (0, 3)), (2, (1, 2)), (3, (1, 3))):
        for place in places:
            features[4 * frame + place] = torch.tensor([0.0, 1.0])
    # Frame 3 differs from frame 2 at 2 (which moved there, and is back) and at 3.
    keep = create("dycoke", retention=10 / 16).select(VisualTokens(layout, features)).keep
    assert _per_frame(keep, 4, 4) == [[0, 1, 2, 3], [0, 3], [1, 2], [2, 3]]


def _merged_slowly(tokens: VisualTokens, frames: int, size: int, kept: int) -> list[list[int]]:
    """Both passes of TTM over windows of four, as loops."""
    features, found = tokens.features, [list(range(size)) for _ in range(frames)]

    def least_like(frame: int, other: int) -> list[int]:
        like = [
            _cosine(features[frame * size + i], features[other * size + i]) for i in range(size)
        ]
        return sorted(sorted(range(size), key=lambda i: like[i])[:kept])

    for frame in range(0, frames - 1, 2):
        found[frame + 1] = least_like(frame + 1, frame)
    for frame in range(0, frames - 2, 4):
        found[frame + 2] = least_like(frame + 2, frame)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 13), st.integers(1, 6), st.integers(0, 5))
def test_dycoke_equals_loops(frames: int, kept: int, seed: int) -> None:
    tokens = _video(frames, seed=seed)
    whole = -(-frames // 4)
    retention = min(1.0, (6 * whole + kept * (frames - whole)) / (6 * frames) + 1e-6)
    keep = create("dycoke", retention=retention).select(tokens).keep
    assert _per_frame(keep, frames, 6) == _merged_slowly(tokens, frames, 6, kept)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_dycoke_spends_the_budget_exactly(frames: int, retention: float) -> None:
    keep = create("dycoke", retention=round(retention, 3)).select(_video(frames)).keep
    exact = frames * 6 * round(1000 * round(retention, 3)) // 1000
    assert len(keep) == max(1, exact)


def test_dycoke_widens_windows_below_a_quarter() -> None:
    """32 frames of 196 at R = 0.1: no window of four, eight or sixteen leaves them their tenth."""
    tokens = VisualTokens(TokenLayout.video(32, (14, 14)), torch.randn(32 * 196 + 1, 4))
    for retention, whole in ((0.475, 8), (0.3, 4), (0.17, 2), (0.14, 1)):
        keep = create("dycoke", retention=retention).select(tokens).keep
        sizes = tokens.layout.take(keep).view_sizes
        assert [i for i, size in enumerate(sizes) if size == 196] == [*range(0, 32, 32 // whole)]
        assert max(sizes) - min(sizes) >= 100
        assert min(sizes) >= 19
    sizes = tokens.layout.take(create("dycoke", retention=0.05).select(tokens).keep).view_sizes
    assert set(sizes) == {9, 10}


def test_dycoke_official_counts() -> None:
    """k = 0.7: int(0.3 * 196) = 58; frame 30 stays whole, and of 33 frames the last one is lost."""
    whole, reduced = 9, 23
    tokens = VisualTokens(TokenLayout.video(32, (14, 14)), torch.randn(32 * 196 + 1, 4))
    retention = round((whole + reduced * 0.3) / 32, 6)
    keep = create("dycoke", retention=retention, official=True).select(tokens).keep
    sizes = tokens.layout.take(keep).view_sizes
    assert [i for i, size in enumerate(sizes) if size == 196] == [*range(0, 32, 4), 30]
    assert {size for size in sizes if size != 196} == {58}
    odd = create("dycoke", retention=0.5, official=True).select(_video(33)).keep
    assert _per_frame(odd, 33, 6)[-1] == []


def test_dycoke_of_an_image_keeps_what_is_least_like_its_view() -> None:
    layout = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 0, 4))
    tokens = VisualTokens(layout, torch.randn(14, 5, generator=torch.Generator().manual_seed(1)))
    keep = create("dycoke", retention=0.5).select(tokens).keep.tolist()
    for view in range(3):
        patches = (layout.view == view).nonzero().squeeze(1).tolist()
        mean = tokens.features[patches].mean(0)
        ranked = sorted(patches, key=lambda i: _cosine(tokens.features[i], mean))
        assert [k for k in keep if k in patches] == sorted(ranked[:2])
