"""VisPruner: half of the budget for attended tokens, half for the most diverse of the others.

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
from tokenprune.ops.similarity import Nearest
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

PER_ROUND = 8  # tokens dropped in one round, as in the official code


@register("vispruner")
@dataclass(frozen=True, kw_only=True)
class VisPruner(Compressor):
    """Of the ``T`` tokens of a view, ``int(T * important)`` are the most attended ones.

    The others, most attended first, are thinned in rounds until ``T`` tokens are left.  A round
    splits them alternately into two halves.  Up to eight tokens of the first half are dropped:
    those with the largest cosine to a token of the second half, before the projector.  The next
    round has the rest of the first half, most similar first, followed by the second half.

    Args:
        important: Share of the budget that is given by attention.  Official: 0.5.
        score: ``cls_attention``, or ``received`` for vision encoders without CLS token.
        layer: Encoder layer of the attention.  Official: the last but one, whose output the
            projector receives.
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
            "An odd number of remaining tokens is split as well; officially it is an error.",
            "The canvas is unpadded and its rows keep their separators; officially neither.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the tokens; the largest are important."""
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
    """(count,) indices that stay of ``order`` (M,), after thinning by cosine.

    Args:
        order: (M,) indices into ``unit``, most attended first.
        count: How many stay.
        unit: (N, C) vectors of unit length.
    """
    if not count:
        return order[:0]
    nearest = Nearest(unit[order])
    rest = torch.arange(len(order), device=order.device)
    while len(rest) > count:
        first, second = rest[::2], rest[1::2]
        dropped = min(PER_ROUND, len(rest) - count, len(second))
        cosine = nearest.largest(first, second)
        left = first[cosine.argsort(descending=True, stable=True)[dropped:]]
        rest = torch.cat([left, second])
    return order[rest]
