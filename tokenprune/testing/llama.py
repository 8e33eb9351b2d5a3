"""The attention of a Llama decoder layer with given weights, for vectors of official code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

__all__ = [
    "llama_attention",
]


def llama_attention(
    query: Tensor, key: Tensor, norm: Tensor, heads: int, *, base: float, eps: float, length: int
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """What `tokenprune.attention.decoder_row` takes of a layer.

    Args:
        query, key: (D, D) weights of the projections, which have no bias.
        norm: (D,) weights of the norm in front of the layer.
        heads: Of queries and of keys.
        base, eps: Of the rotary embedding and of the norm.
        length: Positions that the rotary embedding is wanted for.

    Returns:
        The attention module, the norm, and cos and sin (1, length, D / heads).
    """
    config = LlamaConfig(
        hidden_size=len(norm),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )
    attention, before = LlamaAttention(config, 0), LlamaRMSNorm(len(norm), eps)
    attention.load_state_dict({"q_proj.weight": query, "k_proj.weight": key}, strict=False)
    before.load_state_dict({"weight": norm})
    cos, sin = LlamaRotaryEmbedding(config)(norm, torch.arange(length)[None])
    return attention, before, (cos, sin)
