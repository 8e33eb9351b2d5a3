"""Positional bias: planted biases are found, and methods without bias are not blamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from planted import FULL, PADDED, Planted, encoded, printed, row
from scipy.stats import kstest
from torch import Tensor

import tokenprune as tp
from tokenprune.allocators import Allocator
from tokenprune.compressor import Compressor, Selection
from tokenprune.errors import UserError
from tokenprune.experiments.positional_bias.analysis import selector_bias
from tokenprune.experiments.positional_bias.estimates import (
    _without_rounding,
    paired_bias,
    profiles,
    statistics,
)
from tokenprune.experiments.positional_bias.rearrange import (
    CONDITIONS,
    DEFAULT,
    move_tokens,
)
from tokenprune.layout import TokenLayout
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Broken(Compressor):
    """Fails on every image but the first."""

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.features[0, 0] != encoded(1)[0].features[0, 0]:
            raise ValueError("no such token")
        return Selection(tokens.layout.patches[:3])


def test_selection_by_position_is_detected() -> None:
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
def test_selection_by_content_shows_no_bias(retention: float) -> None:
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
    """A crop keeps its budget from the thumbnail, at any place in the sequence."""
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
    text = printed(found)
    for word in ("feature-norm", *CONDITIONS):
        assert word in text or word == "reversed-frames"
    assert max(map(len, text.splitlines())) <= 80


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
    assert down["p"] == 1  # the same columns, the same selection
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
    """Crops keep the same numbers, so there is no evidence of bias, not even from rounding."""
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
    """Fixed budgets that differ by more than a token are a positional bias."""

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
    """Two views keep 3 and one keeps 2; by content alone the numbers would move."""
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


def test_full_retention_has_no_evidence() -> None:
    found = selector_bias(["last"], encoded(4), retention=[1.0]).statistics
    both = row(found, "reversed-crops")
    assert np.isnan(both["equivariance"])
    assert both["defined"] == 0
    assert both["p"] == 1
    assert row(found, "normal", "normal")["slope"] == pytest.approx(0, abs=1e-12)


def test_scores_are_recorded() -> None:
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


def test_images_without_fingerprint_are_distinguished() -> None:
    plain = [VisualTokens(one.layout, one.features) for one in encoded(3)]
    tokens = selector_bias(["feature-norm"], plain, conditions=["flip-lr"]).tokens
    normal = tokens[tokens["condition"] == "normal"]
    for image, rows in normal.groupby("image"):
        norms = plain[image].features.norm(dim=-1)[FULL.patches]
        np.testing.assert_allclose(rows["score"], norms.numpy(), rtol=1e-6)


def test_random_draws_again_for_images_without_fingerprint() -> None:
    """A single draw for all images would look like a positional bias."""
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
