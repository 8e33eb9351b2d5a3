"""Runs a compressor inside an unmodified Hugging Face model.

A context manager installs hooks and always removes them, so that the user's own
``model.generate(**inputs)`` stays as it is:

* `observing` notes the geometry and signals of every image while the model encodes it, and has
  the vision tower run under a method that acts inside it (``encoder``, `tokenprune.encoder`);
* a pre-hook on the language model drops columns of the prompt (``pre_llm``) and packs the ragged
  batch to the right, padding on the left;
* pre-hooks on the decoder layers do the same between two layers (``llm``) and hand every layer
  behind the cut the mask, rotary embedding and positions of what is left;
* a hook behind the language model spreads the hidden states over the original columns again, so
  that logits, labels and loss keep their shape.

What must outlive a forward lives on the KV cache (`tokenprune.engine.cache`).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from tokenprune.adapter import adapter_of
from tokenprune.attention import proportional_mask
from tokenprune.compressor import Compressor, Selection, Stage, placed
from tokenprune.cost.arithmetic import (
    DecoderShape,
    Kept,
    VisionShape,
    copied_bytes,
    encoder_flops,
    held_bytes,
    kept_of,
    merging_bytes,
    signal_bytes,
    signal_flops,
)
from tokenprune.cost.ledger import Ledger, settle
from tokenprune.encoder import encoder_part
from tokenprune.engine.arguments import Kwargs, argument, asked
from tokenprune.engine.cache import (
    CACHE,
    adopt,
    is_pruned,
    refuse_beyond_window,
    refuse_paged,
    settle_layers,
    window_of,
)
from tokenprune.engine.decoder import LayerSignals, tapped_layers
from tokenprune.engine.dropping import BEFORE, PROMPT
from tokenprune.engine.forward import Pass, Span
from tokenprune.engine.guard import Guard, Ours, bypassed, eagerly, plain_copies
from tokenprune.engine.prefix import Prefix
from tokenprune.engine.trace import Prefill, SelectionRecord, Trace
from tokenprune.engine.vision import encoded, observing
from tokenprune.errors import ContractError, UserError
from tokenprune.layout import listed
from tokenprune.signals import Signal
from tokenprune.spec import parse
from tokenprune.tokens import Encoding, VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "Session",
    "compress",
]


_active: WeakSet[nn.Module] = WeakSet()


_entering = threading.Lock()


@contextmanager
def compress(
    model: nn.Module | Adapter,
    compressor: Compressor | str | Sequence[Compressor] | None,
    *,
    extra_signals: Iterable[Signal] = (),
    prefix: Prefix | None = None,
    **fields: Any,
) -> Iterator[Trace]:
    """Run ``compressor`` inside ``model`` while the context is open.

    Methods that look at the prompt see what it asks, never an answer or a guess.  Of the last ``k``
    columns of a forward with ``logits_to_keep=k``, only the first belongs to the prompt; the others
    are draft tokens of assisted decoding, or a continuation to be scored.  With ``labels`` the
    token that asks for an image is the last text token before the first label behind that image.

    What ``attention_mask`` hides is not there: it is not ranked, kept or counted.  Logits and
    ``output_hidden_states`` are in the columns of the prompt, where a dropped column shows what the
    last kept column before it shows.

    Threads that share the context of the one that opened it (`contextvars.copy_context`) may run
    the model side by side; others are refused.  Whatever ``torch.compile`` has compiled, this model
    or another, runs eagerly in the meantime.  Copies of the model that are made inside are plain.

    Args:
        model: A model that an adapter knows, e.g. ``LlavaNextForConditionalGeneration``, its
            adapter, or a wrapper that `adapter_of` sees through.
        compressor: A `Compressor`, a spec such as ``"globalcom2"`` or ``"fastv:layer=3"``, or None
            to run uncompressed and only keep the account.  A list has one compressor for each row
            of the batch, all of them in front of the language model.
        extra_signals: Signals that the model cannot provide.  The caller puts them into the
            `VisualTokens` handed to `Adapter.assemble`.
        prefix: What other contexts that run the same prompts have in common with this one.
        **fields: With a spec: the strategy's fields, e.g. ``retention=0.25``.

    Yields:
        The `Trace` of the latest prefill.

    Raises:
        UserError: The model lacks what the compressor needs, or already runs inside a context.
            Inside: a forward got past the hooks, or ran in a thread that is not of the context.
    """
    adapter = adapter_of(model)
    adapter.require_language_model()
    if isinstance(compressor, str):
        compressor = parse(compressor, **fields)
    elif fields:
        raise UserError(f"fields {sorted(fields)} need a strategy's name, got {compressor!r}.")
    extra_signals = frozenset(extra_signals)
    rows: list[Compressor | None]
    rows = [*compressor] if isinstance(compressor, Sequence) else [compressor]
    for one in {id(one): one for one in rows if one is not None}.values():
        adapter.check(one, extra_signals)
    if len(rows) > 1:
        _check_rows(rows)
    trace = Trace()
    session = Session(adapter, rows, extra_signals, prefix, trace)
    with _entering:
        if adapter.base in _active:
            raise UserError(
                "this model already runs inside a compress context; leave it first, or combine the "
                "strategies with Chain.of(...)."
            )
        _active.add(adapter.base)
    try:
        with eagerly(model if isinstance(model, nn.Module) else adapter.model), session.installed():
            yield trace
    finally:
        _active.discard(adapter.base)


def _check_rows(compressors: Sequence[Compressor | None]) -> None:
    """Raise `UserError` unless ``compressors`` can act in the rows of one batch."""
    parts = [part for one in compressors if one is not None for part in one.parts()]
    for part in parts:
        if part.stage is not Stage.PRE_LLM:
            raise UserError(
                f"{part.label} does not act in front of the language model, so it cannot share a "
                "batch with other compressors; run it in a context of its own."
            )
    if len({part.keeps_positions for part in parts}) > 1:
        raise UserError(
            "some of these compressors keep the positions of the full prompt and some do not; run "
            "them in contexts of their own."
        )


class Session(threading.local):
    """The hooks of one open context, and what each thread that runs the model has come to."""

    def __init__(
        self,
        adapter: Adapter,
        compressors: Sequence[Compressor | None],
        extra_signals: frozenset[Signal],
        prefix: Prefix | None,
        trace: Trace,
    ) -> None:
        self.adapter = adapter
        self.trace = trace
        self.compressors = compressors
        self.needs = [
            one.needs - extra_signals if one else frozenset[Signal]() for one in compressors
        ]
        self.signals = frozenset[Signal]().union(*self.needs)
        self.encoder = encoder_part(compressors[0])
        depth = len(adapter.decoder_layers)
        self.before = [placed(one, depth)[0] for one in compressors]
        self.inside = placed(compressors[0], depth)[1]
        parts = [part for one in compressors if one is not None for part in one.parts()]
        self.drops = any(part.retention < 1 or part.separators != "all" for part in parts)
        self.layers = LayerSignals(adapter)
        self.prefix = prefix
        self.repeating: Any = None  # this session's use of the prefix
        self.shape = DecoderShape.of(adapter.language_model.config)
        self.vision = VisionShape.of(adapter.base.config.vision_config)
        self.seen: dict[str, list[list[Tensor]]] = {name: [] for name in adapter.encoders}
        # What the outer forwards were given, until the language model takes it.
        self.placeholders: dict[str, Tensor] = {}
        self.ids: Tensor | None = None
        self.labels: Tensor | None = None
        self.scored = 1
        self.current: Pass | None = None
        self.opened: Pass | None = None  # the pass that the trace will tell about
        # Without a KV cache the whole prefix runs again for every new token: the selection made
        # for the prompt is reused, else the newest token would rank.
        self.memory: list[tuple[Tensor, int, Tensor, Tensor, Selection]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        adapter = self.adapter
        hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
            (adapter.base, self._begin),
            (adapter.language_model, self._enter),
            *(
                (layer, functools.partial(self._layer, index))
                for index, layer in enumerate(adapter.decoder_layers)
            ),
        ]
        if adapter.model is not adapter.base:
            hooks.append((adapter.model, self._targets))
        for index in tapped_layers(self.signals, self.inside):
            attention = adapter.decoder_layers[index].get_submodule("self_attn")
            hooks.append((attention, functools.partial(self._attention, index)))
        guard = Guard(adapter, alone=self.prefix is not None)

        def enter() -> dict[str, list[list[Tensor]]]:
            guard.admit()
            return self.seen  # of the thread that encodes

        handles = [
            module.register_forward_pre_hook(Ours(hook), with_kwargs=True) for module, hook in hooks
        ]
        handles.append(adapter.language_model.register_forward_hook(Ours(self._leave)))
        # Also when a forward fails before the language model runs, the next one starts afresh.
        handles += [
            module.register_forward_hook(Ours(self._forget), always_call=True)
            for module in {adapter.model, adapter.base}
        ]
        first = min(self.inside, default=self.shape.layers)
        try:
            with (
                observing(adapter, self.signals, enter, self.encoder),
                self.prefix.installed(adapter.decoder_layers, first, self._tap)
                if self.prefix is not None
                else nullcontext() as self.repeating,
                guard.watching(),
                plain_copies([*guard.modules, *adapter.language_model.modules()]),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.current = self.opened = None
            self.memory.clear()
            self._forget()

    # -- what the caller passed ------------------------------------------------------------------

    def _targets(self, module: nn.Module, args: Any, kwargs: Kwargs) -> None:
        """Note where the prompt ends, for answers and drafts have no say in what is kept."""
        self.labels = argument(module, args, kwargs, "labels")
        scored = argument(module, args, kwargs, "logits_to_keep")
        self.scored = scored if isinstance(scored, int) and scored > 0 else 1

    def _forget(self, *_: Any) -> None:
        """What a forward was given is nothing to the next one."""
        self.ids, self.labels, self.scored = None, None, 1
        self.placeholders = {}
        for calls in self.seen.values():
            calls.clear()

    def _begin(self, module: nn.Module, args: Any, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        self.ids = argument(module, args, kwargs, "input_ids")
        embeds = argument(module, args, kwargs, "inputs_embeds")
        if self.ids is None and embeds is None and args:
            raise UserError(
                f"the arguments of {type(module).__name__}.forward were replaced by ones without a "
                "name, so that input_ids cannot be told; call it with input_ids=..."
            )
        given = argument(module, args, kwargs, "mm_encoder_outputs") or {}
        for modality, calls in self.seen.items():
            calls.clear()
            if given.get(modality) is not None:
                calls.append(list(given[modality].pooler_output))
        self.placeholders.clear()
        for modality, token in self.adapter.placeholders.items():
            if self.ids is not None:
                self.placeholders[modality] = self.ids == token
            elif embeds is not None:
                table = self.adapter.model.get_input_embeddings()
                like = table(torch.tensor(token, device=embeds.device))
                self.placeholders[modality] = (embeds == like).all(-1)
        if self.ids is not None and not any(self.before):  # else it is seen what is left
            self.adapter.check_length(self.ids.shape[1])
        plain = [name for name, output in given.items() if type(output.pooler_output) is list]
        if not plain or "mm_encoder_outputs" not in kwargs:
            return None
        # Beam search makes plain lists of what has to be joined as a stack.
        joined = {name: encoded(given[name].pooler_output) for name in plain}
        return args, {**kwargs, "mm_encoder_outputs": {**given, **joined}}

    def _find_spans(self, state: Pass) -> list[Span]:
        """The visual tokens of this forward, image by image, in the order of the placeholders."""
        spans: list[Span] = []
        found = {
            modality: [feature for call in calls for feature in call]
            for modality, calls in self.seen.items()
        }
        if not self.placeholders or not any(found.values()):
            return []
        visual, real = state.look(self.placeholders)
        device = state.columns.device
        for modality, features in found.items():
            if not features:
                continue
            where = visual[modality].nonzero()
            if len(where) != sum(map(len, features)):
                raise UserError(
                    f"this forward has {len(where)} {modality} placeholders but "
                    f"{sum(map(len, features))} visual tokens; an image split over several "
                    "forwards (prefill_chunk_size) is not supported under compression."
                )
            for feature, place in zip(
                features, where.split([len(one) for one in features]), strict=True
            ):
                record = getattr(feature, "visual", None)
                if record is None:
                    raise UserError(
                        f"the {modality} features were not encoded inside this context, so their "
                        "layout is unknown; pass pixel_values, or features from adapter.assemble "
                        "(prefill_chunk_size is not supported under compression)."
                    )
                self._check_encoding(record)
                row, columns = int(place[0, 0]), place[:, 1]
                there = listed(real[row, columns])
                tokens = replace(
                    record, features=feature.to(device), layout=record.layout.to(device)
                )
                spans.append(
                    Span(
                        row=row,
                        first=int(columns[0]),
                        last=int(columns[-1]),
                        columns=columns[there],
                        index=there,
                        tokens=tokens if len(there) == len(columns) else tokens.take(there),
                        layout=record.layout.host,
                        carrier=feature,
                        there=there,
                        entered=there,
                        record=record,
                    )
                )
        # Images and videos of a prompt are told apart by their order in it.
        spans.sort(key=lambda span: (span.row, span.first))
        before: Counter[int] = Counter()
        for span in spans:
            span.image = before[span.row]
            before[span.row] += 1
        state.spans = spans
        state.ask()
        return spans

    def _check_encoding(self, record: VisualTokens) -> None:
        """Features must have been encoded as this context would encode them."""
        found = record.encoding.by if record.encoding is not None else ""
        wanted = repr(self.encoder) if self.encoder is not None else ""
        if found != wanted:
            raise UserError(
                f"these features were encoded by {found or 'the plain vision tower'}, but this "
                f"context runs {wanted or 'the plain vision tower'}; encode them with "
                "adapter.encode(images, signals, compressor), or pass pixel_values."
            )

    def _refuse_missing_images(self) -> None:
        """Placeholders that no features were put into would run as if they were text."""
        for modality, where in self.placeholders.items():
            if where.any():
                raise UserError(
                    f"the prompt has {int(where.sum())} {modality} placeholders, but no {modality} "
                    "reached this forward; pass pixel_values with the prompt (prefill_chunk_size "
                    "is not supported under compression)."
                )

    # -- in front of the language model ----------------------------------------------------------

    def _enter(self, module: nn.Module, args: Any, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        self.current = self.opened = None
        embeds = argument(module, args, kwargs, "inputs_embeds")
        if embeds is None:  # the language model is used by itself
            return None
        changed = dict(kwargs)
        if "past_key_values" in changed:  # the old name is still understood
            changed[CACHE] = changed.pop("past_key_values")
        cache = changed.get(CACHE)
        refuse_paged(cache)
        state, continued = self._start(embeds, changed), is_pruned(cache)
        spans = self._find_spans(state)
        stages = any(self.before) or bool(self.inside)
        if stages and self.ids is None and not spans and not continued and embeds.shape[1] > 1:
            self._warn_blind()
        # A token that was generated or drafted behind a prompt may be any, also a placeholder.
        new = self.scored if cache is not None and cache.get_seq_length() else 1
        if stages and not spans and embeds.shape[1] > new:
            self._refuse_missing_images()
        work = stages and bool(spans)
        if work or continued:
            mask = changed.get("attention_mask")
            if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
                raise UserError(
                    "compression needs the 2-D attention mask, not a prepared 4-D one; static and "
                    "compiled KV caches are not supported."
                )
            config = self.adapter.language_model.config
            if asked(changed, "output_attentions", config) and (continued or self.drops):
                raise UserError(
                    "output_attentions is not available under compression, because tokens that "
                    "were dropped have no attention; run the plain model for attention maps, or "
                    "leave output_attentions out."
                )
            if cache is None and asked(changed, "use_cache", config):
                cache = changed[CACHE] = DynamicCache(config=config)
            if cache is None:
                refuse_beyond_window(embeds.shape[1], window_of(config))
        if spans and len(embeds) % len(self.compressors):
            raise UserError(
                f"{len(self.compressors)} compressors, one for each row, were given for a batch of "
                f"{len(embeds)} rows."
            )
        if work or continued:
            self.current = state
            self._join_cache(state, changed, cache, continued)
        elif cache is not None and spans and (held := cache.get_seq_length()):
            mask = changed.get("attention_mask")
            there = state.real.new_ones(len(embeds), held)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                there = mask[:, :held]
            state.held = [there.sum(1)] * self.shape.layers
        if self.repeating is not None:
            given = [self.ids, changed.get("attention_mask")]
            images = [span.record for span in spans]
            self.repeating.begin(changed.get(CACHE), [*given, *images] if spans else [])
        if spans:
            self._charge_vision(state, embeds.element_size())
        for span in spans if PROMPT in self.signals else []:
            prompt = embeds[span.row, state.text_slots(span)].detach()
            span.tokens = replace(span.tokens, text={**span.tokens.text, PROMPT: prompt})
        for step in range(max(map(len, self.before)) if spans else 0):
            with self.trace.around():
                embeds = self._shorten(state, step, embeds, changed)
        if spans and any(self.before):
            numbered = any(part.keeps_positions for parts in self.before for part in parts)
            left = state.width if numbered else max(state.left)
            self.adapter.check_length(left, what="what is left of the prompt")
        for span in spans:
            span.entered = span.index
            span.tokens = replace(
                span.tokens,
                entered=len(span.tokens.layout.patches),
                inputs=self._inputs(state, span, embeds),
            )
        self._count(state, 0)
        first = not (continued or (cache is not None and cache.get_seq_length()))
        if spans or (first and not self.trace.has_images):
            self.opened, state.entered = state, state.real.sum(1)
        return args, changed

    def _start(self, embeds: Tensor, changed: Kwargs) -> Pass:
        (rows, width), device = embeds.shape[:2], embeds.device
        mask, cache = changed.get("attention_mask"), changed.get(CACHE)
        column = torch.arange(width, device=device).expand(rows, -1)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            columns = torch.where(mask[:, -width:].to(device).bool(), column, -1)
        else:
            columns = column
        positions = changed.get("position_ids")
        if positions is None:
            seen = cache.get_seq_length() if cache is not None else 0
            positions = column + seen
        labels = self.labels
        if labels is not None and labels.shape[-1] < width:  # of the last columns only
            labels = F.pad(labels, (width - labels.shape[-1], 0), value=-100)
        return Pass(
            columns=columns,
            positions=positions.to(device).expand(rows, -1),
            scored=self.scored,
            labels=labels,
            ids=self.ids,
            cache=None,
            layers=[],
            spans=[],
            tally=[[0] * self.shape.layers for _ in range(rows)],
            spent=[0.0] * rows,
            most=[0] * rows,
            taps=tapped_layers(self.signals, self.inside),
            width=width,
            order=column,
            entered=column,
        )

    def _join_cache(
        self, state: Pass, changed: Kwargs, cache: Cache | None, continued: bool
    ) -> None:
        """Announce the new entries to the KV cache; continue behind what was compressed before."""
        if cache is None:
            return
        mask = changed.get("attention_mask")
        held = cache.get_seq_length()
        past = state.real.new_ones(len(state.columns), held)
        if mask is not None and not continued:
            past = mask[:, :held].to(past.device).bool()
        state.cache = cache
        state.layers = adopt(cache, past, self.shape.layers)
        if held:
            state.held = [layer.valid[:, : layer.held].sum(1) for layer in state.layers]
        for layer in state.layers:
            layer.expect(state.real)
        if continued:
            first = state.layers[0]
            state.inherited = [layer.extra for layer in state.layers]
            state.positions = state.positions - first.shift.to(state.positions.device)
            changed.update(attention_mask=first.mask().long(), position_ids=state.positions)

    def _shorten(self, state: Pass, step: int, embeds: Tensor, changed: Kwargs) -> Tensor:
        """Drop columns of the prompt: (B, M, D) embeddings of what is left."""
        keep, width = state.real, embeds.shape[1]
        gone, keeps_positions, shown = False, False, self._shown(state)
        made: dict[Any, Selection] = {}
        for span in state.spans:
            parts = self.before[self._index(state, span.row)]
            if step >= len(parts):
                continue
            part = parts[step]
            keeps_positions = part.keeps_positions
            if not len(span.tokens.layout.patches):  # the attention mask hides them all
                gone |= self._narrow(state, span, part(span.tokens).keep, keep, part.stage, None)
                continue
            asks = PROMPT in part.needs  # of a prompt that grows where there is no KV cache
            chosen = self._recall(state, span, BEFORE) if asks else None
            if chosen is None:
                # Questions about one image share what is chosen of it, unless they have a say.
                key = (id(part), id(span.record)) if span.is_untouched else None
                chosen = made.get(key)
                if chosen is None:
                    chosen = _choose(part, span, span.tokens)
                if key is not None:
                    made[key] = chosen
                state.charge(span, part, span.tokens, shown[span.row], chosen)
                if asks:
                    self._remember(state, span, BEFORE, chosen)
            if chosen.features is not None:
                if embeds is changed["inputs_embeds"]:
                    embeds = embeds.clone()
                slots = state.slots(span.row, span.columns[chosen.keep])
                embeds[span.row, slots] = chosen.features.to(embeds.dtype)
            gone |= self._narrow(state, span, chosen.keep, keep, part.stage, None)
        changed["inputs_embeds"] = embeds
        if not gone:
            return embeds
        shift = self._pack(state, keep, keeps_positions)
        embeds = state.repack(embeds)
        for layer in state.layers:
            layer.expect(state.real, width - embeds.shape[1])
            layer.shift = layer.shift + shift.to(layer.shift.device)
        mask = state.layers[0].mask() if state.layers else state.real
        changed.update(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=state.positions
        )
        return embeds

    def _index(self, state: Pass, row: int) -> int:
        """Which of the compressors acts in ``row``; the beams of a prompt lie side by side."""
        return row * len(self.compressors) // len(state.columns)

    def _narrow(
        self,
        state: Pass,
        span: Span,
        chosen: Tensor,
        keep: Tensor,
        stage: Stage,
        layer: int | None,
    ) -> bool:
        """Take what was not chosen out of the span and of ``keep`` (B, M); whether any was."""
        gone = len(chosen) < len(span.columns)
        if gone:
            keep[span.row, state.slots(span.row, span.columns)] = False
            state.left[span.row] -= len(span.columns) - len(chosen)
            span.index, span.columns = span.index[chosen], span.columns[chosen]
            keep[span.row, state.slots(span.row, span.columns)] = True
            span.tokens = span.tokens.take(chosen)
        layout = span.layout
        state.selections.append(
            SelectionRecord(span.row, span.image, stage, layer, layout, span.index)
        )
        return gone

    def _pack(self, state: Pass, keep: Tensor, keeps_positions: bool) -> Tensor:
        """Move the kept slots of every row to the right; (B, 1) positions each row lost."""
        lost = state.real & ~keep
        steps, shift = lost.cumsum(1), lost.sum(1, keepdim=True)
        if state.hidden is not None and not keeps_positions:
            closes = shift > 0
            steps += state.hidden.gather(1, state.columns.clamp(min=0)) * closes
            shift = shift + state.hidden[:, -1:] * closes
            state.hidden = state.hidden * ~closes
        width = max(state.left)
        # A stable sort puts what goes in front and leaves what stays in order behind it.
        state.order = keep.int().argsort(dim=1, stable=True)[:, -width:]
        if not keeps_positions:
            state.positions = state.positions - steps
        state.positions = state.positions.gather(1, state.order)
        state.columns = torch.where(keep, state.columns, -1).gather(1, state.order)
        if state.sizes is not None:
            state.sizes = state.sizes.gather(1, state.order)
        state.packed = True
        return torch.zeros_like(shift) if keeps_positions else shift

    # -- between decoder layers ------------------------------------------------------------------

    def _attention(self, index: int, module: nn.Module, args: Any, kwargs: Kwargs) -> None:
        wanted = ("hidden_states", "position_embeddings")
        self._tap(index, *(argument(module, args, kwargs, name) for name in wanted))

    def _tap(self, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Keep what the attention module of decoder layer ``index`` receives."""
        if self.current is not None and self.current.spans:
            self.current.tapped[index] = hidden, rotary

    def _layer(
        self, index: int, module: nn.Module, args: Any, kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        state = self.current
        if state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if state.spans and index in self.inside:
            with self.trace.around():
                hidden = self._cut(state, index, hidden, kwargs)
        state.ran.append(state.columns if state.packed else None)
        behind = state.cuts
        if state.layers:
            behind = state.layers[index].cut - state.layers[0].cut
        if not behind:
            return None
        changed = {**kwargs, **self._surroundings(state, index, behind, hidden, kwargs)}
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _cut(self, state: Pass, index: int, hidden: Tensor, kwargs: Kwargs) -> Tensor:
        """Select in front of decoder layer ``index``: (B, M, D) hidden states of what is left."""
        part, width = self.inside[index], hidden.shape[1]
        whole, keep, gone, shown = hidden, state.real, False, self._shown(state)
        once = functools.partial(self._once, state, index)
        rows = self.layers.everywhere(state, part, index, whole, kwargs, once)
        for span in state.spans:
            if not len(span.tokens.layout.patches):  # the attention mask hides them all
                gone |= self._narrow(state, span, part(span.tokens).keep, keep, Stage.LLM, index)
                continue
            tokens = self.layers.tokens(state, span, part, index, whole, rows, once)
            chosen = self._recall(state, span, index)
            if chosen is None:
                chosen = _choose(part, span, tokens)
                copies = held_bytes(tokens, inside=True) - held_bytes(span.tokens, inside=False)
                state.charge(span, part, tokens, shown[span.row] + copies, chosen)
                self._remember(state, span, index, chosen)
            if chosen.features is not None:
                hidden = hidden.clone()
                where = state.slots(span.row, span.columns[chosen.keep]).to(hidden.device)
                hidden[span.row, where] = chosen.features.to(hidden.dtype)
            if chosen.sizes is not None:
                if state.sizes is None:
                    state.sizes = torch.ones_like(state.columns, dtype=torch.float32)
                where = state.slots(span.row, span.columns[chosen.keep])
                state.sizes[span.row, where] = chosen.sizes.to(state.sizes)
            gone |= self._narrow(state, span, chosen.keep, keep, Stage.LLM, index)
        state.tapped.clear()
        if not gone:
            return hidden
        shift = self._pack(state, keep, part.keeps_positions)
        state.cuts += 1
        state.masks.clear()
        hidden = state.repack(hidden)
        if part.keeps_positions:
            cos, sin = state.rotary or kwargs["position_embeddings"]
            rows_of = len(hidden)
            state.rotary = (
                state.repack(cos.expand(rows_of, -1, -1)),
                state.repack(sin.expand(rows_of, -1, -1)),
            )
        else:
            at = state.positions.to(hidden.device)
            state.rotary = self.adapter.language_model.rotary_emb(hidden, at)
        for layer in state.layers[index:]:
            layer.expect(state.real, width - hidden.shape[1], state.sizes)
            layer.cut += 1
            if not part.keeps_positions:
                more = shift.to(layer.valid.device)
                layer.extra = more if layer.extra is None else layer.extra + more
        self._count(state, index)
        return hidden

    def _surroundings(
        self, state: Pass, index: int, behind: int, hidden: Tensor, kwargs: Kwargs
    ) -> Kwargs:
        """Mask, rotary embedding and position ids of a layer behind a cut."""
        language = self.adapter.language_model
        layer = state.layers[index] if state.layers else None
        positions, rotary = state.positions, state.rotary
        if rotary is None:  # the cut was made by an earlier forward
            positions, rotary = kwargs["position_ids"], kwargs["position_embeddings"]
        moved = state.inherited[index] if state.inherited else None
        if moved is not None:
            positions = (positions - moved.to(positions.device)).to(hidden.device)
            rotary = language.rotary_emb(hidden, positions)
        if behind not in state.masks:
            there = state.real if layer is None else layer.mask()
            # Where there is no padding, no mask at all; to see that from one would be a wait.
            # Without a KV cache there must be one: gaps in the positions would pass for the borders
            # of several packed sequences.
            unmasked = state.is_whole and layer is not None
            state.masks[behind] = create_causal_mask(
                config=language.config,
                inputs_embeds=hidden,
                attention_mask=None if unmasked else there.long(),
                position_ids=positions,
                layer_idx=index,
                **{CACHE: state.cache},
            )
            sizes = state.sizes if layer is None else layer.sizes
            if sizes is not None:
                state.masks[behind] = self._proportional(state.masks[behind], sizes, hidden)
        mask = state.masks[behind]
        return {
            "attention_mask": None if mask is None else mask.to(hidden.device),
            "position_ids": positions,
            "position_embeddings": tuple(table.to(hidden.device) for table in rotary),
        }

    def _proportional(self, mask: Tensor | None, sizes: Tensor, hidden: Tensor) -> Tensor:
        """``mask`` for attention that counts merged tokens as often as ``sizes`` says."""
        kernel = self.adapter.language_model.config._attn_implementation
        if kernel not in ("sdpa", "eager"):
            raise UserError(
                f"attention in proportion to the sizes of merged tokens needs sdpa or eager "
                f"attention, this model runs {kernel}; load it with attn_implementation='sdpa', or "
                "turn the strategy's option off (pact:proportional=false)."
            )
        return proportional_mask(mask, sizes.to(hidden.device), hidden.shape[1], hidden.dtype)

    def _once(self, state: Pass, index: int, what: Hashable, look: Callable[[], Tensor]) -> Tensor:
        """What ``look`` computes; in front of the first cut once for all that share a `Prefix`."""
        if self.repeating is None or index != min(self.inside):
            return look()
        account = state.read, state.asked, state.projected
        found: Tensor = self.repeating.once((index, what), account, look)
        return found

    def _inputs(self, state: Pass, span: Span, embeds: Tensor) -> tuple[Tensor, Tensor] | None:
        """What enters the language model: an image's patch tokens, and the text behind it."""
        if Signal("llm_inputs") not in self.signals:
            return None
        patches = span.tokens.layout.patches
        row = embeds[span.row].detach()
        slots = state.slots(span.row, span.columns)
        return row[slots[patches]], row[state.text_slots(span)]

    def _recall(self, state: Pass, span: Span, index: int) -> Selection | None:
        """What was chosen when this very prompt ran before, without a KV cache."""
        if state.prompt_ids is None:
            return None
        row = state.prompt_ids[span.row]
        for feature, cut, there, ids, chosen in self.memory:
            same = feature is span.carrier and cut == index and torch.equal(there, span.there)
            if same and torch.equal(row[: len(ids)], ids):
                return chosen
        return None

    def _remember(self, state: Pass, span: Span, index: int, chosen: Selection) -> None:
        if state.prompt_ids is None:
            return
        here = {id(other.carrier) for other in state.spans}
        self.memory = [entry for entry in self.memory if id(entry[0]) in here]
        ids = state.prompt_ids[span.row]
        self.memory.append((span.carrier, index, span.there, ids, chosen))

    # -- behind the language model ---------------------------------------------------------------

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        opened, self.opened = self.opened, None
        if self.repeating is not None:
            self.repeating.end()
        if opened is not None and opened.spans:
            cut = {chosen.layer for chosen in opened.selections}
            for index in self.inside.keys() - cut:
                raise bypassed(f"decoder layer {index}")
        if opened is not None:
            self._tell(opened, output[0].element_size())
        state, self.current = self.current, None
        if state is not None and state.cache is not None:
            settle_layers(state.cache, cut=state.packed or state.sizes is not None)
        if state is None or not state.packed:
            return None
        hidden = state.spread(output[0], state.columns)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        if output.get("hidden_states") is not None:
            # The first is what enters layer 0, each other what a layer returns.
            columns = [state.ran[0], *state.ran]
            output.hidden_states = tuple(
                states if states is None or at is None else state.spread(states, at)
                for states, at in zip(output.hidden_states, columns, strict=True)
            )
        return output

    # -- the account -----------------------------------------------------------------------------

    def _count(self, state: Pass, start: int) -> None:
        """Note how many visual tokens the layers from ``start`` on process."""
        counts = [0] * len(state.tally)
        for span in state.spans:
            counts[span.row] += len(span.columns)
        for count, layers in zip(counts, state.tally, strict=True):
            layers[start:] = [count] * (len(layers) - start)

    def _charge_vision(self, state: Pass, size: int) -> None:
        views, towers = [0] * len(state.spent), {}
        for span in state.spans:
            views[span.row] += span.layout.views
            if span.tokens.encoding is not None:  # the same for all images
                towers[span.row] = span.tokens.encoding
        known: dict[Any, tuple[float, int]] = {}  # most rows look at the same
        for row, count in enumerate(views):
            looked = self.needs[self._index(state, row)], self.adapter, count
            run = towers.get(row)
            if (key := (*looked, run)) not in known:
                attended = None if run is None else run.attended
                held = signal_bytes(*looked, size, attended)
                if run is not None:
                    held = max(held, merging_bytes(run, self.adapter.vision_width, count, size))
                known[key] = signal_flops(*looked, attended), held
            flops, state.most[row] = known[key]
            state.spent[row] += flops

    def _shown(self, state: Pass) -> list[int]:
        """Bytes of the tower's signals of all images, per row.

        Those that the row's compressor asked for: images that were encoded for several have more.
        """
        shown = [0] * len(state.most)
        for span in state.spans:
            compressor = self.compressors[self._index(state, span.row)]
            needs = compressor.needs if compressor is not None else ()
            shown[span.row] += held_bytes(span.tokens, inside=False, needs=needs)
        return shown

    def _tell(self, state: Pass, size: int) -> None:
        """Let the trace tell what this prefill did.

        The sums are made when they are asked for, so that nothing waits for the device here, from
        counts and indices alone: a trace must not keep features or a KV cache alive.
        """
        images = [
            (span.row, (span.layout, span.there, span.entered, span.index)) for span in state.spans
        ]
        entered, tally, spent, most = state.entered, state.tally, state.spent, state.most
        read, asked, projected = state.read, state.asked, state.projected
        picked, cuts = state.picked, self.inside
        shape, vision, past = self.shape, self.vision, state.held
        towers = [(span.row, span.layout.views, span.tokens.encoding) for span in state.spans]
        plain = encoder_flops([self.adapter.vision_tokens] * vision.layers, vision)

        def tower(run: Encoding | None) -> float:
            if run is None:
                return plain
            return encoder_flops(run.attended, vision, run.processed)

        kept = defaultdict[int, Kept](lambda: "mean")
        kept.update((cut, kept_of(one.name for one in part.needs)) for cut, part in cuts.items())
        compressors = [self.compressors[self._index(state, row)] for row in range(len(tally))]
        requested = [1.0 if one is None else one.retention for one in compressors]

        def ledgers() -> list[Ledger]:
            made = []
            for row, total in enumerate(entered.tolist()):
                mine = [image for where, image in images if where == row]
                text = total - tally[row][0]
                tokens = [text + visual for visual in tally[row]]
                rows = [(layer, count, new) for at, layer, count, new in asked if at == row]
                rows += [(layer, 1, new) for layer, new in read if mine]
                rows += [(layer, 0, True) for layer in projected if mine]
                flops = [shape.row_flops(tokens[layer], new, n) for layer, n, new in rows]
                held = [
                    shape.row_bytes(tokens[layer], new, size, n, kept[layer + 1])
                    for layer, n, new in rows
                ]
                held += [
                    shape.vector_bytes(tokens[cut - 1], size, signal.name)
                    for cut, part in cuts.items()
                    for signal in part.needs
                    if mine and signal.name in ("llm_states", "llm_keys")
                ]
                copied = 0
                for one in picked:
                    if one.row == row:
                        states, own = sum(tokens[layer] for layer in one.tapped), one.work.cost()
                        flops.append(own.flops)
                        held.append(one.shown + int(own.bytes) + states * shape.hidden * size)
                        slots = text + one.visual
                        copied = max(copied, copied_bytes(slots, one.merged, shape, size))
                made.append(
                    settle(
                        shape=shape,
                        size=size,
                        requested=requested[row],
                        before=[layout.take(index) for layout, index, _, _ in mine],
                        entered=[layout.take(index) for layout, _, index, _ in mine],
                        after=[layout.take(index) for layout, _, _, index in mine],
                        text=text,
                        visual_per_layer=tally[row],
                        selector_flops=spent[row] + sum(flops),
                        selector_bytes=max([most[row], *held]),
                        merged_bytes=copied,
                        kv_before=[int(layer[row]) for layer in past],
                        vision_flops=sum(
                            views * tower(run) for where, views, run in towers if where == row
                        ),
                        uncompressed_vision_flops=plain * sum(layout.views for layout, *_ in mine),
                    )
                )
            return made

        self.trace._tell(Prefill(state.selections, bool(state.spans), ledgers))

    def _warn_blind(self) -> None:
        warnings.warn(
            "inputs_embeds that already contain visual features cannot be told from text, so "
            "nothing is compressed; pass input_ids with pixel_values instead.",
            stacklevel=2,
        )


def _choose(part: Compressor, span: Span, tokens: VisualTokens) -> Selection:
    """What ``part`` chooses of an image, which is named where it breaks the contract."""
    try:
        return part(tokens)
    except ContractError as error:
        where = f"{span.layout.modality} {span.image} of prompt {span.row}, both counted from 0"
        raise ContractError(f"{error} ({where})") from error
