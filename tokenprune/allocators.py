"""Allocators: how the budget is divided between the views."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenprune.budget import Rounding, apportion, budget, rounded_up, surplus
from tokenprune.errors import UserError, unknown
from tokenprune.layout import Kind, TokenLayout, moved
from tokenprune.ops.merging import group_sums, tally
from tokenprune.ops.spatial import pooled, regions, summary_distance
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "ALLOCATORS",
    "SALIENCY",
    "Allocator",
    "Proportional",
    "ThumbnailCommand",
    "ThumbnailMean",
    "ThumbnailPeak",
    "TopK",
    "allocator",
    "shared",
]


SALIENCY = Signal("saliency")
"""Saliency in the last encoder layer."""


class Allocator(ABC):
    """The rule that gives each view a number of patch tokens to keep.  It does not rank them."""

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals that the allocator reads."""
        return frozenset()

    @abstractmethod
    def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
        """(V,) int64 tokens to keep in each of V views, on the CPU or on the features' device.

        Args:
            tokens: The packed sequence.
            scores: (N,) scores, higher is kept first; NaN at separators.
            retention: R in (0, 1].
        """

    def limit(self, layout: TokenLayout, retention: float) -> int:
        """An upper bound for the sum of `counts`.  Override it to exceed R by design."""
        return rounded_up(layout, retention)

    def patch_count(self, layout: TokenLayout, retention: float) -> int | None:
        """The sum of `counts`; None if the layout alone does not decide it."""
        return None


@dataclass(frozen=True)
class Proportional(Allocator):
    """Every view keeps the same share.  The total is the rounded ``R * P`` (`apportion`)."""

    rounding: Rounding = "floor"

    def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
        return torch.tensor(self.shares(tokens.layout, retention), device="cpu")

    def shares(self, layout: TokenLayout, retention: float) -> list[int]:
        """`counts`, which follow from the layout."""
        return apportion(self.patch_count(layout, retention), layout.view_sizes)

    def patch_count(self, layout: TokenLayout, retention: float) -> int:
        return budget(len(layout.patches), retention, self.rounding)


@dataclass(frozen=True)
class TopK(Allocator):
    """The ``R * P`` highest scores of the whole sequence, in any view."""

    rounding: Rounding = "floor"

    def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
        layout = tokens.layout.to(scores.device)
        total = self.patch_count(layout, retention)
        order = scores[layout.patches].float().argsort(descending=True, stable=True)
        return tally(layout.view[layout.patches[order[:total]]], layout.views)

    def patch_count(self, layout: TokenLayout, retention: float) -> int:
        return budget(len(layout.patches), retention, self.rounding)


@dataclass(frozen=True)
class ThumbnailCommand(Allocator):
    """GlobalCom²: the thumbnail divides the budget between the crops.

    With ``S_j`` the sum of the thumbnail's scores over the region of crop ``j`` (of ``n``),
    ``sigma = softmax((S - max S) / tau)`` and ``r_j = min(R * (1 + sigma_j - mean sigma), 1)``,
    crop ``j`` keeps ``trunc(r_j * N_j)`` of its ``N_j`` unpadded tokens and the thumbnail
    ``trunc(R * N)``.

    Source: arXiv 2501.05179, section on adaptive compression; official
    ``llava/model/llava_arch.py``, ``generate_scale_for_crop_features`` (commit 96b2d00).  Its 1e-8
    in the softmax and its float64 arithmetic are kept, because ``r_j * N_j`` can be within 1e-6 of
    an integer.

    A video has no thumbnail.  The temporal summary of its frames replaces it; this is not in the
    paper.  ``S_f`` is the sum of the distances of frame ``f``'s tokens from the summary
    (`summary_distance`), and frames replace crops in the formula.  ``r_f * N_f`` is truncated with
    a tolerance of 1e-6, so that tied frames (two frames always tie) keep the same number of tokens
    on every device.  One view without crops keeps ``trunc(R * N)``.

    An image of its own size that is divided into regions (`divided`) is treated like the frames of
    a video, with ``S_j`` the sum of its scores at half the resolution (`pooled`) over region ``j``.

    The sum of the counts differs from ``R * P``: the budget that a crop loses where ``r_j`` is
    limited to 1 is not spent elsewhere, a large crop with a large ratio adds to the sum, and every
    count is truncated.

    Args:
        tau: Temperature, larger than 0.  The paper's 10 suits sums of raw logits.
        signal: The thumbnail's scores.
        total: ``official``, or ``exact``: the crops together keep what the thumbnail leaves of
            ``trunc(R * P)``.  They divide it in proportion to ``R * (1 + sigma_j - mean sigma) *
            N_j``.  What a full crop cannot take goes to the others (`shared`).  This is not in the
            paper.

    Raises:
        UserError: ``tau`` is not a finite number larger than 0.
    """

    tau: float = 10.0
    signal: Signal = SALIENCY
    total: Literal["official", "exact"] = "official"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise UserError(f"tau must be a number larger than 0, got {self.tau}.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def ratios(self, tokens: VisualTokens, retention: float) -> Tensor:
        """(n,) float64 retention ratio of each crop, or of each frame of a video."""
        return self._unlimited(tokens, retention).clamp(max=1.0)

    def _unlimited(self, tokens: VisualTokens, retention: float) -> Tensor:
        """`ratios` that may be larger than 1."""
        richness = self.richness(tokens)
        weight = ((richness - richness.max()) / self.tau).exp()
        sigma = weight / (weight.sum() + 1e-8)
        return retention * (1 + sigma - sigma.mean())

    def richness(self, tokens: VisualTokens) -> Tensor:
        """(n,) float64 ``S_j`` of each crop or region, or of each frame of a video."""
        layout = tokens.layout
        if layout.modality == "video":
            patches = layout.patches
            distance = summary_distance(layout, tokens.features)[patches].double()
            return self.summary(distance, layout.view[patches], layout.views)
        if layout.native:
            patches = layout.patches
            small = pooled(layout, tokens[self.signal].double())[patches]
            return self.summary(small / 4, layout.view[patches], layout.views)
        there = layout.places[Kind.THUMBNAIL]  # an earlier selection may have dropped some
        scores = tokens[self.signal].double()
        thumbnail = scores.new_zeros(layout.view_shape)
        thumbnail[layout.row[there], layout.col[there]] = scores[there]
        region = moved(regions(layout.view_shape, layout.grid).flatten(), thumbnail.device)
        return self.summary(thumbnail.flatten(), region, layout.grid[0] * layout.grid[1])

    def limit(self, layout: TokenLayout, retention: float) -> int:
        """More than R allows: the ``r_j`` average to R, but large crops may have larger ratios."""
        if self.total == "exact":
            return super().limit(layout, retention)
        crops = layout.view_sizes[1:] if layout.grid != (0, 0) else layout.view_sizes
        return rounded_up(layout, retention) + surplus(crops, retention)

    def summary(self, scores: Tensor, region: Tensor, regions: int) -> Tensor:
        """(regions,) sum of the scores (P,) in each region; ``region`` (P,) is in [0, regions)."""
        return group_sums(scores, region, regions)

    def patch_count(self, layout: TokenLayout, retention: float) -> int | None:
        if self.total == "exact" or not (layout.grid != (0, 0) or _without_thumbnail(layout)):
            return budget(len(layout.patches), retention)
        return None

    def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
        sizes = tokens.layout.view_sizes
        divides = tokens.layout.grid != (0, 0) or _without_thumbnail(tokens.layout)
        if self.total == "exact" and divides:
            return self._exact(tokens, retention)
        if _without_thumbnail(tokens.layout):
            ratios = self.ratios(tokens, retention)
            there = moved(torch.tensor(sizes, device="cpu"), ratios.device)
            frames = (ratios * there + 1e-6).long()
            # At a low retention every share may be below one token; the richest frame keeps one.
            richest = torch.arange(len(sizes), device=ratios.device) == ratios.argmax()
            return torch.where(richest, frames.clamp(min=1), frames)
        if tokens.layout.grid == (0, 0):
            return Proportional().counts(tokens, scores, retention)
        ratios = self.ratios(tokens, retention)
        there = moved(torch.tensor(sizes[1:], device="cpu"), ratios.device)
        crops = (ratios * there).long()
        return torch.cat([crops.new_full((1,), budget(sizes[0], retention)), crops])

    def _exact(self, tokens: VisualTokens, retention: float) -> Tensor:
        """`counts` whose sum is ``trunc(R * P)``."""
        sizes = tokens.layout.view_sizes
        fixed = [] if _without_thumbnail(tokens.layout) else [budget(sizes[0], retention)]
        ratios = self._unlimited(tokens, retention)
        there = moved(torch.tensor(sizes[len(fixed) :], device="cpu"), ratios.device)
        total = max(budget(sum(sizes), retention) - sum(fixed), 0)
        crops = shared(total, ratios * there, there)
        thumbnail = torch.tensor(fixed, dtype=torch.int64, device="cpu")
        return torch.cat([moved(thumbnail, crops.device), crops])


def _without_thumbnail(layout: TokenLayout) -> bool:
    """Whether the views are frames, or regions of an image of its own size."""
    return layout.modality == "video" or (layout.native and layout.views > 1)


def shared(total: int, weights: Tensor, most: Tensor) -> Tensor:
    """``total`` divided in proportion to weights, where no entry gets more than it can take.

    Entry ``j`` gets ``min(c * w_j, m_j)``, rounded by the largest-remainder method, with the ``c``
    at which these quotas add up to ``total``.  As a function of ``c`` their sum is the least of the
    lines that have the entries that are full first, in the order of ``m_j / w_j``, at ``m_j``.  So
    ``c`` is the largest solution of one of these lines.  There is no synchronisation.

    Args:
        total: At most the sum of ``most``.
        weights: (n,) float64, not negative; positive where ``most`` is.
        most: (n,) int64.

    Returns:
        (n,) int64.  Of equal remainders, the earlier entry is served first.
    """
    order = (most / weights).nan_to_num(torch.inf).argsort(stable=True)
    full = most[order].cumsum(0) - most[order]  # what earlier entries take
    rest = weights[order].flip(0).cumsum(0).flip(0)  # weights of the others
    slope = torch.where(rest > 0, (total - full) / rest, 0).max()
    quotas = (slope * weights).minimum(most)
    counts = (quotas + 1e-6).long()
    # Rounded, so that remainders that tie also tie on another device.
    remainders = ((quotas - counts) * 1e6).round()
    rank = remainders.argsort(descending=True, stable=True).argsort()
    return counts + (rank < total - counts.sum())


@dataclass(frozen=True)
class ThumbnailMean(ThumbnailCommand):
    """`ThumbnailCommand` with the mean score of a region in place of the sum.

    Where a grid divides the thumbnail into regions of unlike sizes, the sum prefers large regions.
    The mean is multiplied by the mean size of the regions.  So `tau` keeps its scale, and regions
    of one size have the ratios of `ThumbnailCommand`.  Not in the paper.
    """

    def summary(self, scores: Tensor, region: Tensor, regions: int) -> Tensor:
        sizes = tally(region, regions)
        typical = len(region) / (sizes > 0).sum().clamp(min=1)
        return super().summary(scores, region, regions) / sizes.clamp(min=1) * typical


@dataclass(frozen=True)
class ThumbnailPeak(ThumbnailCommand):
    """`ThumbnailCommand` with the largest score of a region in place of the sum.

    Not in the paper: a variant for comparison with GlobalCom²'s rule.

    Args:
        tau: Temperature.  One logit varies less than a sum of logits, hence the smaller default.
        signal: The thumbnail's scores.
    """

    tau: float = 1.0

    def summary(self, scores: Tensor, region: Tensor, regions: int) -> Tensor:
        return scores.new_full((regions,), -torch.inf).scatter_reduce(0, region, scores, "amax")


ALLOCATORS: dict[str, type[Allocator]] = {
    "proportional": Proportional,
    "topk": TopK,
    "globalcom2": ThumbnailCommand,
    "mean": ThumbnailMean,
    "max": ThumbnailPeak,
}


def allocator(name: str) -> Allocator:
    """The allocator called ``name``, with its defaults.

    Raises:
        UnknownNameError: There is no such allocator.
    """
    if name not in ALLOCATORS:
        raise unknown("allocator", name, ALLOCATORS)
    return ALLOCATORS[name]()
