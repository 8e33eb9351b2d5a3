"""Methods that select at several depths of the language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from tokenprune.budget import left_at
from tokenprune.compressor import Compressor, Stage, check_cuts
from tokenprune.tokens import VisualTokens

__all__ = ["Depths", "StagedCompressor"]

Depths = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1, max_length=1000)
]
"""Type of `StagedCompressor.depths`."""


@dataclass(frozen=True, kw_only=True)
class StagedCompressor(Compressor):
    """A method that selects at several cuts of the language model.

    At cut ``i`` of ``n`` it keeps at most ``floor(R^(i/n) * P)`` of the ``P`` tokens that entered.
    Every cut drops the same share, and the last one reaches R.

    Attributes:
        depths: Cuts as fractions of the decoder's depth, ascending.
        cut: Number of the cut at which this compressor selects, from 1; 0 stands for the last.
    """

    depths: Depths
    cut: Annotated[int, Field(ge=0)] = 0

    stage: ClassVar[Stage] = Stage.LLM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuts(self, self.cut)

    @property
    def cuts(self) -> tuple[float, ...]:
        return self.depths

    def at(self, cut: int | float) -> Compressor:
        return replace(self, cut=1 + self.depths.index(cut))

    def limit(self, tokens: VisualTokens) -> int:
        share = (self.cut or len(self.depths)) / len(self.depths)
        return left_at(tokens, self.retention, share)
