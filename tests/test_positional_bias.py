"""Positional bias: statistics that find what is planted and nothing else, and the whole command."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy.stats import kstest
from torch import Tensor
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.allocators import Allocator, TopK
from tokenprune.cli import app
from tokenprune.compressor import Compressor, ScoringCompressor, Selection
from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.positional_bias import analysis, figures
from tokenprune.experiments.positional_bias.analysis import Analysis, positional_bias, selector_bias
from tokenprune.experiments.positional_bias.command import _p_value, tables
from tokenprune.experiments.positional_bias.estimates import (
    _without_rounding,
    agreement,
    equivariance,
    paired_bias,
    profiles,
    sign_flip,
    slope,
    statistics,
)
from tokenprune.experiments.positional_bias.rearrange import (
    CONDITIONS,
    CROPS,
    DEFAULT,
    NotPossible,
    move_pixels,
    move_tokens,
    origins,
    paired,
)
from tokenprune.experiments.positional_bias.run import PositionalBiasRequest, run
from tokenprune.layout import Kind, TokenLayout
from tokenprune.pipeline import Pipeline
from tokenprune.registry import strategies
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS
from tokenprune.tokens import VisualTokens

FULL = LAYOUTS["2x2"]
PADDED = LAYOUTS["2x2 padded"]
VIDEO = LAYOUTS["video"]


def encoded(count: int = 24, *layouts: TokenLayout) -> list[VisualTokens]:
    """Made-up images of the layouts in turn, by default of 2x2 crops."""
    some = layouts or (FULL,)
    return [sample_tokens(frozenset(), some[i % len(some)], seed=i) for i in range(count)]


def row(table: pd.DataFrame, condition: str, level: str = "selector", **fields: Any) -> pd.Series:
    """The only row of a condition."""
    chosen = (table["condition"] == condition) & (table["level"] == level)
    for name, value in fields.items():
        chosen &= table[name] == value
    (index,) = table.index[chosen]
    return table.loc[index]


# --- methods whose bias is known ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Planted(ScoringCompressor):
    """Scores content, plus ``late`` times the place in the sequence, plus ``right`` times x."""

    allocator: Allocator = field(default_factory=TopK)
    content: float = 1.0
    late: float = 0.0
    right: float = 0.0

    def score(self, tokens: VisualTokens) -> Tensor:
        layout = tokens.layout
        x = torch.where(
            layout.kind == Kind.CROP,
            (layout.canvas_col + 0.5) / max(layout.canvas_shape[1], 1),
            (layout.col + 0.5) / layout.view_shape[1],
        )
        place = torch.linspace(0, 1, len(tokens))
        return self.content * tokens.features[:, 0] + self.late * place + self.right * x


@dataclass(frozen=True, kw_only=True)
class Broken(Compressor):
    """Fails on every image but the first."""

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.features[0, 0] != encoded(1)[0].features[0, 0]:
            raise ValueError("no such token")
        return Selection(tokens.layout.patches[:3])


# --- statistics of arrays -------------------------------------------------------------------------


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
    assert found.low == pytest.approx(found.value)  # both images are alike


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
    # Ties may come apart by the rounding: the p-value lies between those of > and of >=.
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
    assert found.p == 1  # one score other than 0 cannot tell


def test_the_slope_and_its_p_value_are_of_one_sum() -> None:
    """Images of unlike sizes: whichever way the slope points, its p-value tests that."""
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
    text = _printed(found)
    assert "1.000" not in text
    assert "[-" not in text, "nor an interval"


def _printed(found: pd.DataFrame) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    return console.export_text()


def test_what_is_printed_beside_a_slope_is_its_own_p_value() -> None:
    methods = [Planted(retention=0.25, late=late) for late in (0.0, 0.2, 4.0)]
    found = selector_bias(methods, encoded(24)).statistics
    lines = _printed(found).splitlines()
    for method in methods:
        own = row(found, "reversed-crops", method=method.label)
        (line,) = (one for one in lines if f"{own['paired_slope']:+.2f} [" in one)
        assert _p_value(own["p"]) in line
        assert (own["p"] < 0.05) == (own["paired_slope_low"] > 0)


def test_paired_bias_passes_over_what_did_not_move() -> None:
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


def test_equivariance_leaves_out_what_has_no_counterpart() -> None:
    before, after = [1, 0, 1, 0], [0, 1, 0, 1]
    assert equivariance(before, after, [1, 0, 3, 2]) == 1
    assert equivariance(before, after, [1, 0, -1, -1]) == 1
    assert np.isnan(equivariance(before, after, [-1, -1, -1, -1]))
    assert np.isnan(equivariance([1] * 4, [1] * 4, [1, 0, 3, 2]))


# --- rearranging ----------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    grid = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]))
    shape = draw(st.tuples(st.integers(2, 4), st.integers(2, 4)))
    rows, cols = grid[0] * shape[0], grid[1] * shape[1]
    pad = draw(st.integers(0, (shape[0] - 1) // 2))
    if draw(st.booleans()):
        return TokenLayout.anyres(grid, shape, (pad, rows - pad, 0, cols))
    return TokenLayout.anyres(grid, shape, (0, rows, 0, cols))


@given(layouts(), st.sampled_from([one for one in CONDITIONS if one != "reversed-frames"]))
def test_origins_equal_a_slow_loop(layout: TokenLayout, condition: Any) -> None:
    found = origins(layout, condition).tolist()
    by_view: dict[int, list[int]] = {}
    for i, view in enumerate(layout.view.tolist()):
        by_view.setdefault(view, []).append(i)
    height, width = layout.view_shape
    for i, source in enumerate(found):
        kind, view = int(layout.kind[i]), int(layout.view[i])
        if kind == Kind.SEPARATOR and condition == "reversed-crops":
            # It still ends the row of what comes in front of it.
            assert layout.kind[source] == Kind.SEPARATOR
            assert layout.canvas_row[source] == layout.canvas_row[found[i - 1]]
        elif kind == Kind.SEPARATOR or (kind == Kind.THUMBNAIL and condition in CROPS):
            assert source == i
        elif condition in CROPS:
            partner = layout.views - view
            assert source == by_view[partner][by_view[view].index(i)]
        else:
            names = ("canvas_row", "canvas_col") if kind == Kind.CROP else ("row", "col")
            sizes = layout.canvas_shape if kind == Kind.CROP else (height, width)
            here = [int(getattr(layout, name)[i]) for name in names]
            there = [int(getattr(layout, name)[source]) for name in names]
            axis = int(condition == "flip-lr")
            here[axis] = sizes[axis] - 1 - here[axis]
            assert there == here
            assert layout.kind[source] == kind
    assert [found[i] for i in found] == list(range(len(layout)))


def test_the_thumbnail_has_no_counterpart_where_crops_move() -> None:
    aside = FULL.kind != Kind.CROP
    for condition in CROPS:
        assert ((paired(FULL, condition) == -1) == aside).all()
    assert ((paired(FULL, "flip-lr") == -1) == FULL.is_separator).all()


def test_reversed_frames() -> None:
    found = origins(VIDEO, "reversed-frames")
    assert found.tolist() == [12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3, 16]
    assert paired(VIDEO, "reversed-frames").tolist() == [*found.tolist()[:-1], -1]


@pytest.mark.parametrize(
    ("name", "condition", "why"),
    [
        ("one view", "reversed-crops", "fewer than two crops"),
        ("no rows", "reversed-crops", "no crop left"),
        ("2x2", "reversed-frames", "fewer than two frames"),
    ],
)
def test_what_cannot_be_reversed(name: str, condition: Any, why: str) -> None:
    with pytest.raises(NotPossible, match=why):
        origins(LAYOUTS[name], condition)


def test_crops_of_unlike_shapes_are_not_exchanged() -> None:
    lopsided = TokenLayout.anyres((1, 2), (4, 4), (0, 4, 1, 8))
    with pytest.raises(NotPossible, match="unlike shapes"):
        origins(lopsided, "reversed-crops")
    assert len(origins(lopsided, "flip-lr")) == len(lopsided)


@pytest.mark.parametrize("condition", ["flip-lr", "flip-tb", "exchanged-crops"])
def test_signals_move_with_their_features(condition: Any) -> None:
    signal = tp.create("globalcom2", retention=0.5).needs
    tokens = sample_tokens(signal, PADDED)
    moved = move_tokens(tokens, condition)
    source = origins(PADDED, condition)
    assert torch.equal(moved.features, tokens.features[source])
    for name in signal:
        assert torch.equal(
            moved.signals[name].nan_to_num(), tokens.signals[name][source].nan_to_num()
        )
    assert moved.seed != tokens.seed
    assert moved.layout is tokens.layout


@pytest.mark.parametrize("layout", [FULL, PADDED, LAYOUTS["1x3"], VIDEO])
def test_reversed_order_moves_whole_tokens(layout: TokenLayout) -> None:
    """All that is known of a token goes with it; crops or frames come last first, row by row."""
    signal = next(iter(tp.create("globalcom2", retention=0.5).needs))
    tokens = sample_tokens(frozenset({signal}), layout)
    video = layout.modality == "video"
    moved = move_tokens(tokens, "reversed-frames" if video else "reversed-crops")

    def entries(some: VisualTokens) -> list[tuple[float, ...]]:
        names = ("kind", "view", "row", "col", "canvas_row", "canvas_col")
        places = torch.stack([getattr(some.layout, name) for name in names], 1)
        values = [some.features, some.signals[signal].nan_to_num()[:, None]]
        return [tuple(one) for one in torch.cat([places.to(values[0]), *values], 1).tolist()]

    assert sorted(entries(moved)) == sorted(entries(tokens))
    assert moved.layout.view_sizes == layout.view_sizes
    last = layout.views - 1
    for before, after in zip(layout.view.tolist(), moved.layout.view.tolist(), strict=True):
        thumbnail, separator = before == 0 and not video, before < 0
        kept = thumbnail or separator
        assert after == (before if kept else last - before + int(not video))
    for view in range(layout.views):
        mine = moved.layout.view == view
        rows, cols = moved.layout.row[mine], moved.layout.col[mine]
        raster = rows * layout.view_shape[1] + cols
        assert raster.tolist() == sorted(raster.tolist())


def test_crops_of_an_image_change_places() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    for slot, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels[y : y + 4, x : x + 4] = 10 * slot
    pixels[0, 0] = 99  # the corner of the first crop becomes the corner of the last
    turned = np.asarray(move_pixels(Image.fromarray(pixels), "reversed-crops", FULL, 4))
    assert turned[::4, ::4, 0].tolist() == [[30, 20], [10, 99]]
    with pytest.raises(NotPossible, match="padded"):
        move_pixels(Image.new("RGB", (8, 6)), "reversed-crops", PADDED, 4)
    with pytest.raises(NotPossible, match="thumbnail"):
        move_pixels(Image.fromarray(pixels), "exchanged-crops", FULL, 4)


# --- planted biases and planted nulls -------------------------------------------------------------


def test_choice_by_position_is_found() -> None:
    found = selector_bias(["last", "first"], encoded(24))
    for method, sign in (("last", 1), ("first", -1)):
        normal = row(found.statistics, "normal", "normal", method=method)
        assert sign * normal["slope_low"] > 1
        for condition in ("reversed-crops", "flip-tb", "all"):
            assert row(found.statistics, condition, method=method)["p"] < 1e-6
        reversed_ = row(found.statistics, "reversed-crops", method="last")
        assert reversed_["equivariance"] == reversed_["equivariance_high"] == 0
        assert reversed_["paired_slope_low"] > 0.5
    last = row(found.statistics, "normal", "normal", method="last")
    assert last["last"] > 0.9 or last["last"] > last["first"]
    assert row(found.statistics, "reversed-crops", method="last")["last"] == last["last"]


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.6])
def test_choice_by_content_is_not_blamed(retention: float) -> None:
    """Exactly 1 and exactly p = 1, also where padding and rounding favour earlier views."""
    images = encoded(16, FULL, PADDED, LAYOUTS["1x3"], TokenLayout.video(4, (4, 4)))
    methods = ["feature-norm", "feature-norm:allocator=topk"]
    found = selector_bias(methods, images, retention=[retention])
    compared = found.statistics[found.statistics["condition"] != "normal"]
    assert set(compared["condition"]) == {*DEFAULT, "all"}
    assert (compared["p"] == 1).all()
    assert (compared["equivariance"] == 1).all()
    assert (compared["equivariance_low"] == 1).all()
    assert (compared["content_agreement"].dropna() >= 0.8).all()


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.6])
def test_globalcom2_follows_content(retention: float) -> None:
    """A crop keeps what the thumbnail grants it, whenever it comes in the sequence."""
    needs = tp.create("globalcom2", retention=0.5).needs
    some = [FULL, PADDED, LAYOUTS["1x3"], *(TokenLayout.video(n, (4, 4)) for n in (2, 3, 5))]
    images = [sample_tokens(needs, some[i % len(some)], seed=i) for i in range(24)]
    methods = ["globalcom2:tau=1.0", "last"]
    both: list[Any] = ["reversed-crops", "reversed-frames", "exchanged-crops"]
    found = selector_bias(methods, images, retention=[retention], conditions=both).statistics
    for modality, condition in (("image", "reversed-crops"), ("video", "reversed-frames")):
        here = found[found["modality"] == modality]
        ours = row(here, condition, method=methods[0])
        assert ours["equivariance"] == ours["equivariance_low"] == 1
        assert (ours["p"], ours["paired_slope"]) == (1, 0)
        assert row(here, condition, method="last")["equivariance"] == 0
        together = row(here, "all", method=methods[0])
        assert together["equivariance"] == 1, "exchanged crops are no part of it"
    exchanged = row(found, "exchanged-crops", method=methods[0])
    assert exchanged["equivariance"] < 0.9, "the thumbnail speaks of other crops"


def test_crops_are_exchanged_only_where_asked_for() -> None:
    assert "exchanged-crops" not in set(selector_bias(["last"], encoded(2)).statistics["condition"])
    found = selector_bias(["last"], encoded(2), conditions=["exchanged-crops"]).statistics
    assert list(found["condition"]) == ["normal", "exchanged-crops"]


def test_tables_of_all_conditions_are_legible() -> None:
    found = selector_bias(["feature-norm"], encoded(2), conditions=CONDITIONS).statistics
    text = _printed(found)
    for word in ("feature-norm", *CONDITIONS):
        assert word in text or word == "reversed-frames"
    assert max(map(len, text.splitlines())) <= 80


def test_exchanged_crops_have_no_pipeline(testbed: Pipeline, pictures: list[Image.Image]) -> None:
    asked: dict[str, Any] = {"conditions": ["exchanged-crops"]}
    with pytest.raises(UserError, match="add the level 'selector'"):
        positional_bias(testbed, ["last"], pictures[:1], levels=["pipeline"], **asked)
    found = positional_bias(testbed, ["globalcom2:tau=1"], pictures[:2], **asked)
    assert not found.skipped
    assert set(found.statistics["level"]) == {"normal", "selector"}


def test_more_planted_bias_is_less_equivariance() -> None:
    methods = [Planted(retention=0.25, late=late) for late in (0.0, 1.0, 4.0, 1e4)]
    found = selector_bias(methods, encoded(24), conditions=["reversed-crops"])
    rows = found.statistics[found.statistics["condition"] == "reversed-crops"]
    values = rows["equivariance"].tolist()
    assert values[0] == 1
    assert values[3] == 0
    assert values == sorted(values, reverse=True)
    assert rows["p"].iloc[0] == 1
    assert (rows["p"].iloc[1:] < 1e-3).all()
    assert rows["paired_slope"].is_monotonic_increasing


def test_bias_to_a_side_is_seen_by_the_flip_across() -> None:
    found = selector_bias([Planted(retention=0.25, right=2.0)], encoded(24)).statistics
    across, down = row(found, "flip-lr"), row(found, "flip-tb")
    assert across["p"] < 1e-6
    assert across["paired_slope_low"] > 0.1
    assert down["p"] == 1  # the same columns, the same choice
    assert down["equivariance"] == 1


@pytest.mark.parametrize("condition", ["reversed-crops", "flip-tb"])
def test_random_is_uniform_over_seeds(condition: Any) -> None:
    # Over the whole sequence, or else equal budgets leave reversed crops nothing to vary.
    methods = [f"random:seed={seed},allocator=topk" for seed in range(40)]
    small = TokenLayout.anyres((2, 1), (3, 3), (0, 6, 0, 3))
    found = selector_bias(methods, encoded(20, small), conditions=[condition])
    rows = found.statistics[found.statistics["condition"] == condition]
    assert len(rows) == 40
    assert kstest(rows["p"], "uniform").pvalue > 0.01
    assert rows["equivariance"].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("retention", [0.3, 0.5])
def test_random_within_equal_budgets(retention: float) -> None:
    """Crops keep what they kept, so that nothing can be held against it, not even rounding."""
    methods = [f"random:seed={seed}" for seed in range(3)]
    found = selector_bias(methods, encoded(20, FULL, PADDED), retention=[retention])
    rows = found.statistics
    assert (rows["p"][rows["condition"] == "reversed-crops"] == 1).all()
    assert (rows["p"].dropna() > 0.001).all()


def test_rounding_errors_are_no_evidence() -> None:
    """Sums that are 0 on paper: a token moved by a third gone, one moved by a third come."""
    before, after = np.tile([1, 0, 0], 30), np.tile([0, 1, 0], 30)
    where = np.tile([0.1, 0.2, 0.3], 30) * np.arange(1, 31).repeat(3) / 30
    found = paired_bias(before, after, where, where + 0.1, np.arange(30).repeat(3))
    assert found.p == 1
    assert (found.scores == 0).all()


def test_real_differences_between_slots_are_not_rounding() -> None:
    """Fixed budgets that differ by more than a token are a preference for places."""

    @dataclass(frozen=True)
    class Favours(Allocator):
        def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
            return torch.tensor([4, 2, 2, 2, 5])

    method = Planted(retention=0.25, allocator=Favours())
    both: list[Any] = ["reversed-crops", "exchanged-crops"]
    found = selector_bias([method], encoded(24), conditions=both).statistics
    assert row(found, "exchanged-crops")["p"] < 1e-6
    assert row(found, "exchanged-crops")["equivariance"] < 1
    # The preference is for crops, which take it along when they come in another order.
    assert row(found, "reversed-crops")["equivariance"] == 1


@pytest.mark.parametrize("now", [[1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
def test_only_budgets_that_stay_are_rounded(now: list[int]) -> None:
    """A view of three keeps 3 and one keeps 2; content alone would have them change places."""
    by_position = np.array([1, 1, 1, 1, 1, 0], bool)
    by_content = np.array([1, 1, 0, 1, 1, 1], bool)
    stays = _without_rounding(
        by_content, by_position, by_position, np.array([0, 0, 0, 1, 1, 1]), np.zeros(6)
    )
    assert stays[0].tolist() == by_content.tolist()
    changes = _without_rounding(
        by_content, by_position, np.array(now, bool), np.array([0, 0, 0, 1, 1, 1]), np.zeros(6)
    )
    assert changes[0].tolist() == [bool(one) for one in now]
    assert changes[2].tolist() == now
    assert changes[1].sum() == by_content.sum()


def test_everything_kept_tells_nothing() -> None:
    found = selector_bias(["last"], encoded(4), retention=[1.0]).statistics
    both = row(found, "reversed-crops")
    assert np.isnan(both["equivariance"])
    assert both["defined"] == 0
    assert both["p"] == 1
    assert row(found, "normal", "normal")["slope"] == pytest.approx(0, abs=1e-12)


def test_scores_are_noted() -> None:
    images = encoded(2)
    method = Planted(retention=0.25, late=3.0)
    tokens = selector_bias([method, "uniform"], images).tokens
    part = tokens[(tokens["method"] == method.label) & (tokens["condition"] == "reversed-crops")]
    for image, rows in part.groupby("image"):
        moved = move_tokens(images[image], "reversed-crops")
        expected = method.score(moved)[FULL.patches].numpy()
        np.testing.assert_allclose(rows["score"], expected, rtol=1e-6)
        assert rows["score"][rows["kept"]].min() >= rows["score"][~rows["kept"]].max()
    assert tokens["score"][tokens["method"] == "uniform"].isna().all()


def test_images_without_fingerprint_are_told_apart() -> None:
    plain = [VisualTokens(one.layout, one.features) for one in encoded(3)]
    tokens = selector_bias(["feature-norm"], plain, conditions=["flip-lr"]).tokens
    normal = tokens[tokens["condition"] == "normal"]
    for image, rows in normal.groupby("image"):
        norms = plain[image].features.norm(dim=-1)[FULL.patches]
        np.testing.assert_allclose(rows["score"], norms.numpy(), rtol=1e-6)


def test_random_draws_anew_for_images_without_fingerprint() -> None:
    """One draw for all images would look like a preference for its places."""
    plain = [VisualTokens(one.layout, one.features) for one in encoded(24)]
    found = selector_bias(["random:allocator=topk"], plain)
    assert (found.statistics["p"].dropna() > 1e-3).all()
    kept = found.tokens.groupby(["condition", "token"], observed=True)["kept"].mean()
    assert kept.between(0, 1, inclusive="neither").all()


def test_profiles_by_hand() -> None:
    found = selector_bias(["last"], encoded(2), conditions=["reversed-crops"])
    table = found.profiles
    normal = table[table["condition"] == "normal"]
    slots = normal[normal["axis"] == "slot"].set_index("place")["kept"]
    # The last 20 of 80 patches: two rows of 8 and the right half of a row of the 8 x 8 canvas.
    assert slots.tolist() == pytest.approx([0, 0, 8 / 16, 12 / 16])
    views = normal[normal["axis"] == "view"].set_index("place")["kept"]
    assert views[0] == 0
    sequence = profiles(found.tokens, bins=4)
    sequence = sequence[(sequence["axis"] == "position") & (sequence["condition"] == "normal")]
    assert sequence["place"].tolist() == [0.125, 0.375, 0.625, 0.875]
    tokens = found.tokens[found.tokens["condition"] == "normal"]
    for place, kept in zip(sequence["place"], sequence["kept"], strict=True):
        inside = tokens["kept"][(tokens["position"] - place).abs() < 0.125]
        assert kept == pytest.approx(inside.mean())
    assert (sequence["kept_low"] == sequence["kept_high"]).all()


def test_statistics_can_be_made_again_from_the_table(tmp_path: Path) -> None:
    found = selector_bias(["random"], encoded(6), seed=3)
    found.tokens.to_parquet(tmp_path / "tokens.parquet")
    again = statistics(pd.read_parquet(tmp_path / "tokens.parquet"), seed=3)
    pd.testing.assert_frame_equal(again, found.statistics)


def test_a_method_that_fails_costs_only_itself() -> None:
    found = selector_bias([Broken(retention=0.1), "uniform"], encoded(4))
    assert list(found.failures) == [("Broken", 0.1)]
    assert found.failures["Broken", 0.1].error == "ValueError: no such token"
    assert set(found.statistics["method"]) == {"uniform"}
    assert selector_bias([Broken(retention=0.1)], encoded(4)).statistics.empty


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["unifrom"]}, "uniform"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["fastv"]}, "use positional_bias with a model"),
        ({"conditions": ["reversed-crop"]}, "reversed-crops"),
        ({"encoded": []}, "at least one image"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"methods": ["uniform"], "encoded": encoded(1)} | arguments
    with pytest.raises(UserError, match=message):
        selector_bias(given.pop("methods"), given.pop("encoded"), **given)


# --- in a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def testbed() -> Pipeline:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Six images of the testbed, one of them on a padded canvas."""
    questions = held_out(200, seed=0)[::5]
    images = [item.images[0].open() for item in questions]
    padded = [image for image in images if image.size == (112, 80)]
    return [image for image in images if image.size == (112, 112)][:5] + padded[:1]


@pytest.fixture(scope="module")
def result(testbed: Pipeline, pictures: list[Image.Image]) -> Analysis:
    methods = ["feature-norm", "globalcom2", "fastv", "pyramiddrop", "uniform@0.5 + fastv@0.5"]
    return positional_bias(testbed, methods, pictures, batch_size=4)


def test_crops_show_the_tower_the_same_pixels(
    testbed: Pipeline, pictures: list[Image.Image]
) -> None:
    """Reversed pixels, encoded anew, are the reversed features; only the thumbnail differs."""
    (tokens,) = testbed.encode(pictures[:1])
    turned = move_pixels(pictures[0], "reversed-crops", tokens.layout, 56)
    assert isinstance(turned, Image.Image)
    (again,) = testbed.encode([turned])
    moved = move_tokens(tokens, "reversed-crops")
    crops = tokens.layout.kind == Kind.CROP
    torch.testing.assert_close(again.features[crops], moved.features[crops])
    assert not torch.allclose(again.features[~crops], moved.features[~crops], atol=1e-2)


def test_levels_and_skipped_images(result: Analysis) -> None:
    assert result.skipped == {("reversed-crops", "pipeline", "a padded canvas"): 1}
    table = result.statistics
    for condition in ("reversed-crops", "flip-lr", "flip-tb", "all"):
        assert row(table, condition, method="feature-norm")["equivariance"] == 1
    exact = row(table, "reversed-crops", "pipeline", method="feature-norm")
    assert exact["images"] == 5
    assert exact["equivariance"] == 1
    # A vision transformer does not encode a mirrored image as the mirrored encoding.
    assert row(table, "flip-lr", "pipeline", method="feature-norm")["equivariance"] < 0.9


def kept(result: Analysis, method: str, image: int, condition: str) -> list[int]:
    table = result.tokens
    chosen = table[
        (table["method"] == method)
        & (table["image"] == image)
        & (table["condition"] == condition)
        & table["level"].isin(["normal", "selector"])
        & table["kept"]
    ]
    return [int(token) for token in chosen["token"]]


@pytest.mark.parametrize("condition", ["normal", "reversed-crops", "flip-lr"])
@pytest.mark.parametrize("spec", ["globalcom2", "fastv", "pyramiddrop", "uniform@0.5 + fastv@0.5"])
def test_choices_are_those_of_the_engine(
    testbed: Pipeline, pictures: list[Image.Image], result: Analysis, spec: str, condition: Any
) -> None:
    """Also where several images run in one batch, against one prompt at a time."""
    method = tp.parse(spec) if "@" in spec else tp.parse(spec, retention=0.25)
    outside = [signal for signal in method.needs if not signal.in_llm]
    for image in (0, 5):
        (tokens,) = testbed.encode([pictures[image]], outside)
        if condition != "normal":
            tokens = move_tokens(tokens, condition)
        inputs = testbed.assemble([[tokens]], ["What is in the image?"])
        with tp.compress(testbed.model, method) as trace, torch.no_grad():
            testbed.model(**inputs)
        keep = trace.selections[-1].keep
        patches = keep[~tokens.layout.is_separator[keep]].tolist()
        assert kept(result, method.label, image, condition) == patches


def test_reversed_crops_are_a_permuted_prompt_of_the_plain_model(
    testbed: Pipeline, pictures: list[Image.Image], result: Analysis
) -> None:
    """FastV's choice from the attention that the model pays to a sequence permuted by hand."""
    (tokens,) = testbed.encode(pictures[:1])
    assert tokens.layout.grid == (2, 2)
    order = list(range(49))
    for line, column in itertools.product(range(14), range(15)):
        top, left = 1 - line // 7, 1 - column // 7  # of the other crop
        other = (7 * top + line % 7, 7 * left + column % 7)
        y, x = other if column < 14 else (other[0], 14)
        order.append(49 + 15 * y + x)
    eager = tp.load("testbed-next", attn_implementation="eager").model
    inputs = testbed.assemble([[tokens]], ["What is in the image?"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = eager.get_input_embeddings()(ids).detach()
    visual = ids[0] == testbed.adapter.facts.placeholders["image"]
    embeds[0, visual] = tokens.features[order]
    with torch.no_grad():
        seen = eager(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
    scores = seen.attentions[1][0].mean(0)[-1, visual]
    patches = [place for place in range(len(order)) if not tokens.layout.is_separator[place]]
    best = sorted(patches, key=lambda place: -float(scores[place]))[: round(0.25 * len(patches))]
    assert kept(result, "fastv", 0, "reversed-crops") == sorted(best)


def test_scores_inside_the_model_are_those_that_rank(result: Analysis) -> None:
    table = result.tokens[(result.tokens["method"] == "fastv") & (result.tokens["image"] == 1)]
    for _, rows in table.groupby(["condition", "level"], observed=True):
        assert rows["score"][rows["kept"]].min() >= rows["score"][~rows["kept"]].max()
        assert rows["score"].between(0, 1).all()


def test_first_cut_keeps_more_than_the_last(result: Analysis) -> None:
    table = result.tokens[result.tokens["method"] == "pyramiddrop"]
    assert (table["kept_first"] | ~table["kept"]).all()
    assert table["kept_first"].sum() > table["kept"].sum()


def test_the_model_is_left_alone(testbed: Pipeline, pictures: list[Image.Image]) -> None:
    hooks = sum(len(module._forward_pre_hooks) for module in testbed.model.modules())
    method = tp.parse("fastv", retention=0.25)
    positional_bias(testbed, [method], pictures[:1], conditions=["flip-lr"], levels=["selector"])
    assert sum(len(module._forward_pre_hooks) for module in testbed.model.modules()) == hooks
    assert "score" not in vars(method)


def test_figures_show_the_table(result: Analysis) -> None:
    made = dict(figures.figures(result.tokens, result.statistics, "testbed-next"))
    assert set(made) == {
        f"{name}-image-25" for name in ("slots", "sequence", "map", "equivariance")
    }
    (canvas,) = made["map-image-25"].axes[0].images
    norms = result.tokens[
        (result.tokens["method"] == "feature-norm")
        & (result.tokens["condition"] == "normal")
        & (result.tokens["kind"] == "crop")
        & (result.tokens["image"] < 5)
    ]
    rows = norms["row"] + 7 * (norms["slot"] // 2)
    cols = norms["col"] + 7 * (norms["slot"] % 2)
    cell = norms["kept"][(rows == 3) & (cols == 9)]
    assert canvas.get_array()[3, 9] == pytest.approx(cell.mean())
    assert canvas.get_array().shape == (14, 14)
    axes = made["slots-image-25"].axes[1]
    assert axes.get_title(loc="left") == "globalcom2"
    heights = [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
    shares = result.tokens[
        (result.tokens["method"] == "globalcom2")
        & (result.tokens["condition"] == "normal")
        & (result.tokens["slot"] >= 0)
        & (result.tokens["image"] < 5)
    ]
    expected = shares.groupby("slot")["kept"].mean().tolist()
    assert heights[:4] == pytest.approx(expected)


# --- the command ----------------------------------------------------------------------------------


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["positional-bias", *words])


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = "--methods last random --images 24 -r 0.25 --conditions reversed-crops"
    found = invoke(*words.split(), "--out", str(out))
    assert found.exit_code == 0, found.output
    assert max(map(len, found.output.split("SKIPPED")[0].splitlines())) <= 80
    assert {path.name for path in out.iterdir()} == {
        *(
            "manifest.json",
            "manifest.backup.json",
            "tokens.parquet",
            "statistics.csv",
            "profiles.csv",
            "plots",
            "parts",
        )
    }
    assert (out / "plots" / "slots-image-25.png").stat().st_size > 10_000
    table = pd.read_csv(out / "statistics.csv")
    assert row(table, "reversed-crops", method="last")["p"] < 1e-5
    assert row(table, "reversed-crops", method="random")["p"] > 0.01
    tokens = pd.read_parquet(out / "tokens.parquet")
    assert tokens["image_id"].nunique() == 24
    assert "last" in found.output
    assert "with a padded canvas" in found.output


def _stopped(request: PositionalBiasRequest, calls: int) -> None:
    """Begin a run and press Ctrl-C when it reports for the ``calls``-th time that it works."""
    seen: list[str] = []

    def report(done: int, total: int, doing: str) -> None:
        seen.append(doing)
        if total and len([one for one in seen if " at " in one]) == calls:
            raise KeyboardInterrupt

    outcome = run(request, report)
    assert outcome.status == "interrupted"
    assert 0 < outcome.answered < outcome.wanted
    assert not outcome.tables


@pytest.mark.parametrize("batch_size", [4, 3])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """Nothing is lost, doubled or computed again, with batches of another size either."""
    monkeypatch.setattr(figures, "figures", lambda *_: [])
    asked: dict[str, Any] = {
        "methods": ("globalcom2", "fastv"), "retention": (0.5, 0.25), "images": 10,
    }  # fmt: skip
    whole = run(PositionalBiasRequest(**asked, batch_size=4, out=tmp_path / "whole"))
    out = tmp_path / "run"
    _stopped(
        PositionalBiasRequest(**asked, batch_size=4, out=out), 7
    )  # amid the second batch of four
    assert not (out / "tokens.parquet").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    there = pd.concat(map(pd.read_parquet, (out / "parts").glob("*.parquet")))
    assert there.groupby(["method", "retention"])["image"].nunique().sum() == 4 * 4 + 2 * 4

    counted: list[int] = []
    real = analysis._selections

    def counting(adapter: Any, compressor: Any, cases: Any, prompts: Any) -> Any:
        counted.extend(case.image for case in cases if case.condition == "normal")
        return real(adapter, compressor, cases, prompts)

    monkeypatch.setattr(analysis, "_selections", counting)
    again = run(PositionalBiasRequest(**asked, batch_size=batch_size, out=out))
    assert sorted(counted) == sorted([*range(4, 8)] * 2 + [*range(8, 10)] * 4)
    if batch_size == 4:
        pd.testing.assert_frame_equal(again.tables["tokens"], whole.tables["tokens"])
        pd.testing.assert_frame_equal(again.tables["statistics"], whole.tables["statistics"])
    keys = ["method", "retention", "image", "condition", "level", "token"]
    assert not again.tables["tokens"].duplicated(keys).any()
    assert again.tables["tokens"][keys].astype(str).equals(whole.tables["tokens"][keys].astype(str))
    assert again.notes == whole.notes
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"

    counted.clear()
    run(PositionalBiasRequest(**asked, out=out))
    assert not counted, "all of it was there"


def test_what_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "figures", lambda *_: [])
    request = PositionalBiasRequest(methods=("last", "first"), images=3, out=tmp_path / "run")
    real = type(tp.create("last", retention=0.5)).select
    with monkeypatch.context() as broken:
        broken.setattr(type(tp.create("last", retention=0.5)), "select", lambda *_: 1 / 0)
        found = run(request)
    assert set(found.tables["tokens"]["method"]) == {"first"}
    assert list(found.failures) == ["last at 0.25"]
    assert type(tp.create("last", retention=0.5)).select is real
    found = run(request)
    assert not found.failures
    assert found.tables["tokens"].groupby("method", observed=True)["image"].nunique().to_dict() == {
        "last": 3, "first": 3,
    }  # fmt: skip


def test_runs_of_other_methods_do_not_mix(tmp_path: Path) -> None:
    """The same names and retentions, put together otherwise."""
    out = tmp_path / "run"
    run(PositionalBiasRequest(methods=("last@0.5", "first@0.25"), images=2, out=out))
    with pytest.raises(UserError, match="holds another experiment"):
        run(PositionalBiasRequest(methods=("last@0.25", "first@0.5"), images=2, out=out))


def test_all_are_those_that_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["last", "tome", "cdpruner"]
    monkeypatch.setattr(strategies, "names", lambda: names)
    found = invoke("--methods", "all", "--images", "1", "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.output
    assert "SKIPPED tome: tome acts inside the vision encoder" in found.output
    assert "SKIPPED cdpruner: cdpruner needs a CLIP text encoder" in found.output
    assert set(pd.read_csv(tmp_path / "run" / "statistics.csv")["method"]) == {"last"}


def test_own_images_and_videos(tmp_path: Path) -> None:
    frames = [picture.open() for picture in held_out(1, 0, "video")[0].images]
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"{index}.png")
    names = ", ".join(f'"{index}.png"' for index in range(len(frames)))
    lines = [
        '{"image": "0.png", "question": "what digit", "answer": "1"}',
        '{"image": "0.png", "question": "another", "answer": "1"}',
        '{"images": ["0.png", "1.png"], "question": "what", "answer": "1"}',
        f'{{"video": [{names}], "question": "what digit", "answer": "1"}}',
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines))
    asked = PositionalBiasRequest(
        model="testbed-onevision", methods=("last",), data=file, out=tmp_path / "run"
    )
    found = run(asked)
    assert found.tables["tokens"].groupby("modality")["image"].nunique().to_dict() == {
        "image": 1,
        "video": 1,
    }
    assert "SKIPPED: 1 image with several images in one prompt." in found.notes
    video = row(found.tables["statistics"], "reversed-frames", modality="video")
    assert video["equivariance"] == 0
    assert not (found.tables["statistics"]["condition"] == "reversed-crops")[
        found.tables["statistics"]["modality"] == "video"
    ].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods unifrom", "uniform"),
        ("--methods tome", "inside the vision encoder"),
        ("--conditions sideways", "condition"),
        ("--images 0", "at least 1"),
        ("-r 25", "at most 1"),
        ("--modality sound", "modality"),
        ("--modality video", "takes images only"),
        ("no-such.png", "no image"),
        ("a.png --data b.jsonl", "not both"),
    ],
)
def test_bad_input(words: str, message: str, tmp_path: Path) -> None:
    found = invoke(*words.split(), "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert message in found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize("condition", ["flip-lr", "flip-tb", "reversed-crops"])
def test_photos_are_upright_before_they_are_flipped(condition: Any) -> None:
    upright = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    photo = upright.rotate(90)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees the other way
    moved, expected = (move_pixels(one, condition, FULL, 4) for one in (photo, upright))
    assert np.array_equal(np.asarray(moved), np.asarray(expected))
