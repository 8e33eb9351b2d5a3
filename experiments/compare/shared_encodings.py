"""The output of the vision encoder, computed once for all cells and checked for changes.

The core detects a method that writes to its inputs (`tokenprune.untouched`), unless the method
bypasses PyTorch through ``.data`` or numpy.  Here the numbers themselves are compared after every
computation, as one sum of bits per row, which costs little in comparison with a prefill.  Encodings
that were changed are computed again, so that other cells see the right ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.encoder import EncoderCompressor
from tokenprune.experiments.common.questions import Question
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens
from tokenprune.untouched import digest

if TYPE_CHECKING:
    from tokenprune.experiments.compare.runner import Runner

__all__ = [
    "Encodings",
]


_Encoder = EncoderCompressor | None


_GEOMETRY = [item.name for item in fields(TokenLayout) if item.type == "Tensor"]


class Encodings:
    """Images and videos as each vision encoder encoded them, as long as questions need them."""

    def __init__(self, runner: Runner, signals: Mapping[_Encoder, frozenset[Signal]]) -> None:
        """Encode with ``runner``; ``signals`` are by encoder (None: the plain one)."""
        self.runner, self.signals = runner, signals
        self._found: dict[tuple[_Encoder, str], tuple[Sequence[Any], Tensor]] = {}

    def __contains__(self, which: tuple[_Encoder, Question]) -> bool:
        tower, item = which
        return (tower, item.image_id) in self._found

    def lacking(self, tower: _Encoder, questions: Sequence[Question]) -> list[Question]:
        """One question for every image that vision encoder ``tower`` has not encoded yet."""
        return list({q.image_id: q for q in questions if (tower, q) not in self}.values())

    def encode(self, tower: _Encoder, questions: Sequence[Question]) -> None:
        """Encode the images of ``questions``, including those that are encoded already."""
        made = self.runner.encode(questions, self.signals[tower], tower)
        for item, images in zip(questions, made, strict=True):
            self._found[tower, item.image_id] = images, _digest(images)

    def shown(self, tower: _Encoder, questions: Sequence[Question]) -> list[Sequence[Any]]:
        """For every question its encoded images."""
        return [self._found[tower, item.image_id][0] for item in questions]

    def changed(self, tower: _Encoder, questions: Sequence[Question]) -> list[Question]:
        """One question for every image whose encoding has changed."""
        questions = list({item.image_id: item for item in questions}.values())
        entries = [self._found[tower, item.image_id] for item in questions]
        now = [_digest(images) for images, _ in entries]
        before = [digests for _, digests in entries]
        if not entries or torch.equal(torch.cat(now), torch.cat(before)):  # one synchronisation
            return []
        pairs = zip(questions, now, before, strict=True)
        return [item for item, one, other in pairs if not torch.equal(one, other)]

    def keep(self, images: set[str]) -> None:
        """Drop the encodings of all other images."""
        self._found = {which: one for which, one in self._found.items() if which[1] in images}


def _digest(images: Sequence[Any]) -> Tensor:
    """Sums of the bits of all inputs of methods for some images; empty for stand-ins."""
    parts = [torch.zeros(0, dtype=torch.int64, device="cpu")]
    for tokens in images:
        if isinstance(tokens, VisualTokens):
            values = [tokens.features, *tokens.signals.values()]
            values += [one for one in (tokens.fingerprint, tokens.clusters) if one is not None]
            values.append(torch.stack([getattr(tokens.layout, name) for name in _GEOMETRY]))
            parts += [digest(one) for one in values]
    device = max((part.device for part in parts), key=lambda one: one.type != "cpu")
    return torch.cat([part.to(device) for part in parts])
