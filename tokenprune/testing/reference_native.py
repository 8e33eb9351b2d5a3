"""A slow run of the vision encoders of Qwen-VL, and the position ids of their prompts by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = ["native_image", "numbered"]


def numbered(
    length: int,
    images: Sequence[tuple[TokenLayout, Tensor, Tensor]],
    step: int,
) -> Tensor:
    """(3, length) position ids of a prompt whose images have some of their rows and columns.

    Args:
        length: Number of columns of the prompt.
        images: For every image or video its layout, the columns of all its tokens, and the indices
            of those that stay.
        step: Difference of the times of two successive frames in one run of placeholders.

    Returns:
        Time, row and column of each column of the prompt; -1 for tokens that do not stay.
    """
    of_column = {
        column: (image, place)
        for image, (_, columns, _) in enumerate(images)
        for place, column in enumerate(columns.tolist())
    }
    found = torch.full((3, length), -1)
    column = start = 0
    while column < length:
        if column not in of_column:
            found[:, column] = start
            column, start = column + 1, start + 1
            continue
        image, first = of_column[column]
        layout, _, stays = images[image]
        kept = set(stays.tolist())
        run = [first]
        while of_column.get(column + len(run)) == (image, first + len(run)):
            run.append(first + len(run))
        left = [place for place in run if place in kept]
        rows = sorted({int(layout.row[place]) for place in left})
        cols = sorted({int(layout.col[place]) for place in left})
        for place in left:
            frame = int(layout.view[place]) - int(layout.view[first])
            at = (
                step * frame,
                rows.index(int(layout.row[place])),
                cols.index(int(layout.col[place])),
            )
            found[:, column + place - first] = start + torch.tensor(at)
        column, start = column + len(run), start + max(len(rows), len(cols))
    return found


def native_image(
    adapter: Any, layout: TokenLayout, pixels: Tensor, signals: Sequence[Signal]
) -> VisualTokens:
    """An image or video with features and signals, from full attention matrices.

    The patches stay in the order of the processor: the four of a token, token by token.  Windows
    are masks.

    Args:
        adapter: The model.
        layout: Layout of its N tokens.
        pixels: (4N, C) patches.
        signals: Signals of the vision encoder.
    """
    tower, config = adapter.vision_tower, adapter.base.config.vision_config
    token = torch.arange(4 * len(layout)) // 4
    inner = torch.arange(4 * len(layout)) % 4
    row, col = 2 * layout.row[token] + inner // 2, 2 * layout.col[token] + inner % 2
    states = tower.patch_embed(pixels) + _learned(tower, layout, row, col)
    same_view = layout.view[token][:, None] == layout.view[token]
    side = getattr(config, "window_size", 0) // (2 * config.patch_size)  # in tokens
    values: dict[Signal, Tensor] = {}
    levels: list[Tensor] = []
    deep = list(getattr(config, "deepstack_visual_indexes", ()))
    for index, block in enumerate(tower.blocks):
        seen = same_view
        if index not in getattr(config, "fullatt_block_indexes", range(config.depth)):
            window = layout.row[token] // side * 1000 + layout.col[token] // side
            seen = same_view & (window[:, None] == window)
        query, key, value = (
            part.unflatten(-1, (config.num_heads, -1)).transpose(0, 1)
            for part in block.attn.qkv(block.norm1(states)).chunk(3, -1)
        )
        turned = [_turned(part, row, col, config) for part in (query, key)]
        logits = turned[0] @ turned[1].mT / query.shape[-1] ** 0.5
        attention = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        for signal in signals:
            if signal.in_vision_layer and signal.layer % config.depth == index:
                each = {
                    "keys": key.mean(0),
                    "joint_keys": key.transpose(0, 1).flatten(1),
                    "received": attention.mean(0).sum(0) / same_view.sum(0),
                }[signal.resolve(has_cls=False).name]
                values[signal] = each.unflatten(0, (-1, 4)).mean(1)
        mixed = (attention @ value).transpose(0, 1).flatten(1)
        states = states + block.attn.proj(mixed)
        states = states + block.mlp(block.norm2(states))
        if index in deep:
            levels.append(tower.deepstack_merger_list[deep.index(index)](states))
    inputs = Signal("unprojected")
    if inputs in signals:
        values[inputs] = states.unflatten(0, (-1, 4)).flatten(1)
    return VisualTokens(
        layout=layout,
        features=tower.merger(states),
        signals=values,
        projector=adapter.project,
        levels=tuple(levels),
    )


def _learned(tower: Any, layout: TokenLayout, row: Tensor, col: Tensor) -> Tensor | float:
    """(4N, D) learned position embeddings, bilinear between those of a square grid."""
    if not hasattr(tower, "pos_embed"):
        return 0.0
    side = int(tower.pos_embed.num_embeddings**0.5)
    table = tower.pos_embed.weight.unflatten(0, (side, side))
    total: Tensor | float = 0.0
    places = []
    for place, length in zip((row, col), layout.view_shape, strict=True):
        at = place * (side - 1) / max(2 * length - 1, 1)
        low = at.floor().long()
        high = (low + 1).clamp(max=side - 1)
        places.append(((low, 1 - (at - low)), (high, at - low)))
    for y, tall in places[0]:
        for x, wide in places[1]:
            total = total + table[y, x] * (tall * wide)[:, None]
    return total


def _turned(heads: Tensor, row: Tensor, col: Tensor, config: Any) -> Tensor:
    """(heads, n, d) queries or keys, the first half of their pairs by row, the rest by column."""
    pairs = heads.shape[-1] // 2
    base = config.rope_parameters["rope_theta"]
    angles = [
        place[:, None] / base ** (2 * torch.arange(pairs // 2) / pairs) for place in (row, col)
    ]
    angle = torch.cat(angles, -1)
    left, right = heads.chunk(2, -1)
    return torch.cat(
        [left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1
    )
