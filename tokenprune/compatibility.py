"""Checks whether a method can run in a model, from the facts about the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Stage, cut_layer
from tokenprune.encoder import EncoderCompressor
from tokenprune.errors import UserError
from tokenprune.facts import ModelFacts, VisionFacts
from tokenprune.registry import strategies
from tokenprune.signals import Signal
from tokenprune.spec import create

__all__ = [
    "check_compatible",
    "check_encoder",
    "check_length",
    "check_signal",
    "compatible_methods",
    "lacking",
    "other_options",
]


def check_compatible(
    facts: ModelFacts, compressor: Compressor, extra_signals: Collection[Signal] = ()
) -> None:
    """Raise `UserError` if ``compressor`` cannot run in the model.

    Args:
        facts: Facts about the model.
        compressor: The method.
        extra_signals: Signals that the caller provides with the encoded images.
    """
    cut_by: dict[int, Compressor] = {}
    for part in compressor.parts():
        if part.stage is Stage.LLM and facts.language_model is None:
            raise UserError(
                f"{part.name} acts inside the language model, which {facts.family} models do not "
                f"have. {_alternatives(facts)}"
            )
        if isinstance(part, EncoderCompressor):
            check_encoder(facts, part)
        for signal in sorted(part.needs.difference(extra_signals), key=repr):
            check_signal(facts, signal, part.name, part)
        for cut in part.cuts:
            layer = cut_layer(cut, facts.decoder.layers)
            _check_cut(layer, facts.decoder.layers, part)
            if cut_by.setdefault(layer, part) is not part:
                raise UserError(
                    f"{cut_by[layer].name} and {part.name} both cut in front of decoder layer "
                    f"{layer}; move one of them to another layer."
                )


def _check_cut(layer: int, depth: int, part: Compressor) -> None:
    if not 0 < layer < depth:
        raise UserError(
            f"{part.name} cuts in front of decoder layer {layer}; this model has layers 0 to "
            f"{depth - 1}."
        )


def check_encoder(facts: ModelFacts, part: EncoderCompressor) -> None:
    """Raise `UserError` if the vision encoder cannot run under ``part``."""
    reason = _encoder_refuses(facts.vision, part)
    if reason:
        raise UserError(f"{part.name} {reason}. {_alternatives(facts)}")


def _encoder_refuses(vision: VisionFacts, part: EncoderCompressor) -> str:
    """The reason why the vision encoder cannot run under ``part``; empty if it can."""
    if not vision.reducible:
        return (
            "acts inside the vision encoder, which is offered for the CLIP and SigLIP encoders of "
            f"transformers, not for {vision.model_type!r}"
        )
    shape = vision.view_shape
    grid = part.grid(shape, budget(math.prod(shape), part.retention))
    if grid != shape and not vision.resizable:
        return "resizes the views, but this vision encoder cannot interpolate its positions"
    if vision.attention not in ("sdpa", "eager") and part.bias(torch.ones(1, 2)) is not None:
        return (
            f"adds to the attention logits, which {vision.attention} attention does not take; load "
            "the model with attn_implementation='sdpa'"
        )
    return ""


def check_signal(
    facts: ModelFacts, signal: Signal, who: str, part: Compressor | None = None
) -> None:
    """Raise `UserError` if the model cannot provide ``signal``.

    Args:
        facts: Facts about the model.
        signal: The signal.
        who: Name of the method or signal, for the message.
        part: The compressor that needs the signal; the message then lists its options that do not.
    """
    missing = _missing(facts, signal)
    if missing:
        lacks = f"the attention of {missing}, which the {facts.vision.model_type} encoder of this "
        lacks += "model does"
        if signal.in_llm or signal.needs_text_tower:
            lacks = f"{missing}, which {facts.family} models do"
        works = [] if part is None else other_options(facts, part)
        if not (works and signal.needs_text_tower):  # most methods need no text encoder
            works += compatible_methods(facts)
        raise UserError(
            f"{who} needs {lacks} not have. Methods that work here: {', '.join(works)}."
        )
    depth = facts.decoder.layers if signal.in_llm else facts.vision.layers
    if not -depth <= signal.layer < depth:
        raise UserError(
            f"{who} asks for layer {signal.layer} of the "
            f"{'decoder' if signal.in_llm else 'vision encoder'}, which has {depth}."
        )


def _missing(facts: ModelFacts, signal: Signal) -> str:
    """The part of a model that ``signal`` needs and this one lacks; empty if it lacks none."""
    vision = facts.vision
    from_attention = signal.in_vision_layer
    if from_attention and not vision.readable:
        return "plain blocks (a softmax of query times key, without a bias or a second map)"
    if signal.in_llm and facts.language_model is None:
        return "a language model"
    if signal.needs_cls and not vision.has_cls:
        return "a CLS token"
    if signal.needs_head and not vision.has_head:
        return "a pooling head"
    if signal.needs_text_tower:
        return "a CLIP text encoder, to compare the patches with the question"
    return ""


def lacking(facts: ModelFacts, compressor: Compressor) -> str:
    """The part of a model that ``compressor`` needs and this one lacks; empty if it can run.

    `check_compatible` refuses exactly the methods for which this is not empty, unless a cut is out
    of range.

    >>> from tokenprune.testing import Host
    >>> lacking(Host.tiny("LLaVA-OneVision").adapter.facts, create("fastervlm", retention=0.5))
    'a CLS token'
    """
    for part in compressor.parts():
        if part.stage is Stage.LLM and facts.language_model is None:
            return "a language model"
        if isinstance(part, EncoderCompressor) and _encoder_refuses(facts.vision, part):
            return "an encoder of CLIP or SigLIP"
        for signal in sorted(part.needs, key=repr):
            missing = _missing(facts, signal)
            if missing:
                return missing.partition(",")[0]
    return ""


def other_options(facts: ModelFacts, part: Compressor) -> list[str]:
    """Specs that differ from ``part`` in one option and need only signals that the model has."""
    hints = get_type_hints(type(part), include_extras=False)
    found = []
    for name in (item.name for item in dataclasses.fields(part)):
        for value in get_args(hints[name]) if get_origin(hints[name]) is Literal else ():
            other = dataclasses.replace(part, **{name: value})
            if not any(_missing(facts, signal) for signal in other.needs):
                found.append(other.label)
    return found


def compatible_methods(facts: ModelFacts) -> list[str]:
    """Names of the registered methods that run in the model with their default options."""
    return [name for name in strategies.names() if not lacking(facts, create(name, retention=0.5))]


def _alternatives(facts: ModelFacts) -> str:
    return f"Methods that work here: {', '.join(compatible_methods(facts))}."


def check_length(facts: ModelFacts, tokens: int, new: int = 0, what: str = "the prompt") -> None:
    """Raise `UserError` if a prompt and its answer take more positions than the decoder knows.

    Args:
        facts: Facts about the model.
        tokens: Number of tokens of the prompt, visual ones included.
        new: Number of tokens of the answer.
        what: Name of the prompt in the message.
    """
    known = facts.decoder.positions
    if known is not None and tokens + new > known:
        more = f" and {new} of the answer" if new else ""
        raise UserError(
            f"{what} has {tokens} tokens{more}, but the language model knows {known} "
            "positions; shorten the text, or show fewer or smaller images."
        )
