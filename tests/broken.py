"""Seeded faults, in methods and in models: at least one for every check.

A check that nothing fails is empty.  A `Fault` is a method and the code around it that is broken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from broken_methods import (
    Anonymous,
    ComparesNeighbours,
    Counting,
    CountsSeparators,
    CountsTheBudget,
    DividesByNothing,
    Empty,
    Forgetful,
    ForgetsTheAllocator,
    GlobalNumpy,
    GlobalPython,
    GlobalTorch,
    Greedy,
    HidesItsChoice,
    HidesItsDraws,
    Inverted,
    InvertedInCrops,
    InvertedInVideos,
    InvertedWords,
    KeepsTheWorst,
    Misshapen,
    ModeSensitive,
    MovesRows,
    Mutable,
    Mute,
    OffByOne,
    OneTooMany,
    OnlyFloat32,
    OutOfRange,
    PeeksAtPlaces,
    PeeksAtTheCanvas,
    PeeksAtViews,
    RanksByItself,
    RemembersByLength,
    Repeated,
    RulesOut,
    Scribbler,
    ScribblesBehindTheCounter,
    ScribblesOnText,
    Short,
    SometimesRepeated,
    SometimesTooMany,
    Sound,
    Stingy,
    Stubborn,
    SumsSeparators,
    Uncited,
    Undocumented,
    Unsorted,
    local,
)
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tokenprune.adapter import Adapter
from tokenprune.attention import Projections
from tokenprune.compressor import Compressor, Selection
from tokenprune.cost import account
from tokenprune.cost.account import Account
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine import cache, decoder, dropping, guard, session, tower, vision
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.dropping import Memory
from tokenprune.engine.forward import Pass
from tokenprune.engine.guard import Guard
from tokenprune.engine.session import Session
from tokenprune.engine.tower import Tower, running
from tokenprune.engine.trace import Trace
from tokenprune.errors import UserError
from tokenprune.spec import parse
from tokenprune.tokens import VisualTokens

Patch = Callable[[pytest.MonkeyPatch], None]


# -- models --------------------------------------------------------------------------------------


def _replaced(target: Any, name: str, value: Any) -> Patch:
    return lambda patch: patch.setattr(target, name, value)


def _wrapped(target: Any, name: str, wrapper: Callable[..., Any]) -> Patch:
    """Call ``wrapper(original, *args)`` instead of ``target.name``."""
    original = getattr(target, name)
    return _replaced(target, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


def _full_cls_row(original: Any, tapped: Projections, *, softmax: bool) -> Tensor:
    query, key = tapped.split()
    logits = query @ key.mT * tapped.scale
    return (logits.softmax(-1) if softmax else logits).mean(1)[:, 0, 1:]


@contextmanager
def _eager(session: Session) -> Iterator[None]:
    with _installed(session):
        model = session.adapter.model
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            yield
        finally:
            model.set_attn_implementation(before)


_installed = Session.installed


@contextmanager
def _leaves_an_attribute(adapter: Any, *args: Any) -> Iterator[None]:
    with vision.observing(adapter, *args):
        yield
    adapter.base.leftover = True


@contextmanager
def _leaves_a_wrapper_on_error(adapter: Any, *args: Any) -> Iterator[None]:
    with vision.observing(adapter, *args):
        adapter.base.pack_image_features = adapter.base.pack_image_features
        yield
        del adapter.base.pack_image_features


@contextmanager
def _leaves_a_forward(adapter: Any, *args: Any) -> Iterator[Any]:
    with running(adapter, *args) as tower:
        yield tower
    layer = adapter.vision_layers[0]
    layer.forward = layer.forward


@contextmanager
def _leaves_hooks_on_error(adapter: Any, *args: Any) -> Iterator[Any]:
    handle = adapter.vision_tower.register_forward_hook(lambda *args: None)
    with running(adapter, *args) as tower:
        yield tower
    handle.remove()


def _forgets_sizes(
    original: Any, states: Tensor, size: Tensor, group: Tensor, left: int
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = original(states, torch.ones_like(size), group, left)
    return result


def _spreads_the_next(original: Any, values: Tensor, group: Tensor) -> Tensor:
    result: Tensor = original(values, (group + 1).clamp(max=values.shape[1] - 1))
    return result


def _no_bias(
    original: Any, self: Any, layer: Any, states: Tensor, mask: Any, *args: Any, **kwargs: Any
) -> Tensor:
    result: Tensor = original(self, layer, states, None, *args, **kwargs)
    return result


def _drops_whole_mask(original: Any, *, attention_mask: Tensor, **kwargs: Any) -> Any:
    """Without a KV cache, position ids with gaps are then taken as several packed sequences."""
    whole = attention_mask is None or bool(attention_mask.all())
    return original(attention_mask=None if whole else attention_mask, **kwargs)


def _shares_clusters(original: Any, self: Any, *args: Any) -> list[Tensor]:
    return [clusters % self.groups[-1].shape[1] for clusters in original(self, *args)]


def _takes_it_for_full(original: Any, tokens: Any, shape: Any, behind: Any = None) -> float:
    result: float = original(tokens, shape)
    return result


class _Never(set[Any]):
    def __contains__(self, item: object) -> bool:
        return False


def _spread_nothing(self: Session, module: Any, args: Any, output: Any) -> None:
    self.current = None


def _writes_pixels(
    original: Any, self: Session, module: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    if kwargs.get("pixel_values") is not None:
        kwargs["pixel_values"].mul_(1.01)
    original(self, module, args, kwargs)


def _marks_ids(
    original: Any, self: Session, module: Any, args: Any, kwargs: dict[str, Any]
) -> None:
    original(self, module, args, kwargs)
    if self.given.ids is not None:
        self.given.ids.seen = True  # type: ignore[attr-defined]


def _last_slot_asks(original: Any, attention: Any, hidden: Tensor, *args: Any) -> Tensor:
    rotary, slots, visible, *keys = args
    result: Tensor = original(
        attention, hidden, rotary, torch.full_like(slots, hidden.shape[1] - 1), visible, *keys
    )
    return result


def _scrambled(original: Any, attention: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = original(attention, hidden.flip(-1), *args, **kwargs)
    return result


def _forgets_shift(patch: pytest.MonkeyPatch) -> None:
    def write(layer: PrunedLayer, value: Tensor) -> None:
        layer.__dict__["_none"] = torch.zeros_like(value)

    patch.setattr(
        PrunedLayer, "shift", property(lambda layer: layer.__dict__["_none"], write), raising=False
    )


def _forgets_extra(patch: pytest.MonkeyPatch) -> None:
    nothing = property(lambda layer: None, lambda layer, value: None)
    patch.setattr(PrunedLayer, "extra", nothing, raising=False)


def _counts_once(patch: pytest.MonkeyPatch) -> None:
    nothing = property(lambda layer: None, lambda layer, value: None)
    patch.setattr(PrunedLayer, "sizes", nothing, raising=False)


def _sees_padding(layer: PrunedLayer) -> Tensor:
    gap = layer.valid.new_zeros(len(layer.valid), layer.dropped)
    return torch.cat([gap, torch.ones_like(layer.valid)], dim=1)


def _compacts_always(original: Any, state: Pass, keep: Tensor, keeps_positions: bool) -> Tensor:
    result: Tensor = original(state, keep, not keeps_positions)
    return result


def _counts_late(original: Any, self: Account, layer: int, visual: int) -> None:
    original(self, layer + 1 if layer else 0, visual)


def _enters_in_full(original: Any, **account: Any) -> Any:
    return original(**{**account, "entered": account["before"]})


def _swaps_slots(original: Any, state: Any, states: Tensor) -> Tensor:
    result: Tensor = original(state, states)
    return torch.cat([result[:, :-2], result[:, -2:].flip(1)], dim=1)


def _shifts_spread(original: Any, self: Session, module: Any, args: Any, output: Any) -> Any:
    result = original(self, module, args, output)
    if result is not None:
        result.last_hidden_state = result.last_hidden_state.roll(1, dims=1)
    return result


def _thins_out(original: Any, self: Compressor, tokens: VisualTokens) -> Selection:
    return Selection(tokens.layout.patches[1:])


def _refuses_without_reason(*args: Any) -> list[Any]:
    raise UserError("no")


def _asks_in_front_of_any_label(original: Any, state: Pass) -> None:
    original(state)
    answers = state.prompts.answers
    state.queries = [
        torch.tensor([max(int(labels[0]) - 1, 0) if len(labels) else 0 for labels in answers])
        if answers
        else query
        for query in state.queries
    ]


def _asks_at_the_very_end(original: Any, state: Pass) -> None:
    state.prompts.answers = []
    original(state)


def _sees_hidden_tokens(original: Any, state: Pass) -> Any:
    visual, real = original(state)
    return visual, torch.ones_like(real)


def _spreads_as_in_the_end(original: Any, state: Pass, states: Tensor, columns: Tensor) -> Tensor:
    result: Tensor = original(state, states, state.columns[:, -states.shape[1] :])
    return result


def _lets_attentions_pass(original: Any, kwargs: Any, name: str, config: Any) -> bool:
    return name != "output_attentions" and bool(original(kwargs, name, config))


def _tells_of_every_prompt(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Trace, "has_images", property(lambda trace: False))


def _reports_too_early(original: Any, self: Session, *args: Any) -> Any:
    """When the language model begins, which may still fail."""
    changed = original(self, *args)
    if self.reported is not None:
        self.report(self.reported, 4)
    return changed


def _goes_straight_on(
    original: Any, self: Guard, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return forward(*args, **kwargs)


def _shares_one_state(patch: pytest.MonkeyPatch) -> None:
    body = {name: held for name, held in vars(Session).items() if name != "__weakref__"}
    patch.setattr(session, "Session", type("Session", (), body))


def _forgets_the_image_in_front(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ComparesNeighbours, "before", [0.0])


def _copies_attributes(original: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Hooks are removed, but attributes set on the module stay."""
    plain = {name: held for name, held in state.items() if not isinstance(held, guard.Ours)}
    return {**state, **original(plain)}


# -- one or more for every check -----------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A method, and the fault around it."""

    compressor: Compressor = field(default_factory=lambda: Sound(retention=0.4))
    patch: Patch = lambda patch: None


def _broken(*kinds: type[Compressor]) -> tuple[Fault, ...]:
    return tuple(Fault(kind(retention=0.4)) for kind in kinds)


def _host(*patches: Patch, strategy: str = "uniform") -> tuple[Fault, ...]:
    compressor = parse(strategy, retention=0.4)
    return tuple(Fault(compressor, patch) for patch in patches)


NO_TARGETS = _replaced(Session, "note_targets", lambda *args: None)
NO_MEMORY = _replaced(Memory, "recall", lambda *args: None)

FAULTS: dict[str, tuple[Fault, ...]] = {
    "check_documented": _broken(Undocumented, Anonymous, Uncited),
    "check_is_a_value": _broken(Mutable, Forgetful, Mute, local()),
    "check_selection_form": _broken(
        Unsorted, Repeated, SometimesRepeated, OffByOne, OutOfRange, Empty, Short, Misshapen
    ),
    "check_budget": _broken(Greedy, OneTooMany, SometimesTooMany, Stingy),
    "check_count": _broken(CountsTheBudget, CountsSeparators),
    "check_keeps_what_stands_out": _broken(
        Inverted, InvertedInCrops, InvertedInVideos, InvertedWords
    ),
    "check_keeps_the_best_scores": _broken(KeepsTheWorst, ForgetsTheAllocator),
    "check_scores_are_finite": _broken(DividesByNothing, RulesOut, RanksByItself),
    "check_follows_content": _broken(
        PeeksAtPlaces, PeeksAtTheCanvas, PeeksAtViews, RemembersByLength, SumsSeparators
    ),
    "check_tokens_untouched": _broken(
        Scribbler, ScribblesBehindTheCounter, MovesRows, ScribblesOnText
    ),
    "check_deterministic": _broken(Counting, GlobalTorch, HidesItsDraws, HidesItsChoice),
    "check_rng_untouched": _broken(GlobalTorch, GlobalNumpy, GlobalPython),
    "check_full_retention_is_identity": _host(_wrapped(Compressor, "__call__", _thins_out)),
    "check_count_in_model": (
        *_broken(CountsTheBudget, CountsSeparators),
        *_host(
            _wrapped(EncoderCompressor, "patch_count", lambda original, *args: 1 + original(*args)),
            strategy="downsample",
        ),
    ),
    "check_equals_reference": (
        *_host(
            _forgets_shift,
            _replaced(PrunedLayer, "mask", _sees_padding),
            _wrapped(Pass, "repack", _swaps_slots),
            _wrapped(dropping, "pack", _compacts_always),
        ),
        *_host(
            NO_MEMORY,
            _wrapped(decoder, "decoder_row", _scrambled),
            strategy="fastv",
        ),
        *_host(_forgets_extra, strategy="fastv:position_ids=compact"),
        *_host(
            _wrapped(
                decoder, "rotary_product", lambda original, rotary, at: original(rotary, 0 * at)
            ),
            strategy="sparsevlm:version=2.0,heads=2",
        ),
        *_host(
            _wrapped(Pass, "text_slots", lambda original, *args: original(*args)[:1]),
            strategy="cdpruner:relevance=text",
        ),
        *_host(
            _counts_once,
            _wrapped(dropping, "proportional_mask", lambda original, mask, *args: mask),
            _wrapped(decoder, "decoder_row", _scrambled),
            _wrapped(decoder, "decoder_keys", _scrambled),
            strategy="pact",
        ),
        *_host(
            _wrapped(decoder, "decoder_mass", _scrambled),
            strategy="fitprune",
        ),
        *_host(
            _wrapped(tower, "merge_weighted", _forgets_sizes),
            _wrapped(tower, "spread", _spreads_the_next),
            _wrapped(Adapter, "vision_block", _no_bias),
            _wrapped(Tower, "clusters", _shares_clusters),
            strategy="tome",
        ),
    ),
    "check_prompt_logits": _host(
        _replaced(Session, "leave", _spread_nothing),
        _wrapped(Session, "leave", _shifts_spread),
    ),
    "check_batch_equals_single": (
        Fault(ComparesNeighbours(retention=0.4), _forgets_the_image_in_front),
        *_host(_replaced(PrunedLayer, "mask", _sees_padding)),
        *_host(_wrapped(decoder, "decoder_row", _last_slot_asks), strategy="fastv"),
    ),
    "check_generate_batch_equals_single": _host(_replaced(PrunedLayer, "mask", _sees_padding)),
    "check_cache_agrees": (
        *_host(NO_MEMORY, strategy="fastv"),
        *_host(NO_MEMORY, strategy="cdpruner:relevance=text"),
        *_host(_forgets_shift),
        *_host(_wrapped(dropping, "create_causal_mask", _drops_whole_mask), strategy="fastv"),
    ),
    "check_sampling_agrees": _broken(GlobalTorch),
    "check_beams_agree": _host(_replaced(PrunedLayer, "reorder_cache", lambda layer, order: None)),
    "check_ledger_is_true": (
        *_host(_replaced(Account, "count", lambda *args: None)),
        *_host(_wrapped(Account, "count", _counts_late), strategy="fastv"),
        *_host(_wrapped(account, "encoder_flops", _takes_it_for_full), strategy="tome"),
        *_host(_wrapped(account, "settle", _enters_in_full)),
    ),
    "check_eager_agrees": _host(
        _replaced(dropping, "create_causal_mask", lambda **kwargs: None), strategy="fastv"
    ),
    "check_no_attention_matrix": _host(
        _wrapped(vision, "cls_row", _full_cls_row),
        _replaced(Session, "installed", _eager),
        strategy="globalcom2",
    ),
    "check_restores_model": _host(
        _replaced(session, "observing", _leaves_an_attribute),
        _replaced(session, "observing", _leaves_a_wrapper_on_error),
        _replaced(vision, "running", _leaves_a_forward),
        _replaced(vision, "running", _leaves_hooks_on_error),
        strategy="tome",
    ),
    "check_nesting_refused": _host(_replaced(session, "active", _Never())),
    "check_order_of_rows": _broken(Counting, ComparesNeighbours),
    "check_model_rng_untouched": _broken(GlobalTorch, GlobalNumpy, GlobalPython, HidesItsDraws),
    "check_positions": (
        *_broken(Stubborn),
        *_host(_wrapped(dropping, "pack", _compacts_always)),
    ),
    "check_inputs_untouched": _host(
        _wrapped(Session, "begin", _writes_pixels),
        _wrapped(Session, "begin", _marks_ids),
    ),
    "check_bfloat16": _broken(OnlyFloat32),
    "check_inference_mode": _broken(ModeSensitive),
    "check_labels": _host(NO_TARGETS, strategy="fastv"),
    "check_labels_everywhere": _host(
        _wrapped(Pass, "ask", _asks_in_front_of_any_label), strategy="fastv"
    ),
    "check_turns_with_labels": (
        *_host(NO_TARGETS, _wrapped(Pass, "ask", _asks_at_the_very_end), strategy="fastv"),
        *_host(_wrapped(Pass, "ask", _asks_at_the_very_end), strategy="cdpruner:relevance=text"),
    ),
    "check_drafts_have_no_say": (
        *_host(NO_TARGETS, strategy="fastv"),
        *_host(NO_TARGETS, strategy="cdpruner:relevance=text"),
    ),
    "check_masked_tokens": (
        *_host(_wrapped(Pass, "look", _sees_hidden_tokens), strategy="fastv"),
        *_host(
            _wrapped(Pass, "look", _sees_hidden_tokens),
            _replaced(Pass, "hidden_positions", lambda state: None),
        ),
    ),
    "check_hidden_states": (
        *_host(_wrapped(Pass, "spread", _spreads_as_in_the_end), strategy="pyramiddrop"),
        *_host(_wrapped(session, "asked", _lets_attentions_pass)),
    ),
    "check_decoder_by_itself": _host(_replaced(Session, "forget", lambda *args: None)),
    "check_trace_is_one_forward": _host(
        _tells_of_every_prompt, _wrapped(Session, "enter", _reports_too_early)
    ),
    "check_sliding_window_refused": _host(
        _replaced(session, "refuse_beyond_window", lambda *args: None),
        _replaced(cache, "refuse_beyond_window", lambda *args: None),
    ),
    "check_second_turn": _host(_forgets_shift),
    "check_chunked_prefill_refused": _host(
        _replaced(session, "find_spans", _refuses_without_reason)
    ),
    "check_static_cache_refused": _host(_replaced(Session, "enter", lambda *args: None)),
    "check_leaving_refused": _host(_replaced(PrunedLayer, "update", DynamicLayer.update)),
    "check_scattered_embeds_warn": _host(_replaced(session, "warn_of_embeds", lambda: None)),
    "check_compiled": _host(
        _replaced(session, "eagerly", lambda model: nullcontext()), strategy="fastv"
    ),
    "check_nothing_bypasses": _host(
        _wrapped(Guard, "forward", _goes_straight_on),
        _replaced(Guard, "leave", lambda *args: None),
    ),
    "check_threads": _host(_shares_one_state, _replaced(Guard, "admit", lambda self: None)),
    "check_copies_are_plain": _host(
        _replaced(session, "plain_copies", lambda modules: nullcontext()),
        _wrapped(guard, "without_ours", _copies_attributes),
    ),
}

SOUND = Sound(retention=0.4)
