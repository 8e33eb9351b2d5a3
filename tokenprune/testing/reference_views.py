"""Slow references of the views of a vision encoder: signals, and views that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = ["tiled_by_hand", "vision_signal"]


def tiled_by_hand(
    adapter: Any,
    signals: frozenset[Signal],
    layouts: Sequence[TokenLayout],
    pixels: Tensor,
    output: Any,
) -> list[VisualTokens]:
    """Images and videos whose views follow each other in ``pixels``; squares of patches merge."""
    images, first = [], 0
    for layout in layouts:
        views = pixels[first : first + layout.views]
        features = output.pooler_output[first : first + layout.views].flatten(0, 1)
        maps = {}
        for signal in signals:
            if signal.in_llm:
                continue
            values = vision_signal(adapter, signal, views)
            cells = _merged_cells(values, adapter.view_shape, adapter.facts.vision.merge_size)
            join = torch.cat if signal.name == "unprojected" else _mean_of
            maps[signal] = torch.stack([join([*cell]) for view in cells for cell in view])
        images.append(
            VisualTokens(
                layout=layout,
                features=features,
                signals=maps,
                fingerprint=adapter.pixels_of({"pixel_values": pixels}, "image", 0, first),
                projector=adapter.base.multi_modal_projector,
            )
        )
        first += layout.views
    return images


def _merged_cells(values: Tensor, shape: tuple[int, int], side: int) -> list[list[Tensor]]:
    """For every view, for every token, (side * side, ...) values of its patches, row by row."""
    rows, cols = shape
    return [
        [
            torch.stack(
                [
                    view[(row + down) * cols + col + right]
                    for down in range(side)
                    for right in range(side)
                ]
            )
            for row in range(0, rows, side)
            for col in range(0, cols, side)
        ]
        for view in values
    ]


def _mean_of(cell: Sequence[Tensor]) -> Tensor:
    return torch.stack([*cell]).mean(0)


def vision_signal(adapter: Any, signal: Signal, views: Tensor) -> Tensor:
    """(V, patches) or (V, patches, C) vision signal, from the full attention matrix."""
    signal = signal.resolve(adapter.facts.vision.has_cls)
    index = signal.layer % len(adapter.vision_layers)
    layer, attention = adapter.vision_layers[index], adapter.vision_attention(index)
    tower = adapter.base.vision_tower(views, output_hidden_states=True)
    norm = getattr(layer, "layer_norm1", None) or layer.layernorm_before
    states = norm(tower.hidden_states[index])
    first = int(adapter.facts.vision.has_cls)
    if signal.name == "unprojected":
        chosen: Tensor = tower.hidden_states[adapter.base.config.vision_feature_layer]
        return chosen[:, first:]

    def heads(name: str) -> Tensor:
        out = getattr(attention, f"{name}_proj")(states)
        out = getattr(attention, f"{name}_norm", nn.Identity())(out)
        split: Tensor = out.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        return split

    query, key = heads("q"), heads("k")
    if signal.name == "keys":
        return key.mean(1)[:, first:]
    if "joint" in signal.name:
        query, key = (part.transpose(1, 2).flatten(2)[:, None] for part in (query, key))
    if signal.name == "joint_keys":
        return key[:, 0, first:]
    logits: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    if signal.name == "cls_logits":
        return logits.mean(1)[:, 0, first:]
    full = logits.softmax(-1).mean(1)
    return full[:, 0, first:] if signal.needs_cls else full.mean(1)[:, first:]
