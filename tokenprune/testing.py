"""The contract as a product: what every strategy must do, in every model, as small checks.

Each ``check_*`` raises `AssertionError` with a counter-example.  For a strategy of your own::

    from tokenprune.testing import check_compressor

    def test_mine() -> None:
        check_compressor(Mine(retention=0.4))

or one test per check, with readable names::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_mine(check: Check) -> None:
        run(check, Mine(retention=0.4))

Checks of the model kind run the strategy inside tiny random models of every registered adapter, on
a ragged batch: a prompt with one image, one of text only, one with two images of different aspect.
"""

from __future__ import annotations

import contextvars
import copy
import dataclasses
import functools
import math
import pickle
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune.attention
from tokenprune.budget import Proportional, budget
from tokenprune.cache import CACHE
from tokenprune.compressor import (
    Chain,
    Compressor,
    ScoringCompressor,
    Selection,
    Stage,
    create,
    parse,
)
from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.engine import Trace, adapter_of, compress
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.hand_tower import (
    clusters_by_hand,
    features_by_hand,
    signal_by_hand,
    tower_by_hand,
)
from tokenprune.primitives import patches_by_view
from tokenprune.registry import adapters
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import Kind, Signal, TokenLayout, VisualTokens, unpadded_box
from tokenprune.untouched import shown

__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "STRATEGY_CHECKS",
    "Check",
    "Host",
    "Reference",
    "check_compressor",
    "example",
    "hosts",
    "reference",
    "refusal",
    "run",
    "sample_tokens",
]

Check = Callable[..., None]
Inputs = dict[str, Any]

DECODERS = ("llama", "mistral", "qwen2")
RETENTION = 0.4
SHARES = (0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.99)
TOLERANCE = 1e-4


# -- a model to run in ---------------------------------------------------------------------------


class Row(NamedTuple):
    """One prompt of the ragged batch.

    Attributes:
        sizes: (height, width) of its images.
        text: How many ids follow the images and videos.
        frames: Frames of each of its videos, behind the images, where the model takes videos.
    """

    sizes: tuple[tuple[int, int], ...]
    text: int
    frames: tuple[int, ...] = ()


ROWS = (Row(((20, 30),), 3), Row((), 5), Row(((10, 30), (24, 24)), 4, frames=(3,)))


@dataclass(frozen=True, eq=False)
class Host:
    """A tiny random model and the inputs to run it on."""

    adapter: Any
    name: str = ""
    decoder: str = ""

    @classmethod
    def tiny(cls, name: str, decoder: str = "llama", seed: int = 0) -> Host:
        """The tiny model of the adapter registered as ``name``."""
        family: Any = adapters.get(name)
        return cls(adapter_of(family.tiny(decoder, seed)), name, decoder)

    def like(
        self,
        *,
        attention: str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> Host:
        """A copy of this model with another attention kernel, dtype or sliding window."""
        model = copy.deepcopy(self.model)
        if attention is not None:
            model.set_attn_implementation(attention)
        if window is not None:
            adapter_of(model).language_model.config.sliding_window = window
        return Host(adapter_of(model.to(dtype)), self.name, self.decoder)

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.adapter.model

    @property
    def placeholders(self) -> list[int]:
        """Ids that stand for visual tokens."""
        return [*self.adapter.placeholders.values()]

    def layouts(self, row: int) -> list[TokenLayout]:
        """Layouts of the images, then of the videos of a prompt."""
        sizes, _, frames = ROWS[row]
        images = [self.adapter.layout(size, together=len(sizes) > 1) for size in sizes]
        if "video" not in self.adapter.encoders:
            return images
        return images + [self.adapter.video_layout(count) for count in frames]

    def prompt(self, row: int) -> list[int]:
        """Ids of one prompt: BOS, some text in front of each image, and the question."""
        draw = random.Random(row)
        ids = [1]
        for layout in self.layouts(row):
            ids += [draw.randrange(5, 60), draw.randrange(5, 60)]
            ids += [int(self.adapter.placeholders[layout.modality])] * len(layout)
        return ids + [draw.randrange(5, 60) for _ in range(ROWS[row].text)]

    def media(self, row: int) -> dict[str, Inputs]:
        """Modality to the encoder inputs of a prompt; they are the same in every batch."""
        sizes, _, frames = ROWS[row]
        found = {}
        if sizes:
            found["image"] = self.adapter.dummy_images(sizes, row, together=len(sizes) > 1)
        if frames and "video" in self.adapter.encoders:
            found["video"] = _batched([self.adapter.dummy_video(count, row) for count in frames])
        return found

    def inputs(
        self,
        rows: Sequence[int] = (0, 1, 2),
        side: str = "left",
        answer: Sequence[int] = (),
    ) -> Inputs:
        """The batch of ``rows``, each with ``answer`` behind it, padded on ``side``.

        Ids and images of a row are the same in every batch.
        """
        prompts = [[*self.prompt(row), *answer] for row in rows]
        width = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            pad = [0] * (width - len(prompt))
            ids.append(pad + prompt if side == "left" else prompt + pad)
            real = [1] * len(prompt)
            mask.append(pad + real if side == "left" else real + pad)
        dtype = self.model.dtype
        result = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        media = [self.media(row) for row in rows]
        for modality in self.adapter.encoders:
            some = [found[modality] for found in media if modality in found]
            for name, values in _batched(some).items():
                result[name] = values.to(dtype if values.is_floating_point() else None)
        return result

    def generate(self, inputs: Inputs, **options: Any) -> Tensor:
        """(B, new) ids of ``model.generate``; four new tokens, none of them a placeholder."""
        ids: Tensor = self._generate(inputs, **options)
        return ids[:, inputs["input_ids"].shape[1] :]

    def generate_with_logits(self, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
        """(B, new) ids and the (B, new, vocabulary) logits they were chosen from."""
        out = self._generate(inputs, return_dict_in_generate=True, output_logits=True, **options)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        return ids, torch.stack(out.logits, dim=1)

    def _generate(self, inputs: Inputs, **options: Any) -> Any:
        options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, **options}
        return self.model.generate(**inputs, suppress_tokens=self.placeholders, **options)

    @torch.no_grad()
    def logits(self, inputs: Inputs, **options: Any) -> Tensor:
        """(B, S, vocabulary) logits of one forward."""
        out: Tensor = self.model(**inputs, **options).logits
        return out


def _batched(parts: Sequence[Inputs]) -> Inputs:
    """Encoder inputs one below the other, images of fewer views filled up with zeros."""
    if not parts:
        return {}
    views = max(part["pixel_values"].shape[1] if "pixel_values" in part else 0 for part in parts)

    def filled(values: Tensor) -> Tensor:
        if values.ndim < 5 or not views:
            return values
        return nn.functional.pad(values, (0, 0) * 3 + (0, views - values.shape[1]))

    return {name: torch.cat([filled(part[name]) for part in parts]) for name in parts[0]}


@functools.cache
def _host(name: str, decoder: str, seed: int = 0) -> Host:
    return Host.tiny(name, decoder, seed)


def hosts(decoders: Sequence[str] = DECODERS) -> list[Host]:
    """A tiny model for every registered adapter with a language model, and every decoder."""
    speaking = [name for name in adapters.names() if adapters.get(name).has_language_model]
    return [_host(name, decoder) for name in speaking for decoder in decoders]


# -- an image to choose from ---------------------------------------------------------------------

# Full and padded grids, a single view, and an image so thin that no crop row (column) is left.
LAYOUTS = {
    "2x2": TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8)),
    "2x2 padded": TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8)),
    "1x3": TokenLayout.anyres((1, 3), (4, 4), (0, 4, 1, 11)),
    "3x1": TokenLayout.anyres((3, 1), (4, 4), (0, 12, 1, 3)),
    "one view": TokenLayout.single((4, 4)),
    "no rows": TokenLayout.anyres((1, 2), (4, 4), (2, 2, 0, 8)),
    "no columns": TokenLayout.anyres((2, 1), (4, 4), (0, 8, 2, 2)),
    "2x2 resampled": TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8), canvas=(4, 6)),
    "video": TokenLayout.video(4, (2, 2)),
}


def _samples(part: Compressor, **options: Any) -> Iterator[tuple[str, VisualTokens]]:
    for index, (name, layout) in enumerate(LAYOUTS.items()):
        yield name, sample_tokens(part.needs, layout, seed=index, **options)


def _select(part: Compressor, tokens: VisualTokens) -> Selection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        return part.select(tokens)


def _with(compressor: Compressor, **fields: Any) -> Compressor:
    """The same method with other fields; of a chain, every part."""
    if isinstance(compressor, Chain):
        return Chain.of(*(replace(part, **fields) for part in compressor.parts))
    return replace(compressor, **fields)


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
    images = _images_by_hand(host, compressor.needs, row, encoder_part(compressor))
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
    stages = list(compressor.stages()) if images else []
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


def _images_by_hand(
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


# -- what the checks have in common --------------------------------------------------------------


class Seen(NamedTuple):
    """What one decoder layer was called with."""

    length: int
    positions: Tensor
    attentions: bool


@contextmanager
def _spy(host: Host) -> Iterator[list[Seen]]:
    """While open, notes what every self-attention module of the decoder is called with."""
    calls: list[Seen] = []

    def note(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        asked = bool(kwargs.get("output_attentions"))
        calls.append(Seen(hidden.shape[1], kwargs["position_ids"], asked))

    handles = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for layer in host.adapter.decoder_layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _vision_products(host: Host) -> Iterator[list[int]]:
    """While open, notes the FLOPs of attention and MLP of every encoder layer that runs."""
    found: list[int] = []

    def attention(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        views, tokens, width = (kwargs.get("hidden_states", args[0] if args else None)).shape
        found.append(views * (4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width))

    def linear(module: Any, args: Any) -> None:
        views, tokens, width = args[0].shape
        found.append(views * 2 * tokens * width * module.out_features)

    handles = []
    for layer in host.adapter.vision_layers:
        handles.append(layer.self_attn.register_forward_pre_hook(attention, with_kwargs=True))
        handles += [
            module.register_forward_pre_hook(linear)
            for module in layer.mlp.modules()
            if isinstance(module, nn.Linear)
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _close(got: Tensor, want: Tensor, what: str) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    wrong = (got - want).abs().float() > TOLERANCE * (1 + want.abs().float())
    wrong |= got.isnan() != want.isnan()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {at}: "
            f"{got[at].item():.6g} instead of {want[at].item():.6g}"
        )


def _same(got: Tensor, want: Tensor, what: str) -> None:
    if not torch.equal(got, want):
        raise AssertionError(f"{what}: {got.tolist()} instead of {want.tolist()}")


def _kept(trace: Trace, row: int) -> list[Tensor]:
    return [chosen.keep for chosen in trace.selections if chosen.row == row]


def _same_kept(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    if len(got) != len(want):
        raise AssertionError(f"{what}: {len(got)} selections instead of {len(want)}")
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        _same(mine, theirs, f"{what}: selection {index} keeps")


def _refused(action: Callable[[], Any], word: str, what: str) -> None:
    """``action`` must raise a `UserError` whose sentence names ``word``."""
    try:
        action()
    except UserError as error:
        sentence = str(error)
    else:
        raise AssertionError(f"{what} was not refused")
    if word not in sentence:
        raise AssertionError(f"{what}: refused, but without naming {word!r}: {sentence}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every global generator seeded while open, and as it was afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _rng() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is the point)
    return random.getstate(), name, np.asarray(keys).tolist(), rest, torch.get_rng_state().tolist()


def _side(side: str, length: int, width: int) -> slice:
    """Columns of a prompt of ``length`` in a batch ``width`` wide."""
    return slice(width - length, width) if side == "left" else slice(0, length)


# -- checks of the strategy by itself ------------------------------------------------------------


def check_documented(compressor: Compressor) -> None:
    """A docstring, and a card that says whose idea it is."""
    for part in compressor.stages():
        cls = type(part)
        written = (cls.__doc__ or f"{cls.__name__}(").strip()  # dataclass makes up `Name(...)`
        if written.startswith(f"{cls.__name__}("):
            raise AssertionError(f"{cls.__name__} has no docstring")
        if not part.card.paper:
            raise AssertionError(f"{cls.__name__} has no card naming its paper")
        known = part.card.arxiv or part.card.code or "baseline" in part.card.paper
        if not known:
            raise AssertionError(f"the card of {cls.__name__} cites neither a paper nor code")


def check_is_a_value(compressor: Compressor) -> None:
    """Frozen, hashable; copies, pickles and spec strings give an equal method back."""
    field = dataclasses.fields(compressor)[0].name
    try:
        setattr(compressor, field, getattr(compressor, field))
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{type(compressor).__name__} is not frozen: {field} can be assigned")
    try:
        pickled = pickle.loads(pickle.dumps(compressor))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"{type(compressor).__name__} cannot be pickled: {error}. Define the class at the top "
            "of a module or notebook, and make the method anew where its cell has run again."
        ) from error
    copies = {
        "deepcopy": copy.deepcopy(compressor),
        "pickle": pickled,
        "dataclasses.replace": replace(compressor),
    }
    for part in compressor.stages():
        if part.name and part is compressor:
            copies[f"parse({part.label!r})"] = parse(part.label, retention=part.retention)
    for how, copied in copies.items():
        if copied != compressor:
            raise AssertionError(f"{how} of {compressor} gives {copied}")
        if hash(copied) != hash(compressor):
            raise AssertionError(f"{how} of {compressor} hashes differently")
        if repr(copied) != repr(compressor):
            raise AssertionError(f"{how}: repr {copied!r}, not {compressor!r}")
    for item in dataclasses.fields(compressor):
        if f"{item.name}=" not in repr(compressor):
            raise AssertionError(f"repr does not show {item.name}")


def check_selection_form(compressor: Compressor) -> None:
    """``keep`` is a sorted, unique, non-empty int64 vector of patch tokens."""
    for part in compressor.stages():
        for retention in (part.retention, *SHARES):
            method = replace(part, retention=retention)
            for dtype in (torch.float32, torch.bfloat16):
                for name, tokens in _samples(method, dtype=dtype):
                    what = f"{part.label}, R = {retention}, {dtype}, layout {name!r}"
                    _well_formed(_select(method, tokens), tokens, what)


def _well_formed(chosen: Selection, tokens: VisualTokens, what: str) -> None:
    keep, listed = chosen.keep, chosen.keep.tolist()
    if keep.dtype != torch.int64:
        raise AssertionError(f"{what}: keep is {keep.dtype}")
    if keep.ndim != 1:
        raise AssertionError(f"{what}: keep has shape {tuple(keep.shape)}")
    if not listed:
        raise AssertionError(f"{what}: keeps nothing")
    if listed != sorted(set(listed)):
        raise AssertionError(f"{what}: not sorted and unique: {listed}")
    inside = range(len(tokens))
    if listed[0] not in inside or listed[-1] not in inside:
        raise AssertionError(f"{what}: not in 0 .. {inside[-1]}: {listed}")
    separators = tokens.layout.is_separator[keep].any()
    if separators:
        raise AssertionError(f"{what}: keeps a separator; the core adds those")
    if chosen.features is not None:
        shape = len(keep), tokens.features.shape[1]
        if chosen.features.shape != shape:
            raise AssertionError(
                f"{what}: features of shape {tuple(chosen.features.shape)}, not {shape}"
            )


def check_budget(compressor: Compressor) -> None:
    """No more than ``R * P`` tokens, rounding up at most once per view; of small budgets half.

    Where ``R`` is large a method may have a schedule of its own that keeps less.

    Fewer are fine where content decides by design (`Compressor.fills_budget`).

    Where views are of different size, an allocator may give a large view more than its share, but
    never more than twice the budget in all.
    """
    hundredths = [percent / 100 for percent in range(1, 100)]
    for part in compressor.stages():
        for name, tokens in _samples(part):
            # Every retention where it is cheap; a fault may show at some of them only.
            for retention in hundredths if name == "one view" else (*SHARES, 0.4, 0.77):
                _due(replace(part, retention=retention), name, tokens)


def _due(method: Compressor, name: str, tokens: VisualTokens) -> None:
    sizes = [size for size in tokens.layout.view_sizes if size]
    share = method.retention * sum(sizes) * (1 if len(set(sizes)) == 1 else 2)
    # Rounding up may add one token a view; where nothing is to be rounded, none.
    extra = len(sizes) if len(sizes) > 1 else math.ceil(share - 1e-9) - share
    most = max(share + extra, 1)
    floor = method.fills_budget and method.retention <= 0.4
    least = method.retention * sum(sizes) / 2 - len(sizes) if floor else 1
    kept = len(_select(method, tokens).keep)
    if not least <= kept <= most:
        raise AssertionError(
            f"{method.label}, layout {name!r}: keeps {kept} of {sum(sizes)} patch tokens at "
            f"R = {method.retention}, at least {max(least, 1):.1f} and at most {most:.1f} were due"
        )


def check_keeps_what_stands_out(compressor: Compressor) -> None:
    """A token that all attention goes to is kept or merged, in whichever view.

    Else a ranking is upside down.  What a method makes of features alone has no upside that could
    be known from outside.
    """
    for part in compressor.stages():
        own = part  # what ranks, not what the allocator looks at
        if getattr(part, "allocator", None) is not None:
            own = replace(part, allocator=Proportional())  # type: ignore[call-arg]
        asked = [
            signal
            for signal in own.needs
            if (signal.is_aligned and not signal.is_vector)
            or signal.name in ("llm_text", "llm_text_heads")
        ]
        # Views large enough for methods that keep only some of their tokens by attention.
        frames = {"two frames": TokenLayout.video(2, (4, 4))}
        layouts = {name: LAYOUTS[name] for name in ("2x2", "2x2 padded", "one view")} | frames
        for name, layout in layouts.items() if asked else ():
            tokens = sample_tokens(own.needs, layout)
            patches = tokens.layout.patches
            for token in patches[len(patches) // 8 :: len(patches) // 4].tolist():
                bright = _lit(tokens, asked, token, 1.0)
                keep = _select(own, bright).keep.tolist()
                if token in keep or _merges(own, bright, token):
                    continue
                # Frames may be chosen from by what changes instead, whoever gets attention.
                dark = _lit(tokens, asked, token, 0.0)
                moot = layout.modality == "video" and keep == _select(own, dark).keep.tolist()
                if not moot:
                    raise AssertionError(
                        f"{part.label} drops token {token}, the one that gets all of "
                        f"{[s.name for s in asked]} (layout {name!r}); is the ranking inverted?"
                    )


def _lit(tokens: VisualTokens, asked: Sequence[Signal], token: int, share: float) -> VisualTokens:
    """The same where ``token`` gets ``share`` of the attention, and all others 0.001."""
    signals = dict(tokens.signals)
    for signal in asked:
        signals[signal] = torch.full_like(signals[signal], 1e-3)
        if not signal.in_llm:
            signals[signal][tokens.layout.is_separator] = torch.nan
        signals[signal][_at_place_of(tokens.layout, token)] = share
    return replace(tokens, signals=signals)


def _at_place_of(layout: TokenLayout, token: int) -> list[int]:
    """The token and, of one in a crop, what shows the same place in the thumbnail."""
    if layout.kind[token] != Kind.CROP:
        return [token]
    at = int(layout.canvas_row[token]), int(layout.canvas_col[token])
    row, col = (
        place * side // full
        for place, side, full in zip(at, layout.view_shape, layout.canvas_shape, strict=True)
    )
    return [token, row * layout.view_shape[1] + col]


def check_keeps_the_best_scores(compressor: Compressor) -> None:
    """A method that scores keeps the highest scores of every view, as many as are allocated."""
    for part in compressor.stages():
        if not isinstance(part, ScoringCompressor):
            continue
        for name, tokens in _samples(part):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RetentionWarning)
                scores, keep = part.score(tokens).float(), _select(part, tokens).keep
                counts = part.allocation.counts(tokens, part.score(tokens), part.retention)
            for view, patches in enumerate(patches_by_view(tokens.layout)):
                kept = torch.isin(patches, keep)
                what = f"{part.label}, layout {name!r}, view {view}"
                if kept.sum() != counts[view]:
                    raise AssertionError(
                        f"{what}: keeps {int(kept.sum())} tokens, {int(counts[view])} were due"
                    )
                best, worst = scores[patches[~kept]], scores[patches[kept]]
                if len(best) and len(worst) and not best.max() <= worst.min():
                    raise AssertionError(
                        f"{what}: drops a score of {best.max():.4g}, keeps one of {worst.min():.4g}"
                    )


def check_scores_are_finite(compressor: Compressor) -> None:
    """Scores are finite; where what is looked at is not, that is refused, and not ranked by.

    A strategy that ranks by itself hands what it ranks by to `Selection.scores`.
    """
    for part in compressor.stages():
        for name, tokens in _samples(part):
            what = f"{part.label} on layout {name!r}"
            try:
                sound = _called(part, tokens).keep
            except UserError as error:
                raise AssertionError(f"{what}: {error}") from error
            for token in tokens.layout.patches[[0, -1]].tolist():
                try:
                    keep = _called(part, _spoilt(tokens, token)).keep
                except Exception:  # however it fails, nothing is ranked by NaN
                    continue
                _same(keep, sound, f"{what}, where token {token} is NaN all over, keeps")


def _called(part: Compressor, tokens: VisualTokens) -> Selection:
    """What the core makes of the strategy's choice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        return part(tokens)


def _spoilt(tokens: VisualTokens, token: int) -> VisualTokens:
    """The same where all that is known of one token is NaN."""
    here = torch.tensor([token])
    return replace(
        tokens,
        features=tokens.features.index_fill(0, here, torch.nan),
        signals={
            signal: values.index_fill(0, here, torch.nan)
            for signal, values in tokens.signals.items()
        },
    )


def _merges(part: Compressor, tokens: VisualTokens, token: int) -> bool:
    """Whether what is kept shows something of ``token``."""
    nudged = tokens.features.clone()
    nudged[token] *= 1.001
    shown = _select(part, tokens).features
    other = _select(part, replace(tokens, features=nudged)).features
    return shown is not None and other is not None and not torch.equal(shown, other)


def check_follows_content(compressor: Compressor) -> None:
    """What a token shows decides, not where it lies: turned content gives the turned choice.

    Strategies that go by places say so with ``positional = True``.
    """
    for part in compressor.stages():
        if part.positional:
            continue
        half = replace(part, retention=0.5)  # of equal views, so that nothing is left to round
        for method, layout in (
            (part, TokenLayout.single((5, 5))),
            (half, LAYOUTS["2x2"]),
            (half, TokenLayout.anyres((1, 2), (4, 4), (0, 4, 0, 8))),
        ):
            turned, order = _turned(layout)
            for seed in range(3):
                tokens = sample_tokens(part.needs, layout, seed=seed)
                other = replace(
                    tokens,
                    features=tokens.features[order],
                    signals={signal: values[order] for signal, values in tokens.signals.items()},
                )
                keep, mirrored = _select(method, tokens).keep, _select(method, other).keep
                what = f"{part.label}, with {turned}, keeps"
                _same(mirrored, order[keep].sort().values, what)


def _turned(layout: TokenLayout) -> tuple[str, Tensor]:
    """(N,) where each entry's content comes from if the picture is turned upside down."""
    order = torch.arange(len(layout))
    for kind in (Kind.THUMBNAIL, Kind.CROP):
        there = (layout.kind == kind).nonzero().squeeze(1)
        order[there] = there.flip(0)
    shape = f"{layout.grid[0]}x{layout.grid[1]} crops" if layout.grid != (0, 0) else "one view"
    return f"the picture of {shape} upside down", order


def check_tokens_untouched(compressor: Compressor) -> None:
    """What the strategy is shown is not written to."""
    for part in compressor.stages():
        for name, tokens in _samples(part):
            before = {key: values.clone() for key, values in shown(tokens).items()}
            _select(part, tokens)
            for key, values in shown(tokens).items():
                unchanged = torch.equal(values.nan_to_num(), before[key].nan_to_num())
                if not unchanged:
                    raise AssertionError(f"{part.label} writes to {key} (layout {name!r})")


def check_deterministic(compressor: Compressor) -> None:
    """The same image gives the same choice, whatever came before and whatever the global seed."""
    for part in compressor.stages():
        for name, tokens in _samples(part):
            with _seeded(1):
                first = _select(part, tokens).keep
            with _seeded(2):
                _select(part, sample_tokens(part.needs, LAYOUTS[name], seed=99))
                again = _select(copy.deepcopy(part), tokens).keep
            _same(again, first, f"{part.label} on layout {name!r}, a second time")


def check_rng_untouched(compressor: Compressor) -> None:
    """The global generators of torch, numpy and Python are left alone."""
    for part in compressor.stages():
        for name, tokens in _samples(part):
            before = _rng()
            _select(part, tokens)
            if _rng() != before:
                raise AssertionError(f"{part.label} draws from a global generator ({name!r})")


# -- checks inside a model -----------------------------------------------------------------------


def check_full_retention_is_identity(compressor: Compressor, host: Host) -> None:
    """Invariant 1: R = 1 gives bit-identical logits and ids, as long as all separators stay."""
    compressor = _with(compressor, separators="all")
    for fields in ({}, {"positions": "compact"}, {"positions": "original"}):
        full = _with(compressor, retention=1.0, **fields)
        for side in ("left", "right"):
            inputs = host.inputs(side=side)
            plain = host.logits(inputs)
            with compress(host.model, full) as trace:
                got = host.logits(inputs)
            _same_bits(got, plain, f"logits at R = 1, {side} padding")
            for ledger in trace.ledgers:
                if ledger.realised != 1:
                    raise AssertionError(f"the ledger says {ledger.realised} at R = 1")
    inputs, full = host.inputs(), _with(compressor, retention=1.0)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        plain = host.generate(inputs, **options)
        with compress(host.model, full):
            _same(host.generate(inputs, **options), plain, f"ids at R = 1 with {options}")


def _same_bits(got: Tensor, want: Tensor, what: str) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{what} are {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not torch.equal(got, want):
        raise AssertionError(f"{what} differ by up to {(got - want).abs().max():.2g}")


def check_equals_reference(compressor: Compressor, host: Host) -> None:
    """Invariant 2: prefill and every decode step equal a short sequence built by hand."""
    for use_cache in (True, False):
        with compress(host.model, compressor) as trace:
            ids, logits = host.generate_with_logits(host.inputs(), use_cache=use_cache)
        for row in range(len(ROWS)):
            what = f"row {row}, use_cache={use_cache}"
            wanted = reference(host, compressor, row, ids[row, :-1].tolist())
            _same_kept(_kept(trace, row), wanted.kept, what)
            steps = ids.shape[1]
            _close(logits[row], wanted.logits[-steps:], f"{what}, logits of the {steps} steps")
            allowed = wanted.logits[-steps:].clone()
            never = [*host.placeholders, host.model.generation_config.eos_token_id]
            allowed[:, never] = -torch.inf
            _same(ids[row], allowed.argmax(-1), f"{what}, ids")


def check_prompt_logits(compressor: Compressor, host: Host) -> None:
    """Logits keep the prompt's shape; at what is left they equal the reference, under any padding.

    A column that was dropped shows the last column before it that is left.
    """
    for side in ("left", "right"):
        inputs = host.inputs(side=side)
        shape = (*inputs["input_ids"].shape, host.model.lm_head.out_features)
        with compress(host.model, compressor):
            got = host.logits(inputs)
            last = host.logits(inputs, logits_to_keep=1)
        if got.shape != shape:
            raise AssertionError(f"logits of shape {tuple(got.shape)}, not {shape}")
        _close(last, got[:, -1:], "logits with logits_to_keep=1")
        for row in range(len(ROWS)):
            wanted = reference(host, compressor, row)
            length = len(host.prompt(row))
            mine = got[row, _side(side, length, shape[1])]
            left = (wanted.columns[None] <= torch.arange(length)[:, None]).sum(1) - 1
            _close(mine, wanted.logits[left], f"row {row}, {side} padding, logits of the prompt")


def check_batch_equals_single(compressor: Compressor, host: Host) -> None:
    """Invariant 3: a batch of n equals n batches of one, padded on either side."""
    for side in ("left", "right"):
        inputs = host.inputs(side=side)
        with compress(host.model, compressor) as trace:
            together = host.logits(inputs)
        ledgers = trace.ledgers
        for row in range(len(ROWS)):
            alone = host.inputs([row])
            with compress(host.model, compressor) as single:
                want = host.logits(alone)[0]
            got = together[row, _side(side, len(want), together.shape[1])]
            what = f"row {row} of the batch, {side} padding"
            _same_kept(_kept(trace, row), _kept(single, 0), what)
            _close(got, want, f"{what}, logits")
            if ledgers[row] != single.ledger:
                raise AssertionError(
                    f"{what}: its account is {ledgers[row]}, alone it is {single.ledger}"
                )


def check_generate_batch_equals_single(compressor: Compressor, host: Host) -> None:
    """Invariant 3 for `generate`: greedy and beams, row by row."""
    for options in ({}, {"num_beams": 3}):
        with compress(host.model, compressor):
            together = host.generate(host.inputs(), **options)
            for row in range(len(ROWS)):
                alone = host.generate(host.inputs([row]), **options)[0]
                _same(together[row], alone, f"row {row} of the batch with {options}, ids")


def check_cache_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 4: greedy search with and without KV cache, and twice in one context."""
    inputs = host.inputs()
    with compress(host.model, compressor):
        cached, with_cache = host.generate_with_logits(inputs)
        plain, without = host.generate_with_logits(inputs, use_cache=False)
        again = host.generate(inputs)
    _close(without, with_cache, "logits without KV cache")
    _same(plain, cached, "ids without KV cache")
    _same(again, cached, "ids of a second generate in the same context")
    for row in range(len(ROWS)):  # by itself, where no padding asks for a mask
        alone = host.inputs([row])
        with compress(host.model, compressor), torch.no_grad():
            cached = host.model(**alone, use_cache=True).logits
            plain = host.model(**alone, use_cache=False).logits
        _close(plain, cached, f"row {row} alone, logits of the prompt without KV cache")


def check_sampling_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 4: sampling with a seed, with and without KV cache."""
    drawn = []
    with compress(host.model, compressor), torch.random.fork_rng(devices=[]):
        for use_cache in (True, True, False):
            torch.manual_seed(5)
            drawn.append(host.generate(host.inputs(), do_sample=True, use_cache=use_cache))
    _same(drawn[1], drawn[0], "ids sampled again with the same seed")
    _same(drawn[2], drawn[0], "ids sampled without KV cache")


def check_beams_agree(compressor: Compressor, host: Host) -> None:
    """Invariant 4: beam search with several returned sequences, with and without KV cache."""
    options = {"num_beams": 3, "num_return_sequences": 2}
    with compress(host.model, compressor):
        cached = host.generate(host.inputs(), **options)
        plain = host.generate(host.inputs(), use_cache=False, **options)
    if len(cached) != 2 * len(ROWS):
        raise AssertionError(f"{len(cached)} sequences, not {2 * len(ROWS)}")
    _same(plain, cached, "ids of the beams without KV cache")


def check_ledger_is_true(compressor: Compressor, host: Host) -> None:
    """Invariant 5: the ledger says what hidden states and KV cache really hold."""
    for row in range(len(ROWS)):
        with (
            compress(host.model, compressor) as trace,
            _spy(host) as calls,
            _vision_products(host) as products,
            torch.no_grad(),
        ):
            out = host.model(**host.inputs([row]), use_cache=True)
        ledger, layers = trace.ledger, out.past_key_values.layers
        told = [ledger.text_tokens + visual for visual in ledger.visual_per_layer]
        processed = [call.length for call in calls]
        cached = [layer.keys.shape[-2] for layer in layers]
        if told != processed:
            raise AssertionError(f"row {row}: layers process {processed}, ledger says {told}")
        if told != cached:
            raise AssertionError(f"row {row}: the KV cache holds {cached}, the ledger says {told}")
        tensors = [part for layer in layers for part in (layer.keys, layer.values)]
        size = sum(part.numel() * part.element_size() for part in tensors)
        if size != ledger.kv_bytes:
            raise AssertionError(f"row {row}: {size} KV bytes, not {ledger.kv_bytes}")
        ran = sum(products)
        if ran != ledger.vision_flops:
            raise AssertionError(f"row {row}: {ran} FLOPs, not {ledger.vision_flops}")
        views = sum(layout.views for layout in host.layouts(row))
        most = ledger.uncompressed_vision_flops
        if ran > most:
            raise AssertionError(f"row {row}: the tower takes {ran} FLOPs, uncompressed {most}")
        if bool(views) != bool(ran):
            raise AssertionError(f"row {row}: {views} views take {ran} FLOPs")
        layouts = host.layouts(row)
        patches = sum(len(layout.patches) for layout in layouts)
        if ledger.patch_tokens != patches:
            raise AssertionError(f"row {row}: {ledger.patch_tokens}, not {patches}")
        last = {chosen.image: chosen for chosen in trace.selections}
        kept = [layout.take(last[i].keep) for i, layout in enumerate(layouts)]
        per_view = tuple(layout.view_sizes for layout in kept)
        if ledger.kept_per_view != per_view:
            raise AssertionError(f"row {row}: {ledger.kept_per_view}, {per_view}")
        if ledger.kept_patches != sum(map(sum, per_view)):
            raise AssertionError(f"row {row}: kept_patches")
        entries = sum(map(len, kept))
        if ledger.kept_patches + ledger.kept_separators != entries:
            raise AssertionError(f"row {row}: separators")
        if ledger.visual_per_layer[-1] != entries:
            raise AssertionError(f"row {row}: last layer")
        entering = {c.image: c for c in trace.selections if c.stage is not Stage.LLM}
        there = [
            layout.take(entering[i].keep) if i in entering else layout
            for i, layout in enumerate(layouts)
        ]
        patches = sum(len(layout.patches) for layout in there)
        if ledger.entered_patches != patches:
            raise AssertionError(f"row {row}: {patches} patches enter the model")
        separators = sum(map(len, there)) - patches
        if ledger.entered_separators != separators:
            raise AssertionError(f"row {row}: {separators} separators enter")
        if ledger.requested != compressor.retention:
            raise AssertionError(f"row {row}: R = {ledger.requested}")
        average = sum(processed) / len(processed) - ledger.text_tokens
        if not math.isclose(ledger.layer_average, average):
            raise AssertionError(f"row {row}: average {average}")
        if ledger.selector_bytes < 0:
            raise AssertionError(f"row {row}: {ledger.selector_bytes} selector bytes")
    _batch_account(compressor, host)


def _batch_account(compressor: Compressor, host: Host) -> None:
    """In a batch a layer is as wide as its longest prompt; the rest is padding, not tokens."""
    with compress(host.model, compressor) as trace, _spy(host) as calls, torch.no_grad():
        out = host.model(**host.inputs(), use_cache=True)
    for layer, (call, cached) in enumerate(zip(calls, out.past_key_values.layers, strict=True)):
        told = [ledger.kv_per_layer[layer] for ledger in trace.ledgers]
        if call.length != max(told):
            raise AssertionError(f"layer {layer}: {call.length} wide, ledgers say {told}")
        rows, _, entries, _ = cached.keys.shape
        padding = sum(max(told) - each for each in told)
        if rows * entries - padding != sum(told):
            raise AssertionError(
                f"layer {layer}: {rows} x {entries} KV entries, {padding} of padding, not {told}"
            )


def check_eager_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 6: the same result under sdpa and eager attention."""
    found = []
    for attention in ("sdpa", "eager"):
        other = host.like(attention=attention)
        with compress(other.model, compressor) as trace:
            inputs = other.inputs()
            logits = other.logits(inputs)[inputs["attention_mask"].bool()]
            ids = other.generate(inputs)
        found.append((logits, ids, [chosen.keep for chosen in trace.selections]))
    _same_kept(found[1][2], found[0][2], "eager instead of sdpa attention")
    _close(found[1][0], found[0][0], "logits under eager instead of sdpa attention")
    _same(found[1][1], found[0][1], "ids under eager instead of sdpa attention")


class _Squares(TorchDispatchMode):
    """Notes every float tensor that looks like attention: (batch, heads, N, N)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, Tensor) and item.is_floating_point() and item.ndim == 4:
                _, heads, rows, columns = item.shape
                if heads > 1 and rows == columns and rows >= 16:
                    self.found.add(tuple(item.shape))
        return out


def check_no_attention_matrix(compressor: Compressor, host: Host) -> None:
    """Invariant 6: nothing of size N x N is made, asked for, or switched to eager."""
    kinds = _attention_kinds(host)
    chunk, tokenprune.attention.CHUNK = tokenprune.attention.CHUNK, 4  # views have 16 patches
    try:
        with compress(host.model, compressor), _spy(host) as calls:
            inside = _attention_kinds(host)
            for row in range(len(ROWS)):
                with _Squares() as squares:
                    host.logits(host.inputs([row]))
                if squares.found:
                    raise AssertionError(f"attention matrices were made: {sorted(squares.found)}")
    finally:
        tokenprune.attention.CHUNK = chunk
    if inside != kinds:
        raise AssertionError(f"the attention kernel was switched from {kinds} to {inside}")
    if any(call.attentions for call in calls):
        raise AssertionError("output_attentions was asked for")


def _attention_kinds(host: Host) -> list[tuple[str, str]]:
    return [
        (name, module.config._attn_implementation)
        for name, module in host.model.named_modules()
        if hasattr(module, "config")
    ]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything a context could leave behind: attributes, hooks, classes, functions, weights."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind = type(module)
        state[f"{name}: class"] = kind
        for key, value in vars(module).items():
            if isinstance(value, dict):
                state[f"{name}.{key}"] = {item: id(held) for item, held in value.items()}
            else:
                state[f"{name}.{key}"] = id(value)
        for item, held in [*module.named_parameters(recurse=False), *module.named_buffers()]:
            state[f"{name}.{item}: data"] = (held.data_ptr(), held._version)
        state[f"class {kind}"] = {key: id(value) for key, value in vars(kind).items()}
        code = vars(sys.modules[kind.__module__])
        state[f"module {kind.__module__}"] = {
            key: id(value) for key, value in code.items() if callable(value)
        }
        if hasattr(module, "config"):
            state[f"{name}: config"] = repr(module.config)
    return state


def _unchanged(model: nn.Module, before: dict[str, Any], what: str) -> None:
    after = fingerprint(model)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        raise AssertionError(f"{what}, these are not as they were: {', '.join(map(str, changed))}")


def check_restores_model(compressor: Compressor, host: Host) -> None:
    """Invariant 7: leaving the context, also by an exception, restores the model exactly."""
    inputs = host.inputs()
    plain = host.logits(inputs), host.generate(inputs)  # also lets transformers set itself up
    before = fingerprint(host.model)
    with compress(host.model, compressor):
        host.logits(inputs)
        host.generate(inputs)
    _unchanged(host.model, before, "after leaving the context")
    try:
        with compress(host.model, compressor):
            host.logits(inputs)
            raise KeyError("in the middle")
    except KeyError:
        pass
    _unchanged(host.model, before, "after an exception in the context")

    def burst(*args: Any) -> None:
        raise KeyError("in the last layer")

    for last in (host.adapter.decoder_layers[-1], host.adapter.vision_layers[-1]):
        try:
            with compress(host.model, compressor):
                handle = last.register_forward_pre_hook(burst)
                try:
                    host.logits(inputs)
                finally:
                    handle.remove()
        except KeyError:
            pass
        _unchanged(host.model, before, "after an exception in a forward")
    _same_bits(host.logits(inputs), plain[0], "the plain logits before and after")
    _same(host.generate(inputs), plain[1], "plain ids after the context")


def check_nesting_refused(compressor: Compressor, host: Host) -> None:
    """Invariant 7: a second context on one model is refused, and does not harm the first."""

    def nest() -> None:
        with compress(host.model, compressor):
            raise AssertionError("a second context on the same model was not refused")

    with compress(host.model, compressor):
        want = host.generate(host.inputs())
        _refused(nest, "already runs inside", "a second context on the same model")
        _same(host.generate(host.inputs()), want, "ids after a second context was refused")
    with compress(host.model, compressor):
        _same(host.generate(host.inputs()), want, "ids in a fresh context after the refusal")


def check_order_of_rows(compressor: Compressor, host: Host) -> None:
    """Invariant 8: a choice depends neither on the row's index nor on its neighbours."""
    with compress(host.model, compressor) as trace:
        host.logits(host.inputs((0, 1, 2)))
        straight = [_kept(trace, row) for row in range(3)]
        for order in ((2, 0, 1), (2, 2, 0), (1, 0, 0)):
            host.logits(host.inputs(order))
            for place, row in enumerate(order):
                what = f"prompt {row} in row {place} of the batch {order}"
                _same_kept(_kept(trace, place), straight[row], what)


def check_model_rng_untouched(compressor: Compressor, host: Host) -> None:
    """Invariant 8: a compressed forward leaves the global generators alone and ignores them."""
    kept = []
    for seed in (1, 2):
        with _seeded(seed), compress(host.model, compressor) as trace:
            before = _rng()
            host.logits(host.inputs())
            if _rng() != before:
                raise AssertionError("a compressed forward drew from a global generator")
            kept.append([chosen.keep for chosen in trace.selections])
    _same_kept(kept[1], kept[0], "with another global seed")


def check_positions(compressor: Compressor, host: Host) -> None:
    """Invariant 9: ``compact`` re-indexes what is left, ``original`` keeps the ids; both exact."""
    for positions in ("auto", "compact", "original"):
        chosen = _with(compressor, positions=positions)
        for row in range(len(ROWS)):
            with compress(host.model, chosen), _spy(host) as calls:
                got = host.logits(host.inputs([row]))
            wanted = reference(host, chosen, row)
            for index, (call, want) in enumerate(zip(calls, wanted.positions, strict=True)):
                what = f"positions={positions}, row {row}, layer {index}, position ids"
                _same(call.positions.expand(1, -1)[0], want, what)
                if positions == "compact":
                    _same(want, torch.arange(len(want)), f"{what} of the reference")
                if positions == "original" and index == len(calls) - 1:
                    _same(want, wanted.columns, f"{what} of the reference")
            _close(got[0, -1], wanted.logits[-1], f"positions={positions}, row {row}, logits")


def check_inputs_untouched(compressor: Compressor, host: Host) -> None:
    """The user's tensors are not written to, nor is anything added to them."""
    inputs = host.inputs()
    before = {name: values.clone() for name, values in inputs.items()}
    attributes = {name: set(vars(values)) for name, values in inputs.items()}
    with compress(host.model, compressor):
        host.logits(inputs)
        host.generate(inputs)
    if list(inputs) != list(before):
        raise AssertionError(f"the inputs are now {list(inputs)}")
    for name, values in inputs.items():
        if not torch.equal(values, before[name]):
            raise AssertionError(f"{name} was written to")
        if set(vars(values)) != attributes[name]:
            raise AssertionError(f"{name} has new attributes {vars(values)}")


def check_bfloat16(compressor: Compressor, host: Host) -> None:
    """Runs in bfloat16: ids with and without cache, logits of that dtype, an honest ledger."""
    half = host.like(dtype=torch.bfloat16)
    inputs = half.inputs()
    with compress(half.model, compressor) as trace:
        logits = half.logits(inputs)
        half.generate(inputs)
    if logits.dtype != torch.bfloat16:
        raise AssertionError(f"logits in {logits.dtype}")
    if not logits.isfinite().all():
        raise AssertionError("logits that are not finite in bfloat16")
    with compress(host.model, compressor) as exact:
        host.logits(host.inputs())
    for row, (mine, theirs) in enumerate(zip(trace.ledgers, exact.ledgers, strict=True)):
        if mine.patch_tokens != theirs.patch_tokens:
            raise AssertionError(f"row {row}: {mine}, {theirs}")
        difference = abs(mine.kept_patches - theirs.kept_patches)
        views = sum(map(len, theirs.kept_per_view))
        if difference > views:
            raise AssertionError(f"row {row}: bfloat16 keeps {difference} tokens more or fewer")


def check_inference_mode(compressor: Compressor, host: Host) -> None:
    """Works under `torch.inference_mode`, with the same result."""
    with compress(host.model, compressor):
        want = host.logits(host.inputs())
        with torch.inference_mode():
            got = host.model(**host.inputs()).logits
            host.generate(host.inputs())
    _same_bits(got.clone(), want, "the logits under inference_mode and no_grad")


def check_labels(compressor: Compressor, host: Host) -> None:
    """Teacher forcing: the answer does not leak into the choice, and the loss is the reference's.

    Gradients reach the embeddings.
    """
    answer = [7, 9, 11]
    for rows, side in (((0,), "left"), ((1,), "left"), ((0, 1, 2), "left"), ((2, 1, 0), "right")):
        inputs, what = host.inputs(rows, side, answer), f"prompts {rows}, {side} padding"
        labels = torch.full_like(inputs["input_ids"], -100)
        for place, row in enumerate(rows):
            columns = _side(side, len(host.prompt(row)) + len(answer), labels.shape[1])
            labels[place, columns][-len(answer) :] = torch.tensor(answer)
        with compress(host.model, compressor) as trace:
            host.logits(host.inputs(rows, side))
            alone = [chosen.keep for chosen in trace.selections]
            loss = host.model(**inputs, labels=labels).loss
            _same_kept([chosen.keep for chosen in trace.selections], alone, f"{what}, with answer")
        wanted = [
            reference(host, compressor, row, answer).logits[-len(answer) - 1 : -1] for row in rows
        ]
        targets = torch.tensor(answer).repeat(len(rows))
        want = nn.functional.cross_entropy(torch.cat(wanted), targets)
        _close(loss.detach()[None], want[None], f"{what}, loss")
        (slope,) = torch.autograd.grad(loss, host.model.get_input_embeddings().weight)
        if not slope.isfinite().all():
            raise AssertionError(f"{what}: gradients that are not finite")
        if not slope.any():
            raise AssertionError(f"{what}: no gradient at the embeddings")


def check_labels_everywhere(compressor: Compressor, host: Host) -> None:
    """Where the whole text has labels, also in front of an image, the prompt asks as without."""
    for row in (0, 2):
        inputs = host.inputs([row])
        labels = inputs["input_ids"].clone()
        labels[torch.isin(labels, torch.tensor(host.placeholders))] = -100
        with compress(host.model, compressor) as trace:
            host.logits(inputs)
            want = _kept(trace, 0)
            host.logits(inputs, labels=labels)
        _same_kept(_kept(trace, 0), want, f"row {row} with labels on all text")


def check_turns_with_labels(compressor: Compressor, host: Host) -> None:
    """Of several turns with labels each image is asked for by the question of its own turn."""
    row, answer = 2, [7, 9, 11]
    inputs = host.inputs([row], answer=answer)
    ids, prompt = inputs["input_ids"][0], len(host.prompt(row))
    places = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
    images = places.split([len(layout) for layout in host.layouts(row)])
    # Between two images lie two ids: the question of the first one's turn, and its answer.
    asking = [int(image[-1]) + 1 for image in images[:-1]] + [prompt - 1]
    labels = torch.full_like(inputs["input_ids"], -100)
    for column in [*(asked + 1 for asked in asking[:-1]), *range(prompt, len(ids))]:
        labels[0, column] = ids[column]
    with compress(host.model, compressor) as trace:
        got = host.logits(inputs, labels=labels)
    wanted = reference(host, compressor, row, answer, asking)
    _same_kept(_kept(trace, 0), wanted.kept, "several turns with labels")
    _close(got[0, -1], wanted.logits[-1], "several turns with labels, logits")


def check_drafts_have_no_say(compressor: Compressor, host: Host) -> None:
    """Draft tokens behind the prompt do not rank: assisted decoding gives the text of greedy."""
    for row in (0, 2):
        wanted = reference(host, compressor, row, [7, 9, 11])
        with compress(host.model, compressor) as trace:
            drafted = host.inputs([row], answer=[7, 9, 11])
            got = host.logits(drafted, logits_to_keep=4)[0]
        _same_kept(_kept(trace, 0), wanted.kept, f"row {row} with three drafted tokens")
        _close(got, wanted.logits[-4:], f"row {row} with three drafted tokens, logits")
    inputs, helper = host.inputs([0]), _host(host.name, host.decoder, 1).model
    with compress(host.model, compressor) as trace:
        want, kept = host.generate(inputs), _kept(trace, 0)
        for options in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
            what = f"decoding with {next(iter(options))}"
            _same(host.generate(inputs, **options), want, f"{what}, ids")
            _same_kept(_kept(trace, 0), kept, what)


def _hidden_patterns(host: Host, row: int) -> dict[str, list[int]]:
    """Columns of a prompt that an attention mask may hide."""
    ids = torch.tensor(host.prompt(row))
    places = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
    layouts = host.layouts(row)
    first = places[: len(layouts[0])]
    view = first[layouts[0].view == 0]
    return {
        "every third visual token": places[::3].tolist(),
        "the first view": view.tolist(),
        "an image": first.tolist(),
    }


def check_masked_tokens(compressor: Compressor, host: Host) -> None:
    """Visual tokens that the attention mask hides are not there: not ranked, kept or counted."""
    for number, name in enumerate(_hidden_patterns(host, 2)):
        inputs = host.inputs()
        hidden: dict[int, list[int]] = {1: []}
        for row in (0, 2):
            hidden[row] = _hidden_patterns(host, row)[name]
            start = inputs["input_ids"].shape[1] - len(host.prompt(row))
            inputs["attention_mask"][row, [start + column for column in hidden[row]]] = 0
        with compress(host.model, compressor) as trace:
            got = host.logits(inputs)[:, -1]
        for row, ledger in enumerate(trace.ledgers):
            what = f"row {row}, {name} hidden"
            wanted = reference(host, compressor, row, hidden_columns=hidden[row])
            _same_kept(_kept(trace, row), wanted.kept, what)
            _close(got[row], wanted.logits[-1], f"{what}, logits")
            text = len(host.prompt(row)) - sum(map(len, host.layouts(row)))
            told = [ledger.text_tokens + visual for visual in ledger.visual_per_layer]
            processed = [len(columns) for columns, _ in wanted.states]
            if (ledger.text_tokens, told) != (text, processed):
                raise AssertionError(f"{what}: layers process {processed}, ledger says {told}")
        if number:
            continue
        with compress(host.model, compressor):
            ids, logits = host.generate_with_logits(inputs)
        for row in (0, 2):
            answer, columns = ids[row, :-1].tolist(), hidden[row]
            wanted = reference(host, compressor, row, answer, hidden_columns=columns, counted=False)
            what = f"row {row}, {name} hidden, logits of the steps"
            _close(logits[row], wanted.logits[-ids.shape[1] :], what)


def check_hidden_states(compressor: Compressor, host: Host) -> None:
    """All hidden states are in the columns of the prompt; attentions are refused."""
    inputs = host.inputs()
    shape = inputs["input_ids"].shape
    with compress(host.model, compressor), torch.no_grad():
        states = host.model(**inputs, output_hidden_states=True).hidden_states
        _refused(
            lambda: host.logits(inputs, output_attentions=True),
            "output_attentions",
            "output_attentions=True",
        )
    for row in range(len(ROWS)):
        mine = _side("left", len(host.prompt(row)), shape[1])
        wanted = reference(host, compressor, row)
        column = torch.arange(len(host.prompt(row)))
        for layer, (columns, want) in enumerate(wanted.states):
            what = f"row {row}, hidden states behind layer {layer}"
            got = states[layer + 1]
            if got.shape[:2] != shape:
                raise AssertionError(f"{what}: shape {tuple(got.shape)}, not {tuple(shape)}")
            left = (columns[None] <= column[:, None]).sum(1) - 1
            _close(got[row, mine], want[left], what)


def check_decoder_by_itself(compressor: Compressor, host: Host) -> None:
    """The language model called directly inherits nothing from the prompt before."""
    inputs, language = host.inputs([0]), host.adapter.language_model
    embeds = host.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        plain = language(inputs_embeds=embeds).last_hidden_state
    with warnings.catch_warnings(), compress(host.model, compressor) as trace, torch.no_grad():
        warnings.simplefilter("ignore")
        host.logits(inputs)
        kept, ledger = _kept(trace, 0), trace.ledger
        got = language(inputs_embeds=embeds).last_hidden_state
        _same_bits(got, plain, "hidden states of the decoder called directly")
        host.adapter.base.get_image_features(**host.media(0)["image"])
        got = language(inputs_embeds=embeds).last_hidden_state
    _same_bits(got, plain, "the same behind images that were encoded directly")
    _same_kept(_kept(trace, 0), kept, "the trace behind a direct call")
    if trace.ledger != ledger:
        raise AssertionError(f"a direct call changed the account to {trace.ledger}")


def check_trace_is_one_forward(compressor: Compressor, host: Host) -> None:
    """Selections and account are of the same prefill, the latest one with images."""

    def burst(*args: Any) -> None:
        raise KeyError("in the last layer")

    with compress(host.model, compressor) as trace:
        host.logits(host.inputs([0]))
        kept, ledger = _kept(trace, 0), trace.ledger
        host.logits(host.inputs([1]))
        _same_kept(_kept(trace, 0), kept, "behind a prompt of text only, selections")
        if trace.ledgers != [ledger]:
            raise AssertionError(f"a prompt of text only left the account {trace.ledgers}")
        handle = host.adapter.decoder_layers[-1].register_forward_pre_hook(burst)
        try:
            host.logits(host.inputs([2]))
        except KeyError:
            pass
        finally:
            handle.remove()
        _same_kept([chosen.keep for chosen in trace.selections], kept, "behind a failed forward")
        if trace.ledgers != [ledger]:
            raise AssertionError(f"a forward that failed left the account {trace.ledgers}")


def check_sliding_window_refused(compressor: Compressor, host: Host) -> None:
    """A prompt beyond a sliding window is refused with a KV cache and without one."""
    windowed = _host(host.name, "mistral").like(window=16)
    for use_cache in (True, False):
        with compress(windowed.model, compressor):
            _refused(
                functools.partial(windowed.logits, windowed.inputs(), use_cache=use_cache),
                "sliding window",
                f"a prompt beyond the sliding window with use_cache={use_cache}",
            )


def check_second_turn(compressor: Compressor, host: Host) -> None:
    """A second turn with the full ids and the returned cache equals the reference."""
    inputs = host.inputs()
    options = {"return_dict_in_generate": True, "output_logits": True}
    with compress(host.model, compressor):
        first = host._generate(inputs, **options)
        asked = torch.tensor([[21, 22], [23, 24], [25, 26]])
        ids = torch.cat([first.sequences, asked], dim=1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), new).long()], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        second = host._generate(turn, **{CACHE: first.past_key_values}, **options)
    answers = second.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(len(ROWS)):
        wanted = reference(host, compressor, row, answers[row, :-1].tolist())
        got = torch.stack(second.logits, dim=1)[row]
        _close(got, wanted.logits[-len(got) :], f"row {row}, logits of the second turn")


def check_chunked_prefill_refused(compressor: Compressor, host: Host) -> None:
    """An image split over several forwards is refused with a sentence."""
    with compress(host.model, compressor):
        _refused(
            lambda: host.generate(host.inputs(), prefill_chunk_size=8),
            "prefill_chunk_size",
            "prefill_chunk_size=8",
        )


def check_static_cache_refused(compressor: Compressor, host: Host) -> None:
    """A static KV cache is refused with a sentence."""
    with compress(host.model, compressor):
        _refused(
            lambda: host.generate(host.inputs(), cache_implementation="static"),
            "static",
            "cache_implementation='static'",
        )


def check_leaving_refused(compressor: Compressor, host: Host) -> None:
    """A compressed KV cache is of no use outside the context, and says so."""
    inputs = host.inputs()
    with compress(host.model, compressor):
        out = host._generate(inputs, return_dict_in_generate=True)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(out.sequences), new).long()], 1)
    turn = {"input_ids": out.sequences, "attention_mask": mask}
    _refused(
        lambda: host.generate(turn, **{CACHE: out.past_key_values}),
        "compressed prompt",
        "continuing a compressed KV cache outside the context",
    )


def check_scattered_embeds_warn(compressor: Compressor, host: Host) -> None:
    """Embeddings with the images already in them cannot be compressed: warn, change nothing."""
    inputs = host.inputs([0])
    embeds = host.model.get_input_embeddings()(inputs["input_ids"]).detach()
    (tokens,) = _images_by_hand(host, frozenset(), 0)
    visual = torch.isin(inputs["input_ids"], torch.tensor(host.placeholders))
    embeds[visual] = tokens.features.detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    plain = host.logits(given)
    with warnings.catch_warnings(record=True) as caught, compress(host.model, compressor):
        warnings.simplefilter("always")
        got = host.logits(given)
    if not any("inputs_embeds" in str(each.message) for each in caught):
        raise AssertionError("embeddings that already contain an image passed without a warning")
    _same_bits(got, plain, "logits of scattered embeddings with and without compression")


@functools.cache
def _compiled(host: Host) -> Host:
    """A copy whose decoder layers were compiled and have run, once for every host."""
    twin = host.like()
    for layer in twin.adapter.decoder_layers:
        layer.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1000):
        twin.logits(host.inputs(), use_cache=False)
    return twin


def check_compiled(compressor: Compressor, host: Host) -> None:
    """Layers that were compiled and ran before the context are compressed like any others."""
    inputs, twin = host.inputs() | {"use_cache": False}, _compiled(host)
    with compress(host.model, compressor) as trace:
        want, kept = host.logits(inputs), [chosen.keep for chosen in trace.selections]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model or a part of it was compiled")
        with compress(twin.model, compressor) as trace:
            try:
                got = twin.logits(inputs)
            except UserError as error:
                raise AssertionError(f"compiled layers were refused: {error}") from error
    _close(got, want, "logits of compiled layers")
    _same_kept([chosen.keep for chosen in trace.selections], kept, "compiled layers")


def check_nothing_bypasses(compressor: Compressor, host: Host) -> None:
    """Calls of ``forward`` run through the hooks; a decoder without hooks is refused."""
    inputs, decoder = host.inputs(), host.adapter.language_model
    with compress(host.model, compressor) as trace:
        want, kept = host.logits(inputs), [chosen.keep for chosen in trace.selections]
        with torch.no_grad():
            _same_bits(host.model.forward(**inputs).logits, want, "logits of model.forward")
            hidden = host.adapter.base.forward(**inputs).last_hidden_state
        head = host.model.get_output_embeddings()
        _same_bits(head(hidden).detach(), want, "logits of model.model.forward")
        _same_kept([chosen.keep for chosen in trace.selections], kept, "model.model.forward")
        # What `compile` leaves behind: the module is called without its hooks.
        decoder._compiled_call_impl = functools.partial(type(decoder).forward, decoder)
        try:
            _refused(lambda: host.logits(inputs), "got past", "a decoder without its hooks")
        finally:
            del decoder._compiled_call_impl


def check_threads(compressor: Compressor, host: Host) -> None:
    """Two threads of a context run at the same time, each as if alone; others are refused."""
    rows = (0, 2)
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    failed: list[Exception] = []
    meeting = threading.Barrier(len(rows), timeout=30)

    def work(row: int, trace: Trace) -> None:
        try:
            found[row] = host.logits(host.inputs([row])), _kept(trace, 0)
        except Exception as error:
            failed.append(error)
            meeting.abort()

    def meet(*args: Any) -> None:
        meeting.wait()

    def together(trace: Trace, run: Callable[[], Callable[..., Any]]) -> None:
        threads = [threading.Thread(target=run(), args=(work, row, trace)) for row in rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with compress(host.model, compressor) as trace:
        alone = {row: (host.logits(host.inputs([row])), _kept(trace, 0)) for row in rows}
        # Each thread waits in front of the first layer until the other is there.
        handle = host.adapter.decoder_layers[0].register_forward_pre_hook(meet)
        try:
            together(trace, lambda: contextvars.copy_context().run)
        finally:
            handle.remove()
        if failed:
            raise AssertionError(f"one of two threads failed: {failed[0]!r}") from failed[0]
        for row in rows:
            _same_bits(found[row][0], alone[row][0], f"prompt {row} in a thread, logits")
            _same_kept(found[row][1], alone[row][1], f"prompt {row} in a thread")
        together(trace, lambda: lambda call, *args: call(*args))
    if len(failed) < len(rows) or not all(isinstance(error, UserError) for error in failed):
        raise AssertionError(f"threads that are not of the context were not refused: {failed}")


def check_copies_are_plain(compressor: Compressor, host: Host) -> None:
    """A copy that is made inside the context is as plain as one made outside."""
    inputs = host.inputs()
    plain, weights = host.logits(inputs), [*host.model.state_dict()]
    with compress(host.model, compressor):
        want = host.logits(inputs)
        try:
            twin = host.like()
        except Exception as error:
            raise AssertionError(f"the model could not be copied: {error!r}") from error
        _same_bits(twin.logits(inputs), plain, "logits of a copy inside the context")
        _same_bits(host.logits(inputs), want, "logits of the original after it was copied")
    _same_bits(twin.logits(inputs), plain, "logits of a copy behind the context")
    if [*twin.model.state_dict()] != weights or [*host.model.state_dict()] != weights:
        raise AssertionError("copying inside the context changed the names of the weights")
    with compress(twin.model, compressor):
        _same_bits(twin.logits(inputs), want, "logits of the copy in a context of its own")


# -- all of them ---------------------------------------------------------------------------------

STRATEGY_CHECKS: tuple[Check, ...] = (
    check_documented,
    check_is_a_value,
    check_selection_form,
    check_budget,
    check_keeps_what_stands_out,
    check_keeps_the_best_scores,
    check_scores_are_finite,
    check_follows_content,
    check_tokens_untouched,
    check_deterministic,
    check_rng_untouched,
)

MODEL_CHECKS: tuple[Check, ...] = (
    check_full_retention_is_identity,
    check_equals_reference,
    check_prompt_logits,
    check_batch_equals_single,
    check_generate_batch_equals_single,
    check_cache_agrees,
    check_sampling_agrees,
    check_beams_agree,
    check_ledger_is_true,
    check_eager_agrees,
    check_no_attention_matrix,
    check_restores_model,
    check_nesting_refused,
    check_order_of_rows,
    check_model_rng_untouched,
    check_positions,
    check_inputs_untouched,
    check_bfloat16,
    check_inference_mode,
    check_labels,
    check_labels_everywhere,
    check_turns_with_labels,
    check_drafts_have_no_say,
    check_masked_tokens,
    check_hidden_states,
    check_decoder_by_itself,
    check_trace_is_one_forward,
    check_sliding_window_refused,
    check_second_turn,
    check_chunked_prefill_refused,
    check_static_cache_refused,
    check_leaving_refused,
    check_scattered_embeds_warn,
    check_compiled,
    check_nothing_bypasses,
    check_threads,
    check_copies_are_plain,
)

CHECKS: tuple[Check, ...] = STRATEGY_CHECKS + MODEL_CHECKS


def refusal(host: Host, compressor: Compressor) -> str:
    """Why the model cannot run the method; empty if it can."""
    try:
        host.adapter.check(compressor)
    except UserError as error:
        return str(error)
    return ""


def run(check: Check, compressor: Compressor, where: Sequence[Host] | None = None) -> None:
    """Run one check; one of the model kind in every host that has what the method needs."""
    if check in STRATEGY_CHECKS:
        check(compressor)
        return
    tried = 0
    refusals = []
    for host in hosts() if where is None else where:
        refused = refusal(host, compressor)
        if refused:
            refusals.append(refused)
            continue
        tried += 1
        try:
            check(compressor, host)
        except AssertionError as error:
            raise AssertionError(f"{host.name} with {host.decoder}: {error}") from error
    if not tried:
        raise AssertionError(f"no tiny model can run {compressor}: {' '.join(refusals)}")


def example(name: str, retention: float = RETENTION) -> Compressor:
    """The registered method with its defaults, or with options that a model here can run.

    Where no tiny model has what the defaults need, the first choice of an option counts that one
    has, such as a substitute for a text tower.
    """
    method, tried = create(name, retention=retention), hosts(DECODERS[:1])
    if all(refusal(host, method) for host in tried):
        for spec in (spec for host in tried for spec in host.adapter.other_options(method)):
            return parse(spec, retention=retention)
    return method


def check_compressor(
    compressor: Compressor | type[Compressor] | str, where: Sequence[Host] | None = None
) -> None:
    """Run every check.

    Args:
        compressor: A strategy, its class, or the name it is registered as; the latter two are
            built with their defaults at ``retention=0.4``.
        where: Models to run it in; default: `hosts()`, all of them.
    """
    if isinstance(compressor, str):
        compressor = create(compressor, retention=RETENTION)
    elif isinstance(compressor, type):
        compressor = compressor(retention=RETENTION)
    for check in CHECKS:
        run(check, compressor, where)


if __name__ == "__main__":
    from tokenprune.golden import main

    main()
