"""Records the scores by which a method ranks tokens."""

from __future__ import annotations

import copy

from torch import Tensor

from tokenprune.compressor import Chain, Compressor, Selection
from tokenprune.tokens import VisualTokens

__all__ = [
    "Note",
    "noting",
]


Note = tuple[VisualTokens, Tensor]
"""The tokens that a method was given, and the (N,) scores by which it ranked them."""


def noting(compressor: Compressor) -> tuple[Compressor, list[Note]]:
    """A copy of ``compressor`` that records its scores (`Compressor.ranking`), and the record.

    The copy differs from the original only in its ``select``.
    """
    notes: list[Note] = []

    def recorded(part: Compressor) -> Compressor:
        made = copy.copy(part)
        if isinstance(part, Chain):
            object.__setattr__(made, "members", tuple(map(recorded, part.members)))
            return made

        def select(tokens: VisualTokens) -> Selection:
            scores = part.ranking(tokens)
            if scores is not None:
                notes.append((tokens, scores))
            return part.select(tokens)

        object.__setattr__(made, "select", select)
        object.__setattr__(
            made, "at", lambda cut: made if part.at(cut) is part else recorded(part.at(cut))
        )
        return made

    return recorded(compressor), notes
