"""A slow reference of a vision encoder under a method that acts inside it, one view at a time.

Embeddings, attention matrices and merging are computed from the weights, without hooks or batches.
Only `EncoderCompressor.grid` and ``reduce`` are the method's own code.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.encoder import EncoderCompressor, EncoderTokens
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal

__all__ = [
    "HandRun",
    "clusters_by_hand",
    "features_by_hand",
    "signal_by_hand",
    "tower_by_hand",
]


class HandRun(NamedTuple):
    """The run of one view.

    Attributes:
        states: The input of layer 0, then the output of every layer, (n, D) each.
        sizes: For each of these states, the number of patches that every entry stands for.
        groups: For each of these states, the index of every entry of a full view in it, -1 if the
            entry is dropped.
    """

    states: list[Tensor]
    sizes: list[list[float]]
    groups: list[list[int]]


def tower_by_hand(adapter: Any, part: EncoderCompressor, view: Tensor, target: int) -> HandRun:
    """Run one view (3, height, width) through all layers.

    Args:
        adapter: The model.
        part: The method.
        view: Pixels as the processor makes them.
        target: Number of vectors after the prefix that the view should end with.
    """
    prefix, shape = int(adapter.facts.vision.has_cls), adapter.view_shape
    grid = part.grid(shape, target)
    states = _embedded(adapter, view, grid)
    groups = [[*range(prefix)]]
    for row in range(shape[0]):
        for col in range(shape[1]):
            y, x = (row + 0.5) * grid[0] / shape[0], (col + 0.5) * grid[1] / shape[1]
            groups[0].append(prefix + int(y + 1e-9) * grid[1] + int(x + 1e-9))
    run = HandRun([states], [[1.0] * len(states)], groups)
    feature = adapter.base.config.vision_feature_layer
    used = feature if feature >= 0 else len(adapter.vision_layers) + 1 + feature
    for index, layer in enumerate(adapter.vision_layers):
        states, sizes = run.states[-1], run.sizes[-1]
        query, key, value = _heads(layer, states)
        logits = query @ key.mT / query.shape[-1] ** 0.5 + _bias(part, sizes)
        mixed = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
        states = states + layer.self_attn.out_proj(mixed)
        group = run.groups[-1]
        seen = EncoderTokens(
            layer=index,
            layers=used,
            prefix=prefix,
            patches=grid[0] * grid[1],
            target=target,
            states=states[None],
            keys=key.mean(0)[None],
            size=torch.tensor(sizes)[None],
        )
        reduction = part.reduce(seen) if index < used else None
        if reduction is not None:
            to = reduction.group[0].tolist()
            group = [to[old] if old >= 0 else -1 for old in group]
            rows, total = [], []
            for place in range(reduction.left):
                members = [entry for entry, where in enumerate(to) if where == place]
                total.append(sum(sizes[entry] for entry in members))
                weighted = [sizes[entry] * states[entry] for entry in members]
                rows.append(torch.stack(weighted).sum(0) / total[-1])
            states, sizes = torch.stack(rows), total
        states = states + layer.mlp(layer.layer_norm2(states))
        run.states.append(states)
        run.sizes.append(sizes)
        run.groups.append(group)
    return run


def _embedded(adapter: Any, view: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, D) the input of the first layer."""
    tower = getattr(adapter.vision_tower, "vision_model", adapter.vision_tower)
    embed, prefix, shape = tower.embeddings, int(adapter.facts.vision.has_cls), adapter.view_shape
    weight = embed.patch_embedding.weight
    side = weight.shape[-1]
    positions = embed.position_embedding.weight
    if grid != shape:
        size = grid[0] * side, grid[1] * side
        view = F.interpolate(view[None], size, mode="bilinear", antialias=True)[0]
        table = positions[prefix:].T.unflatten(1, shape)[None]
        resized = F.interpolate(table, grid, mode="bicubic", align_corners=False)[0]
        positions = torch.cat([positions[:prefix], resized.flatten(1).T])
    patches = [
        view[:, row * side : (row + 1) * side, col * side : (col + 1) * side].flatten()
        for row in range(grid[0])
        for col in range(grid[1])
    ]
    states = torch.stack(patches) @ weight.flatten(1).T
    if embed.patch_embedding.bias is not None:
        states = states + embed.patch_embedding.bias
    if not prefix:
        summed: Tensor = states + positions
        return summed
    states = torch.cat([embed.class_embedding[None], states]) + positions
    normed: Tensor = tower.pre_layrnorm(states)
    return normed


def _heads(layer: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(heads, n, head_dim) queries, keys and values."""
    attention, normed = layer.self_attn, layer.layer_norm1(states)
    query, key, value = (
        getattr(attention, name)(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    return query, key, value


def _bias(part: EncoderCompressor, sizes: list[float]) -> Tensor:
    """(n,) bias that the method adds to the logits of every key."""
    found = part.bias(torch.tensor(sizes)[None])
    return torch.zeros(len(sizes)) if found is None else found[0]


def features_by_hand(adapter: Any, runs: list[HandRun]) -> Tensor:
    """(V, patches, D) the hidden states that the projector receives, for every patch of a view."""
    feature, prefix = adapter.base.config.vision_feature_layer, int(adapter.facts.vision.has_cls)
    views = [_over_patches(run.states[feature], run.groups[feature]) for run in runs]
    return torch.stack(views)[:, prefix:]


def _over_patches(values: Tensor, group: list[int]) -> Tensor:
    """The row of every entry of a full view; zeros for a dropped entry."""
    nothing = torch.zeros_like(values[0])
    return torch.stack([nothing if place < 0 else values[place] for place in group])


def signal_by_hand(
    adapter: Any, part: EncoderCompressor, signal: Signal, runs: list[HandRun]
) -> Tensor:
    """(V, patches) or (V, patches, C) signal of the encoder, from full attention matrices."""
    signal = signal.resolve(adapter.facts.vision.has_cls)
    if signal.name == "unprojected":
        return features_by_hand(adapter, runs)
    index, prefix = signal.layer % len(adapter.vision_layers), int(adapter.facts.vision.has_cls)
    found = []
    for run in runs:
        query, key, _ = _heads(adapter.vision_layers[index], run.states[index])
        if "joint" in signal.name:
            query, key = (part.transpose(0, 1).flatten(1)[None] for part in (query, key))
        logits = query @ key.mT / query.shape[-1] ** 0.5
        attention = (logits + _bias(part, run.sizes[index])).softmax(-1).mean(0)
        values = {
            "keys": key.mean(0),
            "joint_keys": key[0],
            "cls_logits": logits.mean(0)[0],
            "received": attention.mean(0),
        }.get(signal.name, attention[0])
        found.append(_over_patches(values, run.groups[index]))
    return torch.stack(found)[:, prefix:]


def clusters_by_hand(adapter: Any, layout: TokenLayout, runs: list[HandRun]) -> Tensor:
    """(N,) the cluster of each entry; -1 at separators."""
    (height, width), prefix = adapter.view_shape, int(adapter.facts.vision.has_cls)
    rows, cols = layout.view_shape
    found = []
    for view, row, col in zip(
        *(x.tolist() for x in (layout.view, layout.row, layout.col)), strict=True
    ):
        if view < 0:
            found.append(-1)
            continue
        y, x = int((row + 0.5) * height / rows + 1e-9), int((col + 0.5) * width / cols + 1e-9)
        place = runs[view].groups[-1][prefix + y * width + x]
        found.append(-1 if place < 0 else 1000 * view + place)
    return torch.tensor(found)
