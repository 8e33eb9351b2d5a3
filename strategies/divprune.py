"""DivPrune: a subset of tokens whose smallest pairwise distance is large.

Paper:  https://arxiv.org/abs/2503.02175 (CVPR 2025)
Code:   https://github.com/vbdi/divprune, LLaVA/llava/model/llava_arch.py (799e2d9)
"""

from dataclasses import dataclass

import torch

from tokenprune.allocators import Allocator
from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection
from tokenprune.layout import TokenLayout
from tokenprune.ops.diversity import max_min_diversity
from tokenprune.ops.ranking import lengths
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Compressor):
    """Select tokens one by one, each the farthest (by cosine) from those selected before.

    Args:
        allocator: None selects ``round(R * P)`` tokens over the whole image or video, as in the
            official code.  With an allocator, tokens are selected within each view.
    """

    allocator: Allocator | None = None

    card = Card(
        paper="DivPrune",
        arxiv="2503.02175",
        code="https://github.com/vbdi/divprune (799e2d9)",
        verified="divprune",
        deviations=(
            "Separators are not candidates; officially they are tokens like any other.",
            "A token is selected at most once; officially it can be selected again if all others "
            "coincide with a selected one.",
            "The visual span comes from the placeholders; officially it starts at position 35.",
        ),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset() if self.allocator is None else self.allocator.needs

    def patch_count(self, layout: TokenLayout) -> int | None:
        return self._total(layout) if self.allocator is None else super().patch_count(layout)

    def _total(self, layout: TokenLayout) -> int:
        """How many tokens are selected without an allocator."""
        return budget(len(layout.patches), self.retention, "half-even")

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        if self.allocator is None:
            chosen = max_min_diversity(tokens.features, self._total(tokens.layout), patches)
            return Selection(chosen.sort().values, scores=lengths(tokens.features)[patches])
        norms = lengths(tokens.features)
        counts = self.allocator.counts(tokens, norms, self.retention).tolist()
        views = patches_by_view(tokens.layout)
        parts = [
            max_min_diversity(tokens.features, count, mine)
            for mine, count in zip(views, counts, strict=True)
        ]
        return Selection(torch.cat(parts).sort().values, scores=norms[tokens.layout.patches])
