"""The memory that methods report, against the memory that PyTorch allocates."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import tokenprune as tp
from tokenprune.attention import (
    Projections,
    attention_received,
    cls_row,
    decoder_keys,
    decoder_mass,
    decoder_row,
    decoder_rows,
    key_vectors,
    moved_keys,
)
from tokenprune.compressor import Compressor, Stage
from tokenprune.cost.arithmetic import DecoderShape, held_bytes, merging_bytes, signal_bytes
from tokenprune.cost.measuring import Work
from tokenprune.errors import RetentionWarning
from tokenprune.experiments.benchmarks import tower
from tokenprune.experiments.benchmarks.shapes import (
    TEXT,
    decoder_config,
    llava,
    prompt_of,
    tokens_at,
)
from tokenprune.experiments.common.timing import allocations, peak_memory
from tokenprune.layout import TokenLayout
from tokenprune.signals import Kept, Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens

IMAGE = TokenLayout.anyres((2, 2), (12, 12), (0, 24, 0, 24))
VIDEO = TokenLayout.video(6, (9, 9))
WIDTH = 96
OPTIONS = (  # other code limits their memory
    "cdpruner:relevance=text",
    "cdpruner:relevance=none",
    "sparsevlm:version=2.0",
    "divprune:allocator=proportional",
)


def _tokens(part: Compressor, layout: TokenLayout, dtype: torch.dtype) -> VisualTokens:
    """Random tokens whose vectors are wide enough to weigh something."""
    plain = sample_tokens(part.needs, layout, dtype=dtype)

    def wide(rows: int) -> Tensor:
        return torch.randn(rows, WIDTH).to(dtype)

    weight = torch.randn(WIDTH, WIDTH).to(dtype)
    vectors = {
        signal: wide(len(layout))
        for signal in plain.signals
        if signal.is_vector and not signal.name.startswith("llm_text")
    }
    return replace(
        plain,
        features=wide(len(layout)),
        signals={**plain.signals, **vectors},
        text={signal: wide(5) for signal in plain.text},
        inputs=(wide(len(layout.patches)), wide(5)),
        projector=lambda values: values @ weight,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [IMAGE, VIDEO], ids=["image", "video"])
@pytest.mark.parametrize("name", [*tp.list_methods(), *OPTIONS])
def test_measured_memory_is_close_to_allocated_memory(
    name: str, layout: TokenLayout, dtype: torch.dtype
) -> None:
    """The profiler's peak of a selection is within 20 % of that of synthetic tokens."""
    method = tp.parse(name, retention=0.4)
    for part in [method.at(cut) for cut in method.cuts] or [method]:
        tokens = _tokens(part, layout, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RetentionWarning)
            part.select(tokens)  # loads and caches on first use
            real = peak_memory(lambda part=part, tokens=tokens: part.select(tokens))
        found = Work.of(part, tokens, layout).cost().bytes
        some = 16 * len(tokens)  # index vectors inside operators, which are not seen
        if name.startswith("cdpruner") and dtype == torch.bfloat16:
            some += 4 * tokens.features.numel()  # on the CPU `vector_norm` casts inside
        assert found == pytest.approx(real, rel=0.2, abs=some), f"{real:,} taken, {found:,} found"


@pytest.mark.parametrize("name", [*tp.list_methods(), *OPTIONS])
def test_cost_depends_only_on_shapes(name: str) -> None:
    """The forecast gives tensors without values."""
    method = tp.parse(name, retention=0.4)
    for part in [method.at(cut) for cut in method.cuts] or [method]:
        real = _tokens(part, IMAGE, torch.float32)
        empty = replace(
            real,
            features=real.features.to("meta"),
            signals={signal: value.to("meta") for signal, value in real.signals.items()},
            inputs=tuple(value.to("meta") for value in real.inputs or ()),
        )
        assert Work.of(part, empty, IMAGE) == Work.of(part, real, IMAGE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["mean", "heads", "sum"])
@pytest.mark.parametrize("queries", [1, 5, 100, 300, 900])
def test_bytes_of_decoder_rows(queries: int, kept: Kept, dtype: torch.dtype) -> None:
    """The rows themselves, from keys that are cached: within 15 %.

    Their sum takes less on the CPU, where fewer heads are computed at a time than on a GPU.
    """
    layer, hidden, rotary = _layer(dtype)
    keys = decoder_keys(layer.self_attn, hidden, rotary).contiguous()[0]
    given = layer.self_attn, hidden[0], (rotary[0][0], rotary[1][0]), torch.arange(queries)
    visible = torch.ones(1, COUNT, dtype=torch.bool)
    if kept == "sum":
        real = peak_memory(
            lambda: decoder_mass(*given, lambda at: visible.expand(len(at), -1), keys)
        )
    else:
        rows = functools.partial(decoder_rows, *given, visible.expand(queries, -1), keys)
        real = peak_memory(lambda: rows(by_head=kept == "heads"))
    told = DECODER.row_bytes(COUNT, False, hidden.element_size(), queries, kept)
    told -= hidden.nbytes  # which are there before
    small = 8 * COUNT * 4 + 6 * queries * DECODER.hidden * 4  # the queries, and which are visible
    least = 0 if kept == "sum" else 0.85 * told
    assert least <= real <= 1.15 * told + small, f"{real:,} taken, {told:,} told"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_of_keys_made_again(dtype: torch.dtype) -> None:
    """Normed states, keys, and copies while they turn: within 5 %."""
    layer, hidden, rotary = _layer(dtype)
    last, visible = torch.tensor([COUNT - 1]), torch.ones(1, COUNT, dtype=torch.bool)

    def ahead() -> Tensor:
        states = layer.input_layernorm(hidden)
        return decoder_row(layer.self_attn, states, rotary, last, visible)

    size = hidden.element_size()
    told = DECODER.row_bytes(COUNT, True, size)
    assert peak_memory(ahead) == pytest.approx(told, rel=0.05)
    keys, back = torch.randn(1, 8, COUNT, 32).to(dtype), (rotary[0][:, :1], rotary[1][:, :1])
    told = DECODER.vector_bytes(COUNT, size, "llm_keys")
    assert peak_memory(lambda: moved_keys(layer.self_attn, keys, back)) == pytest.approx(told, 0.05)
    told = DECODER.vector_bytes(COUNT, size, "llm_states")
    assert peak_memory(lambda: layer.input_layernorm(hidden)) == pytest.approx(told, rel=0.05)


COUNT = 1000
DECODER = DecoderShape(layers=4, hidden=256, intermediate=344, heads=8, kv_heads=8, head_dim=32)


def _layer(dtype: torch.dtype) -> tuple[Any, Tensor, tuple[Tensor, Tensor]]:
    """A decoder layer, and states and rotary embedding of `COUNT` tokens."""
    config = decoder_config(DECODER)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(dtype).requires_grad_(False)
    hidden = torch.randn(1, COUNT, DECODER.hidden).to(dtype)
    return layer, hidden, LlamaRotaryEmbedding(config)(hidden, torch.arange(COUNT)[None])


WHOLE = [
    name
    for name in tp.list_methods()
    if tp.create(name, retention=0.25).stage is not Stage.ENCODER and name != "cdpruner"
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_ledger_has_the_memory_of_selecting_and_packing(name: str, dtype: torch.dtype) -> None:
    """From the first attention row to the packed prompt, in a real forward.

    The ledger reports at least three quarters of the allocated bytes.  It exceeds them by at most a
    third, apart from tensors that existed before: signals of the vision encoder, and the layer
    input from which attention rows are computed.  FitPrune takes less on the CPU, where fewer heads
    are computed at a time than on a GPU.
    """
    method = tp.create(name, retention=0.25)
    given = frozenset(signal for signal in method.needs if not signal.in_llm)
    adapter = llava(DECODER, "cpu", dtype)
    width = adapter.base.config.vision_config.hidden_size
    tokens = tokens_at(IMAGE, given, DECODER.hidden, vision=width, dtype=dtype)
    inputs = prompt_of(adapter, replace(tokens, clusters=None, inputs=None, text={}))
    taken = []

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        with allocations() as seen:
            yield
        taken.append(seen.peak)

    with tp.compress(adapter.model, method, extra_signals=given) as trace, torch.no_grad():
        adapter.model(**inputs, use_cache=True, logits_to_keep=1)  # loads on first use
        trace.around = around
        adapter.model(**inputs, use_cache=True, logits_to_keep=1)
    told, real = trace.ledger.selector_bytes, max(taken)
    there = (len(IMAGE) + TEXT) * DECODER.hidden * tokens.features.element_size()
    most = 2 if name == "fitprune" else 1.33
    assert 0.75 * real <= told <= most * (real + there), f"{real:,} taken, {told:,} told"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_of_merging_in_the_encoder(dtype: torch.dtype) -> None:
    """The first layer with ToMe, including queries and keys of the attention: within 30 %."""
    adapter = tower.clip(12, "cpu", dtype, **{**tower.SMALL, "hidden_size": 256})
    steps = tower.Steps(adapter, tp.create("tome", retention=0.25), IMAGE, 8)
    run, size = steps().encoding, steps.key.element_size()
    told = merging_bytes(run, adapter.facts.vision.hidden, IMAGE.views, size)
    real = peak_memory(steps.first) + steps.key.nbytes + steps.query.nbytes
    assert told == pytest.approx(real, rel=0.3)


@pytest.mark.parametrize("kind", ["cls_logits", "cls_attention", "received", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_of_encoder_rows(kind: str, dtype: torch.dtype) -> None:
    """Queries and keys that are kept, and the work on them, of four views."""
    adapter = Host.tiny("LLaVA-NeXT").adapter
    keys, width = 17, adapter.facts.vision.hidden
    looks = {"received": attention_received, "keys": key_vectors}
    work = looks.get(kind, functools.partial(cls_row, softmax=True))

    def run() -> None:
        query, key = (torch.ones(4, keys, width).to(dtype) for _ in range(2))
        work(Projections(adapter.facts.vision.heads, 1.0, query, key))

    real = peak_memory(run)
    size = torch.finfo(dtype).bits // 8
    told = signal_bytes({Signal(kind)}, adapter.facts.vision, views=4, size=size)  # type: ignore[arg-type]
    assert 0.5 * told <= real <= 2 * told, f"{real:,} taken, {told:,} told"


def test_input_tensors_are_counted_one_by_one() -> None:
    signals = frozenset({Signal("llm_attention", 1)})
    tokens = _tokens(tp.create("fastv", retention=0.4), IMAGE, torch.float32)
    tokens = replace(tokens, text={}, inputs=None)
    assert set(tokens.signals) == signals
    assert held_bytes(tokens, inside=False) == 4 * len(IMAGE)
    assert held_bytes(tokens, inside=True) == 4 * len(IMAGE) * (1 + WIDTH)
