"""PruMerge: attended patches absorb their nearest neighbours, one extra token the rest.

Paper:  https://arxiv.org/abs/2403.15388 (ICCV 2025)
Code:   https://github.com/42Shawn/LLaVA-PruMerge, multimodal_encoder/clip_encoder.py (097c041)
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import Compressor, Selection
from tokenprune.ops.merging import nearest_others
from tokenprune.ops.ranking import outliers
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

NEARBY = 256  # centres whose neighbours' vectors exist at a time


@register("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Compressor):
    """Of the ``T`` tokens of a view, ``T - 1`` are centres and one stands for all dropped tokens.

    Let ``a`` be the CLS attention over all heads concatenated, and ``x`` the input of the
    projector. Centre ``i`` becomes ``x_i + sum_j a_j x_j`` over its ``neighbours`` nearest tokens
    by the cosine of the keys, other centres included.  The extra token is ``sum_j a_j x_j`` over
    all tokens that are not centres.  As in the official code, the weights are not normalised.

    Args:
        adaptive: Whether the number of `outliers` of the attention is the number of centres, up to
            the budget.
        neighbours: How many tokens a centre absorbs.  Official: 32.
        layer: Encoder layer of attention and keys.  Official: the last one.
        allocator: How many tokens each view keeps.
    """

    adaptive: bool = False
    neighbours: Annotated[int, Field(ge=0)] = 32
    layer: int = -1
    allocator: Allocator = field(default_factory=Proportional)

    location_aware = True  # the location of the extra token
    card = Card(
        paper="LLaVA-PruMerge",
        arxiv="2403.15388",
        code="https://github.com/42Shawn/LLaVA-PruMerge (097c041)",
        verified="prumerge",
        deviations=(
            "The budget is R unless adaptive=True; officially the outliers of a whole batch decide "
            "(about 5 % of the tokens).",
            "Tokens stay in sequence order, the extra token at the most attended dropped one; "
            "officially they come in score order, the extra token last.",
            "Every view is merged separately; the official code has one view.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the centres and weighs the sums."""
        return Signal("cls_joint", self.layer)

    @property
    def metric(self) -> Signal:
        """The keys that determine which tokens are near."""
        return Signal("joint_keys", self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.allocator.needs | {self.saliency, self.metric, Signal("unprojected")}

    @property
    def fills_budget(self) -> bool:
        return not self.adaptive

    def select(self, tokens: VisualTokens) -> Selection:
        scores, vectors = tokens[self.saliency].float(), tokens[Signal("unprojected")].float()
        unit = F.normalize(tokens[self.metric].float(), dim=-1)
        counts = self.allocator.counts(tokens, scores, self.retention).tolist()
        kept, merged = [], []
        for patches, count in zip(patches_by_view(tokens.layout), counts, strict=True):
            if count:
                index, made = self._merged(scores[patches], vectors[patches], unit[patches], count)
                kept.append(patches[index])
                merged.append(made)
        keep, order = torch.cat(kept).sort()
        made = tokens.project(torch.cat(merged))[order]
        return Selection(keep, made, scores=scores[tokens.layout.patches])

    def _merged(
        self, scores: Tensor, vectors: Tensor, unit: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Indices (K,) into the P patches of a view, centres first, and their new vectors (K, C).

        Args:
            scores: (P,) attention.
            vectors: (P, C) input of the projector.
            unit: (P, D) keys of unit length.
            count: The largest ``K``.
        """
        rest = len(scores) > count  # otherwise all patches are centres, without an extra token
        centres = self.centres(scores, count - int(rest and count > 1))
        found = nearest_others(unit[centres], unit, centres, self.neighbours)
        weighted = scores[:, None] * vectors
        near = [weighted[some].sum(1) for some in found.split(NEARBY)]
        made = vectors[centres] + torch.cat(near)
        if len(centres) == count:
            return centres, made  # the budget has no room for an extra token
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped[centres] = False
        place = scores.masked_fill(~dropped, -torch.inf).argmax()
        extra = dropped.float() @ weighted
        return torch.cat([centres, place[None]]), torch.cat([made, extra[None]])

    def centres(self, scores: Tensor, count: int) -> Tensor:
        """(K,) indices of at most ``count`` centres among a view's patches, by scores (P,)."""
        most = max(1, min(outliers(scores), count)) if self.adaptive else count
        return scores.argsort(descending=True, stable=True)[:most]
