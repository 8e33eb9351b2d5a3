"""Records the layout and the signals of every image while the model encodes it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.attention import (
    Projections,
    attention_received,
    cls_row,
    first_arguments,
    key_vectors,
)
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine.guard import Ours, bypassed, eagerly, shadowed
from tokenprune.engine.tower import Tower, running
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.offload import resident
from tokenprune.precision import without_autocast
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "COMPUTED",
    "Ragged",
    "describe",
    "encode",
    "encoded",
    "levels_of",
    "observing",
    "watched",
]

COMPUTED: dict[str, Callable[[Projections], Tensor]] = {
    "cls_logits": lambda tapped: _with_cls(cls_row(tapped, softmax=False)),
    "cls_attention": lambda tapped: _with_cls(cls_row(tapped, softmax=True)),
    "cls_joint": lambda tapped: _with_cls(cls_row(tapped.joint(), softmax=True)),
    "received": lambda tapped: attention_received(tapped),
    "keys": lambda tapped: key_vectors(tapped),
    "joint_keys": lambda tapped: key_vectors(tapped.joint()),
}
"""Name of a signal of the vision layers to the function that computes it: (views, tokens, ...)."""

Seen = Mapping[str, list[list[Tensor]]]


# Hooks on a vision encoder last for one call.  Only one thread at a time may set them.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


_making = threading.Lock()

_encoding: ContextVar[frozenset[nn.Module]] = ContextVar("tokenprune_encoding", default=frozenset())


@contextmanager
def _alone(base: nn.Module) -> Iterator[None]:
    """While open, encoder methods that ``base`` calls in this thread are not observed."""
    token = _encoding.set(_encoding.get() | {base})
    try:
        yield
    finally:
        _encoding.reset(token)


class Ragged(list[Tensor]):
    """Features (N_i, D) of several videos, in place of the stack (V, N, D) of the model.

    The model only calls ``flatten(0, 1)`` or ``to`` on the stack.  In a list, each tensor keeps its
    record, beams repeat it without a copy, and lengths may differ.
    """

    def flatten(self, start: int = 0, end: int = 1) -> Tensor:
        """(sum of N_i, D)."""
        return torch.cat(self)

    def to(self, *args: Any, **kwargs: Any) -> Tensor | Ragged:
        """(sum of N_i, D) on a device, in a dtype; without a dtype the features stay apart.

        Models name a dtype.  Hooks of offloaded models, which move all arguments, do not.
        """
        if any(isinstance(given, torch.dtype) for given in (*args, *kwargs.values())):
            return torch.cat(self).to(*args, **kwargs)
        moved = Ragged(feature.to(*args, **kwargs) for feature in self)
        for feature, source in zip(moved, self, strict=True):
            if (record := getattr(source, "visual", None)) is not None:
                feature.visual = record  # type: ignore[attr-defined]
        return moved


def encoded(
    features: Iterable[Tensor], levels: Sequence[Sequence[Tensor]] = ()
) -> BaseModelOutputWithPooling:
    """``features`` of images or videos in the form that the model's encoder returns.

    Args:
        features: (N, D) of every image or video.
        levels: For each of them, features (N, D) that the model adds after its first decoder
            layers, layer by layer.
    """
    output = BaseModelOutputWithPooling()
    output.pooler_output = Ragged(features)  # type: ignore[assignment]
    # `generate` repeats this attribute for beams, and Qwen3-VL reads it.
    deep = [[*each] for each in zip(*levels, strict=True)]
    if deep:
        output.deepstack_features = deep
    return output


def levels_of(output: Any) -> list[tuple[Tensor, ...]] | None:
    """The ``levels`` of `encoded` in the output of an encoder, or None if there are none."""
    deep = getattr(output, "deepstack_features", None)
    return None if deep is None else [*zip(*deep, strict=True)]


@contextmanager
def observing(
    adapter: Adapter,
    signals: frozenset[Signal],
    enter: Callable[[], Seen] | None = None,
    encoder: EncoderCompressor | None = None,
    prompts: Callable[[], Mapping[str, Tensor]] = dict,
) -> Iterator[None]:
    """While open, every encoded image carries a `VisualTokens` record as ``feature.visual``.

    The record is an attribute of the feature tensor because `generate` encodes images before the
    first forward and passes the tensors alone, repeated for beams.

    Args:
        adapter: The model.
        signals: Signals to compute; those of the language model are skipped.
        enter: Called before every encoder call; returns, for each modality, the list to which the
            features are appended.
        encoder: A method that acts inside the vision encoder.
        prompts: Returns modality to (B, S) placeholders of the prompts that are about to run.
    """
    with ExitStack() as stack:
        for modality, method in adapter.encoders.items():
            encode = watched(adapter, modality, signals, enter, encoder, prompts)
            stack.enter_context(shadowed(adapter.base, method, encode))
        yield


def watched(
    adapter: Adapter,
    modality: str,
    signals: frozenset[Signal],
    enter: Callable[[], Seen] | None = None,
    encoder: EncoderCompressor | None = None,
    prompts: Callable[[], Mapping[str, Tensor]] = dict,
) -> Callable[..., Any]:
    """The model's encoder of ``modality``, with features that carry records.

    Args:
        adapter: The model.
        modality: A key of `Adapter.encoders`.
        signals, enter, encoder, prompts: As in `observing`.
    """
    wanted = frozenset(signal for signal in signals if not signal.in_llm)
    original: Any = getattr(adapter.base, adapter.encoders[modality])
    if isinstance(original, Ours):
        original = original.original  # contexts do not nest
    signature = inspect.signature(original)
    with _making:
        lock = _locks.setdefault(adapter.base, threading.RLock())

    @functools.wraps(original, updated=())  # generate reads the signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        if adapter.base in _encoding.get():  # Qwen3-VL encodes videos by its method for images
            return original(*args, **kwargs)
        seen = None if enter is None else enter()[modality]
        call = {name: kwargs.pop(name) for name in adapter.notes if name in kwargs}
        call |= signature.bind(*args, **kwargs).arguments
        call, layouts = _understood(adapter, modality, call, prompts().get(modality))
        with lock:
            with (
                _alone(adapter.base),
                running(adapter, encoder, call, modality) as tower,
                _tapped(adapter, wanted, tower) as maps,
                resident(adapter.base),  # the encoder reads the separator outside a forward
            ):
                output = original(*args, **kwargs)
            features = _regrouped(output.pooler_output, layouts)
            with without_autocast(features[0].device):
                rows = maps()
            levels = levels_of(output)
            records = describe(
                adapter, call, features, rows, modality, tower, levels=levels, layouts=layouts
            )
        for feature, record in zip(features, records, strict=True):
            feature.visual = record  # type: ignore[attr-defined]
        if type(output.pooler_output) is not list or len(output.pooler_output) != len(features):
            output.pooler_output = features
        if seen is not None:
            seen.append(features)
        return output

    return encode


def _regrouped(features: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> Ragged:
    """Features (N_i, D) of every image or video, from those of a model that returns every view."""
    if len(features) == len(layouts):
        return Ragged(features)
    sizes = [len(layout) for layout in layouts]
    return Ragged(torch.cat([*features]).split(sizes))


def _understood(
    adapter: Adapter, modality: str, call: Mapping[str, Any], there: Tensor | None
) -> tuple[dict[str, Any], list[TokenLayout]]:
    """The arguments of an encoder call with numbers on the CPU, and the layouts of its images.

    Args:
        adapter: The model.
        modality: A key of `Adapter.encoders`.
        call: The arguments, with notes.
        there: (B, S) placeholders of the prompts, or None if they are not known.

    Raises:
        UserError: The prompts do not match what the encoder will return.
    """
    known = dict(call)
    if adapter.reads_prompt and there is not None:
        known["placeholders"] = there
    for name, value in known.items():  # image sizes and counts
        known[name] = value.cpu() if _is_integer(value) else value
    layouts = adapter.layouts(known, modality)
    wanted = sum(map(len, layouts))
    found = wanted if there is None else int(there.sum())
    if found != wanted:
        raise UserError(
            f"the prompts have {found} {modality} placeholders, but {len(layouts)} {modality}s of "
            f"{wanted} visual tokens came with them; prepare prompts and {modality}s together with "
            "the processor of this model."
        )
    return known, layouts


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


@contextmanager
def _tapped(
    adapter: Adapter, signals: frozenset[Signal], tower: Tower | None
) -> Iterator[Callable[[], dict[Signal, Tensor]]]:
    """While open, keep the tensors of the vision encoder from which ``signals`` are computed.

    Yields:
        A function that returns every signal: (all views, patches), or (all views, patches, C).
    """
    layers = {signal.layer for signal in signals if signal.in_vision_layer}
    with ExitStack() as stack:
        tapped = {layer: stack.enter_context(adapter.tap(layer)) for layer in layers}
        rows: list[Tensor] = []
        if any(signal.needs_head for signal in signals):
            rows = stack.enter_context(adapter.tap_head())
        inputs: list[Tensor] = []
        if any(signal.info.source == "projector" for signal in signals):
            inputs = stack.enter_context(first_arguments(adapter.projector))
        prefix = adapter.facts.vision.prefix_tokens

        def of_patches(values: Tensor, layer: int | None) -> Tensor:
            """Values for the patches of a full view, from the output of a layer or of the head."""
            return (values if tower is None else tower.spread(values, layer))[:, prefix:]

        def computed(signal: Signal) -> Tensor:
            if signal.info.source == "projector":
                return adapter.unprojected(inputs[-1])
            if signal.needs_head:
                return rows[-1] if tower is None else of_patches(rows[-1], None)
            if signal.layer not in tapped:
                raise RuntimeError(f"{signal} was not tapped")
            compute = COMPUTED[signal.resolve(adapter.facts.vision.has_cls).name]
            return of_patches(compute(tapped[signal.layer]), signal.layer)

        def maps() -> dict[Signal, Tensor]:
            if any(one.key is None for one in tapped.values()):
                raise bypassed("the vision encoder")
            if tower is not None:
                for layer, projected in tapped.items():
                    projected.bias = tower.biases[layer]
            return {signal: computed(signal) for signal in signals}

        yield maps


def _with_cls(row: Tensor) -> Tensor:
    """(views, tokens) from a row (views, tokens - 1): 0 at the CLS token."""
    return F.pad(row, (1, 0))


def encode(
    adapter: Adapter,
    modality: str,
    call: Mapping[str, Any],
    signals: frozenset[Signal] = frozenset(),
    encoder: EncoderCompressor | None = None,
) -> list[VisualTokens]:
    """Run the model's encoder once, outside a `compress` context.

    Args:
        adapter: The model.
        modality: A key of `Adapter.encoders`.
        call: Arguments of the encoder, as the processor returns them.  They are moved to the
            model's device and dtype.
        signals: Signals to compute while the vision encoder runs.
        encoder: A method that acts inside the vision encoder.

    Returns:
        A record for every image or video.
    """
    moved = BatchFeature(dict(call)).to(adapter.device, adapter.model.dtype)
    run = watched(adapter, modality, signals, encoder=encoder)
    with eagerly(adapter.base), torch.inference_mode(False), torch.no_grad():
        output = run(**moved)
    return [feature.visual for feature in output.pooler_output]


def describe(
    adapter: Adapter,
    call: Mapping[str, Any],
    features: Sequence[Tensor],
    maps: Mapping[Signal, Tensor],
    modality: str,
    tower: Tower | None = None,
    *,
    levels: Sequence[tuple[Tensor, ...]] | None = None,
    layouts: Sequence[TokenLayout] | None = None,
) -> list[VisualTokens]:
    """The records of every image or video of one encoder call.

    Args:
        adapter: The model.
        call: The arguments of the call.
        features: For every image or video (N, D).
        maps: Signal to (all views, patches), or (all views, patches, C) for a vector.
        modality: A key of `Adapter.encoders`.
        levels: For every image or video, features (N, D) that the model adds after its first
            decoder layers.
        tower: The run of the vision encoder, if a method acted inside it.
        layouts: Layouts of the images or videos, if they are known.
    """
    layouts = adapter.layouts(call, modality) if layouts is None else layouts
    clusters = tower.clusters([*layouts], adapter.view_shape) if tower is not None else None
    views = [layout.views for layout in layouts]
    packed = {}
    for signal, values in maps.items():
        wide = values if signal.is_vector else values[..., None]
        rows = adapter.pack(adapter.by_image(wide, layouts), call, modality)
        packed[signal] = rows if signal.is_vector else [row.squeeze(-1) for row in rows]
    project = adapter.project if any(s.name == "unprojected" for s in maps) else None
    return [
        VisualTokens(
            layout=layout,
            # A second tensor on the same memory, so that the record does not refer to the tensor
            # that carries it.
            features=feature.detach(),
            signals={signal: values[index] for signal, values in packed.items()},
            fingerprint=adapter.pixels_of(call, modality, index, sum(views[:index])),
            projector=project,
            levels=() if levels is None else levels[index],
            clusters=clusters[index] if clusters is not None else None,
            encoding=tower.encoding if tower is not None else None,
        )
        for index, (layout, feature) in enumerate(zip(layouts, features, strict=True))
    ]
