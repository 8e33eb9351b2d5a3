"""HiRED: the thumbnail's first layer divides the budget, CLS attention ranks within each view.

Paper:  https://arxiv.org/abs/2408.10945 (AAAI 2025)
Code:   https://github.com/hasanar1f/HiRED, models/llava_next/modeling_llava_next.py (502d6dd)
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.budget import budget
from tokenprune.compressor import ScoringCompressor
from tokenprune.layout import TokenLayout, moved
from tokenprune.ops.spatial import region_sums, thumbnail_map
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True)
class MarkedPatches(Allocator):
    """Divide the budget by how many of the thumbnail's most attended patches lie in each crop.

    Of the budget ``B = floor(R * P)`` the thumbnail gets ``min(floor(B * alpha), N)``.  The top
    ``floor(N * (1 - alpha))`` of its ``N`` patches by ``signal`` are marked, and the crops get the
    rest of the budget in proportion to the marks in their region, rounded down (official
    ``HiRED_sub_img_budgets``).

    Args:
        alpha: The thumbnail's share, and one minus the share of its patches that is marked.
        signal: The signal that marks.
    """

    alpha: float
    signal: Signal

    least: ClassVar[int] = 1
    """Number of tokens of the thumbnail if ``alpha`` is 0."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def counts(self, tokens: VisualTokens, scores: Tensor, retention: float) -> Tensor:
        layout, sizes = tokens.layout, tokens.layout.view_sizes
        if layout.grid == (0, 0):
            return Proportional().counts(tokens, scores, retention)
        total = budget(sum(sizes), retention)
        thumbnail = min(budget(total, self.alpha) if self.alpha else self.least, sizes[0])
        rest = min(total - thumbnail, sum(sizes[1:]))
        attention = thumbnail_map(layout, tokens[self.signal]).flatten().float()
        marked = int(len(attention) * (1 - self.alpha))
        marks = torch.zeros_like(attention)
        marks[attention.argsort(descending=True, stable=True)[:marked]] = 1
        per_crop = self.per_crop(marks.view(layout.view_shape), layout.grid)
        share = per_crop / per_crop.sum().clamp(min=1)
        most = moved(torch.tensor(sizes[1:], device="cpu"), share.device)
        crops = (share * rest).long().minimum(most)
        return torch.cat([crops.new_full((1,), thumbnail), crops])

    def patch_count(self, layout: TokenLayout, retention: float) -> int | None:
        """That of one view; the crops' shares are rounded down, and marks decide them."""
        return Proportional().patch_count(layout, retention) if layout.grid == (0, 0) else None

    def per_crop(self, marks: Tensor, grid: tuple[int, int]) -> Tensor:
        """(crops,) number of the thumbnail's marks (H, W) in the region of each crop."""
        return region_sums(marks, grid)


@register("hired")
@dataclass(frozen=True, kw_only=True)
class HiRED(ScoringCompressor):
    """Rank the tokens of every view by CLS attention; an early layer divides the budget.

    Args:
        alpha: See `MarkedPatches`.  Official: 0.5.
        layer: Encoder layer that ranks.  Official: the last but one, whose output the projector
            receives.
        early: Encoder layer that divides the budget.  Official: the first.
        allocator: Default: `MarkedPatches`.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    layer: int = -2
    early: int = 0
    allocator: Allocator | None = None  # type: ignore[assignment]

    card = Card(
        paper="HiRED",
        arxiv="2408.10945",
        code="https://github.com/hasanar1f/HiRED (502d6dd)",
        verified="hired",
        deviations=(
            "Marks are counted in the region that a crop covers; officially in horizontal strips.",
            "The budget is R of the unpadded tokens; officially R of all, and the part spent on "
            "padding is lost.",
            "Crops are at their location in the crop grid; officially its rows and columns are "
            "swapped.",
            "Canvas rows keep their separators; officially there are none.",
            "A single view is cut to R as well; officially LLaVA-NeXT's is not compressed.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the tokens of every view."""
        return Signal("cls_attention", self.layer)

    @property
    def allocation(self) -> Allocator:
        """How many tokens each view keeps."""
        early = Signal("cls_attention", self.early)
        return self.allocator or MarkedPatches(self.alpha, early)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.allocation.needs | {self.saliency}

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens[self.saliency]
