"""What a strategy sees: one image's packed visual sequence and its geometry."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout, moved
from tokenprune.signals import Signal

__all__ = [
    "Encoding",
    "VisualTokens",
    "told",
]


def told(values: Tensor, flag: Tensor) -> tuple[Tensor, bool]:
    """``values`` (M,) on the CPU and what ``flag`` () says; one wait where both are on a device."""
    if values.device != flag.device:
        return values.cpu(), bool(flag)
    both = torch.cat([values, flag[None].to(values.dtype)]).cpu()
    return both[:-1], bool(both[-1])


@dataclass(frozen=True)
class Encoding:
    """How the vision tower ran on each view of an image, where a method acted inside it.

    Attributes:
        by: Representation of the method.
        attended, processed: Entries (CLS token included) that the attention and the MLP of each
            layer saw.
        key_width: Width of the keys that were compared.
    """

    by: str
    attended: tuple[int, ...]
    processed: tuple[int, ...]
    key_width: int


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """ONE image's (or video's) packed visual sequence of N entries, and what is known of each.

    Attributes:
        layout: Geometry of the N entries.
        features: (N, D) what the language model receives.
        signals: Whatever the strategy declared in `Compressor.needs`; each (N,), or (N, C) where
            `Signal.is_vector`, NaN at separators where the signal exists for patches only.
        fingerprint: Some of the image's pixels, from which `seed` derives.
        projector: Maps ``unprojected`` vectors to features; there where that signal is.
        entered: Inside the language model, how many patch tokens of the image entered it.
        text: Vector signals (T, C) of the prompt's text tokens behind the image or video, up to
            the last one of the prompt; those of the language model's layers inside it only.
        inputs: Inside the language model, for strategies that need ``llm_inputs``: what entered
            it, (P, D) for all patch tokens of the image and (T, D) for the text tokens behind it.
            The same at every cut.
        clusters: Where a method acted inside the vision tower, (N,) which entries share a vector of
            it, on the CPU; -1 at separators and where it was dropped.
        encoding: How the tower ran then.
    """

    layout: TokenLayout
    features: Tensor
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    fingerprint: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    entered: int | None = None
    text: Mapping[Signal, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, Tensor] | None = None
    clusters: Tensor | None = None
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        aligned: dict[Any, Tensor] = {"features": self.features, **self.signals}
        for name, value in aligned.items():
            if len(value) != len(self.layout):
                raise UserError(
                    f"{name} has {len(value)} entries but the layout has {len(self.layout)}; "
                    "all signals are aligned to the packed sequence."
                )

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, signal: Signal) -> Tensor:
        """(N,) or (N, C) the signal, on the device of the features."""
        signal = self.found_as(signal)
        if signal not in self.signals:
            raise UserError(
                f"{signal} was not provided. Name it in the strategy's `needs`; provided here: "
                f"{', '.join(map(str, self.signals)) or 'none'}."
            )
        return self.signals[signal].to(self.features.device)

    def found_as(self, signal: Signal) -> Signal:
        """Under what name ``signal`` lies here: ``saliency`` also under what it stands for."""
        if signal not in self.signals and signal.name == "saliency":
            both = signal.resolve(has_cls=True), signal.resolve(has_cls=False)
            return next((one for one in both if one in self.signals), signal)
        return signal

    def of_text(self, signal: Signal) -> Tensor:
        """(T, C) the signal of the prompt's text, on the device of the features."""
        if signal not in self.text:
            raise UserError(
                f"{signal} was not provided: it is a signal of the prompt's text, which is known "
                "inside tokenprune.compress, not where images are encoded by themselves."
            )
        return self.text[signal].to(self.features.device)

    def project(self, vectors: Tensor) -> Tensor:
        """Features (M, D) that the model makes of vectors (M, C) changed before its projector.

        Raises:
            UserError: The strategy did not name ``unprojected`` in its `needs`.
        """
        found = [value for signal, value in self.signals.items() if signal.name == "unprojected"]
        if self.projector is None or not found:
            raise UserError("the projector is there for strategies that need 'unprojected' only.")
        with torch.no_grad():
            made = self.projector(vectors.to(found[0]))
        return made.to(self.features)

    @property
    def seed(self) -> int:
        """Seed of this image for strategies that draw at random.

        It depends on the pixels alone, so it is the same in every batch and for every beam.
        """
        if self.fingerprint is None:
            return 0
        return zlib.crc32(self.fingerprint.float().cpu().contiguous().numpy().tobytes())

    def take(self, index: Tensor) -> VisualTokens:
        """The entries at ``index`` (M,), best on the CPU (`TokenLayout.take`)."""
        return replace(
            self,
            layout=self.layout.take(index),
            features=_at(self.features, index),
            signals={name: _at(value, index) for name, value in self.signals.items()},
            clusters=None if self.clusters is None else _at(self.clusters, index),
        )


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values[moved(index, values.device)]
