"""What decoder layers show to a selection in front of one of them: attention rows, keys, states.

Read off the KV cache and the hidden states of layers that ran, or computed ahead of the layer that
is about to; at O(N * d), whatever attention kernel the model runs.  `observe` does the same for the
vision tower.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.attention import (
    decoder_keys,
    decoder_mass,
    decoder_row,
    decoder_rows,
    moved_keys,
    rotary_product,
)
from tokenprune.compressor import Compressor, placed
from tokenprune.engine.forward import Pass, Span
from tokenprune.errors import UserError
from tokenprune.offload import applied, resident
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "LayerSignals",
    "cuts_of",
    "tapped_layers",
]


Kwargs = dict[str, Any]


Once = Callable[[Hashable, Callable[[], Tensor]], Tensor]


_TEXT, _HEADS, _ROTARY = Signal("llm_text"), Signal("llm_text_heads"), Signal("llm_text_rotary")


_ASKED = frozenset({_TEXT, _HEADS, _ROTARY})  # that which text asks in the layer before a cut


_SELF, _CROSS, _GLOBAL = Signal("llm_self"), Signal("llm_cross"), Signal("llm_global")


class LayerSignals:
    """What the decoder layers of a model show."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def everywhere(
        self, state: Pass, part: Compressor, index: int, hidden: Tensor, kwargs: Kwargs, once: Once
    ) -> dict[Signal, Tensor]:
        """(G, B, M) or (B, M, C): what ``part`` asks for of all slots in front of layer ``index``.

        Attention rows are there once for each of the G `Pass.queries`.

        Args:
            hidden: (B, M, D) states of the current slots.
            kwargs: What the layer is called with.
            once: Computes what it is given, or remembers it.
        """
        found = {}

        def of_all(row: Callable[[int], Tensor]) -> Tensor:
            return torch.stack([row(group) for group in range(len(state.queries))])

        for signal in part.needs:
            row = functools.partial(self._row, state, signal.layer)
            ahead = functools.partial(self._row_ahead, state, index, hidden, kwargs)
            looks: dict[str, Callable[[], Tensor]] = {
                "llm_attention": functools.partial(of_all, row),
                "llm_ahead": functools.partial(of_all, ahead),
                "llm_keys": functools.partial(self._keys, state, signal.layer, hidden.shape[1]),
                "llm_keys_ahead": functools.partial(self._keys_ahead, state, index, hidden, kwargs),
                "llm_states": functools.partial(self._states, hidden),
            }
            if signal.name in looks:
                found[signal] = once(signal, looks[signal.name])
        return found

    def tokens(
        self,
        state: Pass,
        span: Span,
        part: Compressor,
        index: int,
        hidden: Tensor,
        rows: Mapping[Signal, Tensor],
        once: Once,
    ) -> VisualTokens:
        """What ``part`` sees of one image in front of layer ``index``.

        Args:
            hidden: (B, M, D) states of the current slots.
            rows: What is known of all slots (`everywhere`).
            once: Computes what it is given, or remembers it.
        """
        needs = part.needs
        slots = state.slots(span.row, span.columns).to(hidden.device)
        text = state.text_slots(span)
        if needs & (_ASKED | {_CROSS}) and not len(text):
            raise UserError(f"{part.label} needs text behind the image, whose attention ranks.")

        signals = {}
        for name, values in rows.items():
            mine = values[span.row] if name.is_vector else values[span.group, span.row]
            signals[name] = mine[slots.to(values.device)]
        for signal in needs & _ASKED:
            ask = functools.partial(self._text_rows, state, span, index - 1, text, signal)
            asked = once((signal, span.row, span.image), ask)
            signals[signal] = asked[:, slots.to(asked.device)].transpose(0, 1)
        patches = slots[span.tokens.layout.patches.to(slots.device)]
        looks = {
            _SELF: lambda: self._mass(state, span, index - 1, patches),
            _CROSS: lambda: self._mass(state, span, index - 1, text),
            _GLOBAL: lambda: self._global_row(state, span, index, hidden),
        }
        for signal in needs & looks.keys():
            row = once((signal, span.row, span.image), looks[signal])
            signals[signal] = row[slots.to(row.device)]
        words = {
            name: row[span.row, text.to(row.device)] for name, row in rows.items() if name.is_vector
        }
        return replace(
            span.tokens,
            features=hidden[span.row, slots],
            layout=span.tokens.layout.to(hidden.device),
            signals={**span.tokens.signals, **signals},
            text={**span.tokens.text, **words},
        )

    @torch.no_grad()
    def _row(self, state: Pass, index: int, group: int) -> Tensor:
        """(B, M) the attention row over the current slots in layer ``index``, which has run."""
        hidden, (cos, sin) = state.tapped[index]
        device, count = hidden.device, hidden.shape[1]
        asking, visible = state.asking(device, group)
        keys, sizes = None, state.sizes
        if state.layers:
            keys, sizes = state.layers[index].keys, state.layers[index].sizes
            visible = torch.cat([state.layers[index].valid[:, :-count].to(device), visible], 1)
        attention = self.adapter.decoder_layers[index].get_submodule("self_attn")
        rotary = cos.to(device), sin.to(device)
        with self._at_hand(index):
            row = decoder_row(attention, hidden, rotary, asking, _counted(visible, sizes), keys)
        state.read.append((index, keys is None))
        return row[:, -count:]

    @torch.no_grad()
    def _states(self, hidden: Tensor) -> Tensor:
        """(B, M, D) states of the current slots behind the final norm."""
        return applied(self.adapter.language_model.norm, hidden).to(hidden.device)

    @torch.no_grad()
    def _keys(self, state: Pass, index: int, count: int) -> Tensor:
        """(B, M, kv_heads * head_dim) keys of a layer, rotated as if no padding lay in front."""
        attention = self.adapter.decoder_layers[index].get_submodule("self_attn")
        cached = state.layers[index].keys if state.layers else None
        if cached is not None:
            keys = cached[:, :, -count:]
        else:
            states, (cos, sin) = state.tapped[index]
            rotary = cos.to(states.device), sin.to(states.device)
            with self._at_hand(index):
                keys = decoder_keys(attention, states, rotary)
        first = state.real.int().argmax(1, keepdim=True)
        back = -state.positions.gather(1, first).to(keys.device)
        cos, sin = self.adapter.language_model.rotary_emb(keys, back)
        keys = moved_keys(attention, keys, (cos.to(keys.device), sin.to(keys.device)))
        return keys.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def _text_rows(
        self, state: Pass, span: Span, index: int, text: Tensor, signal: Signal
    ) -> Tensor:
        """(T, M) or (T, M, heads) what an image's text asks the current slots in a layer."""
        prompt, keys, visible = self._prompt(state, span, index)
        _, hidden, rotary = prompt
        text = text.to(hidden.device)
        if signal == _ROTARY:
            return rotary_product(rotary, text)
        with self._at_hand(index):
            rows = decoder_rows(*prompt, text, visible(text), keys, by_head=signal == _HEADS)
        state.asked.append((span.row, index, len(text), keys is None))
        return rows[:, -len(hidden) :]

    @torch.no_grad()
    def _mass(self, state: Pass, span: Span, index: int, asks: Tensor) -> Tensor:
        """(M,) what the current slots get in layer ``index`` from the queries ``asks``."""
        prompt, keys, visible = self._prompt(state, span, index)
        with self._at_hand(index):
            mass = decoder_mass(*prompt, asks.to(prompt[1].device), visible, keys)
        state.asked.append((span.row, index, len(asks), keys is None))
        return mass[-len(prompt[1]) :]

    def _prompt(
        self, state: Pass, span: Span, index: int
    ) -> tuple[
        tuple[nn.Module, Tensor, tuple[Tensor, Tensor]],
        Tensor | None,
        Callable[[Tensor], Tensor],
    ]:
        """Of layer ``index`` and an image's prompt: attention module, input (M, D) and rotation,
        then cached keys, and a function from slots (T,) to how often each key counts (T, K)."""
        states, rotary = state.tapped[index]
        hidden = states[span.row]
        device, count = hidden.device, len(hidden)
        columns = state.columns[span.row].to(device)
        keys, sizes, past = None, state.sizes, columns[:0].bool()
        if state.layers:
            layer = state.layers[index]
            if layer.keys is not None:
                keys = layer.keys[span.row].to(device)
            past, sizes = layer.valid[span.row, :-count].to(device), layer.sizes

        def visible(slots: Tensor) -> Tensor:
            allowed = (columns >= 0) & (columns <= columns[slots][:, None])
            allowed = torch.cat([past.expand(len(slots), -1), allowed], 1)
            return _counted(allowed, None if sizes is None else sizes[span.row])

        cos, sin = (part[span.row if len(part) > 1 else 0].to(device) for part in rotary)
        attention = self.adapter.decoder_layers[index].get_submodule("self_attn")
        return (attention, hidden, (cos, sin)), keys, visible

    @torch.no_grad()
    def _row_ahead(
        self, state: Pass, index: int, hidden: Tensor, kwargs: Kwargs, group: int
    ) -> Tensor:
        """(B, M) the attention row over the current slots in the layer that is about to run."""
        states = self._states_ahead(index, hidden)
        device, count = states.device, states.shape[1]
        asking, visible = state.asking(device, group)
        past = None
        cached = state.layers[index] if state.layers else None
        if cached is not None and cached.keys is not None and cached.held:
            past = cached.keys.to(device)
            visible = torch.cat([cached.valid[:, : past.shape[2]].to(device), visible], 1)
        visible = _counted(visible, state.sizes if cached is None else cached.sizes)
        rotary = self._rotary_ahead(state, index, states, kwargs)
        attention = self.adapter.decoder_layers[index].get_submodule("self_attn")
        with self._at_hand(index):
            row = decoder_row(attention, states, rotary, asking, visible, past=past)
        state.read.append((index - 1, True))  # as many keys as the layer before processed
        return row[:, -count:]

    def _states_ahead(self, index: int, hidden: Tensor) -> Tensor:
        """(..., D) ``hidden`` as the attention of layer ``index`` will see it."""
        norm = self.adapter.decoder_layers[index].get_submodule("input_layernorm")
        with self._at_hand(index):
            return applied(norm, hidden)

    def _at_hand(self, index: int) -> AbstractContextManager[None]:
        """While open, decoder layer ``index`` can be used in parts, outside its own forward."""
        layer = self.adapter.decoder_layers[index]
        return resident(layer, layer.get_submodule("self_attn"))

    def _rotary_ahead(
        self, state: Pass, index: int, states: Tensor, kwargs: Kwargs
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of the current slots in layer ``index``, which is about to run."""
        moved = state.inherited[index] if state.inherited else None
        if moved is None:
            cos, sin = state.rotary or kwargs["position_embeddings"]
        else:
            positions = (state.positions - moved.to(state.positions.device)).to(states.device)
            cos, sin = self.adapter.language_model.rotary_emb(states, positions)
        return cos.to(states.device), sin.to(states.device)

    @torch.no_grad()
    def _keys_ahead(self, state: Pass, index: int, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """(B, M, kv_heads * head_dim) keys of the current slots in the layer about to run."""
        states = self._states_ahead(index, hidden)
        attention = self.adapter.decoder_layers[index].get_submodule("self_attn")
        rotary = self._rotary_ahead(state, index, states, kwargs)
        with self._at_hand(index):
            keys = decoder_keys(attention, states, rotary)
        state.projected.append(index - 1)
        return keys.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def _global_row(self, state: Pass, span: Span, index: int, hidden: Tensor) -> Tensor:
        """(M,) attention of the mean state up to an image's last token, in the layer about to run.

        Queries and keys are not rotated.  The query of the mean is the mean of the queries.
        """
        states = self._states_ahead(index, hidden[span.row])
        columns = state.columns[span.row].to(states.device)
        seen = (columns >= 0) & (columns <= int(span.columns[-1]))
        mean = (states.float() * seen[:, None]).sum(0) / seen.sum()
        both = torch.cat([states, mean.to(states)[None]])[None]
        asking = torch.full((1,), len(states), device=states.device)
        visible = torch.cat([seen, torch.zeros_like(seen[:1])])[None]
        attention: Any = self.adapter.decoder_layers[index].get_submodule("self_attn")
        still = both.new_ones(*both.shape[:2], attention.head_dim)  # cos of no rotation
        with self._at_hand(index):
            row = decoder_row(attention, both, (still, torch.zeros_like(still)), asking, visible)
        state.asked.append((span.row, index - 1, 1, True))
        return row[0, :-1]


def _counted(visible: Tensor, sizes: Tensor | None) -> Tensor:
    """Which keys may be looked at, merged ones as often as ``sizes`` says."""
    return visible if sizes is None else visible * sizes.to(visible.device)


_OF_LAYERS = {"llm_text", "llm_text_heads", "llm_text_rotary", "llm_self", "llm_cross"}


def cuts_of(adapter: Adapter, compressor: Compressor | None) -> dict[int, Compressor]:
    """Index of the decoder layer to what selects in front of it."""
    return placed(compressor, len(adapter.decoder_layers))[1]


def tapped_layers(signals: Iterable[Signal], cuts: dict[int, Compressor]) -> set[int]:
    """Decoder layers whose attention module's input is wanted for attention rows or keys."""
    layers = {one.layer for one in signals if one.name in ("llm_attention", "llm_keys")}
    asking = {
        cut for cut, part in cuts.items() if any(one.name in _OF_LAYERS for one in part.needs)
    }
    return layers | {cut - 1 for cut in asking}
