"""Notes the geometry and the signals of every image while the model itself encodes it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.attention import attention_received, cls_row, first_arguments, key_vectors
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine.guard import Ours, bypassed, shadowed
from tokenprune.engine.tower import Tower, running
from tokenprune.offload import resident
from tokenprune.precision import without_autocast
from tokenprune.signals import Signal

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "Ragged",
    "encoded",
    "observing",
    "watched",
]


Seen = Mapping[str, list[list[Tensor]]]


# Who looks into a vision tower puts hooks on it for the time of one call: one thread at a time.
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


_making = threading.Lock()


class Ragged(list[Tensor]):
    """Features (N_i, D) of several videos, where the model expects them stacked (V, N, D).

    The model only ever joins them, with ``flatten(0, 1)``.  As a list each keeps its own record,
    beams repeat them without copying, and they may differ in length.
    """

    def flatten(self, start: int = 0, end: int = 1) -> Tensor:
        """(sum of N_i, D)."""
        return torch.cat(self)


def encoded(features: Iterable[Tensor]) -> BaseModelOutputWithPooling:
    """``features`` of images or videos as an encoder of the model returns them."""
    output = BaseModelOutputWithPooling()
    output.pooler_output = Ragged(features)  # type: ignore[assignment]
    return output


@contextmanager
def observing(
    adapter: Adapter,
    signals: frozenset[Signal],
    enter: Callable[[], Seen] | None = None,
    encoder: EncoderCompressor | None = None,
) -> Iterator[None]:
    """While open, every encoded image carries a `VisualTokens` record as ``feature.visual``.

    The record rides on the feature tensor because `generate` encodes images before the first
    forward and hands over the tensors alone, repeated for beams.

    Args:
        adapter: The model.
        signals: Signals to compute on the way; those of the language model are left out.
        enter: Called in front of every encoder call; returns, per modality, the list that the
            features are appended to.
        encoder: A method that acts inside the vision tower.
    """
    with ExitStack() as stack:
        for modality, method in adapter.encoders.items():
            encode = watched(adapter, modality, signals, enter, encoder)
            stack.enter_context(shadowed(adapter.base, method, encode))
        yield


def watched(
    adapter: Adapter,
    modality: str,
    signals: frozenset[Signal],
    enter: Callable[[], Seen] | None = None,
    encoder: EncoderCompressor | None = None,
) -> Callable[..., Any]:
    """The model's encoder of ``modality``, the features of which carry records.

    Args:
        adapter: The model.
        modality: Which of the adapter's encoders.
        signals, enter, encoder: As in `observing`.
    """
    wanted = frozenset(signal for signal in signals if not signal.in_llm)
    original = getattr(adapter.base, adapter.encoders[modality])
    if isinstance(original, Ours):
        original = original.original  # each context sees to itself alone
    signature = inspect.signature(original)
    with _making:
        lock = _locks.setdefault(adapter.base, threading.RLock())

    @functools.wraps(original, updated=())  # generate reads the signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        seen = None if enter is None else enter()[modality]
        call = {
            name: value.cpu() if _counts(value) else value  # sizes and numbers of images, once
            for name, value in signature.bind(*args, **kwargs).arguments.items()
        }
        with lock:
            with (
                running(adapter, encoder, call, modality) as tower,
                _tapped(adapter, wanted, tower) as maps,
                resident(adapter.base),  # the encoder reads its newline outside of a forward
            ):
                output = original(*args, **kwargs)
            features = Ragged(output.pooler_output)
            with without_autocast(features[0].device):
                rows = maps()
            records = adapter.describe(call, features, rows, modality, tower)
        for feature, record in zip(features, records, strict=True):
            feature.visual = record  # type: ignore[attr-defined]
        if isinstance(output.pooler_output, Tensor):
            output.pooler_output = features
        if seen is not None:
            seen.append(features)
        return output

    return encode


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


@contextmanager
def _tapped(
    adapter: Adapter, signals: frozenset[Signal], tower: Tower | None
) -> Iterator[Callable[[], dict[Signal, Tensor]]]:
    """While open, the vision tower's rows are kept; call what is yielded for the maps.

    Yields:
        A function that returns for every signal (all views, patches), or (all views, patches, C).
    """
    behind = ("head_attention", "unprojected")
    layers = {signal.layer for signal in signals if signal.name not in behind}
    with ExitStack() as stack:
        tapped = {layer: stack.enter_context(adapter.tap(layer)) for layer in layers}
        rows: list[Tensor] = []
        if any(signal.needs_head for signal in signals):
            rows = stack.enter_context(adapter.tap_head())
        inputs: list[Tensor] = []
        if any(signal.name == "unprojected" for signal in signals):
            inputs = stack.enter_context(first_arguments(adapter.projector))
        prefix = adapter.prefix_tokens

        def of_patches(values: Tensor, layer: int | None) -> Tensor:
            """Values of all patches of a view, of what a layer (or the head) saw."""
            return (values if tower is None else tower.spread(values, layer))[:, prefix:]

        def maps() -> dict[Signal, Tensor]:
            found = {}
            if any(one.key is None for one in tapped.values()):
                raise bypassed("the vision tower")
            if tower is not None:
                for layer, projected in tapped.items():
                    projected.bias = tower.biases[layer]
            for signal in signals:
                name = signal.resolve(adapter.has_cls).name
                rows_of = tapped.get(signal.layer)
                if name == "unprojected":
                    found[signal] = inputs[-1]
                elif name == "head_attention":
                    found[signal] = rows[-1] if tower is None else of_patches(rows[-1], None)
                elif rows_of is None:
                    raise RuntimeError(f"{signal} was not tapped")
                elif name in ("keys", "joint_keys"):
                    keys = key_vectors(rows_of.joint() if name == "joint_keys" else rows_of)
                    found[signal] = of_patches(keys, signal.layer)
                elif name == "received":
                    found[signal] = of_patches(attention_received(rows_of), signal.layer)
                else:
                    one = rows_of.joint() if name == "cls_joint" else rows_of
                    row = cls_row(one, softmax=name != "cls_logits")
                    found[signal] = of_patches(F.pad(row, (1, 0)), signal.layer)
            return found

        yield maps
