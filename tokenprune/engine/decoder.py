"""Computes the signals of the decoder layers for a selection in front of one of them.

They are computed from the KV cache and the hidden states of layers that have run, or ahead of the
layer that runs next, at O(N * d), under any attention kernel.  `tokenprune.engine.vision` computes
the signals of the vision encoder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tokenprune.attention import (
    decoder_keys,
    decoder_mass,
    decoder_row,
    decoder_rows,
    decoder_values,
    mean_query,
    moved_keys,
    rotary_product,
)
from tokenprune.compressor import Compressor, placed
from tokenprune.cost.account import attended_for
from tokenprune.engine.forward import Pass, Span
from tokenprune.engine.numbering import axes_of, taken
from tokenprune.errors import UserError
from tokenprune.offload import applied, resident
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "COMPUTED",
    "LayerSignals",
    "cuts_of",
    "queried_layers",
    "tapped_layers",
]

Kwargs = dict[str, Any]
Once = Callable[[Hashable, Callable[[], Tensor]], Tensor]
Rotary = tuple[Tensor, Tensor]
Method = TypeVar("Method", bound=Callable[..., Tensor])

COMPUTED: dict[str, Callable[..., Tensor]] = {}
"""Name of a signal to the method of `LayerSignals` that computes it."""


def _computes(*names: str) -> Callable[[Method], Method]:
    """Enter a method into `COMPUTED`.

    A method for signals of the scope ``batch`` takes a `_Cut` and the signal, and returns
    (B, M, ...) of all slots, or (G, B, M) attention for the G `Pass.queries`.  One for signals of
    the scope ``image`` also takes the `Span`, and returns (M, ...), or (T, M, ...) for T text
    tokens.
    """

    def enter(method: Method) -> Method:
        COMPUTED.update(dict.fromkeys(names, method))
        return method

    return enter


class _Cut(NamedTuple):
    """The point of a forward at which a selection is made.

    Attributes:
        state: The forward.
        layer: Index of the decoder layer that runs next.
        hidden: (B, M, D) hidden states of the current slots.
        kwargs: Arguments of that layer.
    """

    state: Pass
    layer: int
    hidden: Tensor
    kwargs: Kwargs


class LayerSignals:
    """The signals of the decoder layers of one model."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self._normed = adapter, adapter.facts.decoder.query_norms

    def everywhere(
        self, state: Pass, part: Compressor, index: int, hidden: Tensor, kwargs: Kwargs, once: Once
    ) -> dict[Signal, Tensor]:
        """The signals of ``part`` that are computed for all slots together.

        Args:
            state: The forward.
            part: The compressor that selects in front of layer ``index``.
            index: The decoder layer that runs next.
            hidden: (B, M, D) hidden states of the current slots.
            kwargs: Arguments of that layer.
            once: Returns the result of the given function, which it may have stored earlier.

        Returns:
            Vectors (B, M, C), or attention (G, B, M) for the G `Pass.queries`.
        """
        cut, found = _Cut(state, index, hidden, kwargs), {}
        for signal in part.needs:
            if signal.info.source == "decoder layer" and signal.info.scope == "batch":
                compute = functools.partial(COMPUTED[signal.name], self, cut, signal)
                found[signal] = once(signal, compute)
                rows = len(state.queries) if signal.info.queries == "one" else 1
                for _ in range(rows):
                    self._charge(state, signal, index)
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
        """The tokens of one image that ``part`` receives in front of layer ``index``.

        Args:
            state, part, index, hidden, once: As in `everywhere`.
            span: The image.
            rows: The result of `everywhere`.

        Raises:
            UserError: ``part`` ranks by the text after the image, but there is none.
        """
        cut = _Cut(state, index, hidden, {})
        slots = state.slots(span.row, span.columns).to(hidden.device)
        text = state.text_slots(span)
        signals = {}
        for name, values in rows.items():
            mine = values[span.row] if name.is_vector else values[span.group, span.row]
            signals[name] = mine[slots.to(values.device)]
        for signal in part.needs:
            info = signal.info
            if info.source != "decoder layer" or info.scope != "image":
                continue
            by_text = "T" in info.shape
            if (by_text or info.queries == "text") and not len(text):
                raise UserError(
                    f"{part.label} needs text after the image, whose attention ranks its tokens; "
                    "put the question after the image."
                )
            compute = functools.partial(COMPUTED[signal.name], self, cut, signal, span)
            values = once((signal, span.row, span.image), compute)
            at = slots.to(values.device)
            signals[signal] = values[:, at].transpose(0, 1) if by_text else values[at]
            self._charge(state, signal, index, span, len(text))
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

    # -- signals of all slots --------------------------------------------------------------------

    @_computes("llm_attention")
    def _rows(self, cut: _Cut, signal: Signal) -> Tensor:
        """Attention rows in a layer that has run."""
        return self._for_each_query(cut.state, functools.partial(self._row, cut, signal.layer))

    @_computes("llm_ahead")
    def _rows_ahead(self, cut: _Cut, signal: Signal) -> Tensor:
        """Attention rows in the layer that runs next."""
        return self._for_each_query(cut.state, functools.partial(self._row_ahead, cut))

    @_computes("llm_states")
    @torch.no_grad()
    def _states(self, cut: _Cut, signal: Signal) -> Tensor:
        """Hidden states after the final norm."""
        return applied(self.adapter.language_model.norm, cut.hidden).to(cut.hidden.device)

    @_computes("llm_keys")
    @torch.no_grad()
    def _keys(self, cut: _Cut, signal: Signal) -> Tensor:
        """Keys of a layer that has run, rotated as in a prompt without padding."""
        state, attention = cut.state, self._attention(signal.layer)
        cached = state.layers[signal.layer].keys if state.layers else None
        if cached is not None:
            keys = cached[:, :, -cut.hidden.shape[1] :]
        else:
            states, rotary = state.tapped[signal.layer]
            with self._at_hand(signal.layer):
                keys = decoder_keys(attention, states, _on(rotary, states.device))
        first = state.real.int().argmax(1, keepdim=True)
        back = -axes_of(taken(state.positions, first)).to(keys.device)
        rotary = self.adapter.language_model.rotary_emb(keys, back)
        keys = moved_keys(attention, keys, _on(rotary, keys.device))
        return keys.transpose(1, 2).flatten(2)

    @_computes("llm_values")
    @torch.no_grad()
    def _values(self, cut: _Cut, signal: Signal) -> Tensor:
        """Values of a layer that has run."""
        state = cut.state
        cached = state.layers[signal.layer].values if state.layers else None
        if cached is not None:
            values = cached[:, :, -cut.hidden.shape[1] :]
        else:
            with self._at_hand(signal.layer):
                states, _ = state.tapped[signal.layer]
                values = decoder_values(self._attention(signal.layer), states)
        return values.transpose(1, 2).flatten(2)

    @_computes("llm_keys_ahead")
    @torch.no_grad()
    def _keys_ahead(self, cut: _Cut, signal: Signal) -> Tensor:
        """Rotated keys in the layer that runs next."""
        states = self._states_ahead(cut.layer, cut.hidden)
        rotary = self._rotary_ahead(cut, states)
        with self._at_hand(cut.layer):
            keys = decoder_keys(self._attention(cut.layer), states, rotary)
        return keys.transpose(1, 2).flatten(2)

    # -- signals of one image --------------------------------------------------------------------

    @_computes("llm_text", "llm_text_heads")
    @torch.no_grad()
    def _text_rows(self, cut: _Cut, signal: Signal, span: Span) -> Tensor:
        """Attention rows of the text after an image."""
        prompt, keys, visible = self._prompt(cut, span)
        text = cut.state.text_slots(span).to(prompt[1].device)
        by_head = "heads" in signal.info.shape
        with self._at_hand(cut.layer - 1):
            rows = decoder_rows(*prompt, text, visible(text), keys, by_head=by_head)
        return rows[:, -len(prompt[1]) :]

    @_computes("llm_text_rotary")
    @torch.no_grad()
    def _text_rotary(self, cut: _Cut, signal: Signal, span: Span) -> Tensor:
        """Products of rotated vectors of ones, for the text after an image."""
        (_, hidden, rotary), _, _ = self._prompt(cut, span)
        return rotary_product(rotary, cut.state.text_slots(span).to(hidden.device))

    @_computes("llm_self", "llm_cross")
    @torch.no_grad()
    def _mass(self, cut: _Cut, signal: Signal, span: Span) -> Tensor:
        """Attention from the patch tokens of an image, or from the text after it."""
        queries = None
        if signal.info.queries == "text":
            asks = cut.state.text_slots(span)
        else:
            queries = cut.state.projected[cut.layer - 1][span.row]
            slots = cut.state.slots(span.row, span.columns).to(cut.hidden.device)
            asks = slots[span.tokens.layout.patches.to(slots.device)]
        prompt, keys, visible = self._prompt(cut, span)
        with self._at_hand(cut.layer - 1):
            mass = decoder_mass(*prompt, asks.to(prompt[1].device), visible, keys, queries)
        return mass[-len(prompt[1]) :]

    @_computes("llm_global")
    @torch.no_grad()
    def _global_row(self, cut: _Cut, signal: Signal, span: Span) -> Tensor:
        """Attention row of the mean query, in the layer that runs next, without rotation."""
        states = self._states_ahead(cut.layer, cut.hidden[span.row])
        columns = cut.state.columns[span.row].to(states.device)
        seen = (columns >= 0) & (columns <= int(span.columns[-1]))
        attention: Any = self._attention(cut.layer)
        still = states.new_ones(1, len(states), attention.head_dim)  # cosine of a zero rotation
        rotary, asking = (still, torch.zeros_like(still)), seen.new_zeros(1, dtype=torch.long)
        with self._at_hand(cut.layer):
            query = mean_query(attention, states, seen)
            row = decoder_row(attention, states[None], rotary, asking, seen[None], query=query)
        return row[0]

    # -- helpers ---------------------------------------------------------------------------------

    @staticmethod
    def _for_each_query(state: Pass, row: Callable[[int], Tensor]) -> Tensor:
        """(G, B, M) the ``row`` of each of the G `Pass.queries`."""
        return torch.stack([row(group) for group in range(len(state.queries))])

    @torch.no_grad()
    def _row(self, cut: _Cut, index: int, group: int) -> Tensor:
        """(B, M) attention row over the current slots in layer ``index``, which has run."""
        state = cut.state
        hidden, rotary = state.tapped[index]
        device, count = hidden.device, hidden.shape[1]
        asking, visible = state.asking(device, group)
        keys, sizes = None, state.sizes
        if state.layers:
            keys, sizes = state.layers[index].keys, state.layers[index].sizes
            visible = torch.cat([state.layers[index].valid[:, :-count].to(device), visible], 1)
        visible = _counted(visible, sizes)
        with self._at_hand(index):
            row = decoder_row(
                self._attention(index), hidden, _on(rotary, device), asking, visible, keys
            )
        return row[:, -count:]

    @torch.no_grad()
    def _row_ahead(self, cut: _Cut, group: int) -> Tensor:
        """(B, M) attention row over the current slots in the layer that runs next."""
        state, index = cut.state, cut.layer
        states = self._states_ahead(index, cut.hidden)
        device, count = states.device, states.shape[1]
        asking, visible = state.asking(device, group)
        past = None
        cached = state.layers[index] if state.layers else None
        if cached is not None and cached.keys is not None and cached.held:
            past = cached.keys.to(device)
            visible = torch.cat([cached.valid[:, : past.shape[2]].to(device), visible], 1)
        visible = _counted(visible, state.sizes if cached is None else cached.sizes)
        rotary = self._rotary_ahead(cut, states)
        with self._at_hand(index):
            row = decoder_row(self._attention(index), states, rotary, asking, visible, past=past)
        return row[:, -count:]

    def _prompt(
        self, cut: _Cut, span: Span
    ) -> tuple[tuple[nn.Module, Tensor, Rotary], Tensor | None, Callable[[Tensor], Tensor]]:
        """The prompt of an image in the layer in front of the cut.

        Returns:
            The attention module, its input (M, D) and its rotary embedding; the cached keys; and a
            function that maps T slots to the number of times that each of K keys counts (T, K).
        """
        state, index = cut.state, cut.layer - 1
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
        return (self._attention(index), hidden, (cos, sin)), keys, visible

    def _states_ahead(self, index: int, hidden: Tensor) -> Tensor:
        """(..., D) ``hidden`` after the norm of layer ``index``: the input of its attention."""
        norm = self.adapter.decoder_layers[index].get_submodule("input_layernorm")
        with self._at_hand(index):
            return applied(norm, hidden)

    def _rotary_ahead(self, cut: _Cut, states: Tensor) -> Rotary:
        """cos and sin of the current slots in the layer that runs next."""
        state = cut.state
        moved = state.inherited[cut.layer] if state.inherited else None
        if moved is None:
            rotary = state.rotary or cut.kwargs["position_embeddings"]
        else:
            positions = (state.positions - moved.to(state.positions.device)).to(states.device)
            rotary = self.adapter.language_model.rotary_emb(states, axes_of(positions))
        return _on(rotary, states.device)

    def _charge(
        self, state: Pass, signal: Signal, index: int, span: Span | None = None, text: int = 0
    ) -> None:
        """Enter the cost of a signal in front of layer ``index``, for one image or for all rows."""
        layer = signal.layer if signal.info.layer == "named" else index - 1
        cached = bool(state.layers) and state.layers[layer].keys is not None
        entry = attended_for(
            signal,
            index,
            cached=cached,
            text=text,
            patches=0 if span is None else len(span.tokens.layout.patches),
            row=None if span is None else span.row,
            normed=self._normed,
        )
        if entry is not None:
            state.attended.append(entry)

    def _attention(self, index: int) -> nn.Module:
        """The attention module of decoder layer ``index``."""
        return self.adapter.decoder_layers[index].get_submodule("self_attn")

    def _at_hand(self, index: int) -> AbstractContextManager[None]:
        """While open, modules of decoder layer ``index`` can run outside its forward."""
        return resident(self.adapter.decoder_layers[index], self._attention(index))


def _on(rotary: Rotary, device: torch.device) -> Rotary:
    """cos and sin on ``device``."""
    cos, sin = rotary
    return cos.to(device), sin.to(device)


def _counted(visible: Tensor, sizes: Tensor | None) -> Tensor:
    """``visible`` keys, where merged ones count as often as ``sizes`` says."""
    return visible if sizes is None else visible * sizes.to(visible.device)


def cuts_of(adapter: Adapter, compressor: Compressor | None) -> dict[int, Compressor]:
    """Index of a decoder layer to the compressor that selects in front of it."""
    return placed(compressor, len(adapter.decoder_layers))[1]


def tapped_layers(signals: Iterable[Signal], cuts: Mapping[int, Compressor]) -> set[int]:
    """Decoder layers whose attention input is kept, for ``signals`` and the needs of the cuts."""
    named = {one.layer for one in signals if one.info.is_tapped and one.info.layer == "named"}
    previous = {
        cut - 1
        for cut, part in cuts.items()
        if any(one.info.is_tapped and one.info.layer == "previous" for one in part.needs)
    }
    return named | previous


def queried_layers(cuts: Mapping[int, Compressor]) -> set[int]:
    """Decoder layers whose queries are kept, because those of all patch tokens rank."""
    return {
        cut - 1 for cut, part in cuts.items() if any(one.info.shares_queries for one in part.needs)
    }
