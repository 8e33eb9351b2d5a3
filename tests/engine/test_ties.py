"""Tokens that are equal by construction tie, and ties go to the earlier token."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tokenprune as tp
from tokenprune.allocators import ThumbnailCommand
from tokenprune.experiments.benchmarks.second_device import OTHER, SecondDevice, put
from tokenprune.layout import TokenLayout
from tokenprune.ops.diversity import max_min_diversity
from tokenprune.ops.merging import group_sums
from tokenprune.ops.spatial import summary_distance
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

RECEIVED = Signal("received")


def clip(frames: int, side: int, *, still: bool = False, seed: int = 0) -> VisualTokens:
    """A synthetic video with positive scores; ``still`` repeats its first frame."""
    draw = torch.Generator().manual_seed(seed)
    layout, size = TokenLayout.video(frames, (side, side)), side * side
    features = torch.randn(frames * size + 1, 48, generator=draw)
    scores = torch.rand(frames * size + 1, generator=draw)
    if still:
        features[: frames * size] = features[:size].repeat(frames, 1)
    scores[-1] = torch.nan
    return VisualTokens(layout, features, {RECEIVED: scores})


def patches_kept(tokens: VisualTokens, spec: str, retention: float) -> list[int]:
    keep = tp.parse(spec, retention=retention)(tokens).keep
    return [int(index) for index in keep if not tokens.layout.is_separator[index]]


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the highest scores; on ties the earlier one."""
    return sorted(sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count])


def unit(values: Tensor) -> Tensor:
    return values / values.norm()


@pytest.mark.parametrize(("side", "retention"), [(7, 0.25), (10, 0.5), (10, 0.29), (4, 0.25)])
def test_two_frames_are_equally_rich(side: int, retention: float) -> None:
    """GlobalCom² on two frames against a slow loop in float64: both keep floor(R N) tokens."""
    size = side * side
    count = math.floor(Fraction(str(retention)) * size)
    for seed in range(25):
        tokens = clip(2, side, seed=seed)
        first, second = tokens.features[: 2 * size].double().split(size)
        far = [
            float(1 - unit(a) @ unit(unit(a) + unit(b))) for a, b in zip(first, second, strict=True)
        ]
        expected = []
        for frame in range(2):
            local = tokens[RECEIVED][frame * size : (frame + 1) * size].double()
            scores = 0.5 * unit(torch.tensor(far, dtype=torch.float64)) + 0.5 * unit(local)
            expected += [frame * size + place for place in best(scores.tolist(), count)]
        assert patches_kept(tokens, "globalcom2", retention) == expected


@pytest.mark.parametrize("tau", [10.0, 0.01])
def test_two_frames_tie_to_the_last_bit(tau: float) -> None:
    """However steep the allocation is, and in either order of the frames."""
    for seed in range(25):
        tokens = clip(2, 10, seed=seed)
        distance = summary_distance(tokens.layout, tokens.features)[:-1].view(2, 100)
        assert torch.equal(distance[0], distance[1])
        counts = ThumbnailCommand(tau=tau).counts(tokens, distance, 0.5)
        assert counts.tolist() == [50, 50]
        assert ThumbnailCommand(tau=tau).counts(tokens, distance, 0.001).tolist() == [1, 0]


def test_tokens_of_two_frames_that_tie_go_by_place() -> None:
    """By the distance from the summary alone, over both frames: of every pair the earlier first."""
    for seed in range(10):
        tokens = clip(2, 5, seed=seed)
        first, second = tokens.features[:50].double().split(25)
        cosine = [
            float(unit(a) @ unit(b)) for a, b in zip(first, second, strict=True)
        ]  # the less similar, the farther from their mean
        places = best([-one for one in cosine], 7)
        last = min(places, key=lambda place: -cosine[place])  # of it only the first frame's
        expected = sorted([*places, *(25 + place for place in places if place != last)])
        assert patches_kept(tokens, "globalcom2:alpha=1,allocator=topk", 0.26) == expected


@pytest.mark.parametrize("frames", [2, 3, 5, 6, 7, 11])
def test_a_static_video_is_ranked_by_the_remaining_frames(frames: int) -> None:
    """All frames are their summary: no frame is richer, and only the local scores rank."""
    tokens = clip(frames, 8, still=True)
    expected = []
    for frame in range(frames):
        local = tokens[RECEIVED][64 * frame : 64 * (frame + 1)].tolist()
        expected += [64 * frame + place for place in best(local, 32)]
    assert patches_kept(tokens, "globalcom2", 0.5) == expected
    assert (summary_distance(tokens.layout, tokens.features)[:-1] == 0).all()


def test_frames_that_equal_an_earlier_one_keep_their_first_tokens() -> None:
    """DyCoke, where nothing is new: no token is less like the earlier frame than another."""
    tokens = clip(4, 8, still=True)
    kept = patches_kept(tokens, "dycoke", 0.625)
    assert kept == [*range(64), *range(64, 96), *range(128, 160), *range(192, 224)]


def farthest_first(vectors: Tensor, count: int) -> list[int]:
    """DivPrune's choice by slow loops in float64, ties to the earlier row."""
    rows = [unit(row) for row in vectors.double()]
    far = [[round(float(1 - a @ b), 12) for b in rows] for a in rows]
    size = len(rows)
    closest = [min(far[i][j] for j in range(size) if j != i) for i in range(size)]
    chosen = [max(range(size), key=lambda i: (closest[i], -i))]
    while len(chosen) < count:
        rest = [i for i in range(size) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(far[i][j] for j in chosen), -i)))
    return sorted(chosen)


class Lopsided(TorchFunctionMode):
    """Products of matrices are larger by a rounding error below the diagonal, as on some GPUs."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.matmul, Tensor.__matmul__):
            result = result + 1e-7 * torch.ones_like(result).tril(-1)
        return result


@pytest.mark.parametrize("count", [1, 4])
def test_of_two_nearest_tokens_the_earlier_is_selected(count: int) -> None:
    for seed in range(40):
        vectors = torch.randn(33, 50, generator=torch.Generator().manual_seed(seed))
        expected = farthest_first(vectors, count)
        assert max_min_diversity(vectors, count).sort().values.tolist() == expected
        with Lopsided():
            found = max_min_diversity(vectors, count)
        assert found.sort().values.tolist() == expected


def test_of_equal_rows_the_earlier_is_selected() -> None:
    for seed in range(10):
        vectors = torch.randn(9, 50, generator=torch.Generator().manual_seed(seed)).repeat(3, 1)
        found = max_min_diversity(vectors, 12).sort().values
        assert found.tolist() == farthest_first(vectors, 12)


def test_of_equally_near_neighbours_the_earlier_are_absorbed() -> None:
    """PruMerge: all keys are equal, so that a centre absorbs the first others."""
    method = tp.create("prumerge", retention=0.1, neighbours=3)
    scores = torch.rand(64, generator=torch.Generator().manual_seed(0))
    vectors = torch.eye(64)
    index, made = method._merged(scores, vectors, torch.ones(64, 4) / 2, 2)  # type: ignore[attr-defined]
    centre = int(scores.argmax())
    expected = vectors[centre].clone()
    for other in [place for place in range(64) if place != centre][:3]:
        expected += scores[other] * vectors[other]
    assert int(index[0]) == centre
    torch.testing.assert_close(made[0], expected)


def test_sums_are_added_up_in_order_on_every_device() -> None:
    """In float32 one of these gives 0 in order and 1 in another."""
    values = torch.tensor([1e8, 1.0, -1e8, 5.0, 2.0])
    group = torch.tensor([1, 1, 1, 0, 2])
    expected = [5.0, 0.0, 2.0, 0.0]
    assert group_sums(values, group, 4).tolist() == expected
    with SecondDevice():
        elsewhere = group_sums(put(values, OTHER), put(group, OTHER), 4)
        assert elsewhere.cpu().tolist() == expected
    rows = values[:, None] * torch.ones(3)
    assert group_sums(rows, group, 4)[:, 2].tolist() == expected
