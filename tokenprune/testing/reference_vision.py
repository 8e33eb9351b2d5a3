"""Features and signals of the vision encoder, from full attention matrices and packed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.budget import budget
from tokenprune.encoder import EncoderCompressor
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.signals import Signal
from tokenprune.testing.host import ROWS, Host
from tokenprune.testing.reference_native import native_image
from tokenprune.testing.reference_tower import (
    clusters_by_hand,
    features_by_hand,
    signal_by_hand,
    tower_by_hand,
)
from tokenprune.tokens import VisualTokens

__all__ = ["images_by_hand"]


def images_by_hand(
    host: Host, signals: frozenset[Signal], row: int, part: EncoderCompressor | None = None
) -> list[VisualTokens]:
    """The images and videos of a prompt, with signals from full attention matrices."""
    adapter, images = host.adapter, []
    layouts = {name: [] for name in adapter.encoders}  # type: dict[str, list[TokenLayout]]
    for layout in host.layouts(row):
        layouts[adapter.stream(layout.modality)].append(layout)
    for modality, call in host.media(row).items():
        arguments = {name: value for name, value in call.items() if name not in adapter.notes}
        output = getattr(adapter.base, adapter.encoders[modality])(**arguments)
        pixels = call["pixel_values_videos" if modality == "video" else "pixel_values"]
        if adapter.facts.vision.merge_size > 1 and not adapter.facts.vision.native:
            images += _tiled_by_hand(adapter, signals, layouts[modality], pixels, output)
            continue
        for index, layout in enumerate(layouts[modality]):
            if pixels.ndim == 2:
                patches = pixels.split([4 * len(one) for one in layouts[modality]])[index]
                made = native_image(adapter, layout, patches, [*signals])
                images.append(
                    replace(made, fingerprint=adapter.pixels_of(call, modality, index, index))
                )
                continue
            views = pixels[index, : layout.views] if pixels.ndim == 5 else pixels[index][None]
            size = ROWS[row].sizes[index] if modality == "image" else None
            if part is not None:
                first = layouts[modality][0].view_sizes[0]
                made = _encoded_by_hand(adapter, part, signals, views, layout, size, first)
                images.append(
                    replace(made, fingerprint=adapter.pixels_of(call, modality, index, index))
                )
                continue
            maps = {
                signal: _packed_by_hand(
                    layout, size, _vision_signal(adapter, signal, views), adapter.view_shape
                )
                for signal in signals
                if not signal.in_llm
            }
            images.append(
                VisualTokens(
                    layout=layout,
                    features=output.pooler_output[index],
                    signals=maps,
                    fingerprint=adapter.pixels_of(call, modality, index, index),
                    projector=adapter.base.multi_modal_projector,
                )
            )
    return images


def _tiled_by_hand(
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
            values = _vision_signal(adapter, signal, views)
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


def _encoded_by_hand(
    adapter: Any,
    part: EncoderCompressor,
    signals: frozenset[Signal],
    views: Tensor,
    layout: TokenLayout,
    size: tuple[int, int] | None,
    full: int,
) -> VisualTokens:
    """An image whose views, of ``full`` tokens each, ran under an encoder method."""
    target, shape = budget(full, part.retention), adapter.view_shape
    runs = [tower_by_hand(adapter, part, view, target) for view in views]
    projected = adapter.base.multi_modal_projector(features_by_hand(adapter, runs))
    features = _packed_by_hand(layout, size, projected, shape)
    if layout.is_separator.any():
        features[layout.is_separator] = adapter.base.image_newline
    return VisualTokens(
        layout=layout,
        features=features,
        signals={
            signal: _packed_by_hand(
                layout, size, signal_by_hand(adapter, part, signal, runs), shape
            )
            for signal in signals
            if not signal.in_llm
        },
        projector=adapter.base.multi_modal_projector,
        clusters=clusters_by_hand(adapter, layout, runs),
    )


def _packed_by_hand(
    layout: TokenLayout, size: tuple[int, int] | None, maps: Tensor, view_shape: tuple[int, int]
) -> Tensor:
    """(N, ...) maps (views, patches, ...) of an image of ``size`` or a video, NaN at separators."""
    if maps.ndim == 3:
        channels = [_packed_by_hand(layout, size, part, view_shape) for part in maps.unbind(-1)]
        return torch.stack(channels, -1)
    grids = maps.unflatten(1, view_shape)
    if size is None:
        tokens = [_resampled(frame, layout.view_shape).flatten() for frame in grids]
        return torch.cat([*tokens, torch.tensor([torch.nan])])
    thumbnail = grids[0].flatten()
    if layout.grid == (0, 0):
        return torch.cat(
            [thumbnail, thumbnail.new_full((len(layout) - len(thumbnail),), torch.nan)]
        )
    rows, cols = layout.grid
    crops = grids[1:].unflatten(0, (rows, cols))
    canvas = torch.cat([torch.cat([*crops[row]], dim=1) for row in range(rows)], dim=0)
    top, bottom, left, right = unpadded_box(size, (canvas.shape[0], canvas.shape[1]))
    canvas = canvas[top:bottom, left:right]
    if 0 not in canvas.shape:
        canvas = _resampled(canvas, layout.canvas_shape)
    separators = canvas.new_full((len(canvas), 1), torch.nan)
    return torch.cat([thumbnail, torch.cat([canvas, separators], dim=1).flatten()])


def _resampled(grid: Tensor, shape: tuple[int, int]) -> Tensor:
    """A map (rows, columns) resampled to ``shape``, bilinear between the centres of its cells."""
    result = grid
    for axis, size in enumerate(shape):
        length = grid.shape[axis]
        places = ((torch.arange(size) + 0.5) * length / size - 0.5).clamp(0, length - 1)
        low = places.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (places - low).unflatten(0, (-1, 1) if axis == 0 else (1, -1))
        result = (1 - weight) * result.index_select(axis, low) + weight * result.index_select(
            axis, high
        )
    return result


def _vision_signal(adapter: Any, signal: Signal, views: Tensor) -> Tensor:
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
