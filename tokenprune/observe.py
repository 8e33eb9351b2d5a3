"""Notes the geometry and the signals of every image while the model itself encodes it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tokenprune.attention import attention_received, cls_row, projections
from tokenprune.tokens import Signal

if TYPE_CHECKING:
    from tokenprune.models.adapter import Adapter

__all__ = ["observing"]


@contextmanager
def observing(
    adapter: Adapter,
    signals: frozenset[Signal],
    seen: Mapping[str, list[list[Tensor]]] | None = None,
) -> Iterator[None]:
    """While open, every encoded image carries a `VisualTokens` record as ``feature.visual``.

    The record rides on the feature tensor because `generate` encodes images before the first
    forward and hands over the tensors alone, repeated for beams.

    Args:
        adapter: The model.
        signals: Signals to compute on the way; those of the language model are left out.
        seen: Per modality, a list that every call's features are appended to.
    """
    wanted = frozenset(signal for signal in signals if not signal.in_llm)
    with ExitStack() as stack:
        for modality, method in adapter.encoders.items():
            calls = None if seen is None else seen[modality]
            stack.enter_context(_wrapped(adapter, method, wanted, calls))
        yield


@contextmanager
def _wrapped(
    adapter: Adapter, method: str, signals: frozenset[Signal], seen: list[list[Tensor]] | None
) -> Iterator[None]:
    base = adapter.base
    original = getattr(base, method)
    before = base.__dict__.get(method)
    signature = inspect.signature(original)

    @functools.wraps(original)  # generate reads the signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        with ExitStack() as stack:
            tapped = {
                layer: stack.enter_context(projections(adapter.vision_attention(layer)))
                for layer in {signal.layer for signal in signals}
            }
            output = original(*args, **kwargs)
        maps = {}
        for signal in signals:
            if signal.name == "received":
                received = attention_received(tapped[signal.layer])
                maps[signal] = received[:, 1:] if adapter.has_cls else received
            else:
                softmax = signal.name == "cls_attention"
                maps[signal] = cls_row(tapped[signal.layer], softmax=softmax)
        features = list(output.pooler_output)
        for feature, record in zip(features, adapter.describe(call, features, maps), strict=True):
            feature.visual = record
        if seen is not None:
            seen.append(features)
        return output

    setattr(base, method, encode)
    try:
        yield
    finally:
        delattr(base, method)
        if before is not None:
            setattr(base, method, before)
