"""Attention rows of all patch tokens, from the queries that the decoder layer projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.registry import Card
from tokenprune.signals import Signal
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens

CUT, ROWS = 2, (0, 1, 2)
SELF, CROSS = Signal("llm_self"), Signal("llm_cross")


def _spy(seen: list[VisualTokens]) -> Compressor:
    """A method that keeps all tokens and records its input."""

    @dataclass(frozen=True, kw_only=True)
    class Spy(Compressor):
        """Records its input."""

        stage = Stage.LLM
        card = Card(paper="Spy (test)")
        cuts = (CUT,)
        needs = frozenset({SELF, CROSS})

        def select(self, tokens: VisualTokens) -> Selection:
            seen.append(tokens)
            return Selection(tokens.layout.patches)

    return Spy(retention=0.99)


def _inputs(host: Host, side: str, dtype: torch.dtype) -> dict[str, Any]:
    given = host.inputs(ROWS, side)
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_rows_of_all_patches_are_those_of_eager_attention(
    decoder: str, side: str, dtype: torch.dtype
) -> None:
    """A padded batch with several images, in a model whose heads share keys."""
    host, eager = Host.tiny("LLaVA-NeXT", decoder), Host.tiny("LLaVA-NeXT", decoder)
    config = host.adapter.language_model.config
    assert config.num_key_value_heads < config.num_attention_heads
    eager.model.set_attn_implementation("eager")
    for one in (host, eager):
        one.model.to(dtype)
    seen: list[VisualTokens] = []
    with tp.compress(host.model, _spy(seen)) as trace, torch.no_grad():
        host.model(**_inputs(host, side, dtype), use_cache=True)
    with torch.no_grad():
        inputs = _inputs(eager, side, dtype)
        maps = eager.model(**inputs, output_attentions=True).attentions[CUT - 1].float()
    placeholder = host.adapter.facts.placeholders["image"]
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 2e-3}
    left = [(row == placeholder).nonzero().squeeze(1) for row in inputs["input_ids"]]
    for tokens, record in zip(seen, trace.selections, strict=True):
        columns, left[record.row] = left[record.row].tensor_split([len(tokens)])
        asking = columns[tokens.layout.patches]
        wanted = maps[record.row][:, asking][:, :, columns].amax(0).mean(0)
        torch.testing.assert_close(tokens[SELF], wanted, **close)
    assert [record.row for record in trace.selections] == [0, 2, 2]


def _projected(host: Host, index: int, calls: list[int]) -> Any:
    projection = host.adapter.decoder_layers[index].get_submodule("self_attn.q_proj")
    return projection.register_forward_hook(
        lambda module, args, output: calls.append(output[..., 0].numel())
    )


def test_patches_are_projected_once() -> None:
    """Besides the layer's own queries, only those of the three words after the image."""
    host, calls = Host.tiny("LLaVA-NeXT"), list[int]()
    handle = _projected(host, CUT - 1, calls)
    inputs = host.inputs((0,))
    with tp.compress(host.model, _spy([])), torch.no_grad():
        host.model(**inputs, use_cache=True)
    handle.remove()
    assert calls == [inputs["input_ids"].numel(), 3]
