"""SCOPE: a subset that covers all tokens well, preferring salient ones.

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
from tokenprune.ops.diversity import cover
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Compressor):
    """Pick tokens one by one, each the one with the largest gain in coverage times saliency.

    With ``c_i`` how well token ``i`` is covered (the largest cosine to a picked one, at first 0),
    token ``j`` gains ``sum_i max(0, cos(i, j) - c_i) * a_j^alpha``, before the projector.

    Args:
        alpha: Weight of the saliency.  Official: 1.
        score: ``cls_attention``, or ``received`` for towers without CLS token.
        layer: Encoder layer of the attention.  Official: the last but one, whose output the
            projector gets.
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
            "A picked token is never picked again, also where nothing is left to gain.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """What makes a token worth more."""
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
            alike = unit[patches] @ unit[patches].T
            kept.append(patches[cover(alike, scores[patches] ** self.alpha, count)])
        return Selection(torch.cat(kept).sort().values, scores=scores[tokens.layout.patches])
