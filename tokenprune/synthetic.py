"""Made-up visual tokens, for tests and for forecasts without a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = ["sample_tokens"]

WIDTH, VECTOR, HEADS = 8, 6, 4


def sample_tokens(
    signals: frozenset[Signal],
    layout: TokenLayout,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text: int = 5,
    widths: Mapping[str, int] | None = None,
) -> VisualTokens:
    """Random features, and of the signals exactly those that were declared.

    Args:
        signals: What the strategy `Compressor.needs`.
        layout: Geometry of the N entries.
        seed: Of everything that is drawn.
        dtype: Of everything that is drawn.
        text: How many text tokens lie behind the image.
        widths: Of ``features`` and of vector signals by name, where a few numbers will not do.
    """
    layout = copy.deepcopy(layout)  # a strategy that writes to its own must not spoil others'
    wide = widths or {}
    width = wide.get("features", WIDTH)
    draw = torch.Generator("cpu").manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")

    def signal(which: Signal) -> Tensor:
        if which.name == "llm_text":
            return drawn(len(layout), text).softmax(0)
        if which.name == "llm_text_heads":
            heads = wide.get(which.name, HEADS)
            return drawn(len(layout), text, heads).softmax(0)
        if which.name == "llm_text_rotary":
            return 1 + torch.rand(
                len(layout), text, generator=draw, dtype=torch.float32, device="cpu"
            )
        if which.is_vector:
            vectors = drawn(len(layout), wide.get(which.name, VECTOR))
            if which.in_llm:
                return vectors
            return vectors.masked_fill(layout.is_separator[:, None], torch.nan)
        values = drawn(len(layout))
        if which.name not in ("cls_logits", "saliency"):
            values = values.softmax(0)
        return values if which.in_llm else values.masked_fill(layout.is_separator, torch.nan)

    ordered = sorted((one for one in signals if one.is_aligned), key=repr)
    weight = drawn(wide.get("unprojected", VECTOR), width).to(dtype)
    return VisualTokens(
        layout=layout,
        features=drawn(len(layout), width).to(dtype),
        signals={which: signal(which).to(dtype) for which in ordered},
        fingerprint=drawn(3, 4, 4),
        projector=lambda vectors: vectors.relu() @ weight,
        text={
            which: drawn(text, wide.get(which.name, VECTOR)).to(dtype)
            for which in ordered
            if which.is_vector and which.in_llm and not which.name.startswith("llm_text")
        }
        | {
            which: drawn(text, width if which.in_llm else wide.get(which.name, VECTOR)).to(dtype)
            for which in sorted(signals, key=repr)
            if which.name in ("llm_prompt", "clip_text")
        },
        inputs=(
            drawn(len(layout.patches), width).to(dtype),
            drawn(text, width).to(dtype),
        ),
        clusters=torch.where(
            layout.is_separator,
            -1,
            layout.view * len(layout)
            + torch.randint(max(1, len(layout) // 2), (len(layout),), generator=draw, device="cpu"),
        ),
    )
