"""What strategies say they need to choose, against what PyTorch really allocates."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.attention import Projections, attention_received, cls_row, decoder_rows
from tokenprune.compressor import Compressor
from tokenprune.errors import RetentionWarning
from tokenprune.experiments.measuring import peak_memory
from tokenprune.ledger import DecoderShape, held_bytes, signal_bytes
from tokenprune.testing import Host, sample_tokens
from tokenprune.tokens import Signal, TokenLayout, VisualTokens

IMAGE = TokenLayout.anyres((2, 2), (12, 12), (0, 24, 0, 24))
VIDEO = TokenLayout.video(6, (9, 9))
WIDTH = 96
OPTIONS = (  # that other code stands behind
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
@pytest.mark.parametrize("name", [*tp.available(), *OPTIONS])
def test_memory_is_what_selecting_takes(name: str, layout: TokenLayout, dtype: torch.dtype) -> None:
    """Not a fifth more than is said, and half of what is said at least."""
    method = tp.parse(name, retention=0.4)
    for part in [method.at(cut) for cut in method.cuts] or [method]:
        tokens = _tokens(part, layout, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RetentionWarning)
            part.select(tokens)  # what is loaded or cached on first use
            real = peak_memory(lambda part=part, tokens=tokens: part.select(tokens))
        told = part.memory(tokens)
        some = 48 * len(tokens)  # index vectors more or fewer
        assert real <= 1.2 * told + some, f"{real:,} bytes were taken, memory() says {told:,.0f}"
        assert told <= 2 * real + some, f"memory() says {told:,.0f}, {real:,} bytes were taken"


@pytest.mark.parametrize("name", [*tp.available(), *OPTIONS])
def test_memory_and_flops_go_by_shapes_alone(name: str) -> None:
    """The forecast asks tensors that hold nothing."""
    method = tp.parse(name, retention=0.4)
    for part in [method.at(cut) for cut in method.cuts] or [method]:
        real = _tokens(part, IMAGE, torch.float32)
        empty = replace(
            real,
            features=real.features.to("meta"),
            signals={signal: value.to("meta") for signal, value in real.signals.items()},
            inputs=tuple(value.to("meta") for value in real.inputs or ()),
        )
        assert part.memory(empty) == part.memory(real)
        assert part.flops(empty) == part.flops(real)


@pytest.mark.parametrize("queries", [1, 5, 300])
def test_bytes_of_decoder_rows(queries: int) -> None:
    """The rows themselves, from keys that are cached."""
    host = Host.tiny("LLaVA-NeXT")
    attention = host.adapter.decoder_layers[0].self_attn
    shape = DecoderShape.of(host.adapter.language_model.config)
    count = 400
    hidden = torch.randn(count, shape.hidden)
    cos = sin = torch.randn(count, shape.head_dim)
    slots, visible = torch.arange(queries), torch.ones(queries, count, dtype=torch.bool)
    keys = torch.randn(shape.kv_heads, count, shape.head_dim)
    with torch.no_grad():
        real = peak_memory(
            lambda: decoder_rows(attention, hidden, (cos, sin), slots, visible, keys)
        )
    told = shape.row_bytes(count, False, 4, queries)
    assert 0.5 * told <= real <= 2 * told, f"{real:,} taken, {told:,} told"


@pytest.mark.parametrize("kind", ["cls_logits", "cls_attention", "received"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bytes_of_tower_rows(kind: str, dtype: torch.dtype) -> None:
    """Queries and keys that are kept, and the work on them, of four views."""
    adapter = Host.tiny("LLaVA-NeXT").adapter
    keys, width = 17, adapter.vision_width
    work = attention_received if kind == "received" else lambda t: cls_row(t, softmax=True)

    def run() -> None:
        query, key = (torch.ones(4, keys, width).to(dtype) for _ in range(2))
        work(Projections(adapter.vision_heads, 1.0, query, key))

    real = peak_memory(run)
    size = torch.finfo(dtype).bits // 8
    told = signal_bytes({Signal(kind)}, adapter, views=4, size=size)  # type: ignore[arg-type]
    assert 0.5 * told <= real <= 2 * told, f"{real:,} taken, {told:,} told"


def test_what_is_shown_is_counted_tensor_by_tensor() -> None:
    signals = frozenset({Signal("llm_attention", 1)})
    tokens = _tokens(tp.create("fastv", retention=0.4), IMAGE, torch.float32)
    tokens = replace(tokens, text={}, inputs=None)
    assert set(tokens.signals) == signals
    assert held_bytes(tokens, inside=False) == 4 * len(IMAGE)
    assert held_bytes(tokens, inside=True) == 4 * len(IMAGE) * (1 + WIDTH)
