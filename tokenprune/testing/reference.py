"""A slow reference that builds the compressed prompt by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Stage
from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.signals import Signal
from tokenprune.testing.host import ROWS, Host
from tokenprune.testing.reference_tower import (
    clusters_by_hand,
    features_by_hand,
    signal_by_hand,
    tower_by_hand,
)
from tokenprune.tokens import VisualTokens

__all__ = [
    "Reference",
    "images_by_hand",
    "reference",
]


# -- the reference -------------------------------------------------------------------------------


class Reference(NamedTuple):
    """One prompt, compressed by hand.

    Attributes:
        columns: (M,) columns of prompt and answer that are left at the end.
        logits: (M, vocabulary) at these columns.
        positions: For every decoder layer, (m,) position ids of what it processes.
        kept: For every selection, in the order of parts and images, what it kept (indices into the
            image's full packed sequence).
        states: For every decoder layer, (m,) the columns it processes and (m, D) what it returns,
            of the last one behind the norm.
    """

    columns: Tensor
    logits: Tensor
    positions: list[Tensor]
    kept: list[Tensor]
    states: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def reference(
    host: Host,
    compressor: Compressor,
    row: int,
    answer: Sequence[int] = (),
    asking: Sequence[int] | None = None,
    hidden_columns: Sequence[int] = (),
    counted: bool = True,
) -> Reference:
    """Build the short sequence of one prompt by hand and run it.

    A batch of one without padding, hooks or KV cache: embeddings are gathered, and where tokens go
    between two layers, the layers are called one by one with a mask and positions made here.

    Args:
        host: The model.
        compressor: The method.
        row: Which prompt.
        answer: Ids behind the prompt, which have no say in the selection.
        asking: For every image the column whose attention ranks it; default: the last one of the
            prompt.
        hidden_columns: Columns that the attention mask hides; the sequence is built without them.
        counted: Whether position ids count them, as in a plain forward; those of `generate` do not.
    """
    model, adapter, language = host.model, host.adapter, host.adapter.language_model
    ids = torch.tensor([*host.prompt(row), *answer])
    images = images_by_hand(host, compressor.needs, row, encoder_part(compressor))
    hidden = model.get_input_embeddings()(ids)
    columns = positions = torch.arange(len(ids))
    askers = asking or [len(host.prompt(row)) - 1] * len(images)
    visual = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
    places = list(visual.split([*map(len, images)]))
    for place, tokens in zip(places, images, strict=True):
        hidden[place] = tokens.features
    whole = [torch.arange(len(tokens)) for tokens in images]
    last = [int(place[-1]) for place in places]
    there = ~torch.isin(columns, torch.tensor([*hidden_columns], dtype=torch.long))
    for index, place in enumerate(places):
        whole[index] = there[place].nonzero().squeeze(1)
        images[index] = images[index].take(whole[index])
        places[index] = place[there[place]]
    prompt, hidden, columns = hidden, hidden[there], columns[there]
    positions = columns if counted else torch.arange(len(columns))
    gaps = (~there).cumsum(0) * int(counted)  # closed by the first cut that re-indexes
    kept: list[Tensor] = []
    attention: dict[Signal, Tensor] = {}  # by asking and asked column
    vectors: dict[Signal, Tensor] = {}  # by column
    everything = torch.cat(places) if places else columns[:0]
    # Of the layer before, by asking and asked column: attention of all heads, and rotation alone.
    before: tuple[Tensor, Tensor] | None = None
    sizes = torch.ones(len(ids))  # how often attention counts a column

    def cut(part: Compressor, ahead: nn.Module | None = None) -> None:
        nonlocal hidden, columns, positions
        stays = torch.ones(len(columns), dtype=torch.bool)
        found = hidden.clone()  # what is merged of one image is nothing to another
        for index, tokens in enumerate(images):
            slots = torch.isin(columns, places[index]).nonzero().squeeze(1)
            if not len(tokens.layout.patches):  # hidden, apart from separators perhaps
                rowless = part.separators == "rows" and not tokens.layout.canvas_shape[0]
                stays[slots] = part.separators == "all" or rowless
                places[index] = columns[slots[stays[slots]]]
                whole[index] = whole[index][stays[slots]]
                images[index] = tokens.take(stays[slots].nonzero().squeeze(1))
                kept.append(whole[index])
                continue
            seen = {
                signal: square[askers[index], places[index]] for signal, square in attention.items()
            }
            behind = (columns > last[index]) & (columns <= askers[index])
            text = columns[behind & ~torch.isin(columns, everything)]
            seen |= {signal: values[places[index]] for signal, values in vectors.items()}
            if before is not None:
                every, turned = before
                asked = every[:, text][..., places[index]]
                patches = places[index][tokens.layout.patches]
                given = {
                    "llm_text": asked.mean(0).T,
                    "llm_text_heads": asked.permute(2, 1, 0),
                    "llm_text_rotary": turned[text][:, places[index]].T,
                    "llm_cross": asked.amax(0).mean(0),
                    "llm_self": every[:, patches][..., places[index]].amax(0).mean(0),
                }
                seen |= {one: given[one.name] for one in part.needs if one.name in given}
            if ahead is not None and Signal("llm_global") in part.needs:
                upto = found[columns <= last[index]]
                query, key = (_decoder_projected(ahead, upto, name) for name in "qk")
                key = key.repeat_interleave(len(query) // len(key), dim=0)
                logits = (query.mean(1, keepdim=True) @ key.mT)[:, 0] / query.shape[-1] ** 0.5
                seen[Signal("llm_global")] = logits.softmax(-1).mean(0)[slots]
            tokens = replace(tokens, text={s: values[text] for s, values in vectors.items()})
            tokens = replace(tokens, features=found[slots], signals={**tokens.signals, **seen})
            chosen = part(tokens)
            if chosen.features is not None:
                hidden[slots[chosen.keep]] = chosen.features
            if chosen.sizes is not None:
                sizes[places[index][chosen.keep]] = chosen.sizes
            stays[slots] = False
            stays[slots[chosen.keep]] = True
            images[index] = tokens.take(chosen.keep)
            places[index] = places[index][chosen.keep]
            whole[index] = whole[index][chosen.keep]
            kept.append(whole[index])
        if not part.keeps_positions and not stays.all():
            positions = positions - (~stays).cumsum(0) - gaps[columns]
            gaps.zero_()
        hidden, columns, positions = hidden[stays], columns[stays], positions[stays]

    if Signal("llm_prompt") in compressor.needs:
        vectors[Signal("llm_prompt")] = prompt
    stages = list(compressor.parts()) if images else []
    for part in stages:
        if part.stage is not Stage.LLM:
            cut(part)
    for index, some in enumerate(images):
        patches = torch.isin(columns, places[index][some.layout.patches])
        behind = (columns > last[index]) & (columns <= askers[index])
        text = behind & ~torch.isin(columns, everything)
        entered = len(some.layout.patches)
        images[index] = replace(some, entered=entered, inputs=(hidden[patches], hidden[text]))
    inside = [part for part in stages if part.cuts]
    if not inside and torch.equal(positions, torch.arange(len(positions))):
        # Nothing happens inside, so the plain model on the plain short prompt is the reference.
        out = language(inputs_embeds=hidden[None], use_cache=False, output_hidden_states=True)
        made = [(columns, one[0]) for one in out.hidden_states[1:]]
        logits = model.lm_head(out.last_hidden_state[0])
        return Reference(columns, logits, [positions] * len(made), kept, made)
    seen_positions, made = [], []
    for index, layer in enumerate(adapter.decoder_layers):
        for part in inside:
            for where in {adapter.cut_layer(each): each for each in part.cuts}.values():
                if adapter.cut_layer(where) == index:
                    rotary = language.rotary_emb(hidden[None], positions[None])
                    square = torch.full((len(ids), len(ids)), torch.nan)
                    heads = _decoder_attention(layer, hidden, rotary, sizes[columns])
                    square[columns[:, None], columns] = heads.mean(0)
                    attention[Signal("llm_ahead")] = square
                    if Signal("llm_keys_ahead") in part.needs:
                        keys = _decoder_keys(layer, hidden, rotary)
                        ahead = torch.full((len(ids), keys.shape[1]), torch.nan)
                        ahead[columns] = keys
                        vectors[Signal("llm_keys_ahead")] = ahead
                    states = torch.full((len(ids), hidden.shape[1]), torch.nan)
                    states[columns] = language.norm(hidden)
                    vectors[Signal("llm_states")] = states
                    cut(part.at(where), layer)
        seen_positions.append(positions)
        rotary = language.rotary_emb(hidden[None], positions[None])
        heads = _decoder_attention(layer, hidden, rotary, sizes[columns])
        every = torch.full((len(heads), len(ids), len(ids)), torch.nan)
        every[:, columns[:, None], columns] = heads
        turned = torch.full((len(ids), len(ids)), torch.nan)
        turned[columns[:, None], columns] = _rotation_alone(rotary)
        before = every, turned
        for signal in compressor.needs:
            if signal.name == "llm_keys" and signal.layer == index:
                rotated = _decoder_keys(layer, hidden, rotary)
                vectors[signal] = torch.full((len(ids), rotated.shape[1]), torch.nan)
                vectors[signal][columns] = rotated
            if signal.name == "llm_attention" and signal.layer == index:
                square = torch.full((len(ids), len(ids)), torch.nan)
                square[columns[:, None], columns] = heads.mean(0)
                attention[signal] = square
        causal = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)
        hidden = layer(
            hidden[None],
            attention_mask=(causal + sizes[columns].log())[None, None],
            position_ids=positions[None],
            position_embeddings=rotary,
        )[0]
        made.append((columns, hidden.clone()))  # a cut writes what it merges into it
    hidden = language.norm(hidden)
    made[-1] = columns, hidden
    return Reference(columns, model.lm_head(hidden), seen_positions, kept, made)


def images_by_hand(
    host: Host, signals: frozenset[Signal], row: int, part: EncoderCompressor | None = None
) -> list[VisualTokens]:
    """The images and videos of a prompt, with signals from full attention matrices."""
    adapter, images = host.adapter, []
    layouts = {name: [] for name in adapter.encoders}  # type: dict[str, list[TokenLayout]]
    for layout in host.layouts(row):
        layouts[layout.modality].append(layout)
    for modality, call in host.media(row).items():
        output = getattr(adapter.base, adapter.encoders[modality])(**call)
        pixels = call["pixel_values_videos" if modality == "video" else "pixel_values"]
        for index, layout in enumerate(layouts[modality]):
            views = pixels[index, : layout.views] if pixels.ndim == 5 else pixels[index][None]
            size = ROWS[row].sizes[index] if modality == "image" else None
            if part is not None:
                first = layouts[modality][0].view_sizes[0]
                made = _encoded_by_hand(adapter, part, signals, views, layout, size, first)
                images.append(replace(made, fingerprint=adapter.fingerprint(call, index, 0)))
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
                    fingerprint=adapter.fingerprint(call, index, 0),
                    projector=adapter.base.multi_modal_projector,
                )
            )
    return images


def _encoded_by_hand(
    adapter: Any,
    part: EncoderCompressor,
    signals: frozenset[Signal],
    views: Tensor,
    layout: TokenLayout,
    size: tuple[int, int] | None,
    full: int,
) -> VisualTokens:
    """An image whose views, of ``full`` tokens each, ran under a method inside the tower."""
    target, shape = budget(full, part.retention), adapter.view_shape
    runs = [tower_by_hand(adapter, part, view, target) for view in views]
    projected = adapter.base.multi_modal_projector(features_by_hand(adapter, runs))
    features = _packed_by_hand(layout, size, projected, shape)
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
    """A map (rows, columns) at ``shape``, bilinear between the centres of its cells, by hand."""
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
    """(V, patches) or (V, patches, C) of a vision signal, from the whole attention matrix."""
    signal = signal.resolve(adapter.has_cls)
    index = signal.layer % len(adapter.vision_layers)
    layer, attention = adapter.vision_layers[index], adapter.vision_attention(index)
    tower = adapter.base.vision_tower(views, output_hidden_states=True)
    states = layer.layer_norm1(tower.hidden_states[index])
    first = int(adapter.has_cls)
    if signal.name == "unprojected":
        chosen: Tensor = tower.hidden_states[adapter.base.config.vision_feature_layer]
        return chosen[:, first:]

    def heads(name: str) -> Tensor:
        out: Tensor = getattr(attention, name)(states).unflatten(-1, (attention.num_heads, -1))
        return out.transpose(1, 2)

    query, key = heads("q_proj"), heads("k_proj")
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


def _rotation_alone(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(M, M) products of all-one queries and keys, rotated, over the root of their width."""
    pairs = [part[0][:, : part.shape[-1] // 2] for part in rotary]
    angle = torch.atan2(pairs[1], pairs[0])  # of every pair of channels
    turned = (angle[:, None] - angle[None]).cos().sum(-1)
    result: Tensor = 2 * turned / rotary[0].shape[-1] ** 0.5
    return result


def _decoder_projected(layer: nn.Module, hidden: Tensor, name: str) -> Tensor:
    """(heads, M, head_dim) queries (``q``) or keys (``k``) of a decoder layer, not rotated."""
    attention: Any = layer.self_attn
    states = layer.get_submodule("input_layernorm")(hidden)
    out = attention.get_submodule(f"{name}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    heads: Tensor = out.transpose(0, 1)
    return heads


def _decoder_rotated(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], name: str
) -> Tensor:
    """The same, rotated."""
    out = _decoder_projected(layer, hidden, name)
    left, right = out.chunk(2, dim=-1)
    return out * rotary[0][0] + torch.cat([-right, left], dim=-1) * rotary[1][0]


def _decoder_attention(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], sizes: Tensor
) -> Tensor:
    """(heads, M, M) attention of a decoder layer, as eager attention computes it, in which the
    weight of a key counts as often as ``sizes`` (M,) says."""
    query, key = (_decoder_rotated(layer, hidden, rotary, name) for name in "qk")
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    past = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * past * sizes
    return weight / weight.sum(-1, keepdim=True)


def _decoder_keys(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(M, kv_heads * head_dim) rotated keys of a decoder layer."""
    return _decoder_rotated(layer, hidden, rotary, "k").transpose(0, 1).flatten(1)
