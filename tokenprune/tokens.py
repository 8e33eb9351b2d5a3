"""What a method receives: one image's packed sequence, its layout and its signals."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.deprecated import moved_names
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout, moved
from tokenprune.signals import Signal

__all__ = [
    "Encoding",
    "VisualTokens",
    "on_cpu",
]


def on_cpu(values: Tensor, flag: Tensor) -> tuple[Tensor, bool]:
    """``values`` (M,) on the CPU, and ``flag`` () as a bool, with one synchronisation for both."""
    if values.device.type == "cpu" or values.device != flag.device:
        return values.cpu(), bool(flag)
    both = torch.cat([values, flag[None].to(values.dtype)]).cpu()
    return both[:-1], bool(both[-1])


@dataclass(frozen=True)
class Encoding:
    """How the vision encoder ran on each view of an image under a method that acts inside it.

    Attributes:
        by: Representation of the method.
        attended: Number of entries, CLS token included, in the attention of each layer.
        processed: The same in the MLP of each layer.
        key_width: Width of the keys that were compared.
    """

    by: str
    attended: tuple[int, ...]
    processed: tuple[int, ...]
    key_width: int


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """The packed sequence of one image or video, with features and signals of its N entries.

    Attributes:
        layout: Geometry of the N entries.
        features: (N, D) features as the language model receives them.
        signals: The signals that the method names in `Compressor.needs`.  Each is (N,), or
            (N, ...) where `Signal.is_vector`.  Those of the vision encoder are NaN at separators.
        fingerprint: Some pixels of the image, from which `seed` derives.
        projector: Maps ``unprojected`` vectors to features.  None without that signal.
        entered: Inside the language model, the number of the image's patch tokens that entered it.
        text: Signals (T, ...) of the text tokens after the image, up to the last prompt token
            (`tokenprune.signals.SignalInfo.found_in`).
        inputs: Inside the language model, for methods that need ``llm_inputs``: what entered
            it, (P, D) of all patch tokens of the image and (T, D) of the text tokens after it.
            The same at every cut.
        clusters: If a method acted inside the vision encoder, (N,) the cluster of each entry, on
            the CPU; -1 at separators and at dropped entries.  Otherwise None.
        encoding: How the vision encoder ran in that case.
        levels: Features (N, D) that the model adds to the hidden states after its first decoder
            layers, layer by layer; empty in most models.

    Raises:
        UserError: A signal has more or fewer entries than the layout.
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
    levels: tuple[Tensor, ...] = ()

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
        """(N, ...) the signal, on the device of the features.

        Raises:
            UserError: The method does not name it in its `needs`.
        """
        signal = self.found_as(signal)
        if signal not in self.signals:
            raise UserError(
                f"{signal} was not provided. Name it in the method's `needs`; provided here: "
                f"{', '.join(map(str, self.signals)) or 'none'}."
            )
        return self.signals[signal].to(self.features.device)

    def found_as(self, signal: Signal) -> Signal:
        """The key of ``signal`` in `signals`: itself, or the signal that it stands for."""
        names = signal, signal.resolve(has_cls=True), signal.resolve(has_cls=False)
        return next((one for one in names if one in self.signals), signal)

    def of_text(self, signal: Signal) -> Tensor:
        """(T, ...) the signal of the prompt's text, on the device of the features.

        Raises:
            UserError: The prompt is not known, or the method does not name it in its `needs`.
        """
        if signal not in self.text:
            raise UserError(
                f"{signal} of the text was not provided. Name it in the method's `needs` and run "
                "the method in tokenprune.compress; an image alone has no prompt."
            )
        return self.text[signal].to(self.features.device)

    def project(self, vectors: Tensor) -> Tensor:
        """Features (M, D) that the projector makes of merged ``unprojected`` vectors (M, C).

        Raises:
            UserError: The method does not name ``unprojected`` in its `needs`.
        """
        found = [value for one, value in self.signals.items() if one.info.source == "projector"]
        if self.projector is None or not found:
            raise UserError(
                "the projector is available only to methods that need 'unprojected'; name it "
                "in the method's `needs`."
            )
        with torch.no_grad():
            made = self.projector(vectors.to(found[0]))
        return made.to(self.features)

    @property
    def seed(self) -> int:
        """Seed for methods that draw random numbers.

        It depends on the pixels alone, so it is the same in every batch and for every beam.
        """
        if self.fingerprint is None:
            return 0
        return zlib.crc32(self.fingerprint.float().cpu().contiguous().numpy().tobytes())

    def take(self, index: Tensor) -> VisualTokens:
        """The entries at ``index`` (M,).  An index on the CPU avoids a synchronisation."""
        return replace(
            self,
            layout=self.layout.take(index),
            features=_at(self.features, index),
            signals={name: _at(value, index) for name, value in self.signals.items()},
            clusters=None if self.clusters is None else _at(self.clusters, index),
            levels=tuple(_at(level, index) for level in self.levels),
        )


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values[moved(index, values.device)]


__getattr__ = moved_names(__name__)
