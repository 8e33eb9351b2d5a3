"""PACT and FitPrune against slow loops written from the specification."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenprune.attention import proportional_mask
from tokenprune.compressor import Compressor, Selection, cut_layer
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.dropping import proportional
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.ops.clustering import dispersed, kernel_density, least_cutoff
from tokenprune.ops.ranking import top
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.strategies._fitprune_schedule import fit
from tokenprune.strategies._golden.dart import Official
from tokenprune.strategies.pact import GLOBAL, KEYS
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens


def _distances(size: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(size, 3, generator=draw), dim=-1)
    half = (1 - unit @ unit.T).clamp(min=0).triu(1)
    return half + half.T


def _walk(distance: Tensor, density: Tensor, cutoff: float) -> list[int]:
    """Densest first, everyone that is far from all chosen before."""
    rows, worth = distance.tolist(), density.tolist()
    chosen: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-worth[i], i)):
        if all(rows[i][j] > cutoff for j in chosen):
            chosen.append(i)
    return sorted(chosen)


# -- primitives ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.floats(0, 2), st.integers(0, 9))
def test_dispersed_is_a_walk_from_point_to_point(size: int, cutoff: float, seed: int) -> None:
    distance = _distances(size, seed)
    density = kernel_density(distance)
    for ties in (density, density.round(), torch.ones(size)):
        found = dispersed(distance, ties, cutoff)
        assert found.nonzero().squeeze(1).tolist() == _walk(distance, ties, cutoff)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 25), st.integers(0, 9), st.data())
def test_least_cutoff_is_where_the_count_falls(size: int, seed: int, data: Any) -> None:
    count = data.draw(st.integers(1, size))
    distance = _distances(size, seed)
    density = kernel_density(distance)
    cutoff, found = least_cutoff(distance, density, count)
    assert found.nonzero().squeeze(1).tolist() == _walk(distance, density, cutoff)
    assert 1 <= int(found.sum()) <= count
    if cutoff:
        step = float(distance.max()) / 2**16
        assert len(_walk(distance, density, cutoff - 1.5 * step)) > count
    assert least_cutoff(distance, density, count, 1.9)[0] >= 1.9


def test_kernel_density_by_hand() -> None:
    density = kernel_density(torch.tensor([[0.0, 1, 2], [1, 0, 0.5], [2, 0.5, 0]]))
    wanted = [1 + math.exp(-1 / 4) + math.exp(-1), 1 + math.exp(-1 / 4) + math.exp(-1 / 16)]
    torch.testing.assert_close(density[:2], torch.tensor(wanted))


def test_top_takes_earlier_ones_on_ties() -> None:
    assert top(torch.tensor([1.0, 3, 3, 0, 3]), 2).tolist() == [1, 2]


# -- PACT ----------------------------------------------------------------------------------------


def _pact_slowly(
    tokens: VisualTokens, important: float, cutoff: float
) -> dict[int, tuple[Tensor, int]]:
    """Index of every centre to its feature and size, for a given cutoff."""
    patches = tokens.layout.patches.tolist()
    keys, states = tokens.signals[KEYS], tokens.features
    far = {
        (i, j): max(0.0, 1 - float(torch.dot(keys[i] / keys[i].norm(), keys[j] / keys[j].norm())))
        for i in patches
        for j in patches
    }
    score = {i: float(tokens.signals[GLOBAL][i] * states[i].norm()) for i in patches}
    ranked = sorted(patches, key=lambda i: -score[i])
    stay = ranked[: int(important * len(patches) + 1e-9)]
    density = {
        i: sum(math.exp(-((0.0 if i == j else far[i, j] / 2) ** 2)) for j in stay) for i in stay
    }
    centres: list[int] = []
    for i in sorted(stay, key=lambda i: -density[i]):
        if all(far[i, j] > cutoff for j in centres):
            centres.append(i)
    members: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in patches:
        nearest = i if i in centres else min(centres, key=lambda c: far[i, c])
        if i in stay or far[i, nearest] <= 1.5 * cutoff:
            members[nearest].append(i)
    return {c: (states[some].mean(0), len(some)) for c, some in members.items()}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([0.05, 0.21, 0.5, 1.0]), st.sampled_from([0.3, 0.55, 1.0]), st.integers(0, 9)
)
def test_pact_with_a_given_cutoff_equals_loops(cutoff: float, important: float, seed: int) -> None:
    layout = TokenLayout.anyres((1, 2), (4, 4), (0, 4, 0, 8))
    tokens = sample_tokens(frozenset({GLOBAL, KEYS}), layout, seed=seed)
    method = create("pact", retention=0.99, important=important, cutoff=cutoff)
    chosen, wanted = method.select(tokens), _pact_slowly(tokens, important, cutoff)
    if important == 1 and len(wanted) == 48:  # R allows 47
        return
    assert chosen.keep.tolist() == sorted(wanted)
    assert chosen.features is not None
    assert chosen.sizes is not None
    assert chosen.sizes.tolist() == [wanted[i][1] for i in sorted(wanted)]
    for index, feature in zip(chosen.keep.tolist(), chosen.features, strict=True):
        torch.testing.assert_close(feature, wanted[index][0])


@pytest.mark.parametrize("retention", [0.05, 0.1, 0.3, 0.6, 0.95])
def test_pact_spends_the_budget_unless_the_cutoff_is_larger(retention: float) -> None:
    layout = TokenLayout.single((12, 12))
    tokens = sample_tokens(frozenset({GLOBAL, KEYS}), layout, seed=1)
    kept = len(create("pact", retention=retention).select(tokens).keep)
    assert int(144 * retention) - 3 <= kept <= int(144 * retention)
    wide = create("pact", retention=retention, cutoff=0.9).select(tokens)
    assert len(wide.keep) < 10
    plain = create("pact", retention=retention, proportional=False).select(tokens)
    assert plain.sizes is None


# -- attention in proportion to sizes ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_a_key_of_size_three_counts_like_three_keys(kind: str) -> None:
    """The last two of four queries, over keys of which the second stands for three."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=draw) for n in (2, 4, 4))
    sizes = torch.tensor([[1.0, 3, 1, 1]])
    causal = torch.tensor([[True, True, True, False], [True, True, True, True]])[None, None]
    least = torch.finfo(torch.float32).min
    given = {
        "none": None,
        "bool": causal,
        "additive": torch.zeros(1, 1, 2, 4).masked_fill(~causal, least),
    }
    mask = proportional_mask(given[kind], sizes, 2, torch.float32)
    attend = torch.nn.functional.scaled_dot_product_attention
    got = attend(query, key, value, attn_mask=mask)
    order = torch.tensor([0, 1, 1, 1, 2, 3])
    want = attend(query, key[:, :, order], value[:, :, order], attn_mask=causal[..., order])
    torch.testing.assert_close(got, want)


def test_sizes_live_on_the_cache() -> None:
    """Sizes follow rows, are cropped with the cache, and are 1 for new entries."""
    layer = PrunedLayer(DynamicLayer(), torch.ones(2, 0, dtype=torch.bool))
    sizes = torch.tensor([[1.0, 2, 1], [1, 5, 1]])
    layer.expect(torch.ones(2, 4, dtype=torch.bool))
    layer.expect(torch.ones(2, 3, dtype=torch.bool), 1, sizes)  # one column is left out
    layer.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    layer.expect(torch.ones(2, 1, dtype=torch.bool))
    assert layer.sizes is not None
    assert layer.sizes.tolist() == [[1, 2, 1, 1], [1, 5, 1, 1]]
    layer.update(torch.zeros(2, 1, 1, 4), torch.zeros(2, 1, 1, 4))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.sizes.tolist() == [[1, 5, 1, 1]] * 2
    layer.crop(-1)
    assert layer.sizes.shape == layer.valid.shape
    layer.reset()
    assert layer.sizes is None


def test_other_attention_kernels_are_refused() -> None:
    config = SimpleNamespace(_attn_implementation="flash_attention_2")
    with pytest.raises(UserError, match="flash_attention_2; load it with"):
        proportional(config, None, torch.ones(1, 2), torch.zeros(1, 2, 4))


class _Sized(Compressor):
    """Returns sizes in front of the language model."""

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(tokens.layout.patches[:1], sizes=torch.tensor([3.0]))


def test_sizes_in_front_of_the_language_model_are_refused() -> None:
    host = Host.tiny("LLaVA-NeXT")
    with (
        compress(host.model, _Sized(retention=0.5)),
        pytest.raises(UserError, match="sizes inside the language model only"),
    ):
        host.logits(host.inputs((0,)))


# -- FitPrune ------------------------------------------------------------------------------------


def test_fitprune_keeps_the_largest_products() -> None:
    layout = TokenLayout.single((2, 3))
    seen = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.2, 0.3, 9.0])
    asked = torch.tensor([0.1, 0.9, 0.5, 0.4, 0.2, 0.6, 9.0])  # products 9 9 25 20 4 18
    signals = {Signal("llm_self"): seen, Signal("llm_cross"): asked}
    tokens = VisualTokens(layout, torch.zeros(7, 2), signals)
    assert create("fitprune", retention=0.5).select(tokens).keep.tolist() == [2, 3, 5]


def test_fitprune_schedules() -> None:
    """Of 100 tokens: a geometric fall, and the shape of a fitted one."""
    layout = TokenLayout.single((10, 10), newline=False)
    signals = {Signal("llm_self"): torch.rand(100), Signal("llm_cross"): torch.rand(100)}
    tokens = VisualTokens(layout, torch.zeros(100, 2), signals, entered=100)

    def counts(method: Compressor) -> list[int]:
        return [len(method.at(cut).select(tokens).keep) for cut in method.cuts]

    even = create("fitprune", retention=0.25, steps=4)
    assert even.cuts == (0.2, 0.4, 0.6, 0.8)
    assert counts(even) == [70, 50, 35, 25]
    fitted = create("fitprune", retention=0.25, shares=(1.0, 0.5, 0.5, 0.25))
    assert counts(fitted) == [100, 50, 50, 25]
    # At R = 1/16 every share is squared.
    assert counts(create("fitprune", retention=0.0625, shares=fitted.shares)) == [100, 25, 25, 6]
    for shares in ((0.5, 0.6), (1.0, 1.0)):
        with pytest.raises(UserError, match="shares must fall"):
            create("fitprune", retention=0.5, shares=shares)


def test_fitprune_cuts_in_front_of_every_layer_but_the_first() -> None:
    host = Host.tiny("LLaVA-OneVision")
    depth = len(host.adapter.decoder_layers)
    method = create("fitprune", retention=0.25, separators="none")
    assert {cut_layer(cut, host.adapter.facts.decoder.layers) for cut in method.cuts} == {
        *range(1, depth)
    }
    with compress(host.model, method) as trace:
        host.logits(host.inputs((0,)))
    visual = trace.ledger.visual_per_layer
    assert list(visual) == sorted(set(visual), reverse=True)  # fewer in every layer
    assert visual[-1] == int(trace.ledger.patch_tokens * 0.25)


def _calibration(samples: int, layers: int) -> list[list[tuple[Tensor, Tensor]]]:
    """For every image and layer both scores of its 20 tokens."""
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randn(samples, layers, 2, 20, generator=draw).mul(1.5).softmax(-1)
    return [[(one[0], one[1]) for one in image] for image in pairs]


def _fitted_slowly(images: list[list[tuple[Tensor, Tensor]]], tolerance: float) -> list[float]:
    """The average share that is left after every layer."""
    shares = [0.0] * len(images[0])
    for image in images:
        there = set(range(20))
        for layer, scores in enumerate(image):
            tails = []
            for values in (score.tolist() for score in scores):
                rest, tail = sum(values[i] for i in there), set()
                for i in sorted(there, key=lambda i: values[i]):
                    rest -= values[i]
                    if rest < (1 - tolerance) * sum(values):
                        break
                    tail.add(i)
                tails.append(tail)
            there -= tails[0] & tails[1]
            shares[layer] += len(there) / 20 / len(images)
    return shares


@pytest.mark.parametrize("retention", [0.25, 0.5, 0.8])
def test_fit_halves_down_to_a_tolerance_that_reaches_r(retention: float) -> None:
    images, layers = _calibration(4, 5), 6
    layout = TokenLayout.single((4, 5), newline=False)

    def run(method: Compressor) -> None:
        for image in images:
            tokens = VisualTokens(layout, torch.zeros(20, 2), entered=20)
            index = torch.arange(20)
            for cut, (seen, asked) in zip(method.cuts, image, strict=True):
                signals = {Signal("llm_self"): seen[index], Signal("llm_cross"): asked[index]}
                keep = method.at(cut).select(replace(tokens, signals=signals)).keep
                tokens, index = tokens.take(keep), index[keep]

    shares = fit(run, layers, retention)
    slow = [_fitted_slowly(images, step / 128) for step in range(128)]
    assert shares[-1] <= retention
    assert any(
        shares == pytest.approx(after) and before[-1] > retention
        for before, after in pairwise(slow)
    )
    assert create("fitprune", retention=retention, shares=shares).shares == shares


def test_fit_in_a_model() -> None:
    """The schedule of a model: as many shares as cuts, and R at the end."""
    host = Host.tiny("LLaVA-OneVision")
    depth = len(host.adapter.decoder_layers)

    def run(method: Compressor) -> None:
        for row in (0, 2):
            with compress(host.model, method):
                host.logits(host.inputs((row,)))

    shares = fit(run, depth, 0.3)
    assert len(shares) == depth - 1
    assert 1 >= shares[0] >= shares[-1] > 0.1
    assert shares[-1] <= 0.3
    method = create("fitprune", retention=0.3, shares=shares, separators="none")
    with compress(host.model, method) as trace:
        host.logits(host.inputs((0,)))
    assert trace.ledger.visual_per_layer[-1] == int(0.3 * trace.ledger.patch_tokens)


@pytest.mark.parametrize("name", ["fitprune", "sparsevlm"])
def test_a_prompt_that_ends_with_the_image_is_refused(name: str) -> None:
    host = Host.tiny("LLaVA-NeXT")
    inputs = host.inputs((0,))
    short = {key: inputs[key][:, :-3] for key in ("input_ids", "attention_mask")}
    with (
        compress(host.model, name, retention=0.25),
        pytest.raises(UserError, match="needs text after the image"),
    ):
        host.logits({**inputs, **short})


# -- HoliTom inside the language model -----------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_inner_holitom_equals_loops(seed: int) -> None:
    layout = TokenLayout.anyres((1, 2), (3, 3), (0, 3, 0, 6))
    row = Signal("llm_attention", 1)
    tokens = sample_tokens(frozenset({row}), layout, seed=seed)
    chosen = create("holitom-inner", retention=0.3).select(tokens)
    patches, scores = layout.patches.tolist(), tokens.signals[row].tolist()
    kept = sorted(sorted(patches, key=lambda i: -scores[i])[:8])  # of 27, rounded
    assert chosen.keep.tolist() == kept
    assert chosen.features is not None
    states = tokens.features
    like = torch.nn.functional.cosine_similarity(states[:, None], states[None], dim=-1).tolist()
    members: dict[int, list[int]] = {k: [k] for k in kept}
    for i in set(patches) - set(kept):
        members[max(kept, key=lambda k: like[i][k])].append(i)
    wanted = torch.stack([states[members[k]].mean(0) for k in kept])
    torch.testing.assert_close(chosen.features, wanted)


def test_official_dart_keeps_its_pivots_on_top_of_the_budget() -> None:
    """49 tokens at R = 0.5: int(24.5 / 8) = 3 for each of eight pivots, and four image pivots."""
    method = Official(retention=0.5)
    tokens = sample_tokens(method.needs, TokenLayout.single((7, 7), newline=False))
    assert len(method(tokens).keep) == 28
    clean = create("dart", retention=0.5)
    assert len(clean(tokens).keep) == 24
