"""The forecast equals the ledger of the engine, without running a model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import full_hosts
from samples import drawn

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.cost.ledger import Ledger
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.forecast import forecast
from tokenprune.layout import TokenLayout
from tokenprune.models.loading import adapter_without_weights, published_config
from tokenprune.strategies._golden.sparsevlm import Scheduled
from tokenprune.strategies.tome import schedule
from tokenprune.testing.host import ROWS, Host, Row

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

CHAINS = (
    "uniform:separators=none@0.6 + pyramiddrop@0.6",
    "first@0.5 + fastv:layer=1@0.5 + dart:layer=3@0.5",
    "feature-norm@0.7 + sparsevlm@0.7",
    "globalcom2@0.5 + fastv@0.5",
    "tome@0.6 + pact@0.6",
    "cdpruner:relevance=text@0.6 + sparsevlm:version=2.0@0.6",
)
OPTIONS = (
    "cdpruner:relevance=text",
    "cdpruner:relevance=saliency",
    "cdpruner:relevance=none",
    "sparsevlm:version=2.0",
    "divprune:allocator=proportional",
)
METHODS = [
    *(tp.create(name, retention=0.4) for name in tp.list_methods()),
    *(tp.parse(spec, retention=0.4) for spec in OPTIONS),
    *map(tp.parse, CHAINS),
    tp.create("uniform", retention=1.0),
]
HOSTS = {host.name: host for host in full_hosts(["qwen2"])}
PROMPTS = (*ROWS, Row((), 4, frames=(3,)), Row((), 3, frames=(3, 3)))  # videos alone


def _engine(host: Host, method: Compressor, row: int) -> Ledger:
    with compress(host.model, method) as trace, torch.no_grad():
        host.model(**host.inputs((row,)), use_cache=True)
    return trace.ledger


@pytest.mark.parametrize(
    ("method", "name", "row"),
    drawn(0.5, METHODS, HOSTS, range(len(PROMPTS))),
    ids=lambda one: f"{one.label}@{one.retention:g}" if isinstance(one, Compressor) else str(one),
)
def test_forecast_is_what_the_engine_does(
    method: Compressor, name: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, videos and both; exact to the last FLOP and byte unless content decides."""
    for module in ("host", "reference_vision"):
        monkeypatch.setattr(f"tokenprune.testing.{module}.ROWS", PROMPTS)
    host = HOSTS[name]
    try:
        check_compatible(host.adapter.facts, method)
    except UserError as refused:
        pytest.skip(str(refused))
    real, layouts = _engine(host, method, row), host.layouts(row)
    # Two words precede every image.
    asking = [PROMPTS[row].text + 2 * later for later in reversed(range(len(layouts)))]
    found = forecast(
        host.adapter, method, layouts, real.text_tokens, asking=asking, size=4, draws=12
    )
    if found.exact:
        ran = _with_views(found.ledger, real)
        assert _exact(found.ledger) == _exact(ran)
        assert _sums(found.ledger) == pytest.approx(_sums(ran), rel=1e-12)  # in whatever order
    else:
        views = sum(map(len, real.patches_per_view))
        lows, highs = zip(*((min(c), max(c)) for c in _layers(found.draws)), strict=True)
        for low, high, count in zip(lows, highs, real.visual_per_layer, strict=True):
            assert low - views <= count <= high + views


_SUMS = {item.name for item in dataclasses.fields(Ledger) if item.type == "float"}


def _sums(ledger: Ledger) -> dict[str, float]:
    return {name: value for name, value in vars(ledger).items() if name in _SUMS}


def _exact(ledger: Ledger) -> dict[str, object]:
    return {name: value for name, value in vars(ledger).items() if name not in _SUMS}


def _with_views(told: Ledger, real: Ledger) -> Ledger:
    """The real account, with the forecast's split into views, which content decides."""
    return Ledger(**{**vars(real), "kept_per_view": told.kept_per_view})


def _layers(draws: tuple[Ledger, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(one.visual_per_layer for one in draws), strict=True))


def test_counts_that_depend_on_content_are_marked() -> None:
    adapter = adapter_without_weights("llava-v1.6-vicuna-7b")
    layouts = [adapter.layout((336, 1000))]
    assert forecast(adapter, tp.create("fastv", retention=0.3), layouts).exact
    rated = Scheduled(scale=2, retention=0.9)
    found = forecast(adapter, rated, layouts, 60)
    assert not found.exact
    assert found.mark == "≈"
    averages = sorted(one.layer_average for one in found.draws)
    assert found.ledger.layer_average == averages[len(averages) // 2]


def test_merging_in_the_tower_is_marked_and_costs_by_the_keys() -> None:
    """23 of CLIP's layers merge 12 or 13 pairs each; keys of a head are 64 wide."""
    adapter = adapter_without_weights("llava-v1.6-vicuna-7b")
    found = forecast(adapter, tp.create("tome", retention=0.5), [adapter.layout((672, 672))])
    assert not found.exact
    left, pairs = 577, 0
    for merged in schedule(576, 288, 23):
        pairs += (left // 2) * (left - left // 2)
        left -= merged
    assert found.ledger.selector_flops == 5 * 2 * 64 * pairs
    assert forecast(adapter, tp.create("downsample", retention=0.5), [adapter.layout((9, 9))]).exact


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-v1.6-vicuna-7b", 7.06),
        ("llava-v1.6-vicuna-13b", 13.35),
        ("llava-v1.6-mistral-7b", 7.57),
        ("llava-v1.6-34b", 34.75),
        ("llava-onevision-qwen2-0.5b", 0.894),
        ("llava-onevision-qwen2-7b", 8.03),
    ],
)
def test_known_sizes_have_the_published_number_of_weights(name: str, billions: float) -> None:
    """As the Hub counts the checkpoints of llava-hf."""
    adapter = adapter_without_weights(name)
    count = sum(weight.numel() for weight in adapter.model.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


def test_published_flops_from_the_known_config() -> None:
    """GlobalCom2's table: 2880 visual tokens, no text, no separators."""
    adapter = adapter_without_weights("llava-v1.6-vicuna-7b")
    shape = DecoderShape.of(adapter.language_model.config)
    layout = TokenLayout.anyres((2, 2), (24, 24), (0, 48, 0, 48), newlines=False)
    for ratio, count, tera in [(0.75, 2160, 30.4), (0.5, 1440, 19.7), (0.25, 720, 9.6)]:
        found = forecast(adapter, tp.create("uniform", retention=ratio), [layout]).ledger
        assert found.visual_per_layer == (count,) * 32
        assert round(found.flops / 1e12, 1) == tera
        assert found.uncompressed_flops == prefill_flops([2880] * 32, shape)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [
        ((672, 672), 576 + 48 * 49),  # the whole 2x2 canvas
        ((336, 336), 576 + 24 * 25),  # half of a 1x2 canvas: as sharp as any, least waste
        ((336, 1008), 576 + 24 * 73),  # one row of three
        ((1080, 1920), 576 + 28 * 49),  # padded above and below
        ((1200, 600), 576 + 48 * 25),  # two crops, one above the other
    ],
)
def test_layout_of_known_sizes(size: tuple[int, int], tokens: int) -> None:
    """(height, width); counted by hand from pinpoints and the unpad rule."""
    assert len(adapter_without_weights("llava-v1.6-mistral-7b").layout(size)) == tokens


def test_hub_spelling_of_known_names() -> None:
    for hub, name in [
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-v1.6-vicuna-7b"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision-qwen2-7b"),
    ]:
        assert published_config(hub).to_dict() == published_config(name).to_dict()


def test_unknown_configs_name_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"Sizes known without a download: llava-1\.5-7b"):
        published_config("llava-v9")


def test_fewer_layers() -> None:
    for name in ("llava-v1.6-vicuna-7b", "llava-onevision-qwen2-7b"):
        assert len(adapter_without_weights(name, layers=3).decoder_layers) == 3
    assert len(adapter_without_weights("testbed-next").decoder_layers) == 6
