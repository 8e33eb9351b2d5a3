"""Synthetic visual tokens, for tests and for forecasts without a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal, SignalInfo
from tokenprune.tokens import VisualTokens

__all__ = ["sample_tokens"]

WIDTH, VECTOR, HEADS = 8, 6, 4
"""Default sizes: of the features, of the vectors of a signal, and of an axis of heads."""


def sample_tokens(
    signals: frozenset[Signal],
    layout: TokenLayout,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    text: int = 5,
    widths: Mapping[str, int] | None = None,
) -> VisualTokens:
    """Random features, and random numbers for exactly the given signals (`SignalInfo.sample`).

    Args:
        signals: The signals to make (`Compressor.needs`).
        layout: Geometry of the N entries.
        seed: Seed of the random numbers.
        dtype: Dtype of the features and signals.
        text: Number of text tokens after the image.
        widths: Size of the last axis of ``features`` and of signals, by name; a small default for
            all others.
    """
    layout = copy.deepcopy(layout)  # a method that writes to it must not affect other tests
    wide = widths or {}
    width = wide.get("features", WIDTH)
    draw = _Draw(seed, dtype)
    aligned = sorted((one for one in signals if one.is_aligned), key=repr)
    others = sorted((one for one in signals if one.info.found_in == "text"), key=repr)
    weight = draw.normal(wide.get("unprojected", VECTOR), width)
    return VisualTokens(
        layout=layout,
        features=draw.normal(len(layout), width),
        signals={one: _aligned(draw, one, layout, text, wide) for one in aligned},
        fingerprint=draw.normal(3, 4, 4, dtype=torch.float32),
        projector=lambda vectors: vectors.relu() @ weight,
        text={
            one: draw.normal(text, wide.get(one.name, VECTOR))
            for one in aligned
            if one.info.is_of_all_tokens
        }
        | {
            one: draw.normal(text, width if one.in_llm else wide.get(one.name, VECTOR))
            for one in others
        },
        inputs=(draw.normal(len(layout.patches), width), draw.normal(text, width)),
        clusters=draw.clusters(layout),
    )


def _aligned(
    draw: _Draw, signal: Signal, layout: TokenLayout, text: int, widths: Mapping[str, int]
) -> Tensor:
    """(N, ...) a signal; a signal of the vision encoder is NaN at separators."""
    last = widths.get(signal.name, HEADS if "heads" in signal.info.shape else VECTOR)
    sizes = {"N": len(layout), "T": text}
    values = draw.signal(signal.info, [sizes.get(axis, last) for axis in signal.info.shape])
    if signal.in_llm:
        return values
    separators = layout.is_separator.reshape(-1, *[1] * (values.ndim - 1))
    return values.masked_fill(separators, torch.nan)


class _Draw:
    """Random numbers on the CPU, independent of PyTorch's default device and dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator("cpu").manual_seed(seed), dtype

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, drawn in float32."""
        return self._normal(shape).to(dtype or self.dtype)

    def signal(self, info: SignalInfo, shape: list[int]) -> Tensor:
        """Numbers that stand in for a signal."""
        if info.sample == "rotation":
            uniform = torch.rand(shape, generator=self.generator, dtype=torch.float32, device="cpu")
            return (1 + uniform).to(self.dtype)
        values = self._normal(shape)
        return (values.softmax(0) if info.sample == "attention" else values).to(self.dtype)

    def clusters(self, layout: TokenLayout) -> Tensor:
        """(N,) clusters of about two entries in each view; -1 at separators."""
        size = len(layout)
        drawn = torch.randint(max(1, size // 2), (size,), generator=self.generator, device="cpu")
        return torch.where(layout.is_separator, -1, layout.view * size + drawn)

    def _normal(self, shape: list[int] | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
