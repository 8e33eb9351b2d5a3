"""SCOPE: a subset that covers all tokens and prefers salient ones.

Paper:  https://arxiv.org/abs/2510.24214 (NeurIPS 2025)
Code:   https://github.com/kinredon/SCOPE, scope/clip_encoder.py
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import Compressor, Selection
from tokenprune.ops.diversity import cover_by_cosine
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Compressor):
    """Select tokens one by one, each with the largest gain in coverage times saliency.

    The coverage ``c_i`` of token ``i`` is its largest cosine to a selected token, at first 0.  The
    gain of token ``j`` with saliency ``a_j`` is ``sum_i max(0, cos(i, j) - c_i) * a_j^alpha``.  The
    cosines are of vectors before the projector.

    Args:
        alpha: Exponent of the saliency.  Official: 1.
        score: ``cls_attention``, or ``received`` for vision encoders without CLS token.
        layer: Encoder layer of the attention.  Official: the last but one, whose output the
            projector receives.
        allocator: How many tokens each view keeps.
    """

    alpha: Annotated[float, Field(ge=0)] = 1.0
    score: Literal["cls_attention", "received"] = "cls_attention"
    layer: int = -2
    allocator: Allocator = field(default_factory=Proportional)

    card = Card(
        paper="SCOPE",
        arxiv="2510.24214",
        code="https://github.com/kinredon/SCOPE",
        deviations=(
            "Attention is the mean over heads, not the sum; the ranking is the same.",
            "A token is selected at most once, even if no other token has a gain.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that weighs the gain of a token."""
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
            worth = scores[patches] ** self.alpha
            kept.append(patches[cover_by_cosine(unit[patches], worth, count)])
        return Selection(torch.cat(kept).sort().values, scores=scores[tokens.layout.patches])
