"""Runs a compressor inside an unmodified Hugging Face model.

`compress` installs hooks and always removes them, so that the user's own
``model.generate(**inputs)`` stays as it is.  In the order in which they run, the hooks are:

1. `Session.note_targets`, in front of the whole model, notes labels and scored columns.
2. `Session.begin`, in front of the model without its head, finds the placeholders.  The vision
   encoder then runs under `tokenprune.engine.vision.observing`, which records layout and signals
   of every image.
3. `Session.enter`, in front of the language model, finds the images and drops columns of the
   prompt (``pre_llm``, `tokenprune.engine.dropping.shorten`).
4. `Session.tap`, in front of an attention module, keeps its input for attention rows, and
   `Session.keep_queries`, after its query projection, the queries if many of them rank.
5. `Session.layer`, in front of each decoder layer, drops columns between two layers (``llm``,
   `tokenprune.engine.dropping.cut`) and passes every layer after the cut the mask, rotary embedding
   and position ids of the kept columns.
6. `Session.leave`, after the language model, reports to the trace and spreads the hidden states
   over the original columns, so that logits, labels and loss keep their shape.
7. `Session.forget`, after the model, drops what the caller passed.

The state that outlives a forward is stored in the KV cache (`tokenprune.engine.cache`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from tokenprune.adapter import ModelLike, adapter_of
from tokenprune.compatibility import check_compatible, check_length
from tokenprune.compressor import Compressor
from tokenprune.deprecated import renamed_arguments
from tokenprune.engine.arguments import Kwargs, argument, arguments, asked
from tokenprune.engine.cache import (
    CACHE,
    refuse_beyond_window,
    refuse_paged,
    settle_layers,
    window_of,
)
from tokenprune.engine.decoder import LayerSignals, Once
from tokenprune.engine.deepstack import DEEPSTACK, added
from tokenprune.engine.dropping import PROMPT, Memory, cut, shorten, surroundings
from tokenprune.engine.forward import Given, Pass, Span
from tokenprune.engine.guard import Guard, Ours, bypassed, eagerly, plain_copies, shadowed
from tokenprune.engine.plan import Plan, check_rows
from tokenprune.engine.prefix import Prefix, Repetition
from tokenprune.engine.spans import find_spans, refuse_missing_images, warn_of_embeds
from tokenprune.engine.trace import Trace
from tokenprune.engine.vision import encoded, levels_of, observing
from tokenprune.errors import UserError
from tokenprune.signals import Signal
from tokenprune.spec import parse

__all__ = [
    "Session",
    "compress",
]


# Models that run inside a context.
active: WeakSet[nn.Module] = WeakSet()

_entering = threading.Lock()


@renamed_arguments(given="extra_signals")
@contextmanager
def compress(
    model: ModelLike,
    compressor: Compressor | str | Sequence[Compressor] | None,
    *,
    extra_signals: Iterable[Signal] = (),
    prefix: Prefix | None = None,
    **fields: Any,
) -> Iterator[Trace]:
    """Run ``compressor`` inside ``model`` while the context is open.

    Methods that use the prompt see the question, never an answer or a draft.  Of the last ``k``
    columns of a forward with ``logits_to_keep=k``, only the first belongs to the prompt; the others
    are draft tokens of assisted decoding, or a continuation to be scored.  With ``labels``, the
    query token of an image, whose attention ranks it, is the last text token before the first label
    after that image.

    Tokens that ``attention_mask`` hides are not ranked, kept or counted.  Logits and
    ``output_hidden_states`` keep the columns of the prompt; a dropped column repeats the last kept
    column before it.

    Threads that share the `contextvars` context of the opening thread
    (`contextvars.copy_context`) may run the model at the same time; others are refused.  While the
    context is open, all code compiled by ``torch.compile`` runs eagerly, also that of other models.
    Copies of the model made inside the context are not compressed.

    Args:
        model: A model that has an adapter, e.g. ``LlavaNextForConditionalGeneration``, its
            adapter, its pipeline, or a wrapper that `adapter_of` unwraps.
        compressor: A `Compressor`, a spec such as ``"globalcom2"`` or ``"fastv:layer=3"``, or None
            to run uncompressed and only measure the cost.  A list has one compressor for each row
            of the batch; all of them act in front of the language model.
        extra_signals: Signals that the model cannot provide.  The caller adds them to the
            `VisualTokens` passed to `Pipeline.assemble`.
        prefix: Decoder layers that contexts with the same prompts run only once.
        **fields: With a spec, options of the method, e.g. ``retention=0.25``.

    Yields:
        The `Trace` of the latest prefill.

    Raises:
        UserError: The model lacks what the compressor needs, or already runs inside a context.
            Inside the context: a forward bypassed the hooks, or ran in a thread that does not
            belong to the context.
    """
    adapter = adapter_of(model)
    facts = adapter.facts
    _ = facts.decoder  # raises if there is no language model
    rows = _compressors(compressor, fields)
    extra_signals = frozenset(extra_signals)
    for one in {id(one): one for one in rows if one is not None}.values():
        check_compatible(facts, one, extra_signals)
    trace, plan = Trace(adapter.fit), Plan(adapter, rows, extra_signals)
    if len(rows) > 1:
        check_rows(plan)
    session = Session(plan, prefix, trace)
    whole = model if isinstance(model, nn.Module) else adapter.model
    with _alone(adapter.base), eagerly(whole), session.installed():
        yield trace


def _compressors(
    compressor: Compressor | str | Sequence[Compressor] | None, fields: dict[str, Any]
) -> list[Compressor | None]:
    """The compressor of all rows, or of each row.  Raises `UserError` for ``fields`` of no spec."""
    if isinstance(compressor, str):
        return [parse(compressor, **fields)]
    if fields:
        raise UserError(f"fields {sorted(fields)} need a method's name, got {compressor!r}.")
    return [*compressor] if isinstance(compressor, Sequence) else [compressor]


@contextmanager
def _alone(base: nn.Module) -> Iterator[None]:
    """While open, refuse other contexts on the model.  Raises `UserError` if one is open."""
    with _entering:
        if base in active:
            raise UserError(
                "this model already runs inside a compress context; leave it first, or combine the "
                "methods with Chain.of(...)."
            )
        active.add(base)
    try:
        yield
    finally:
        active.discard(base)


class Session(threading.local):
    """The hooks of one open context, and the state of each thread that runs the model."""

    def __init__(self, plan: Plan, prefix: Prefix | None, trace: Trace) -> None:
        """Prepare to run ``plan``; called again in every thread that runs the model."""
        self.plan, self.prefix, self.trace = plan, prefix, trace
        self.adapter = plan.adapter
        self.signals = LayerSignals(plan.adapter)
        self.repeating: Repetition | None = None
        self.seen: dict[str, list[list[Tensor]]] = {name: [] for name in self.adapter.encoders}
        self.given = Given()  # arguments of the caller, noted by the hooks of the outer modules
        self.generating: dict[str, Tensor] = {}  # placeholders of the prompts of `generate`
        self.current: Pass | None = None
        self.reported: Pass | None = None  # the pass that the trace will report
        self.memory = Memory()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While open, the hooks are on the model."""
        adapter, plan = self.adapter, self.plan
        guard = Guard(adapter, alone=self.prefix is not None)

        def enter() -> dict[str, list[list[Tensor]]]:
            guard.admit()
            return self.seen  # each thread has its own

        first = min(plan.inside, default=plan.sizes.decoder.layers)
        handles = [
            module.register_forward_pre_hook(Ours(hook), with_kwargs=True)
            for module, hook in self._hooks()
        ]
        handles.append(adapter.language_model.register_forward_hook(Ours(self.leave)))
        for index in plan.queried:
            hook = Ours(functools.partial(self.keep_queries, index))
            attention = adapter.decoder_layers[index].get_submodule("self_attn")
            handles.append(attention.get_submodule("q_proj").register_forward_hook(hook))
        # Forget also if the forward fails, so that the next one does not see its arguments.
        handles += [
            module.register_forward_hook(Ours(self.forget), always_call=True)
            for module in {adapter.model, adapter.base}
        ]
        try:
            with (
                observing(adapter, plan.signals, enter, plan.encoder, self.prompts),
                shadowed(adapter.model, "generate", self.generate(adapter.model))
                if hasattr(adapter.model, "generate")
                else nullcontext(),
                self.prefix.installed(adapter.decoder_layers, first, self._keep_tapped)
                if self.prefix is not None
                else nullcontext() as self.repeating,
                guard.watching(),
                self._deepstack(),
                plain_copies([*guard.modules, *adapter.language_model.modules()]),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.current = self.reported = None
            self.memory.clear()
            self.forget()

    def _deepstack(self) -> AbstractContextManager[None]:
        """While open, features that the model adds after its first layers follow the cuts."""
        language = self.adapter.language_model
        if not hasattr(language, DEEPSTACK):
            return nullcontext()
        add = functools.partial(added, lambda: self.current, getattr(language, DEEPSTACK))
        return shadowed(language, DEEPSTACK, add)

    def _hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Modules and the hooks that run in front of them."""
        adapter, plan = self.adapter, self.plan
        yield adapter.base, self.begin
        yield adapter.language_model, self.enter
        for index, layer in enumerate(adapter.decoder_layers):
            yield layer, functools.partial(self.layer, index)
        if adapter.model is not adapter.base:
            yield adapter.model, self.note_targets
        for index in plan.taps:
            attention = adapter.decoder_layers[index].get_submodule("self_attn")
            yield attention, functools.partial(self.tap, index)

    # -- arguments of the caller -----------------------------------------------------------------

    def prompts(self) -> Mapping[str, Tensor]:
        """Modality to (B, S) placeholders of the prompts that run."""
        return self.given.placeholders or self.generating

    def generate(self, model: Any) -> Callable[..., Any]:
        """``generate`` that notes the prompts: it encodes images in front of the first forward."""
        original = model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            cache = kwargs.get("past_key_values", kwargs.get(CACHE))
            past = cache.get_seq_length() if isinstance(cache, Cache) else 0
            if isinstance(ids, Tensor) and ids.ndim == 2:
                ids = ids[:, past:]  # the images of earlier turns are not encoded again
            self.generating = self._placeholders(ids, kwargs.get("inputs_embeds"))
            try:
                return original(*args, **kwargs)
            finally:
                self.generating = {}

        return generate

    def note_targets(self, module: nn.Module, args: Any, kwargs: Kwargs) -> None:
        """Note where the prompts end, because answers and drafts must not influence selections."""
        scored = argument(module, args, kwargs, "logits_to_keep")
        self.given = replace(
            self.given,
            labels=argument(module, args, kwargs, "labels"),
            scored=scored if isinstance(scored, int) and scored > 0 else 1,
        )

    def begin(self, module: nn.Module, args: Any, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        """Note the input ids, the placeholders, and features that the caller encoded."""
        ids = argument(module, args, kwargs, "input_ids")
        embeds = argument(module, args, kwargs, "inputs_embeds")
        if ids is None and embeds is None and args:
            raise UserError(
                f"the arguments of {type(module).__name__}.forward were replaced by ones without a "
                "name, so that input_ids cannot be found; call it with input_ids=..."
            )
        self.adapter.check_inputs(arguments(module, args, kwargs))
        outputs = argument(module, args, kwargs, "mm_encoder_outputs") or {}
        for modality, calls in self.seen.items():
            calls.clear()
            if outputs.get(modality) is not None:
                calls.append(list(outputs[modality].pooler_output))
        self.given = replace(self.given, ids=ids, placeholders=self._placeholders(ids, embeds))
        if ids is not None and not any(self.plan.before):  # otherwise `_select` checks the rest
            check_length(self.plan.sizes.facts, ids.shape[1])
        plain = [name for name, output in outputs.items() if type(output.pooler_output) is list]
        if not plain or "mm_encoder_outputs" not in kwargs:
            return None
        # Beam search turns features into plain lists, which the model cannot flatten.
        joined = {
            name: encoded(outputs[name].pooler_output, levels_of(outputs[name]) or ())
            for name in plain
        }
        return args, {**kwargs, "mm_encoder_outputs": {**outputs, **joined}}

    def _placeholders(self, ids: Tensor | None, embeds: Tensor | None) -> dict[str, Tensor]:
        """Modality to (B, S) bool, the columns that stand for a visual token."""
        found = {}
        for modality, token in self.plan.sizes.facts.placeholders.items():
            if ids is not None:
                found[modality] = ids == token
            elif embeds is not None:
                table = self.adapter.model.get_input_embeddings()
                like = table(torch.tensor(token, device=embeds.device))
                found[modality] = (embeds == like).all(-1)
        return found

    def forget(self, *_: Any) -> None:
        """Drop the arguments of this forward."""
        self.given = Given()
        for calls in self.seen.values():
            calls.clear()

    # -- in front of the language model ----------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Kwargs) -> tuple[Any, Kwargs] | None:
        """Find the images, select in front of the language model, and open the cost accounts."""
        self.current = self.reported = None
        embeds = argument(module, args, kwargs, "inputs_embeds")
        if embeds is None:  # the caller runs the language model directly, on input ids
            return None
        plan, changed = self.plan, dict(kwargs)
        if "past_key_values" in changed:  # models still accept the old name
            changed[CACHE] = changed.pop("past_key_values")
        refuse_paged(changed.get(CACHE))
        state = Pass.start(self.given, embeds, changed, plan.taps)
        state.spans = find_spans(state, self.seen, plan.encoder)
        if state.spans:
            state.ask()
        self._check_images(state, embeds, changed.get(CACHE))
        self._open_cache(state, embeds, changed)
        is_first = not (state.continued or state.past)
        if state.spans or (is_first and not self.trace.has_images):
            self.reported, state.accounts = state, plan.accounts(len(embeds))
        self._begin_prefix(state, changed)
        if state.spans:
            embeds = self._select(state, embeds, changed)
        if self.reported is not None:
            state.enter_count(0)
            state.entered = state.real.sum(1)
        return args, changed

    def _check_images(self, state: Pass, embeds: Tensor, cache: Cache | None) -> None:
        """Raise `UserError` for placeholders without images; warn of images in embeddings."""
        rows, width = embeds.shape[:2]
        if self.plan.selects and not state.spans:
            if state.given.ids is None and not state.continued and width > 1:
                warn_of_embeds()
            # A generated or drafted token may be a placeholder by chance.
            if width > (state.given.scored if cache is not None and state.past else 1):
                refuse_missing_images(state.given.placeholders)
        count = len(self.plan.compressors)
        if state.spans and rows % count:
            raise UserError(
                f"{count} compressors, one for each row, were given for a batch of {rows} rows."
            )

    def _open_cache(self, state: Pass, embeds: Tensor, changed: Kwargs) -> None:
        """Prepare the KV cache where this forward is compressed; count its entries otherwise."""
        mask, cache = changed.get("attention_mask"), changed.get(CACHE)
        if state.continued or (self.plan.selects and state.spans):
            self._check_arguments(state, embeds, changed)
            self.current, cache = state, changed.get(CACHE)
            if cache is not None:
                state.join(cache, changed, self.plan.sizes.decoder.layers)
        elif state.spans and state.past:
            there = state.real.new_ones(len(embeds), state.past)
            if isinstance(mask, Tensor) and mask.ndim == 2:
                there = mask[:, : state.past]
            state.held = [there.sum(1)] * self.plan.sizes.decoder.layers

    def _check_arguments(self, state: Pass, embeds: Tensor, changed: Kwargs) -> None:
        """Raise `UserError` for arguments that compression does not support; make a KV cache."""
        mask, config = changed.get("attention_mask"), self.adapter.language_model.config
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            raise UserError(
                "compression needs the 2-D attention mask, not a prepared 4-D one; static and "
                "compiled KV caches are not supported."
            )
        if asked(changed, "output_attentions", config) and (state.continued or self.plan.drops):
            raise UserError(
                "output_attentions is not available under compression, because tokens that "
                "were dropped have no attention; run the plain model for attention maps, or "
                "leave output_attentions out."
            )
        if changed.get(CACHE) is None:
            if asked(changed, "use_cache", config):
                changed[CACHE] = DynamicCache(config=config)
            else:
                refuse_beyond_window(embeds.shape[1], window_of(config))

    def _begin_prefix(self, state: Pass, changed: Kwargs) -> None:
        """Pass the prompts to the prefix, if this context shares one."""
        if self.repeating is None:
            return
        prompts: list[Any] = []
        if state.spans:
            images = [span.record for span in state.spans]
            prompts = [state.given.ids, changed.get("attention_mask"), *images]
        self.repeating.begin(changed.get(CACHE), prompts)

    def _select(self, state: Pass, embeds: Tensor, changed: Kwargs) -> Tensor:
        """Select in front of the language model: (B, M, D) embeddings of the kept columns."""
        plan = self.plan
        state.enter_encoding(embeds.element_size())
        for span in state.spans if PROMPT in plan.signals else []:
            prompt = embeds[span.row, state.text_slots(span)].detach()
            span.tokens = replace(span.tokens, text={**span.tokens.text, PROMPT: prompt})
        for step in range(max(map(len, plan.before))):
            with self.trace.around():
                embeds = shorten(plan, self.memory, state, step, embeds, changed)
        if any(plan.before):
            numbered = any(plan.keeps_positions(part) for parts in plan.before for part in parts)
            left = state.width if numbered else max(state.prompts.left)
            check_length(plan.sizes.facts, left, what="the compressed prompt")
        for span in state.spans:
            span.entered = span.index
            span.tokens = replace(
                span.tokens,
                entered=len(span.tokens.layout.patches),
                inputs=self._inputs(state, span, embeds),
            )
        return embeds

    def _inputs(self, state: Pass, span: Span, embeds: Tensor) -> tuple[Tensor, Tensor] | None:
        """What enters the language model: an image's patch tokens, and the text after it."""
        if Signal("llm_inputs") not in self.plan.signals:
            return None
        row = embeds[span.row].detach()
        slots = state.slots(span.row, span.columns)
        return row[slots[span.tokens.layout.patches]], row[state.text_slots(span)]

    # -- between decoder layers ------------------------------------------------------------------

    def tap(self, index: int, module: nn.Module, args: Any, kwargs: Kwargs) -> None:
        """Keep the input of the attention module of decoder layer ``index``."""
        wanted = ("hidden_states", "position_embeddings")
        self._keep_tapped(index, *(argument(module, args, kwargs, name) for name in wanted))

    def _keep_tapped(
        self,
        index: int,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor],
        queries: Tensor | None = None,
    ) -> None:
        if self.current is not None and self.current.spans:
            self.current.tapped[index] = hidden, rotary
            if queries is not None:
                self.current.projected[index] = queries

    def keep_queries(self, index: int, module: nn.Module, args: Any, output: Tensor) -> None:
        """Keep the queries that decoder layer ``index`` projected.

        Attention rows of the text project some of them again; these do not count.
        """
        if self.current is not None and self.current.spans:
            self.current.projected.setdefault(index, output.detach())

    def layer(
        self, index: int, module: nn.Module, args: Any, kwargs: Kwargs
    ) -> tuple[Any, Kwargs] | None:
        """Select in front of decoder layer ``index``, and pass it the kept columns."""
        state, plan = self.current, self.plan
        if state is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if state.spans and index in plan.inside:
            once = self._once(index)
            with self.trace.around():
                hidden = cut(plan, self.memory, self.signals, once, state, index, hidden, kwargs)
        state.ran.append(state.columns if state.packed else None)
        cuts = state.cuts
        if state.layers:
            cuts = state.layers[index].cut - state.layers[0].cut
        if not cuts:
            return None
        changed = {**kwargs, **surroundings(self.adapter, state, index, cuts, hidden, kwargs)}
        if args:
            return (hidden, *args[1:]), changed
        return args, {**changed, "hidden_states": hidden}

    def _once(self, index: int) -> Once:
        """A function that runs a computation, at the first cut once for all that share a prefix."""
        repeating = self.repeating
        if repeating is None or index != min(self.plan.inside):
            return lambda what, compute: compute()
        return lambda what, compute: repeating.once((index, what), compute)

    # -- after the language model ----------------------------------------------------------------

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Report to the trace, and spread the hidden states over the columns of the prompt."""
        reported, self.reported = self.reported, None
        state, self.current = self.current, None
        if self.repeating is not None:
            self.repeating.end()
        if reported is not None:
            done = {record.layer for record in reported.selections}
            for index in self.plan.inside.keys() - done if reported.spans else ():
                raise bypassed(f"decoder layer {index}")
            self.report(reported, output[0].element_size())
        if state is not None and state.cache is not None:
            settle_layers(state.cache, cut=state.packed or state.sizes is not None)
        if state is None or not state.packed:
            return None
        hidden = state.spread(output[0], state.columns)
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        if output.get("hidden_states") is not None:
            # The first is the input of layer 0, each other one the output of a layer.
            columns = [state.ran[0], *state.ran]
            output.hidden_states = tuple(
                states if states is None or at is None else state.spread(states, at)
                for states, at in zip(output.hidden_states, columns, strict=True)
            )
        return output

    def report(self, state: Pass, size: int) -> None:
        """Give the trace the report on a finished forward, at ``size`` bytes a number."""
        self.trace.prefill = state.prefill(size)
