"""First: keep the start of the packed sequence.  A baseline for positional bias."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.allocators import Allocator, TopK
from tokenprune.compressor import ScoringCompressor
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("first")
@dataclass(frozen=True, kw_only=True)
class First(ScoringCompressor):
    """Keep the first ``floor(R * P)`` patch tokens: the thumbnail, then the top of the image.

    Args:
        allocator: ``topk`` counts over the whole sequence, ``proportional`` within every view.
    """

    allocator: Allocator = field(default_factory=TopK)

    location_aware = True
    card = Card(paper="First tokens (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        return -torch.arange(len(tokens), device="cpu")
