"""Facts about models against the modules themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, Qwen2VLConfig

import tokenprune as tp
from tokenprune.adapter import position_table
from tokenprune.errors import UserError
from tokenprune.facts import DecoderFacts
from tokenprune.testing.host import Host, hosts


@pytest.mark.parametrize("host", hosts(), ids=lambda host: f"{host.name}, {host.decoder}")
def test_facts_are_those_of_the_weights(host: Host) -> None:
    adapter, facts = host.adapter, host.adapter.facts
    text, vision = facts.decoder, facts.vision
    decoder, tower = adapter.decoder_layers, adapter.vision_layers
    assert (text.layers, vision.layers) == (len(decoder), len(tower))
    query, key = decoder[0].self_attn.q_proj.weight, decoder[0].self_attn.k_proj.weight
    assert query.shape == (text.heads * text.head_dim, text.hidden)
    assert key.shape == (text.kv_heads * text.head_dim, text.hidden)
    assert decoder[0].mlp.gate_proj.weight.shape == (text.intermediate, text.hidden)
    assert tower[0].mlp.fc1.weight.shape == (vision.intermediate, vision.hidden)
    assert adapter.vision_attention(0).num_heads == vision.heads
    assert text.position_scheme == "rotary"
    embeddings = adapter.vision_tower.embeddings
    if host.name == "InternVL":
        table, cls, wide = embeddings.position_embeddings[0], embeddings.cls_token, 4
        assert adapter.projector.layer_norm.weight.shape == (wide * vision.hidden,)
        assert vision.patch_size == embeddings.patch_embeddings.projection.kernel_size
    else:
        table, wide = position_table(adapter).weight, 1
        cls = getattr(embeddings, "class_embedding", None)
        assert vision.patch_size == embeddings.patch_embedding.kernel_size
    assert table.shape == (vision.tokens, vision.hidden)
    assert (vision.has_cls, vision.merge_size**2) == (cls is not None, wide)


def test_facts_follow_the_model() -> None:
    host = Host.tiny("LLaVA-NeXT")
    before = host.adapter.facts
    assert before == host.adapter.facts
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.vision.layers = 1
    host.model.set_attn_implementation("eager")
    assert host.adapter.facts.vision.attention == "eager"


def test_three_position_ids_for_each_token() -> None:
    assert DecoderFacts.of(LlamaConfig()).position_scheme == "rotary"
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = Qwen2VLConfig(text_config={"rope_parameters": rope}).get_text_config()
    assert DecoderFacts.of(config).position_scheme == "multimodal-rotary"


@pytest.mark.parametrize(
    ("name", "readable", "head"),
    [
        ("vit_tiny_patch16_224", True, False),
        ("beit_base_patch16_224", False, False),
        ("vit_base_patch16_siglip_224", True, True),
    ],
)
def test_facts_of_timm(name: str, readable: bool, head: bool) -> None:
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}
    pipe = tp.load(f"timm/{name}", **options)
    facts = pipe.adapter.facts
    states = pipe.model.vit.blocks[0](torch.zeros(1, facts.vision.tokens, 24))
    assert states.shape == (1, facts.vision.tokens, facts.vision.hidden)
    assert (facts.vision.readable, facts.vision.has_head) == (readable, head)
    assert (facts.vision.layers, facts.vision.heads) == (2, 2)
    assert facts.language_model is None
    with pytest.raises(UserError, match="timm models have no language model"):
        _ = facts.decoder
