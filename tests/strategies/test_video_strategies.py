"""DyCoke and HoliTom against hand computations and slow loops written from the specification."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.ops.diversity import segments
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


def _video(frames: int, shape: tuple[int, int] = (2, 3), seed: int = 0) -> VisualTokens:
    """A video with some static locations."""
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
    """Four frames of four tokens; 1 - k = 1/2, so that frames 1, 2 and 3 keep two each."""
    layout = TokenLayout.video(4, (2, 2))
    features = torch.zeros(17, 2)
    features[:16, 0] = 1.0  # static, except for
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


def test_dycoke_of_an_image_keeps_the_tokens_least_similar_to_their_view() -> None:
    layout = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 0, 4))
    tokens = VisualTokens(layout, torch.randn(14, 5, generator=torch.Generator().manual_seed(1)))
    keep = create("dycoke", retention=0.5).select(tokens).keep.tolist()
    for view in range(3):
        patches = (layout.view == view).nonzero().squeeze(1).tolist()
        mean = tokens.features[patches].mean(0)
        ranked = sorted(patches, key=lambda i: _cosine(tokens.features[i], mean))
        assert [k for k in keep if k in patches] == sorted(ranked[:2])


def _with_gaps(tokens: VisualTokens, seed: int) -> VisualTokens:
    """About two thirds of the tokens of every frame, as after an encoder method."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.rand(len(tokens), generator=draw) < 0.7
    left[-1] = True
    return tokens.take(left.nonzero().squeeze(1))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.sampled_from([0.3, 0.5, 0.8]), st.integers(0, 9))
def test_dycoke_compares_with_the_nearest_token(frames: int, retention: float, seed: int) -> None:
    """Frames of unequal size: frame ``o`` of a window of four with frame ``o & (o - 1)``."""
    tokens = _with_gaps(_video(frames, (3, 4), seed), seed)
    layout = tokens.layout
    at = [(layout.view == frame).nonzero().squeeze(1).tolist() for frame in range(frames)]
    place = [(int(y), int(x)) for y, x in zip(layout.row, layout.col, strict=True)]
    keep = create("dycoke", retention=retention).select(tokens).keep.tolist()
    assert len(keep) == max(1, math.floor(retention * sum(map(len, at)) + 1e-9))
    window = 4
    while True:  # the whole frames, by the rule that the class gives
        whole = [frame for frame in range(frames) if frame % window == 0]
        left = (retention * frames - len(whole)) / max(frames - len(whole), 1)
        if left >= 0.1 or window >= frames:
            break
        window *= 2
    for frame in set(range(frames)) - set(whole):
        offset = frame % window
        before = at[frame - offset + (offset & (offset - 1))]
        if not before:
            continue
        like = {}
        for i in at[frame]:
            near = min(before, key=lambda j: math.dist(place[i], place[j]))
            like[i] = _cosine(tokens.features[i], tokens.features[near])
        mine = [i for i in at[frame] if i in keep]
        assert mine == sorted(sorted(at[frame], key=lambda i: like[i])[: len(mine)])


# -- HoliTom -------------------------------------------------------------------------------------


def _all_cuts(length: int) -> list[list[tuple[int, int]]]:
    """Every way to cut 0 .. length - 1 into runs, short last runs first."""
    if not length:
        return [[]]
    return [
        [*rest, (first, length - 1)]
        for first in reversed(range(length))
        for rest in _all_cuts(first)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9))
def test_segments_are_the_best_of_all(length: int, seed: int) -> None:
    gain = torch.randint(0, 9, (length, length), generator=torch.Generator().manual_seed(seed))
    gain.fill_diagonal_(0)
    runs = segments(gain.float())
    assert [i for s, e in runs for i in range(s, e + 1)] == [*range(length)]
    totals = [sum(int(gain[s, e]) for s, e in cut) for cut in _all_cuts(length)]
    assert sum(int(gain[s, e]) for s, e in runs) == max(totals)


def test_segments_without_savings_stay_single() -> None:
    assert segments(torch.zeros(4, 4)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert segments(torch.tensor([[0.0, 5, 6], [0, 0, 7], [0, 0, 0]])) == [(0, 0), (1, 2)]


def _peaks_slowly(vectors: Tensor, count: int, near: int) -> tuple[list[int], list[int]]:
    """Centres, best first, and the cluster of every point."""
    everyone = range(len(vectors))
    rows = vectors.tolist()
    distance = [
        [math.dist(rows[i], rows[j]) / math.sqrt(len(rows[0])) for j in everyone] for i in everyone
    ]
    density = []
    for i in everyone:
        closest = sorted(distance[i])[: min(near, count)]
        # Two points that are nearest to each other are equally dense: the earlier one counts as
        # denser.
        density.append((round(math.exp(-sum(d * d for d in closest) / len(closest)), 9), -i))
    worst = max(map(max, distance))
    score = []
    for i in everyone:
        denser = [distance[i][j] for j in everyone if density[j] > density[i]]
        score.append(density[i][0] * min(denser, default=worst))
    centres = sorted(everyone, key=lambda i: -score[i])[:count]
    cluster = [min(range(count), key=lambda c: distance[i][centres[c]]) for i in everyone]
    for place, centre in enumerate(centres):
        cluster[centre] = place
    return centres, cluster


def _holitom_slowly(
    tokens: VisualTokens, frames: int, size: int, retention: float
) -> dict[int, Tensor]:
    """From index to feature of the kept tokens, with tau = 0.8 and beta = 0.6."""
    features, scores = tokens.features, tokens.signals[Signal("received")].tolist()
    layout, columns = tokens.layout, tokens.layout.view_shape[1]
    at: list[dict[int, int]] = [{} for _ in range(frames)]  # location to index
    for index in layout.patches.tolist():
        place = int(layout.row[index]) * columns + int(layout.col[index])
        at[int(layout.view[index])][place] = index
    like = [
        [
            _cosine(features[at[f][i]], features[at[f + 1][i]])
            if i in at[f] and i in at[f + 1]
            else -1.0
            for i in range(size)
        ]
        for f in range(frames - 1)
    ]

    def static(first: int, last: int) -> list[int]:
        if first == last:
            return []
        return [i for i in range(size) if all(like[f][i] > 0.8 for f in range(first, last))]

    best = max(_all_cuts(frames), key=lambda cut: sum(len(static(s, e)) * (e - s) for s, e in cut))
    groups = []  # (frames, locations)
    for first, last in best:
        still = static(first, last)
        groups.append(([*range(first, last + 1)], still, True))
        moving = [i for i in range(size) if i not in still]
        groups += [
            ([frame], [i for i in moving if i in at[frame]], False)
            for frame in range(first, last + 1)
        ]
    whole = sum(len(places) for _, places, _ in groups)
    total = min(max(1, int(retention * sum(map(len, at)) + 1e-9)), whole)
    quotas = [total * len(places) / whole for _, places, _ in groups]
    counts = [int(quota + 1e-9) for quota in quotas]
    while sum(counts) < total:
        index = max(range(len(counts)), key=lambda g: (round(quotas[g] - counts[g], 9), -g))
        counts[index] += 1
    left = {}
    for (some, places, still), count in zip(groups, counts, strict=True):
        if still and count:
            means = torch.stack([sum(features[at[f][i]] for f in some) / len(some) for i in places])
            centres, cluster = _peaks_slowly(means, count, 7)
            for c, centre in enumerate(centres):
                others = [i for i in range(len(places)) if cluster[i] == c and i != centre]
                value = means[centre]
                if others:
                    value = 0.6 * value + 0.4 * sum(means[i] for i in others) / len(others)
                left[at[some[0]][places[centre]]] = value
        elif count:
            ranked = sorted(places, key=lambda i: -scores[at[some[0]][i]])[:count]
            left |= {at[some[0]][i]: features[at[some[0]][i]] for i in ranked}
    return left


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.sampled_from([0.1, 0.25, 0.4, 0.6, 0.9]), st.integers(0, 5))
def test_holitom_equals_loops(frames: int, retention: float, seed: int) -> None:
    tokens = _video(frames, (3, 4), seed)
    scores = torch.randn(len(tokens), generator=torch.Generator().manual_seed(seed))
    tokens = replace(tokens, signals={Signal("received"): scores})
    chosen = create("holitom", retention=retention).select(tokens)
    wanted = _holitom_slowly(tokens, frames, 12, retention)
    assert chosen.keep.tolist() == sorted(wanted)
    assert chosen.features is not None
    for index, feature in zip(chosen.keep.tolist(), chosen.features, strict=True):
        torch.testing.assert_close(feature, wanted[index], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.sampled_from([0.25, 0.6, 0.9]), st.integers(0, 9))
def test_holitom_of_frames_with_gaps_equals_loops(frames: int, retention: float, seed: int) -> None:
    """A location is static only if both successive frames have a token there."""
    tokens = _video(frames, (3, 4), seed)
    scores = torch.randn(len(tokens), generator=torch.Generator().manual_seed(seed))
    tokens = _with_gaps(replace(tokens, signals={Signal("received"): scores}), seed)
    chosen = create("holitom", retention=retention).select(tokens)
    wanted = _holitom_slowly(tokens, frames, 12, retention)
    assert chosen.keep.tolist() == sorted(wanted)
    assert chosen.features is not None
    for index, feature in zip(chosen.keep.tolist(), chosen.features, strict=True):
        torch.testing.assert_close(feature, wanted[index], rtol=1e-5, atol=1e-5)


def test_holitom_of_a_video_that_stands_still_is_one_frame() -> None:
    """All locations are static: the mean of the frames is left, for any R."""
    layout = TokenLayout.video(4, (2, 2))
    frame = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1.0, 2.0, 3.0, 6.0])  # the cosine ignores lengths
    features = torch.cat([frame * length for length in lengths] + [torch.zeros(1, 3)])
    tokens = VisualTokens(layout, features, {Signal("received"): torch.rand(17)})
    chosen = create("holitom", retention=0.5).select(tokens)
    assert chosen.keep.tolist() == [0, 1, 2, 3]
    assert chosen.features is not None
    torch.testing.assert_close(chosen.features, frame * 3)
    moving = create("holitom", retention=0.5, tau=1).select(tokens)
    assert len(moving.keep) == 8
