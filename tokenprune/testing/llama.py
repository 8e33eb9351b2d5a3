"""The attention of a Llama decoder layer with given weights, for golden vectors."""

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
    """The arguments of `tokenprune.attention.decoder_row` that belong to a layer.

    Args:
        query, key: (D, D) weights of the projections, which have no bias.
        norm: (D,) weights of the norm in front of the layer.
        heads: Number of query heads and of key heads.
        base: Base of the rotary embedding.
        eps: Epsilon of the norm.
        length: Number of position ids that the rotary embedding covers.

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
