"""VisPruner: half of the budget for the most attended tokens, half for the least alike others.

Paper:  https://arxiv.org/abs/2412.01818 (ICCV 2025)
Code:   https://github.com/Theia-4869/VisPruner, llava/model/llava_arch.py (aefa01a)
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import Compressor, Selection
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

PER_ROUND = 8  # tokens dropped at once


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Compressor):
    """Of the ``T`` tokens of a view, ``int(T * important)`` are the most attended ones.

    The others, most attended first, are thinned round by round: dealt out alternately into two
    hands, the up to eight of the first hand that resemble one of the second most (cosine, before
    the projector) are dropped; what is left of the first hand, most alike first, and the second
    make up the next round.

    Args:
        important: Share of the budget that goes by attention.  Official: 0.5.
        score: ``cls_attention``, or ``received`` for towers without CLS token.
        layer: Encoder layer of the attention.  Official: the last but one, whose output the
            projector gets.
        allocator: How many tokens each view keeps.
    """

    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    score: Literal["cls_attention", "received"] = "cls_attention"
    layer: int = -2
    allocator: Allocator = field(default_factory=lambda: Proportional("half-even"))

    card = Card(
        paper="Beyond Text-Visual Attention (VisPruner)",
        arxiv="2412.01818",
        code="https://github.com/Theia-4869/VisPruner (aefa01a)",
        verified="vispruner",
        deviations=(
            "An odd number of remaining tokens is dealt out as well; officially it is an error.",
            "The canvas is unpadded and its rows keep their separators; officially neither.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """What makes a token important."""
        return Signal(self.score, self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.allocator.needs | {self.saliency, Signal("unprojected")}

    def select(self, tokens: VisualTokens) -> Selection:
        scores = tokens[self.saliency].float()
        unit = F.normalize(tokens[Signal("unprojected")].float(), dim=-1)
        counts = self.allocator.counts(tokens, scores, self.retention).tolist()
        kept = []
        for patches, count in zip(patches_by_view(tokens.layout), counts, strict=True):
            order = patches[scores[patches].argsort(descending=True, stable=True)]
            first = int(count * self.important)
            kept += [order[:first], thinned(order[first:], count - first, unit)]
        return Selection(torch.cat(kept).sort().values, scores=scores[tokens.layout.patches])


def thinned(order: Tensor, count: int, unit: Tensor) -> Tensor:
    """``count`` of the indices ``order`` (M,) into ``unit`` (N, C)."""
    if not count:
        return order[:0]
    alike = unit[order] @ unit[order].T
    rest = torch.arange(len(order), device=order.device)
    while len(rest) > count:
        first, second = rest[::2], rest[1::2]
        gone = min(PER_ROUND, len(rest) - count, len(second))
        nearest = alike[first[:, None], second].amax(1)
        left = first[nearest.argsort(descending=True, stable=True)[gone:]]
        rest = torch.cat([left, second])
    return order[rest]
