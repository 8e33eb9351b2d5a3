"""PruMerge and PruMerge+: attended patches absorb their nearest neighbours, one token the rest.

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
from tokenprune.layout import listed, moved
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("prumerge")
@dataclass(frozen=True, kw_only=True)
class PruMerge(Compressor):
    """Of the ``T`` tokens of a view, ``T - 1`` are centres and one stands for all that is dropped.

    With ``a`` the CLS attention of all heads as one and ``x`` what the projector receives, centre
    ``i`` becomes ``x_i + sum_j a_j x_j`` over its ``neighbours`` nearest others by the cosine of
    the keys, centres included; the extra token is ``sum_j a_j x_j`` over all that are no centres.
    The weights are not normalised, as in the official code.

    Args:
        spatial: Share of the centres that are evenly spaced samples instead of the most attended
            patches.  PruMerge+ in the official code: about three quarters.
        step: Distance of the samples in raster order; 0 makes it so that they fit.
        start: The first sample.
        adaptive: As many centres as the attention has outliers, values above ``Q3 + 1.5 (Q3 - Q1)``
            of the view's quartiles, but never more than R allows.  With samples, every ``s``-th
            patch joins them, ``s = int(int(1 / r) / 3)`` for a share ``r`` of outliers.
        neighbours: How many tokens a centre absorbs.  Official: 32.
        layer: Encoder layer of attention and keys.  Official: the last one, whose input is what the
            projector gets.
        allocator: How many tokens each view keeps.
    """

    spatial: Annotated[float, Field(ge=0, le=1)] = 0.0
    step: Annotated[int, Field(ge=0)] = 0
    start: Annotated[int, Field(ge=0)] = 0
    adaptive: bool = False
    neighbours: Annotated[int, Field(ge=0)] = 32
    layer: int = -1
    allocator: Allocator = field(default_factory=Proportional)

    location_aware = True  # samples, and the place of the extra token
    card = Card(
        paper="LLaVA-PruMerge",
        arxiv="2403.15388",
        code="https://github.com/42Shawn/LLaVA-PruMerge (097c041)",
        verified="prumerge",
        deviations=(
            "The budget is R unless adaptive=True; officially the number of outliers of the "
            "attention decides, over a whole batch (about 5 % of the tokens, 20 % for PruMerge+).",
            "Tokens stay in their places, the extra token at the most attended dropped one; "
            "officially they come in score order, samples and the extra token last.",
            "No patch is a centre twice; officially the samples of the training path repeat "
            "attended patches, which merge twice, and as many dropped patches are lost.",
            "Every view is merged by itself; the official code takes one view.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """What makes a centre, and the weights."""
        return Signal("cls_joint", self.layer)

    @property
    def metric(self) -> Signal:
        """What is near."""
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
        """Of one view's P patches ``count`` indices, centres first, and their new vectors."""
        rest = len(scores) > count  # else all are centres and nothing is left for an extra token
        centres = self._centres(scores, count - int(rest and count > 1))
        found = nearest_others(unit[centres], unit, centres, self.neighbours)
        weighted = scores[:, None] * vectors
        made = vectors[centres] + weighted[found].sum(1)
        if len(centres) == count:
            return centres, made  # no place for an extra token
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped[centres] = False
        place = scores.masked_fill(~dropped, -torch.inf).argmax()
        extra = dropped.float() @ weighted
        return torch.cat([centres, place[None]]), torch.cat([made, extra[None]])

    def _centres(self, scores: Tensor, count: int) -> Tensor:
        """``count`` indices: the most attended patches, then samples that are not among them."""
        order = scores.argsort(descending=True, stable=True)
        samples, step = round(count * self.spatial), self.step
        most = count - samples
        if self.adaptive:
            most = max(1, min(outliers(scores), count))
            step = step or max(1, len(scores) // most // 3)
            samples = count - most if self.spatial else 0
        best = order[:most]
        if not samples:
            return best
        free = torch.ones_like(scores, dtype=torch.bool)
        free[best] = False
        step = step or max(1, len(scores) // samples)
        spaced = torch.zeros_like(free)
        # Officially the last patch is never sampled.
        spaced[self.start : len(scores) - 1 : step] = True
        if self.adaptive:
            chosen = moved(listed(free & spaced), scores.device)
        else:  # those that are not, behind them
            chosen = (free.int() + (free & spaced).int()).argsort(descending=True, stable=True)
        return torch.cat([best, chosen[:samples]])


def nearest_others(centres: Tensor, keys: Tensor, own: Tensor, count: int) -> Tensor:
    """Of each of the ``centres`` (C, D) the places of the ``count`` most similar ``keys`` (M, D).

    Args:
        centres, keys: Of unit length.
        own: (C,) place of each centre among the keys, which is left out.
        count: How many, of M - 1 at most.

    Returns:
        (C, count), the most similar first.
    """
    near = centres @ keys.T
    near[torch.arange(len(centres), device=near.device), own] = -torch.inf
    found = near.argsort(dim=-1, descending=True, stable=True)
    return found[:, : min(count, len(keys) - 1)]


def outliers(scores: Tensor) -> int:
    """How many of ``scores`` (P,) lie above ``Q3 + 1.5 (Q3 - Q1)``, quartiles interpolated."""
    low, high = (scores.float().quantile(share) for share in (0.25, 0.75))
    return int((scores > high + 1.5 * (high - low)).sum())


@register("prumerge+")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with three quarters of the centres evenly spaced (see `PruMerge`)."""

    spatial: Annotated[float, Field(ge=0, le=1)] = 0.75
