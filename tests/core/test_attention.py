"""The attention rows that are computed, against the matrices of eager attention."""

from __future__ import annotations

import math
import threading
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from places import TESTS
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import tokenprune.attention
from tokenprune.attention import (
    attention_received,
    cls_row,
    decoder_mass,
    decoder_row,
    decoder_rows,
    first_arguments,
    projections,
    rotary_product,
)
from tokenprune.testing.golden import read as replay_cases

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 15,
    "patch_size": 3,
    "initializer_range": 0.3,
}


def _tower(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES))
    model.set_attn_implementation("eager")
    return model.eval()


def _layers(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower).encoder.layers


@torch.no_grad()
def _run(kind: str, layer: int, attention: str) -> tuple[Any, Tensor]:
    """Projections read with kernel ``attention``, and (V, heads, N, N) of eager attention."""
    tower: Any = _tower(kind)
    pixels = torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(1))
    full = tower(pixels, output_attentions=True).attentions[layer]
    tower.set_attn_implementation(attention)
    with projections(_layers(tower)[layer].self_attn) as tapped:
        tower(pixels)
    return tapped, full


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 2])
def test_cls_row_is_the_row_of_eager_clip(layer: int, attention: str) -> None:
    tapped, full = _run("clip", layer, attention)
    wanted = full.mean(1)[:, 0, 1:]
    torch.testing.assert_close(cls_row(tapped, softmax=True), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [0, 2])
def test_cls_logits_are_what_eager_softmaxes(layer: int) -> None:
    """Logits are known from probabilities up to one constant per head, so compare per head."""
    tapped, full = _run("clip", layer, "sdpa")
    for head in range(3):
        one = tokenprune.attention.Projections(
            heads=1,
            scale=tapped.scale,
            query=tapped.query[..., head * 8 : head * 8 + 8],
            key=tapped.key[..., head * 8 : head * 8 + 8],
        )
        constant = full[:, head, 0, 1:].log() - cls_row(one, softmax=False)
        torch.testing.assert_close(constant, constant[:, :1].expand_as(constant), atol=1e-5, rtol=0)
    heads = [part.view(2, -1, 3, 8) for part in (tapped.query, tapped.key)]
    products = torch.einsum("vhd,vnhd->vhn", heads[0][:, 0], heads[1]) / 8**0.5
    torch.testing.assert_close(cls_row(tapped, softmax=False), products.mean(1)[:, 1:])


@pytest.mark.parametrize("chunk", [4, 128])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_received_is_the_column_mean(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenprune.attention, "CHUNK", chunk)
    tapped, full = _run(kind, 1, "sdpa")
    torch.testing.assert_close(attention_received(tapped), full.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_attention_is_read_only_inside_the_context() -> None:
    attention = _layers(_tower("clip"))[0].self_attn
    with pytest.raises(KeyError), projections(attention) as tapped:
        raise KeyError
    assert not attention.q_proj._forward_hooks
    assert not attention.k_proj._forward_hooks
    with pytest.raises(RuntimeError, match="was not run while"):
        tapped.split()


# -- decoder -------------------------------------------------------------------------------------


def _decoder(kind: str, kv_heads: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = AutoModel.from_config(config).eval()
    model.set_attn_implementation("eager")
    return model


IDS = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(3))
LENGTHS = torch.tensor([12, 8])


@torch.no_grad()
def _tapped(model: Any, layer: int, mask: Tensor) -> tuple[dict[str, Any], Any]:
    """The arguments of attention ``layer``, and its attention under eager."""
    calls: list[dict[str, Any]] = []
    handle = model.layers[layer].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    with ExitStack() as stack:
        stack.callback(handle.remove)
        out = model(input_ids=IDS, attention_mask=mask, output_attentions=True, use_cache=True)
    return calls[0], out


def _mask(side: str) -> Tensor:
    column = torch.arange(12)
    if side == "right":
        return (column < LENGTHS[:, None]).long()
    return (column >= 12 - LENGTHS[:, None]).long()


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "cached keys"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoder_row_is_the_row_of_eager_attention(
    kind: str, kv_heads: int, side: str, cached: bool
) -> None:
    """Grouped queries, biases (qwen2), q_norm and k_norm (qwen3), padding on both sides."""
    model, layer, mask = _decoder(kind, kv_heads), 1, _mask(side)
    call, out = _tapped(model, layer, mask)
    asking = LENGTHS - 1 if side == "right" else torch.tensor([11, 11])
    visible = mask.bool() & (torch.arange(12) <= asking[:, None])
    with torch.no_grad():
        got = decoder_row(
            model.layers[layer].self_attn,
            call["hidden_states"],
            call["position_embeddings"],
            asking,
            visible,
            out.past_key_values.layers[layer].keys if cached else None,
        )
    wanted = out.attentions[layer].mean(1)[torch.arange(2), asking]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "cached keys"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_decoder_rows_are_rows_of_eager_attention(
    monkeypatch: pytest.MonkeyPatch, kind: str, kv_heads: int, cached: bool
) -> None:
    monkeypatch.setattr(tokenprune.attention, "CHUNK", 2)
    model, mask = _decoder(kind, kv_heads), _mask("left")
    call, out = _tapped(model, 1, mask)
    asking = torch.tensor([11, 7, 10, 8, 9])
    cos, sin = call["position_embeddings"]
    for row in range(2):
        visible = mask[row].bool() & (torch.arange(12) <= asking[:, None])
        given = (
            model.layers[1].self_attn,
            call["hidden_states"][row],
            (cos.expand(2, -1, -1)[row], sin.expand(2, -1, -1)[row]),
            asking,
            visible,
            out.past_key_values.layers[1].keys[row] if cached else None,
        )
        with torch.no_grad():
            got, heads = decoder_rows(*given), decoder_rows(*given, by_head=True)
        wanted = out.attentions[1][row][:, asking]
        torch.testing.assert_close(got, wanted.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads, wanted.movedim(0, -1), rtol=1e-5, atol=1e-6)


def test_rotary_product_depends_on_the_distance_alone() -> None:
    """Two channels turn by ``i``, two by ``i / 10``: ones times ones is twice the cosines."""
    angle = (torch.arange(9.0)[:, None] * torch.tensor([1, 0.1])).repeat(1, 2)
    asking = torch.tensor([8, 3])
    got = rotary_product((angle.cos(), angle.sin()), asking)
    assert got.shape == (2, 9)
    for row, place in enumerate(asking.tolist()):
        for other in range(9):
            wanted = 2 * (math.cos(place - other) + math.cos((place - other) / 10)) / math.sqrt(4)
            assert float(got[row, other]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("cached", [False, True], ids=["recomputed", "cached keys"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_decoder_mass_is_the_mean_of_the_heads_with_most_attention(
    monkeypatch: pytest.MonkeyPatch, kind: str, cached: bool
) -> None:
    monkeypatch.setattr(tokenprune.attention, "CHUNK", 2)
    model, mask = _decoder(kind, 2), _mask("left")
    call, out = _tapped(model, 1, mask)
    asking = torch.tensor([11, 7, 10, 8, 9])
    cos, sin = call["position_embeddings"]
    for row in range(2):

        def visible(slots: Tensor, row: int = row) -> Tensor:
            return mask[row].bool() & (torch.arange(12) <= slots[:, None])

        given = (
            model.layers[1].self_attn,
            call["hidden_states"][row],
            (cos.expand(2, -1, -1)[row], sin.expand(2, -1, -1)[row]),
        )
        keys = out.past_key_values.layers[1].keys[row] if cached else None
        with torch.no_grad():
            got = decoder_mass(*given, asking, visible, keys)
            nobody = decoder_mass(*given, asking[:0], visible, keys)
        wanted = out.attentions[1][row][:, asking].amax(0).mean(0)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        assert not nobody.any()


@pytest.mark.parametrize("at_once", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoder_mass_equals_a_loop_over_queries(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, dtype: torch.dtype, at_once: int
) -> None:
    """Blocks of queries and heads; cached keys in front, padding, and keys that count thrice."""
    monkeypatch.setattr(tokenprune.attention, "CHUNK", 3)
    monkeypatch.setattr(tokenprune.attention, "_AT_ONCE", {False: at_once})
    draw = torch.Generator().manual_seed(0)
    past, entries, heads, dim = 3, 12, 4, 8
    attention = _decoder("llama", kv_heads).layers[0].self_attn.to(dtype)
    hidden = torch.randn(entries, heads * dim, generator=draw).to(dtype)
    keys = torch.randn(kv_heads, past + entries, dim, generator=draw).to(dtype)
    still = torch.ones(entries, dim, dtype=dtype), torch.zeros(entries, dim, dtype=dtype)
    counts = torch.tensor([1, 1, 3, 0, 0, 0, 1, 1, 3, 1, 1, 1, 1, 2, 1.0])  # 0 is padding
    asking = [11, 5, 3, 9, 4, 7, 8]

    def visible(slots: Tensor) -> Tensor:
        return counts * (torch.arange(past + entries) <= past + slots[:, None])

    with torch.no_grad():
        got = decoder_mass(attention, hidden, still, torch.tensor(asking), visible, keys)
        queries = attention.q_proj(hidden).view(entries, heads, dim).double()
    wanted = torch.zeros(past + entries, dtype=torch.float64)
    for slot in asking:
        most = torch.zeros(past + entries, dtype=torch.float64)
        for head in range(heads):
            logits = queries[slot, head] @ keys[head * kv_heads // heads].double().T
            powers = counts * (logits / dim**0.5).exp()
            powers[past + slot + 1 :] = 0
            most = torch.maximum(most, powers / powers.sum())
        wanted += most / len(asking)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wanted.float(), rtol=close, atol=close)
    assert not got[counts == 0].any()


def test_decoder_row_of_an_earlier_token() -> None:
    """Teacher forcing asks with the last prompt token, which must not see the answer."""
    model, mask = _decoder("llama", 2), torch.ones(2, 12).long()
    call, out = _tapped(model, 0, mask)
    asking = torch.tensor([7, 4])
    visible = torch.arange(12) <= asking[:, None]
    with torch.no_grad():
        got = decoder_row(
            model.layers[0].self_attn,
            call["hidden_states"],
            call["position_embeddings"],
            asking,
            visible,
        )
    wanted = out.attentions[0].mean(1)[torch.arange(2), asking]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert (got[0, 8:] == 0).all()


def test_the_row_ahead_is_the_official_one_of_pyramiddrop() -> None:
    """RMSNorm, projections and rotation of the layer after the cut, for a padded batch."""
    folder = TESTS / "data" / "golden" / "pyramiddrop"
    (case,) = (c for c in replay_cases(folder, "pyramiddrop") if c.params["batch"] == 2)
    given, params = case.tensors, case.params
    width, heads = params["dim"], params["heads"]
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=params["rms_eps"],
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=8,
    )
    layer = LlamaModel(config).layers[0]
    layer.input_layernorm.weight.data = given["norm_weight"]
    layer.self_attn.q_proj.weight.data = given["q_weight"]
    layer.self_attn.k_proj.weight.data = given["k_weight"]
    features = given["features"]
    lengths = [
        params["image_start"] + visual + text
        for visual, text in zip(params["visual_before"], params["text_tokens"], strict=True)
    ]
    slots = torch.arange(features.shape[1])
    visible = slots[None] < torch.tensor(lengths)[:, None]
    rotary = LlamaModel(config).rotary_emb(features, slots[None])
    last = torch.tensor(lengths) - 1
    with torch.no_grad():
        row = decoder_row(layer.self_attn, layer.input_layernorm(features), rotary, last, visible)
    torch.testing.assert_close(row, given["attention_row"].mean(1), atol=1e-6, rtol=1e-5)


def test_calls_of_another_thread_are_not_recorded() -> None:
    module, mine = nn.Linear(2, 2), torch.ones(1, 2)
    with first_arguments(module) as seen:
        other = threading.Thread(target=module, args=(torch.zeros(3, 2),))
        other.start()
        other.join()
        module(mine)
    (kept,) = seen
    assert torch.equal(kept, mine)
