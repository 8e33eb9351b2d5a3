"""FastV: from layer K on, drop the visual tokens that the last prompt token attends to least."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, TopK
from tokenprune.compressor import ScoringCompressor, Stage
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(ScoringCompressor):
    """Rank by the attention that the last prompt token pays in layer K - 1, mean over heads.

    The layers 0 .. K - 1 run at full length and cache the full prompt.  Tokens are selected once,
    at prefill.  Kept tokens keep their position ids.

    Args:
        allocator: Default: the budget ``round(R * P)`` over all views together.
        layer: K, counted from 0: tokens are dropped in front of decoder layer K.  Paper: 2.
    """

    allocator: Allocator = field(default_factory=lambda: TopK(rounding="half-even"))
    layer: Annotated[int, Field(ge=1)] = 2

    stage = Stage.LLM
    card = Card(
        paper="An Image is Worth 1/2 Tokens After Layer 2",
        arxiv="2403.06764",
        code="https://github.com/pkunlp-icler/FastV (d165972)",
        verified="fastv",
        deviations=(
            "The visual span comes from the placeholders; the official scripts hard-code it.",
            "Every row of a batch is ranked by its own attention; officially row 0 ranks for all.",
            "Separators are not ranked; the option separators decides about them.",
            "Only the last prompt token's attention ranks, as in the official code; the paper "
            "describes the attention from all tokens.",
        ),
    )

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def row(self) -> Signal:
        """The attention row that ranks the tokens."""
        return Signal("llm_attention", self.layer - 1)

    @property
    def needs(self) -> frozenset[Signal]:
        return super().needs | {self.row}

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens[self.row]
