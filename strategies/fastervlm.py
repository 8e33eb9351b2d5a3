"""FasterVLM: keep the tokens of every view that the CLS token attends to most.

Paper:  https://arxiv.org/abs/2412.01818v1
Code:   https://github.com/Theia-4869/FasterVLM, llava/model/llava_arch.py (f5d5f12)
"""

from dataclasses import dataclass, field

from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import ScoringCompressor
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("fastervlm")
@dataclass(frozen=True, kw_only=True)
class FasterVLM(ScoringCompressor):
    """Rank by the softmaxed attention of the CLS token, mean over heads.  Every view keeps R.

    Args:
        layer: Encoder layer of the attention.  Official: the last but one, whose output the
            projector receives.
        allocator: How many tokens each view keeps.
    """

    allocator: Allocator = field(default_factory=lambda: Proportional("half-even"))
    layer: int = -2

    card = Card(
        paper="[CLS] Attention is All You Need (FasterVLM)",
        arxiv="2412.01818",
        code="https://github.com/Theia-4869/FasterVLM (f5d5f12)",
        verified="fastervlm",
        deviations=(
            "The canvas is unpadded and its rows keep their separators; officially neither.",
            "The crop grid is the one that LLaVA-NeXT selects; officially the pinpoint with the "
            "best fill is used.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the tokens of every view."""
        return Signal("cls_attention", self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return super().needs | {self.saliency}

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens[self.saliency]
