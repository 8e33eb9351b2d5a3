"""A slow reference that builds the compressed prompt by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.compressor import Compressor, Stage, cut_layer
from tokenprune.encoder import encoder_part
from tokenprune.signals import Signal
from tokenprune.testing.host import Host
from tokenprune.testing.reference_native import numbered
from tokenprune.testing.reference_vision import images_by_hand
from tokenprune.tokens import VisualTokens

__all__ = [
    "BY_HAND",
    "Reference",
    "reference",
]


class Reference(NamedTuple):
    """One prompt, compressed by hand.

    Attributes:
        columns: (M,) columns of prompt and answer that remain at the end.
        logits: (M, vocabulary) at these columns.
        positions: For every decoder layer, (m,) position ids of the tokens that it processes, or
            (3, m) with multimodal positions.
        kept: For every selection, in the order of parts and images, the kept indices into the
            image's full packed sequence.
        states: For every decoder layer, (m,) columns that it processes and (m, D) its output; for
            the last layer, the output of the norm after it.
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

    The sequence is a batch of one without padding, hooks or KV cache.  Embeddings are gathered.  If
    tokens are dropped between two layers, the layers are called one by one, with a mask and
    position ids that are computed here.

    Args:
        host: The model.
        compressor: The method.
        row: Index of the prompt.
        answer: Ids after the prompt, which must not affect the selection.
        asking: For every image the column of its query token, whose attention ranks it; the last
            column of the prompt by default.
        hidden_columns: Columns that the attention mask hides; the sequence is built without them.
        counted: Whether position ids count hidden columns: they do in a plain forward, and do not
            in `generate`.
    """
    prompt = _Prompt(host, compressor, row, answer, asking)
    prompt.hide(hidden_columns, counted)
    parts = list(compressor.parts()) if prompt.images else []
    for part in parts:
        if part.stage is not Stage.LLM:
            prompt.cut(part)
    prompt.enter()
    inside = [part for part in parts if part.cuts]
    plain = host.multimodal or torch.equal(prompt.positions, torch.arange(len(prompt.positions)))
    if not inside and plain:
        return prompt.run_plainly()
    return prompt.run(inside)


class _Layer(NamedTuple):
    """The results of one decoder layer for S columns; NaN at dropped columns.

    Attributes:
        attention: (heads, S, S) attention by query and key.
        rotation: (S, S) products of rotated vectors of ones (`_rotation_alone`).
        keys: (S, kv_heads * head_dim), rotated.
        values: (S, kv_heads * head_dim).
    """

    attention: Tensor
    rotation: Tensor
    keys: Tensor
    values: Tensor


class _Seen(NamedTuple):
    """The values in front of a decoder layer from which the signals of one image are computed.

    Attributes:
        ran: The layers that have run.
        ahead: The layer that runs next.
        module: The module of that layer.
        states: (S, D) hidden states after the final norm; NaN at dropped columns.
        upto: (m,) columns up to the image's last column, and their hidden states (m, D).
        asks: The column of the image's query token.
        text: (T,) columns of the text after the image.
        patches: (P,) columns of the image's patch tokens.
    """

    ran: list[_Layer]
    ahead: _Layer
    module: nn.Module
    states: Tensor
    upto: tuple[Tensor, Tensor]
    asks: int
    text: Tensor
    patches: Tensor


def _global(seen: _Seen) -> Tensor:
    """(S,) attention of the mean of all states up to an image's last column, without rotation."""
    columns, hidden = seen.upto
    query, key = (_decoder_projected(seen.module, hidden, name) for name in "qk")
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = (query.mean(1, keepdim=True) @ key.mT)[:, 0] / query.shape[-1] ** 0.5
    found = torch.full((len(seen.states),), torch.nan)
    found[columns] = logits.softmax(-1).mean(0)
    return found


BY_HAND: Mapping[str, Callable[[_Seen, int], Tensor]] = {
    "llm_attention": lambda seen, layer: seen.ran[layer].attention.mean(0)[seen.asks],
    "llm_ahead": lambda seen, layer: seen.ahead.attention.mean(0)[seen.asks],
    "llm_keys": lambda seen, layer: seen.ran[layer].keys,
    "llm_values": lambda seen, layer: seen.ran[layer].values,
    "llm_keys_ahead": lambda seen, layer: seen.ahead.keys,
    "llm_states": lambda seen, layer: seen.states,
    "llm_text": lambda seen, layer: seen.ran[-1].attention[:, seen.text].mean(0).T,
    "llm_text_heads": lambda seen, layer: seen.ran[-1].attention[:, seen.text].permute(2, 1, 0),
    "llm_text_rotary": lambda seen, layer: seen.ran[-1].rotation[seen.text].T,
    "llm_cross": lambda seen, layer: seen.ran[-1].attention[:, seen.text].amax(0).mean(0),
    "llm_self": lambda seen, layer: seen.ran[-1].attention[:, seen.patches].amax(0).mean(0),
    "llm_global": lambda seen, layer: _global(seen),
}
"""Name of a signal of the decoder layers to its value (S, ...) at every column."""


class _Prompt:
    """The state of one prompt, in a batch of one, while it passes through the model.

    Attributes:
        hidden: (M, D) embeddings or hidden states of the remaining columns.
        columns, positions: (M,) these columns, and their position ids, or (3, M) with multimodal
            positions.
        images: The remaining tokens of every image.
        places: For every image, the columns of these tokens.
        whole: For every image, the indices of these tokens in its full packed sequence.
        last: For every image, its last column in the full prompt.
        asks: For every image, the column of its query token.
        sizes: For every column of the prompt, how often attention counts it.
        kept: The kept indices of every selection.
        ran: The decoder layers that have run.
    """

    def __init__(
        self,
        host: Host,
        compressor: Compressor,
        row: int,
        answer: Sequence[int],
        asking: Sequence[int] | None,
    ) -> None:
        self.host, self.adapter = host, host.adapter
        self.language: Any = host.adapter.language_model
        ids = torch.tensor([*host.prompt(row), *answer])
        self.images = images_by_hand(host, compressor.needs, row, encoder_part(compressor))
        self.prompt = self.hidden = host.model.get_input_embeddings()(ids)
        self.columns = self.positions = torch.arange(len(ids))
        self.asks = list(asking or [len(host.prompt(row)) - 1] * len(self.images))
        visual = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
        self.places = list(visual.split([*map(len, self.images)]))
        for place, tokens in zip(self.places, self.images, strict=True):
            self.hidden[place] = tokens.features
        self.whole = [torch.arange(len(tokens)) for tokens in self.images]
        self.last = [int(place[-1]) for place in self.places]
        self.layouts, self.full = [one.layout for one in self.images], [*self.places]
        if host.multimodal:
            self.positions = self._numbered()
        self.sizes = torch.ones(len(ids))
        self.kept: list[Tensor] = []
        self.merged: dict[int, list[Tensor]] = {}
        self.ran: list[_Layer] = []

    def hide(self, columns: Sequence[int], counted: bool) -> None:
        """Remove the columns that the attention mask hides; position ids may count them."""
        there = ~torch.isin(self.columns, torch.tensor([*columns], dtype=torch.long))
        for index, place in enumerate(self.places):
            self.whole[index] = there[place].nonzero().squeeze(1)
            self.images[index] = self.images[index].take(self.whole[index])
            self.places[index] = place[there[place]]
        self.hidden, self.columns = self.hidden[there], self.columns[there]
        if not self.host.multimodal:
            self.positions = self.columns if counted else torch.arange(len(self.columns))
        # Gaps in the position ids.  The first cut that renumbers them closes the gaps.
        self.gaps = (~there).cumsum(0) * int(counted)
        self.visual = torch.cat(self.places) if self.places else self.columns[:0]

    def enter(self) -> None:
        """Record the tokens that enter the language model."""
        for index, some in enumerate(self.images):
            patches = torch.isin(self.columns, self.places[index][some.layout.patches])
            text = torch.isin(self.columns, self._text(index))
            self.images[index] = replace(
                some,
                entered=len(some.layout.patches),
                inputs=(self.hidden[patches], self.hidden[text]),
            )

    def cut(self, part: Compressor, layer: nn.Module | None = None) -> None:
        """Run the selections of ``part``, in front of ``layer`` or of the language model."""
        stays = torch.ones(len(self.columns), dtype=torch.bool)
        hidden = self.hidden.clone()  # merged tokens of one image must not affect another image
        ahead = None if layer is None else self._layer(layer)
        for index, tokens in enumerate(self.images):
            slots = torch.isin(self.columns, self.places[index]).nonzero().squeeze(1)
            if not len(tokens.layout.patches):  # the attention mask hides all patch tokens
                rowless = part.separators == "rows" and not tokens.layout.canvas_shape[0]
                stays[slots] = part.separators == "all" or rowless
                self._keep(index, tokens, stays[slots].nonzero().squeeze(1))
                continue
            tokens = replace(tokens, features=hidden[slots])
            if ahead is None or layer is None:
                text = {one: self.prompt[self._text(index)] for one in part.needs & {_PROMPT}}
                tokens = replace(tokens, text=text)
            else:
                tokens = self._given(index, tokens, part, layer, ahead, hidden)
            chosen = part(tokens)
            if chosen.features is not None:
                self.hidden[slots[chosen.keep]] = chosen.features
            if chosen.merging is not None:
                levels = [chosen.merging(level) for level in tokens.levels]
                self.merged[index] = [one.clone() for one in levels]
            if chosen.sizes is not None:
                self.sizes[self.places[index][chosen.keep]] = chosen.sizes
            stays[slots] = False
            stays[slots[chosen.keep]] = True
            self._keep(index, tokens, chosen.keep)
        closes = not self.host.keeps_positions(part) and not bool(stays.all())
        if closes and not self.host.multimodal:
            self.positions = self.positions - (~stays).cumsum(0) - self.gaps[self.columns]
            self.gaps.zero_()
        self.hidden, self.columns = self.hidden[stays], self.columns[stays]
        self.positions = self.positions[..., stays]
        if closes and self.host.multimodal:
            self.positions = self._numbered()[:, self.columns]

    def _numbered(self) -> Tensor:
        """(3, S) position ids of all columns if images have the rows and columns that remain."""
        images = list(zip(self.layouts, self.full, self.whole, strict=True))
        config = self.adapter.base.config.vision_config
        return numbered(len(self.prompt), images, getattr(config, "tokens_per_second", 1))

    def _keep(self, index: int, tokens: VisualTokens, keep: Tensor) -> None:
        self.images[index] = tokens.take(keep)
        if index in self.merged:
            self.images[index] = replace(self.images[index], levels=tuple(self.merged.pop(index)))
        self.places[index] = self.places[index][keep]
        self.whole[index] = self.whole[index][keep]
        self.kept.append(self.whole[index])

    def _text(self, index: int) -> Tensor:
        """(T,) columns of the text after an image, up to its query token."""
        after = (self.columns > self.last[index]) & (self.columns <= self.asks[index])
        return self.columns[after & ~torch.isin(self.columns, self.visual)]

    def _given(
        self,
        index: int,
        tokens: VisualTokens,
        part: Compressor,
        layer: nn.Module,
        ahead: _Layer,
        hidden: Tensor,
    ) -> VisualTokens:
        """The tokens of an image that ``part`` receives in front of a decoder ``layer``."""
        text, place = self._text(index), self.places[index]
        upto = self.columns <= self.last[index]
        seen = _Seen(
            ran=self.ran,
            ahead=ahead,
            module=layer,
            states=self._by_column(self.language.norm(hidden)),
            upto=(self.columns[upto], hidden[upto]),
            asks=self.asks[index],
            text=text,
            patches=place[tokens.layout.patches],
        )
        own = [one for one in part.needs if one.name in BY_HAND]
        values = {one: BY_HAND[one.name](seen, one.layer) for one in own}
        words = {one: values[one][text] for one in own if one.info.is_of_all_tokens}
        words |= {one: self.prompt[text] for one in part.needs & {_PROMPT}}
        return replace(
            tokens,
            text=words,
            signals={**tokens.signals, **{one: value[place] for one, value in values.items()}},
        )

    def run_plainly(self) -> Reference:
        """Run the unmodified language model on the short prompt."""
        options: dict[str, Any] = {}
        if self.host.multimodal:
            options["position_ids"] = self.positions[:, None]
        levels = [*zip(*(one.levels for one in self.images), strict=True)]
        if levels:
            visual = torch.cat(self.places)
            options["visual_pos_masks"] = torch.isin(self.columns, visual)[None]
            options["deepstack_visual_embeds"] = [torch.cat(each) for each in levels]
        out = self.language(
            inputs_embeds=self.hidden[None], use_cache=False, output_hidden_states=True, **options
        )
        made = [(self.columns, one[0]) for one in out.hidden_states[1:]]
        logits = self.host.model.lm_head(out.last_hidden_state[0])
        return Reference(self.columns, logits, [self.positions] * len(made), self.kept, made)

    def run(self, inside: Sequence[Compressor]) -> Reference:
        """Run the decoder layers one by one, with the cuts of the parts ``inside``."""
        positions, made = [], []
        depth = len(self.adapter.decoder_layers)
        for index, layer in enumerate(self.adapter.decoder_layers):
            for part in inside:
                for where in {cut_layer(each, depth): each for each in part.cuts}.values():
                    if cut_layer(where, depth) == index:
                        self.cut(part.at(where), layer)
            positions.append(self.positions)
            self.ran.append(self._layer(layer))
            causal = torch.full((len(self.hidden), len(self.hidden)), -torch.inf).triu(1)
            self.hidden = layer(
                self.hidden[None],
                attention_mask=(causal + self.sizes[self.columns].log())[None, None],
                position_ids=None if self.host.multimodal else self.positions[None],
                position_embeddings=self._rotary(),
            )[0]
            # A copy, because a cut writes merged tokens into `hidden`.
            made.append((self.columns, self.hidden.clone()))
            for place, image in zip(self.places, self.images, strict=True):
                if index < len(image.levels):
                    self.hidden[torch.isin(self.columns, place)] += image.levels[index]
        last = self.language.norm(self.hidden)
        made[-1] = self.columns, last
        logits = self.host.model.lm_head(last)
        return Reference(self.columns, logits, positions, self.kept, made)

    def _rotary(self) -> tuple[Tensor, Tensor]:
        positions = self.positions[..., None, :]
        rotary: tuple[Tensor, Tensor] = self.language.rotary_emb(self.hidden[None], positions)
        return rotary

    def _layer(self, layer: nn.Module) -> _Layer:
        """The results of a decoder layer for the current states."""
        rotary = self._rotary()
        heads = _decoder_attention(layer, self.hidden, rotary, self.sizes[self.columns])
        return _Layer(
            attention=torch.stack([self._by_column(self._by_column(one).T).T for one in heads]),
            rotation=self._by_column(self._by_column(_rotation_alone(rotary)).T).T,
            keys=self._by_column(_decoder_keys(layer, self.hidden, rotary)),
            values=self._by_column(_decoder_values(layer, self.hidden)),
        )

    def _by_column(self, values: Tensor) -> Tensor:
        """(S, ...) ``values`` (M, ...) of the remaining columns; NaN at dropped columns."""
        found = values.new_full((len(self.sizes), *values.shape[1:]), torch.nan)
        found[self.columns] = values
        return found


_PROMPT = Signal("llm_prompt")


def _rotation_alone(rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(M, M) products of queries and keys of ones after rotation, over the root of their width."""
    pairs = [part[0][:, : part.shape[-1] // 2] for part in rotary]
    angle = torch.atan2(pairs[1], pairs[0])  # of every pair of channels
    turned = (angle[:, None] - angle[None]).cos().sum(-1)
    result: Tensor = 2 * turned / rotary[0].shape[-1] ** 0.5
    return result


def _decoder_projected(layer: nn.Module, hidden: Tensor, name: str) -> Tensor:
    """(heads, M, head_dim) queries (``q``), keys (``k``) or values (``v``), not rotated."""
    attention: Any = layer.self_attn
    states = layer.get_submodule("input_layernorm")(hidden)
    out = attention.get_submodule(f"{name}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{name}_norm"):
        out = attention.get_submodule(f"{name}_norm")(out)
    heads: Tensor = out.transpose(0, 1)
    return heads


def _decoder_rotated(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], name: str
) -> Tensor:
    """(heads, M, head_dim) rotated queries (``q``) or keys (``k``)."""
    out = _decoder_projected(layer, hidden, name)
    left, right = out.chunk(2, dim=-1)
    return out * rotary[0][0] + torch.cat([-right, left], dim=-1) * rotary[1][0]


def _decoder_attention(
    layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor], sizes: Tensor
) -> Tensor:
    """(heads, M, M) eager attention of a decoder layer; each key counts ``sizes`` (M,) times."""
    query, key = (_decoder_rotated(layer, hidden, rotary, name) for name in "qk")
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits: Tensor = query @ key.mT / query.shape[-1] ** 0.5
    past = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * past * sizes
    return weight / weight.sum(-1, keepdim=True)


def _decoder_keys(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(M, kv_heads * head_dim) rotated keys of a decoder layer."""
    return _decoder_rotated(layer, hidden, rotary, "k").transpose(0, 1).flatten(1)


def _decoder_values(layer: nn.Module, hidden: Tensor) -> Tensor:
    """(M, kv_heads * head_dim) values of a decoder layer."""
    return _decoder_projected(layer, hidden, "v").transpose(0, 1).flatten(1)
