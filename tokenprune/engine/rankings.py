"""By what a method ranks tokens, noted while it runs."""

import copy

from torch import Tensor

from tokenprune.compressor import Chain, Compressor, Selection
from tokenprune.tokens import VisualTokens

__all__ = [
    "Note",
    "noting",
]


Note = tuple[VisualTokens, Tensor]
"""What a method was shown, and the (N,) scores it ranked by."""


def noting(compressor: Compressor) -> tuple[Compressor, list[Note]]:
    """A copy that notes every score vector it ranks by (`Compressor.ranking`), and its notes.

    The copy's own ``select`` stands in front of its class's; nothing else is touched.
    """
    notes: list[Note] = []

    def heedful(part: Compressor) -> Compressor:
        made = copy.copy(part)
        if isinstance(part, Chain):
            object.__setattr__(made, "members", tuple(map(heedful, part.members)))
            return made

        def select(tokens: VisualTokens) -> Selection:
            scores = part.ranking(tokens)
            if scores is not None:
                notes.append((tokens, scores))
            return part.select(tokens)

        object.__setattr__(made, "select", select)
        object.__setattr__(
            made, "at", lambda cut: made if part.at(cut) is part else heedful(part.at(cut))
        )
        return made

    return heedful(compressor), notes
