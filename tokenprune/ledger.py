"""What a compression really cost: tokens, FLOPs, KV bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["DecoderShape", "Ledger", "VisionShape", "encoder_flops", "prefill_flops"]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Read from the text config of a ``transformers`` model."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def kv_bytes(self, size: int) -> int:
        """Bytes that one token takes in one layer's KV cache, ``size`` bytes a number."""
        return 2 * self.kv_heads * self.head_dim * size


def prefill_flops(tokens: Sequence[int], shape: DecoderShape) -> float:
    """FLOPs of a prefill in which layer ``l`` processes ``tokens[l]`` tokens.

    Per layer ``2n(4d² + 3dm) + 4n²d`` for ``n`` tokens, width ``d`` and MLP width ``m``, the
    projections adjusted for grouped-query attention; non-causal count of the attention products,
    as in the efficiency tables of the GlobalCom² repository (LLaVA-NeXT-7B, 2880 tokens: 41.7
    TFLOPs).
    """
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * shape.hidden * (2 * query + 2 * key_value + 3 * shape.intermediate)
    return float(sum(n * linear + 4 * n * n * query for n in tokens))


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower that its cost depends on."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Read from the vision config of a ``transformers`` model."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
        )


def encoder_flops(
    tokens: Sequence[int], shape: VisionShape, behind: Sequence[int] | None = None
) -> float:
    """FLOPs of the layers of a vision tower on one view.

    Per layer ``2n * 4d² + 4n²d`` for the attention over ``n`` tokens and ``2n' * 2dm`` for the MLP
    behind it, of width ``m`` and without a gate.  Patch embedding and projector are left out, as
    `prefill_flops` leaves out embedding and head.

    Args:
        tokens: What the attention of each layer that runs sees, CLS token included.
        shape: Of the tower.
        behind: What the MLP of each layer sees, where tokens are merged between the two.
    """
    linear = 2 * 4 * shape.hidden**2
    mlp = 2 * 2 * shape.hidden * shape.intermediate
    pairs = zip(tokens, tokens if behind is None else behind, strict=True)
    return float(sum(n * linear + 4 * n * n * shape.hidden + left * mlp for n, left in pairs))


@dataclass(frozen=True)
class Ledger:
    """The account of one prompt's prefill.

    Attributes:
        requested: R as asked for.
        patch_tokens, kept_patches: Patch tokens before compression, and entering the last layer.
        separators, kept_separators: The same for separators.
        patches_per_view, kept_per_view: For every image, the patch tokens of each of its views,
            before compression and at the end.
        text_tokens: Tokens of the prompt that are not visual.
        visual_per_layer: Visual tokens (separators included) that each decoder layer processed.
        kv_bytes: Size of the KV cache after the prefill.
        flops: Prefill FLOPs of the decoder, layer by layer, plus `selector_flops`.
        selector_flops: What choosing cost: attention rows and the strategy's own arithmetic.
        uncompressed_flops: Prefill FLOPs of the decoder on the full prompt.
        vision_flops: FLOPs of the vision tower's layers on all views, as many tokens in each as
            really ran (`encoder_flops`); not part of `flops`.
        uncompressed_vision_flops: The same on full views.
    """

    requested: float
    patch_tokens: int
    kept_patches: int
    separators: int
    kept_separators: int
    patches_per_view: tuple[tuple[int, ...], ...]
    kept_per_view: tuple[tuple[int, ...], ...]
    text_tokens: int
    visual_per_layer: tuple[int, ...]
    kv_bytes: int
    flops: float
    selector_flops: float
    uncompressed_flops: float
    vision_flops: float
    uncompressed_vision_flops: float

    @property
    def realised(self) -> float:
        """Kept patch tokens / patch tokens (1 without an image)."""
        return self.kept_patches / self.patch_tokens if self.patch_tokens else 1.0

    @property
    def layer_average(self) -> float:
        """Visual tokens processed by a decoder layer on average."""
        return sum(self.visual_per_layer) / len(self.visual_per_layer)
