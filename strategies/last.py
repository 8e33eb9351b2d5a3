"""Last: keep the end of the packed sequence.  A baseline for positional bias."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.allocators import Allocator, TopK
from tokenprune.compressor import ScoringCompressor
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("last")
@dataclass(frozen=True, kw_only=True)
class Last(ScoringCompressor):
    """Keep the last ``floor(R * P)`` patch tokens: the bottom of the image.

    A method that ranks by causal attention degenerates to this if attention prefers recent tokens.

    Args:
        allocator: ``topk`` counts over the whole sequence, ``proportional`` within every view.
    """

    allocator: Allocator = field(default_factory=TopK)

    location_aware = True
    card = Card(paper="Last tokens (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.arange(len(tokens), device="cpu")
