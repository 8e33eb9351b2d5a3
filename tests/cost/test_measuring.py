"""What a selection costs, measured on synthetic tokens."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection
from tokenprune.cost.measuring import Work, observed
from tokenprune.layout import TokenLayout
from tokenprune.ops.clustering import density_peaks
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

LAYOUT = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12))


class Runs:
    """The input of a `Probe` in every run."""

    def __init__(self) -> None:
        self.seen: list[VisualTokens] = []


@dataclass(frozen=True, kw_only=True)
class Probe(Compressor):
    """Three products of all pairs, of which at most two exist at a time, and global random draws.

    It records its input, and warns.
    """

    runs: Runs

    def select(self, tokens: VisualTokens) -> Selection:
        self.runs.seen.append(tokens)
        warnings.warn("too few", stacklevel=1)
        torch.rand(3)
        features = tokens.features
        pairs = features @ features.T
        pairs = pairs + features @ features.T  # the sum is the third
        del pairs
        self_product = features @ features[0]
        del self_product
        return Selection(tokens.layout.patches[:3])

    def __repr__(self) -> str:
        return f"Probe(retention={self.retention})"


def _work(runs: Runs, width: int, retention: float = 0.5) -> Work:
    tokens = sample_tokens(frozenset(), LAYOUT, widths={"features": width})
    return Work.of(Probe(retention=retention, runs=runs), tokens, LAYOUT)


def test_flops_and_bytes_of_known_products() -> None:
    count, width = len(LAYOUT), 80
    runs = Runs()
    cost = _work(runs, width).cost()
    assert cost.flops == 2 * 2 * count * count * width + 2 * count * width
    assert cost.bytes == 3 * 4 * count * count  # both terms and their sum
    assert [one.features.shape for one in runs.seen] == [(count, width)]


def test_equal_shapes_are_measured_once_and_others_again() -> None:
    runs = Runs()
    for width in (16, 16, 24, 16):
        _work(runs, width, retention=0.4).cost()
    assert [one.features.shape[1] for one in runs.seen] == [16, 24]


def test_costs_are_measured_only_when_read_and_when_tokens_are_dropped() -> None:
    runs = Runs()
    work = _work(runs, 8, retention=0.3)
    assert not runs.seen
    whole = _work(runs, 8, retention=1.0)
    assert (whole.cost().flops, whole.cost().bytes, runs.seen) == (0, 0, [])
    work.cost()
    assert len(runs.seen) == 1


def test_a_measurement_leaves_no_trace() -> None:
    """No warning, and the global generator continues where it was."""
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _work(Runs(), 40, retention=0.6).cost()
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device_and_inference_mode_of_the_caller_do_not_matter() -> None:
    expected = _work(Runs(), 48, retention=0.7).cost()
    with torch.device("meta"), torch.inference_mode():
        found = _work(Runs(), 48, retention=0.70001).cost()
    assert (found.flops, found.bytes) == (expected.flops, expected.bytes)


@dataclass(frozen=True, kw_only=True)
class Stated(Probe):
    def flops(self, tokens: VisualTokens) -> float:
        return 7.0

    def memory(self, tokens: VisualTokens) -> float | None:
        return None if self.retention < 0.5 else 11.0


def test_stated_costs_are_not_measured() -> None:
    runs = Runs()
    tokens = sample_tokens(frozenset(), LAYOUT)
    cost = Work.of(Stated(retention=0.5, runs=runs), tokens, LAYOUT).cost()
    assert (cost.flops, cost.bytes, runs.seen) == (7, 11, [])
    cost = Work.of(Stated(retention=0.45, runs=runs), tokens, LAYOUT).cost()
    assert cost.flops == 7
    assert cost.bytes == 3 * 4 * len(LAYOUT) ** 2


def test_distances_count_as_products() -> None:
    points = torch.randn(50, 30)
    with observed() as cost:
        density_peaks(points, 5)
    assert cost.flops == 2 * 50 * 50 * 30


def test_products_count_as_in_torch() -> None:
    """Batched and plain products, and an attention, against the counter of PyTorch."""
    one, other = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 6, 7)
    states = torch.randn(1, 2, 9, 8)

    def work() -> None:
        _ = one @ other
        torch.nn.functional.linear(torch.randn(5, 6), torch.randn(3, 6), torch.randn(3))
        torch.nn.functional.scaled_dot_product_attention(states, states, states)

    with FlopCounterMode(display=False) as counter:
        work()
    with observed() as cost:
        work()
    assert cost.flops == counter.get_total_flops() > 0


def test_views_and_writes_in_place_take_no_memory() -> None:
    given = torch.zeros(100, 10)
    with observed() as cost:
        given.T[2:5].add_(1)
        given[:, 3].fill_(2)
    assert cost.bytes == 0
    with observed() as cost:
        for _ in range(5):
            given = given + 1  # the first of them is not ours
    assert cost.bytes == 2 * 100 * 10 * 4


def test_a_second_selection_is_measured_at_its_own_size() -> None:
    runs = Runs()
    tokens = sample_tokens(frozenset(), LAYOUT, widths={"features": 16})
    left = tokens.take(torch.arange(0, len(tokens), 3))
    cost = Work.of(Probe(retention=0.55, runs=runs), left, LAYOUT).cost()
    assert cost.bytes == 3 * 4 * len(left) ** 2
    assert runs.seen[0].layout.is_separator.sum() == left.layout.is_separator.sum()
    assert max(runs.seen[0].layout.view_sizes) - min(runs.seen[0].layout.view_sizes) <= 1


@pytest.mark.parametrize("name", tp.list_methods())
def test_the_synthetic_tokens_have_the_shapes_of_the_real_ones(name: str) -> None:
    method = tp.parse(name, retention=0.4)
    part = method.at(method.cuts[0]) if method.cuts else method
    wide = dict.fromkeys((one.name for one in part.needs), 90) | {"features": 100}
    real = sample_tokens(part.needs, LAYOUT, dtype=torch.bfloat16, text=3, widths=wide)
    real = replace(real, entered=len(real.layout.patches))
    made = Work.of(part, real, LAYOUT).tokens()

    def shapes(tokens: VisualTokens) -> dict[object, object]:
        found: dict[object, torch.Tensor] = {"features": tokens.features, **tokens.signals}
        found |= {("text", one): value for one, value in tokens.text.items()}
        if Signal("llm_inputs") in part.needs:
            found |= dict(enumerate(tokens.inputs or ()))
        return {one: (tuple(value.shape), value.dtype) for one, value in found.items()}

    assert shapes(made) == shapes(real)
    assert (made.entered, made.clusters is None) == (real.entered, real.clusters is None)
