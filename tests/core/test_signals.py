"""The table of signals against the engine, and a method that ranks by values."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import torch
from families import FULL, full_hosts
from places import ROOT
from pydantic import Field
from torch import Tensor

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Chain, Compressor, ScoringCompressor, Selection, Stage
from tokenprune.cost.arithmetic import DecoderShape, held_bytes, signal_flops
from tokenprune.engine import decoder, vision
from tokenprune.engine.prefix import Prefix
from tokenprune.engine.session import compress
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.experiments.common.timing import peak_memory
from tokenprune.forecast import forecast
from tokenprune.layout import TokenLayout
from tokenprune.ops.ranking import lengths
from tokenprune.pipeline import encoder_outputs
from tokenprune.registry import Card
from tokenprune.signals import AXES, SIGNALS, Signal
from tokenprune.spec import parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing import reference
from tokenprune.testing.asserting import Check
from tokenprune.testing.generation_checks import check_cache_agrees
from tokenprune.testing.host import DECODERS, ROWS, Host, hosts
from tokenprune.testing.model_checks import (
    check_batch_equals_single,
    check_eager_agrees,
    check_equals_reference,
    check_prompt_logits,
)
from tokenprune.testing.runner import CHECKS, run
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

HOSTS = {host.name: host for host in hosts(["llama"])}
CUT = 2


# -- the table -----------------------------------------------------------------------------------


def _literal_names() -> Iterator[tuple[str, str]]:
    """File and name of every ``Signal("name")`` in the package."""
    for folder in ("tokenprune", "strategies", "models", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Signal"):
                    continue
                if node.args and isinstance(node.args[0], ast.Constant):
                    yield path.name, str(node.args[0].value)


def test_every_name_in_the_package_is_in_the_table() -> None:
    found = list(_literal_names())
    assert len(found) > 20
    assert [one for one in found if one[1] not in SIGNALS] == []


def test_everything_in_the_table_is_computed_and_has_a_reference() -> None:
    layers = {name for name, info in SIGNALS.items() if info.source == "decoder layer"}
    assert set(decoder.COMPUTED) == layers
    assert set(reference.BY_HAND) == layers
    tower = {name for name, info in SIGNALS.items() if info.source == "vision layer"}
    assert set(vision.COMPUTED) == tower - {"saliency"}
    for info in SIGNALS.values():
        assert info.stands_for is None or set(info.stands_for) <= set(vision.COMPUTED)


@pytest.mark.parametrize("name", SIGNALS)
def test_entries_are_explained(name: str) -> None:
    info = SIGNALS[name]
    assert set(info.shape) <= set(AXES)
    assert info.meaning.endswith(".")
    assert info.meaning.count(". ") == 0
    assert info.paper


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'llm_values'"):
        Signal("llm_value")


@pytest.mark.parametrize("name", SIGNALS)
def test_synthetic_tokens_have_the_shape_of_the_table(name: str) -> None:
    info, layout = SIGNALS[name], TokenLayout.anyres((1, 2), (4, 4), (0, 4, 0, 8))
    tokens = sample_tokens(frozenset({Signal(name)}), layout, text=3)
    if info.found_in == "inputs":
        assert tokens.inputs is not None
        return
    found = getattr(tokens, info.found_in)[Signal(name)]
    assert found.ndim == len(info.shape)
    counts = {"N": len(layout), "T": 3, "Q": 3}
    assert [counts.get(axis, size) for axis, size in zip(info.shape, found.shape, strict=True)] == [
        *found.shape
    ]
    if info.sample == "attention":
        assert bool((found[layout.patches] > 0).all())


# -- what the engine delivers --------------------------------------------------------------------


def _spy(signal: Signal, seen: list[VisualTokens], stage: Stage) -> Compressor:
    """A method that keeps the first half and records its input."""
    acts_at = stage

    @dataclass(frozen=True, kw_only=True)
    class Spy(Compressor):
        """Records its input."""

        stage = acts_at
        card = Card(paper="Spy (test)")

        @property
        def cuts(self) -> tuple[int, ...]:
            return (CUT,) if self.stage is Stage.LLM else ()

        @property
        def needs(self) -> frozenset[Signal]:
            return frozenset({signal})

        def select(self, tokens: VisualTokens) -> Selection:
            seen.append(tokens)
            return Selection(tokens.layout.patches[: (len(tokens.layout.patches) + 1) // 2])

    return Spy(retention=0.5)


def _sizes(host: Host, tokens: VisualTokens, row: int, image: int) -> dict[str, int]:
    """Sizes of the axes, from the configuration and the prompt."""
    text, tower = host.adapter.language_model.config, host.adapter.base.config.vision_config
    later = sum(len(host.adapter.runs(one)) for one in host.layouts(row)[image + 1 :])
    return {
        "N": len(tokens.layout),
        "P": len(host.layouts(row)[image].patches),
        "T": ROWS[row].text + 2 * later,  # two words are in front of every image and frame
        "heads": text.num_attention_heads,
        "hidden": text.hidden_size,
        "kv_width": text.num_key_value_heads * (text.hidden_size // text.num_attention_heads),
        "vision_width": tower.hidden_size,
        "vision_head_width": tower.hidden_size // tower.num_attention_heads,
        "projector_width": host.adapter.projector.get_submodule(
            "layer_norm" if host.name == "InternVL" else "linear_1"
        ).weight.shape[-1],
    }


@pytest.mark.parametrize(
    ("host", "dtype"),
    [(name, torch.float32) for name in HOSTS] + [(name, torch.bfloat16) for name in FULL],
)
@pytest.mark.parametrize("name", SIGNALS)
def test_the_engine_delivers_the_signals_of_the_table(
    name: str, host: str, dtype: torch.dtype
) -> None:
    """Shape and dtype, in a batch of prompts with several images and with none."""
    info, model = SIGNALS[name], HOSTS[host].like(dtype=dtype)
    signal = Signal(name, CUT - 1 if info.source == "decoder layer" else -1)
    seen: list[VisualTokens] = []
    stage = Stage.LLM if info.in_llm else Stage.PRE_LLM
    method = _spy(signal, seen, stage)
    if info.source == "text encoder":
        with pytest.raises(UserError, match="text encoder"):
            check_compatible(model.adapter.facts, method)
        return
    try:
        check_compatible(model.adapter.facts, method)
    except UserError as refused:
        assert info.needs_cls or info.source == "pooling head", refused  # noqa: PT017
        pytest.skip(str(refused))
    with compress(model.model, method):
        model.logits(model.inputs())
    images = [(row, image) for row in range(3) for image in range(len(model.layouts(row)))]
    assert len(seen) == len(images)
    wanted = dtype if info.dtype == "model" else torch.float32
    for tokens, (row, image) in zip(seen, images, strict=True):
        sizes = _sizes(model, tokens, row, image)
        found = {
            "signals": tokens.signals.get(signal),
            "text": tokens.text.get(signal),
            "inputs": (tokens.inputs or [None])[0],
        }
        delivered = found[info.found_in]
        assert delivered is not None
        assert [*delivered.shape] == [sizes[axis] for axis in info.shape]
        assert delivered.dtype == wanted
        assert bool(delivered[tokens.layout.patches if info.is_aligned else ...].isfinite().all())
        assert (found["text"] is not None) == (info.found_in == "text" or info.is_of_all_tokens)
        if info.is_of_all_tokens:
            assert len(tokens.text[signal]) == sizes["T"]
            assert tokens.text[signal].dtype == wanted
        if info.found_in == "inputs":
            assert tokens.inputs is not None
            assert [*tokens.inputs[1].shape] == [sizes["T"], sizes["hidden"]]


# -- llm_values ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ByValues(ScoringCompressor):
    """Attention times the norm of the value (VATP, arXiv 2406.12335)."""

    layer: Annotated[int, Field(ge=1)] = CUT

    stage = Stage.LLM
    card = Card(paper="Attention Score is Not All You Need", arxiv="2406.12335")

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def needs(self) -> frozenset[Signal]:
        row = Signal("llm_attention", self.layer - 1)
        return super().needs | {row, Signal("llm_values", self.layer - 1)}

    def score(self, tokens: VisualTokens) -> Tensor:
        row = tokens[Signal("llm_attention", self.layer - 1)]
        return row * lengths(tokens[Signal("llm_values", self.layer - 1)])


BY_VALUES = ByValues(retention=0.4)
CHAINS = {
    "in front": Chain.of(parse("uniform:separators=none@0.6"), ByValues(retention=0.6)),
    "twice": Chain.of(ByValues(retention=0.6, layer=1), ByValues(retention=0.6, layer=3)),
    "merged": Chain.of(parse("pact:depth=0.25@0.6"), ByValues(retention=0.6, layer=3)),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranking_by_values_obeys_the_contract(check: Check) -> None:
    able = full_hosts(["llama"])
    run(check, BY_VALUES, [random.Random(check.__name__).choice(able)])


@pytest.mark.parametrize("check", [check_equals_reference, check_batch_equals_single])
@pytest.mark.parametrize("family", [name for name in DECODERS if name != "llama"])
def test_values_of_other_decoders(family: str, check: Check) -> None:
    run(check, BY_VALUES, full_hosts([family]))


@pytest.mark.parametrize(
    "check",
    [check_equals_reference, check_prompt_logits, check_cache_agrees, check_eager_agrees],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("chain", CHAINS)
def test_values_in_chains(chain: str, check: Check) -> None:
    run(check, CHAINS[chain], full_hosts(["llama"]))


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_values_are_those_of_the_plain_model(host: Host) -> None:
    """Bit by bit what its KV cache holds, at the columns of the image and of the text."""
    seen: list[VisualTokens] = []
    signal = Signal("llm_values", CUT - 1)
    inputs = host.inputs((0,))
    with torch.no_grad():
        cache = host.model(**inputs, use_cache=True).past_key_values
        with compress(host.model, _spy(signal, seen, Stage.LLM)):
            host.model(**inputs, use_cache=True)
    plain = cache.layers[CUT - 1].values[0].transpose(0, 1).flatten(1)
    places = torch.isin(inputs["input_ids"][0], torch.tensor(host.placeholders))
    behind = plain[places.nonzero().max() + 1 :]
    assert torch.equal(seen[0].signals[signal], plain[places])
    assert torch.equal(seen[0].text[signal], behind)


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_values_are_shared_with_a_prefix(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed once for two contexts, whose logits, selections and ledgers stay the same."""
    methods = [ByValues(retention=0.7), ByValues(retention=0.3)]
    calls = []
    original = decoder.COMPUTED["llm_values"]

    def counted(*given: Any) -> Tensor:
        calls.append(1)
        return original(*given)

    monkeypatch.setitem(decoder.COMPUTED, "llm_values", counted)

    def outcome(method: Compressor, prefix: Prefix | None) -> tuple[Tensor, Any, list[Tensor]]:
        with compress(host.model, method, prefix=prefix) as trace, torch.no_grad():
            logits = host.model(**_encoded(host), use_cache=True).logits
        return logits, trace.ledgers, [one.keep for one in trace.selections]

    alone = [outcome(method, None) for method in methods]
    assert len(calls) == 2
    shared = Prefix(host.adapter, methods)
    for method, wanted in zip(methods, alone, strict=True):
        logits, ledgers, kept = outcome(method, shared)
        assert torch.equal(logits, wanted[0])
        assert ledgers == wanted[1]
        assert all(torch.equal(a, b) for a, b in zip(kept, wanted[2], strict=True))
    assert len(calls) == 3


_known: dict[str, list[Any]] = {}


def _encoded(host: Host) -> dict[str, Any]:
    """Inputs of all prompts, with images that are encoded once."""
    if host.name not in _known:
        with vision.observing(host.adapter, frozenset()), torch.no_grad():
            outputs = [
                getattr(host.adapter.base, host.adapter.encoders[modality])(**call).pooler_output
                for row in range(3)
                for modality, call in host.media(row).items()
            ]
        _known[host.name] = [feature.visual for some in outputs for feature in some]
    inputs = host.inputs()
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return text | encoder_outputs(host.adapter, [_known[host.name]])


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("method", [BY_VALUES, *CHAINS.values()], ids=["alone", *CHAINS])
def test_forecast_values_equal_those_of_the_ledger(
    method: Compressor, host: Host, row: int
) -> None:
    with compress(host.model, method) as trace, torch.no_grad():
        host.model(**host.inputs((row,)), use_cache=True)
    real, layouts = trace.ledger, host.layouts(row)
    # In front of every run of placeholders are two text tokens.
    runs = [len(host.adapter.runs(layout)) for layout in layouts]
    asking = [ROWS[row].text + 2 * sum(runs[index + 1 :]) for index in range(len(runs))]
    found = forecast(host.adapter, method, layouts, real.text_tokens, asking=asking, size=4).ledger
    assert found.visual_per_layer == real.visual_per_layer
    assert found.selector_bytes == real.selector_bytes
    assert found.selector_flops == pytest.approx(real.selector_flops, rel=1e-12)
    assert found.kv_bytes == real.kv_bytes


def test_values_cost_memory_and_no_flops() -> None:
    """By hand: states, and the values of the image twice, as they are a copy of all tokens'."""
    host, seen = HOSTS["LLaVA-NeXT"], list[VisualTokens]()
    with compress(host.model, _spy(Signal("llm_values", CUT - 1), seen, Stage.LLM)) as trace:
        host.model(**host.inputs((0,)), use_cache=True)
    config, entries, text = host.adapter.language_model.config, len(host.layouts(0)[0]), 3
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    wanted = 4 * (entries * config.hidden_size + width * (2 * entries + text))
    assert held_bytes(seen[0], inside=True) == wanted
    assert trace.ledger.selector_flops == 0


@pytest.mark.parametrize(
    "name", [name for name, info in SIGNALS.items() if info.source == "decoder layer"]
)
def test_flops_of_decoder_signals_by_hand(name: str) -> None:
    """Queries, their products with all keys, and keys where no KV cache has them yet."""
    host, seen = HOSTS["LLaVA-NeXT"], list[VisualTokens]()
    with compress(host.model, _spy(Signal(name, CUT - 1), seen, Stage.LLM)) as trace:
        host.model(**host.inputs((0,)), use_cache=True)
    config, keys = host.adapter.language_model.config, len(host.prompt(0))
    width = config.hidden_size  # of all query heads as well
    one = 2 * width * width + 2 * keys * width
    projected = 2 * keys * width * width * config.num_key_value_heads // 4
    text, patches = 3, len(host.layouts(0)[0].patches)
    wanted = {
        "llm_attention": one,
        "llm_ahead": one + projected,
        "llm_keys_ahead": projected,
        "llm_global": one + projected,
        "llm_text": text * one,
        "llm_text_heads": text * one,
        "llm_cross": text * one,
        "llm_self": patches * 2 * keys * width,  # the layer projected its queries
    }
    assert config.num_attention_heads == 4
    assert trace.ledger.selector_flops == wanted.get(name, 0)


def test_bytes_at_work_for_values() -> None:
    """One copy of the KV cache's values, as PyTorch allocates it."""
    shape = DecoderShape(layers=1, hidden=64, intermediate=8, heads=8, kv_heads=4, head_dim=8)
    values = torch.zeros(1, 4, 1000, 8, dtype=torch.bfloat16)
    real = peak_memory(lambda: values.transpose(1, 2).flatten(2))
    assert shape.vector_bytes(1000, 2, "llm_values") == real


FAULTS: dict[str, Callable[..., Tensor]] = {
    "keys in their place": lambda layers, cut, signal: decoder.COMPUTED["llm_keys"](
        layers, cut, signal
    ),
    "of another layer": lambda layers, cut, signal: VALUES(
        layers, cut, Signal("llm_values", signal.layer - 1)
    ),
    "the first slots": lambda layers, cut, signal: VALUES(layers, cut, signal).flip(1),
}
VALUES = decoder.COMPUTED["llm_values"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_finds_wrong_values(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decoder.COMPUTED, "llm_values", FAULTS[fault])
    with pytest.raises(AssertionError):
        run(check_equals_reference, BY_VALUES, full_hosts(["llama"])[:1])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("cls_logits", 1), ("cls_attention", 1), ("cls_joint", 1), ("received", 17)],
)
def test_flops_of_vision_attention_by_hand(name: str, rows: int) -> None:
    """A row of a view of 17 tokens is a product of a query with 17 keys of the whole width."""
    vision = Host.tiny("LLaVA-NeXT").adapter.facts.vision
    config = Host.tiny("LLaVA-NeXT").model.config.vision_config
    assert (config.image_size // config.patch_size) ** 2 + 1 == 17
    expected = 2 * 3 * rows * 17 * config.hidden_size
    assert signal_flops({Signal(name)}, vision, views=3) == expected
