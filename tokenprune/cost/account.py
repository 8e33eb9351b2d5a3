"""What one selection costs."""

from __future__ import annotations

from dataclasses import dataclass

from tokenprune.cost.measuring import Work

__all__ = [
    "Picked",
]


@dataclass(frozen=True)
class Picked:
    """What one selection took, counted once the row's length is known.

    Attributes:
        work: What the strategy did.
        shown: Bytes that it was shown.
        tapped: Layers whose states were there for attention rows.
        visual: Visual tokens of the row in front of it.
        merged: How many vectors were put in.
    """

    row: int
    work: Work
    shown: int
    tapped: tuple[int, ...]
    visual: int
    merged: int
