"""Methods against hand computations and slow references."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.budget import coarse_grid
from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops.diversity import cover, max_min_diversity
from tokenprune.ops.ranking import outliers
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.strategies._golden.hired import Strips
from tokenprune.strategies._golden.sparsevlm import Scheduled
from tokenprune.strategies.hired import MarkedPatches
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

LAYOUT = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 0, 4))  # 4 tokens, 2 rows of 4 and a separator


def _tokens(layout: TokenLayout = LAYOUT, dim: int = 3, seed: int = 0) -> VisualTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisualTokens(layout, torch.randn(len(layout), dim, generator=draw))


def test_first_and_last_by_hand() -> None:
    """14 entries: thumbnail 0-3, canvas rows 4-7 and 9-12, separators 8 and 13."""
    tokens = _tokens()
    assert create("first", retention=0.5).select(tokens).keep.tolist() == [0, 1, 2, 3, 4, 5]
    assert create("last", retention=0.5).select(tokens).keep.tolist() == [6, 7, 9, 10, 11, 12]
    each = create("last", retention=0.5, allocator="proportional").select(tokens).keep
    assert each.tolist() == [2, 3, 9, 10, 11, 12]  # the lower row of both crops
    each = create("first", retention=0.25, allocator="proportional").select(tokens).keep
    assert each.tolist() == [0, 4, 6]


def test_feature_norm_by_hand() -> None:
    tokens = _tokens()
    tokens.features[torch.tensor([1, 5, 11])] *= 100
    assert create("feature-norm", retention=0.25).select(tokens).keep.tolist() == [1, 5, 11]


# -- pooling -------------------------------------------------------------------------------------


def _pooled_slowly(plane: Tensor, rows: int, cols: int) -> dict[tuple[int, int], Tensor]:
    """Cell to mean, for a plane (h, w, D)."""
    cells: dict[tuple[int, int], list[Tensor]] = {}
    height, width = plane.shape[:2]
    for y in range(height):
        for x in range(width):
            cells.setdefault((y * rows // height, x * cols // width), []).append(plane[y, x])
    return {cell: torch.stack(some).mean(0) for cell, some in cells.items()}


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([0.05, 0.1, 0.25, 0.4, 0.6, 0.9]),
)
def test_pooling_a_video_equals_loops(shape: tuple[int, int], retention: float) -> None:
    tokens = _tokens(TokenLayout.video(2, shape))
    chosen = create("spatial-pool", retention=retention).select(tokens)
    assert chosen.features is not None
    frames = tokens.features[:-1].view(2, *shape, -1)
    per_frame = len(chosen.keep) // 2
    budget = max(1, math.floor(retention * shape[0] * shape[1] + 1e-9))
    assert 1 <= per_frame <= budget
    found = False
    for rows in range(
        1, shape[0] + 1
    ):  # the grid is not returned; some grid must explain the result
        if per_frame % rows:
            continue
        cells = [_pooled_slowly(frame, rows, per_frame // rows) for frame in frames]
        wanted = torch.stack([mean for some in cells for mean in some.values()])
        order = chosen.keep
        if wanted.shape == chosen.features.shape and len(order) == len(wanted):
            found |= torch.allclose(chosen.features, wanted, atol=1e-5)
    assert found


def test_pooling_by_hand() -> None:
    """At a quarter: the thumbnail becomes one token, the canvas of 2 x 4 one row of two."""
    tokens = _tokens()
    chosen = create("spatial-pool", retention=0.25).select(tokens)
    assert chosen.features is not None
    canvas = tokens.features[torch.tensor([4, 5, 6, 7, 9, 10, 11, 12])].view(2, 4, 3)
    wanted = [tokens.features[:4].mean(0), *(canvas[:, i : i + 2].mean((0, 1)) for i in (0, 2))]
    torch.testing.assert_close(chosen.features, torch.stack(wanted))
    assert chosen.keep.tolist() == [0, 4, 6]  # the upper left of the four in the middle


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([0.3, 0.6, 0.9]),
    st.integers(0, 9),
)
def test_pooling_a_plane_with_gaps_loses_no_cell(
    shape: tuple[int, int], retention: float, seed: int
) -> None:
    """Of the grids that hold few enough tokens none holds more; every mean is that of a cell."""
    tokens = _tokens(TokenLayout.video(2, shape))
    draw = torch.Generator().manual_seed(seed)
    left = [i for i in range(len(tokens) - 1) if torch.rand(1, generator=draw) < 0.7]
    if not left:
        return
    tokens = tokens.take(torch.tensor(left))
    chosen = create("spatial-pool", retention=retention).select(tokens)
    assert chosen.features is not None
    of_frame = tokens.layout.view
    for frame in of_frame.unique().tolist():
        there = (of_frame == frame).nonzero().squeeze(1).tolist()
        places = {i: (int(tokens.layout.row[i]), int(tokens.layout.col[i])) for i in there}
        most = max(1, math.floor(retention * len(there) + 1e-9))
        held = {}  # of every grid that `coarse_grid` gives, its cells' members
        for count in range(most, shape[0] * shape[1] + 1):
            rows, cols = coarse_grid(shape, count)
            cells: dict[tuple[int, int], list[int]] = {}
            for i, (y, x) in places.items():
                cells.setdefault((y * rows // shape[0], x * cols // shape[1]), []).append(i)
            held[rows, cols] = cells
        best = max(len(cells) for cells in held.values() if len(cells) <= most)
        mine = [k for k in range(len(chosen.keep)) if int(chosen.keep[k]) in places]
        assert len(mine) == best
        kept = sorted(int(chosen.keep[k]) for k in mine)
        fits = []
        for cells in held.values():
            wanted = {}
            for members in cells.values():
                y, x = (sum(places[i][axis] for i in members) / len(members) for axis in (0, 1))
                near = min(members, key=lambda i: math.dist(places[i], (y, x)))
                wanted[near] = tokens.features[members].mean(0)
            if sorted(wanted) == kept:
                means = torch.stack([wanted[int(chosen.keep[k])] for k in mine])
                fits.append(torch.allclose(chosen.features[mine], means, atol=1e-5))
        assert any(fits)


def test_pooling_by_hand_after_a_merge_of_the_middle() -> None:
    """Of a 4 x 4 frame in four cells the upper left token of each is missing; no cell is empty."""
    gone = {0, 2, 8, 10}
    left = torch.tensor([i for i in range(16) if i not in gone])
    tokens = _tokens(TokenLayout.video(1, (4, 4))).take(left)
    chosen = create("spatial-pool", retention=0.34).select(tokens)
    assert chosen.features is not None
    cells = [[1, 4, 5], [3, 6, 7], [9, 12, 13], [11, 14, 15]]
    assert left[chosen.keep].tolist() == [5, 7, 13, 15]  # nearest to the mean location of three
    whole = _tokens(TokenLayout.video(1, (4, 4))).features
    wanted = torch.stack([whole[cell].mean(0) for cell in cells])
    torch.testing.assert_close(chosen.features, wanted)


def test_pooling_knows_no_border_between_crops() -> None:
    """Three cells on a canvas of two crops of three columns: the middle one spans both."""
    layout = TokenLayout.anyres((1, 2), (1, 3), (0, 1, 0, 6), newlines=False)
    tokens = _tokens(layout)
    chosen = create("spatial-pool", retention=0.5).select(tokens)
    assert chosen.features is not None
    canvas = tokens.features[3:]
    wanted = canvas.view(3, 2, -1).mean(1)
    torch.testing.assert_close(chosen.features[1:], wanted)


# -- diversity -----------------------------------------------------------------------------------


def _diverse_slowly(features: Tensor, count: int) -> list[int]:
    unit = torch.nn.functional.normalize(features, dim=-1)
    cosines = (
        unit @ unit.T
    )  # of the two nearest tokens the earlier is selected, in spite of rounding
    distance = (1 - torch.maximum(cosines, cosines.T)).tolist()
    everyone = range(len(features))
    nearest = [min(distance[j][i] for j in everyone if j != i) for i in everyone]
    chosen = [max(everyone, key=lambda i: nearest[i])]
    while len(chosen) < count:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[j][i] for j in chosen)))
    return sorted(chosen)


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(0, 9))
def test_max_min_diversity_equals_loops(size: int, seed: int) -> None:
    features = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    for count in range(1, size + 1):
        chosen = max_min_diversity(features, count).sort().values
        assert chosen.tolist() == _diverse_slowly(features, count)


def test_max_min_diversity_never_picks_twice() -> None:
    assert max_min_diversity(torch.ones(5, 3), 4).tolist() == [0, 1, 2, 3]
    assert max_min_diversity(torch.ones(5, 3), 0).tolist() == []


def test_divprune_takes_the_budget_of_an_allocator() -> None:
    tokens = _tokens(seed=3)
    keep = create("divprune", retention=0.5, allocator="proportional").select(tokens).keep
    assert LAYOUT.take(keep).view_sizes == (2, 2, 2)
    crop = (LAYOUT.view == 2).nonzero().squeeze(1)
    wanted = crop[torch.tensor(_diverse_slowly(tokens.features[crop], 2))]
    assert keep[LAYOUT.view[keep] == 2].tolist() == wanted.tolist()


# -- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("official", [False, True])
def test_hired_counts_marks_where_the_crops_are(official: bool) -> None:
    """Thumbnail of 4 x 4, grid of 2 x 2; all marks are in the left half."""
    layout = TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8))
    early = Signal("cls_attention", 0)
    marks = torch.zeros(4, 4)
    marks[:, :2] = torch.arange(1.0, 9).view(4, 2)  # the half of the patches that is marked
    values = torch.zeros(len(layout))
    values[layout.kind == Kind.THUMBNAIL] = marks.flatten()
    tokens = VisualTokens(layout, torch.zeros(len(layout), 1), {early: values})
    kind = Strips if official else MarkedPatches
    counts = kind(0.5, early).counts(tokens, values, 0.4)
    # 32 of 80 tokens; 16 for the thumbnail, 16 for the crops on the left.  The official strips
    # are rows of the thumbnail, each of which holds a quarter of the marks.
    assert counts.tolist() == ([16, 4, 4, 4, 4] if official else [16, 8, 0, 8, 0])


def test_hired_leaves_the_thumbnail_one_token_or_officially_none() -> None:
    layout = TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8))
    values = torch.arange(float(len(layout)))
    early = Signal("cls_attention", 0)
    tokens = VisualTokens(layout, torch.zeros(len(layout), 1), {early: values})
    kinds = MarkedPatches, Strips
    counts = [kind(0.0, early).counts(tokens, values, 0.4) for kind in kinds]
    # Of 32 tokens; all patches are marked, so that the crops share equally and lose remainders.
    assert [one.tolist() for one in counts] == [[1, 7, 7, 7, 7], [0, 8, 8, 8, 8]]


def test_vidcom2_gives_the_odd_frame_more() -> None:
    draw = torch.Generator().manual_seed(0)
    still = torch.randn(16, 8, generator=draw)
    frames = [still + 0.01 * torch.randn(16, 8, generator=draw) for _ in range(3)]
    frames.append(torch.randn(16, 8, generator=draw))
    layout = TokenLayout.video(4, (4, 4))
    tokens = VisualTokens(layout, torch.cat([*frames, torch.zeros(1, 8)]))
    keep = create("vidcom2", retention=0.25).select(tokens).keep
    sizes = layout.take(keep).view_sizes
    assert sizes[3] > max(sizes[:3])
    assert min(sizes) >= 1


# -- coverage, graphs, merging -------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 9))
def test_cover_equals_loops(size: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(size, 3, generator=draw), dim=-1)
    alike, worth = unit @ unit.T, torch.rand(size, generator=draw)
    chosen: list[int] = []
    covered = [0.0] * size
    for _ in range(size):
        gains = {
            j: float(worth[j]) * sum(max(0.0, float(alike[i, j]) - covered[i]) for i in range(size))
            for j in range(size)
            if j not in chosen
        }
        best = max(gains, key=lambda j: gains[j])
        if gains[best] < 1e-5:  # no gain is left: rounding decides
            break
        chosen.append(best)
        covered = [max(c, float(alike[i, best])) for i, c in enumerate(covered)]
        assert cover(alike, worth, len(chosen)).tolist() == sorted(chosen)
    assert cover(alike, worth, size).tolist() == list(range(size))


def test_scope_prefers_salient_tokens_among_equals() -> None:
    layout = TokenLayout.single((1, 4))
    x, y = torch.eye(2)
    vectors = torch.stack([x, x, y, y, torch.full((2,), torch.nan)])
    scores = torch.tensor([0.1, 0.4, 0.3, 0.2, torch.nan])
    signals = {Signal("cls_attention", -2): scores, Signal("unprojected"): vectors}
    tokens = VisualTokens(layout, torch.zeros(5, 2), signals)
    assert create("scope", retention=0.5).select(tokens).keep.tolist() == [1, 2]


def test_gprune_equals_loops() -> None:
    strategy = create("gprune", retention=0.5)
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    size = len(features)
    norms = [float(row.norm()) for row in features]
    cosines = [
        [float(a @ b) / (norms[i] * norms[j]) for j, b in enumerate(features)]
        for i, a in enumerate(features)
    ]
    edges = [[j for j in range(size) if cosines[i][j] >= 0.5] for i in range(size)]
    information = norms
    for _ in range(5):
        passed = [0.0] * size
        for i in range(size):
            total = sum(math.exp(cosines[i][j] / 0.03) for j in edges[i])
            for j in edges[i]:
                passed[j] += information[i] * math.exp(cosines[i][j] / 0.03) / total
        information = passed
    wanted = torch.tensor([value / len(edges[i]) for i, value in enumerate(information)])
    torch.testing.assert_close(strategy.score(features), wanted, rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]


def test_gprune_takes_the_canvas_as_one_plane() -> None:
    keep = create("gprune", retention=0.5).select(_tokens()).keep
    kind = LAYOUT.kind[keep]
    assert int((kind == Kind.THUMBNAIL).sum()) == 2
    assert int((kind == Kind.CROP).sum()) == 4


def test_prumerge_keeps_the_mass_of_what_it_drops() -> None:
    """Without neighbours: centres are as they were, and one token is the weighted rest."""
    layout = TokenLayout.single((1, 5))
    draw = torch.Generator().manual_seed(0)
    vectors, keys = torch.randn(6, 3, generator=draw), torch.randn(6, 4, generator=draw)
    scores = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05, torch.nan])
    signals = {
        Signal("cls_joint"): scores,
        Signal("joint_keys"): keys,
        Signal("unprojected"): vectors,
    }
    tokens = VisualTokens(layout, vectors, signals, projector=lambda x: 2 * x)
    chosen = create("prumerge", retention=0.6, neighbours=0).select(tokens)
    assert chosen.keep.tolist() == [0, 1, 3]  # 1 and 3 are centres, 0 is the most attended other
    rest = sum(scores[i] * vectors[i] for i in (0, 2, 4))
    assert chosen.features is not None
    wanted = 2 * torch.stack([rest, vectors[1], vectors[3]])
    torch.testing.assert_close(chosen.features, wanted)


@pytest.mark.parametrize("seed", range(5))
def test_prumerge_counts_outliers_as_numpy_does(seed: int) -> None:
    scores = torch.rand(301, generator=torch.Generator().manual_seed(seed)) ** 9
    low, high = np.percentile(scores.numpy(), [25, 75])
    assert outliers(scores) == int((scores.numpy() > high + 1.5 * (high - low)).sum())


def test_prumerge_keeps_as_many_as_stand_out() -> None:
    """Three outliers of 25: centres 3 and an extra token; with samples, every second patch."""
    layout = TokenLayout.single((5, 5))
    tokens = _tokens(layout)
    scores = torch.linspace(0, 0.1, 26)
    scores[[4, 9, 14]] += 5
    signals = {
        Signal("cls_joint", -1): scores,
        Signal("joint_keys", -1): torch.randn(26, 4),
        Signal("unprojected"): tokens.features,
    }
    tokens = VisualTokens(layout, tokens.features, signals, projector=lambda x: x)
    keep = create("prumerge", retention=0.9, adaptive=True).select(tokens).keep.tolist()
    assert keep == [4, 9, 14, 24]
    keep = create("prumerge+", retention=0.96, adaptive=True).select(tokens).keep.tolist()
    assert keep == sorted({4, 9, 14, *range(0, 24, 2), 24})  # int(int(25 / 3) / 3) = 2
    capped = create("prumerge+", retention=0.2, adaptive=True).select(tokens).keep.tolist()
    assert len(capped) == 5
    assert {4, 9, 14} < set(capped)


def test_pyramiddrop_follows_its_schedule() -> None:
    method = create("pyramiddrop", retention=0.125)
    layout = TokenLayout.single((8, 8))
    row = torch.arange(65.0)
    tokens = VisualTokens(layout, torch.zeros(65, 1), {Signal("llm_ahead"): row})
    left = [len(method.at(cut).select(tokens).keep) for cut in method.cuts]
    assert left == [32, 16, 8]
    halved = tokens.take(torch.arange(32, 65))
    inside = VisualTokens(halved.layout, halved.features, halved.signals, entered=64)
    assert len(method.at(0.5).select(inside).keep) == 16


def test_dart_pivots_select_the_least_similar_tokens() -> None:
    """Image pivot 0; text pivot along y; two tokens more, one for each."""
    layout = TokenLayout.single((1, 5), newline=False)
    x, y = torch.eye(2)
    states = torch.stack([x, x + 0.1 * y, -x, y, -y])
    keys = torch.tensor([[9.0], [1], [1], [1], [1]])
    method = create("dart", retention=0.6, image_pivots=1, text_pivots=1)
    named = Signal("llm_keys", 1), Signal("llm_states")
    tokens = VisualTokens(
        layout,
        states,
        dict(zip(named, (keys, states), strict=True)),
        text=dict(zip(named, (torch.tensor([[1.0], [5]]), torch.stack([x, y])), strict=True)),
    )
    assert method.select(tokens).keep.tolist() == [0, 2, 4]


def _rated(rows: Tensor, states: Tensor, visual: Tensor, text: Tensor) -> VisualTokens:
    layout = TokenLayout.single((1, len(states)), newline=False)
    signals = {Signal("llm_text"): rows}
    return VisualTokens(layout, states, signals, entered=len(visual), inputs=(visual, text))


def test_sparsevlm_asks_the_words_that_are_about_the_image() -> None:
    """Word 1 is related to the image and is a rater; word 0 is not, and attends to token 5."""
    states = torch.arange(6.0)[:, None].expand(-1, 2)
    visual, text = torch.tensor([[1.0, 0]]).expand(6, 2), torch.eye(2).flip(0)
    rows = torch.tensor([[0, 0.3], [0, 0.1], [0, 0.05], [0, 0.4], [0, 0.1], [0.9, 0.05]])
    tokens = _rated(rows, states, visual, text)
    method = create("sparsevlm", retention=0.34, depths=(0.5,), recycle=0)
    assert method.select(tokens).keep.tolist() == [0, 3]
    # With recycling, one kept token is a merged one: the best two of five dropped tokens.
    merging = create("sparsevlm", retention=0.34, depths=(0.5,))
    chosen = merging.select(tokens)
    assert chosen.keep.tolist() == [0, 3]
    assert chosen.features is not None
    torch.testing.assert_close(chosen.features, torch.tensor([[0.5, 0.5], [3, 3]]))


def test_sparsevlm_takes_all_text_as_raters_if_none_is_above_the_mean() -> None:
    rows, states = torch.tensor([[0.1], [0.8], [0.1]]), torch.ones(3, 2)
    method = create("sparsevlm", retention=0.5)
    one = _rated(rows, states, states, torch.ones(1, 2))
    assert method.select(one).keep.tolist() == [1]
    none = _rated(rows[:, :0], states, states, torch.ones(0, 2))
    with pytest.raises(UserError, match="needs text after the image"):
        method.select(none)


@pytest.mark.parametrize("schedule", ["", "rank", "192", "64"])
@pytest.mark.parametrize("retention", [0.01, 0.2, 0.5, 0.99])
def test_sparsevlm_never_exceeds_its_budget(schedule: str, retention: float) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.rand(576, 4, generator=draw)
    states, text = torch.randn(576, 8, generator=draw), torch.randn(4, 8, generator=draw)
    tokens = _rated(rows, states, states, text)
    method = create("sparsevlm", retention=retention)
    if schedule:
        method = Scheduled(retention=retention, schedule=schedule)  # type: ignore[arg-type]
    for stage, cut in enumerate(method.cuts, 1):
        kept = len(method.at(cut).select(tokens).keep)
        most = max(1, math.floor(576 * retention ** (stage / 3) + 1e-9))
        assert kept <= most
        if not schedule:
            assert kept == most


def test_sparsevlm_2_corrects_for_places_and_asks_the_heads_that_look() -> None:
    """Head 1 attends most to token 3; corrected for rotation, to 0.  Head 0 attends little."""
    states = torch.arange(4.0)[:, None].expand(-1, 2)
    visual, text = torch.ones(4, 2), torch.ones(1, 2)
    heads = torch.tensor([[[0.0, 0.3]], [[0.2, 0.1]], [[0.0, 0.1]], [[0.0, 0.4]]])
    rotary = torch.tensor([[1.0], [2], [2], [4]])
    layout = TokenLayout.single((1, 4), newline=False)
    signals = {Signal("llm_text_heads"): heads, Signal("llm_text_rotary"): rotary}
    tokens = VisualTokens(layout, states, signals, entered=4, inputs=(visual, text))
    method = create("sparsevlm", retention=0.25, depths=(0.5,), version="2.0", heads=1)
    assert method.select(tokens).keep.tolist() == [0]
    assert method.select(tokens).features is None
    assert method.keeps_positions
    assert not create("sparsevlm", retention=0.25).keeps_positions
    half = replace(method, retention=0.5)
    assert half.select(tokens).keep.tolist() == [0, 3]
    assert replace(half, heads=14).select(tokens).keep.tolist() == [0, 1]


# -- CDPruner ------------------------------------------------------------------------------------

CLIP = Signal("clip_patches"), Signal("clip_text")


def _with_text(seed: int = 0) -> VisualTokens:
    tokens = _tokens(dim=5, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    patches = torch.randn(len(LAYOUT), 4, generator=draw)
    patches[LAYOUT.is_separator] = torch.nan
    text = {CLIP[1]: torch.randn(2, 4, generator=draw)}
    text[Signal("llm_prompt")] = torch.randn(3, 5, generator=draw)
    saliency = torch.randn(len(LAYOUT), generator=draw)
    signals = {CLIP[0]: patches, Signal("saliency"): saliency}
    return VisualTokens(LAYOUT, tokens.features, signals, text=text)


def _cos(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


@pytest.mark.parametrize("relevance", ["clip", "text", "saliency", "none"])
def test_cdpruner_weighs_by_relevance_over_all_views(relevance: str) -> None:
    tokens = _with_text()
    patches = [index for index in range(14) if index not in (8, 13)]
    words = tokens.text[Signal("llm_prompt")].mean(0)
    related = {
        "clip": [
            -sum(_cos(tokens[CLIP[0]][i], m) for m in tokens.text[CLIP[1]]) / 2 for i in patches
        ],
        "text": [_cos(tokens.features[i], words) for i in patches],
        "saliency": [float(tokens[Signal("saliency")][i]) for i in patches],
        "none": [0.0] * 12,
    }[relevance]
    low, spread = min(related), max(related) - min(related)
    quality = [(one - low + 1e-6) / spread if spread else 1.0 for one in related]
    strategy = create("cdpruner", retention=0.5, relevance=relevance)
    assert strategy.quality(tokens).tolist() == pytest.approx(quality, abs=1e-5)  # type: ignore[attr-defined]

    worth = dict(zip(patches, quality, strict=True))
    wanted: list[int] = []
    for view in ([0, 1, 2, 3], [4, 5, 9, 10], [6, 7, 11, 12]):
        best, volume = [], -math.inf
        firsts = [i for i in view if worth[i] == max(worth[j] for j in view)]
        sums = {i: sum(_cos(tokens.features[i], tokens.features[j]) for j in view) for i in firsts}
        first = min(firsts, key=lambda i: sums[i])
        for other in (i for i in view if i != first):
            gain = worth[other] ** 2 * (
                1 - _cos(tokens.features[first], tokens.features[other]) ** 2
            )
            if gain > volume:
                best, volume = [first, other], gain
        wanted += best
    assert strategy.select(tokens).keep.tolist() == sorted(wanted)


def test_cdpruner_takes_a_constant_relevance_as_one() -> None:
    tokens = _with_text()
    tokens.signals[Signal("saliency")].fill_(0.3)
    flat = create("cdpruner", retention=0.5, relevance="saliency").select(tokens).keep
    plain = create("cdpruner", retention=0.5, relevance="none").select(tokens).keep
    assert torch.equal(flat, plain)


def test_cdpruner_by_text_needs_text() -> None:
    tokens = replace(_with_text(), text={Signal("llm_prompt"): torch.zeros(0, 5)})
    with pytest.raises(UserError, match="needs text after the image"):
        create("cdpruner", retention=0.5, relevance="text").select(tokens)


def test_cdpruner_keeps_twins_apart_and_more_than_the_rank() -> None:
    tokens = VisualTokens(LAYOUT, torch.ones(len(LAYOUT), 3))
    assert len(create("cdpruner", retention=0.75, relevance="none").select(tokens).keep) == 9


def test_cdpruner_by_clip_runs_where_the_caller_brings_the_signals() -> None:
    """The caller provides the CLIP signals; without them, the refusal names substitutes."""
    pipe = tp.load("testbed-next")
    image = Image.fromarray(torch.arange(64 * 96 * 3).view(64, 96, 3).to(torch.uint8).numpy())
    (tokens,) = pipe.encode([image])
    draw = torch.Generator().manual_seed(0)
    brought = replace(
        tokens,
        signals={CLIP[0]: torch.randn(len(tokens), 4, generator=draw)},
        text={CLIP[1]: torch.randn(1, 4, generator=draw)},
    )
    method = create("cdpruner", retention=0.3)
    inputs = pipe.assemble([[brought]], ["How many objects are there?"])
    with tp.compress(pipe.model, method, extra_signals=CLIP) as trace:
        pipe.model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(trace.selections[0].keep, method(brought).keep)
    with (
        tp.compress(pipe.model, method, extra_signals=CLIP),
        pytest.raises(UserError, match="provided"),
    ):
        pipe.model.generate(**pipe.assemble([[tokens]], ["How many?"]), max_new_tokens=2)
    with (
        pytest.raises(UserError, match=r"CLIP text encoder.*LLaVA-NeXT.*cdpruner:relevance=text"),
        tp.compress(pipe.model, method),
    ):
        pass
    with pytest.raises(UserError, match="needs the prompt"):
        pipe.select("cdpruner:relevance=text", [image], retention=0.3)


def test_cdpruner_by_text_follows_the_question() -> None:
    pipe = tp.load("testbed-next")
    image = next(iter(held_out(1, 0, "image"))).images[0].open()
    kept = []
    for question in ("How many objects are there?", "What digit is on the red square?"):
        with tp.compress(pipe.model, "cdpruner:relevance=text", retention=0.2) as trace:
            pipe.model.generate(**pipe.prepare([image], [question]), max_new_tokens=1)
        kept.append(trace.selections[0].keep.tolist())
    assert kept[0] != kept[1]
