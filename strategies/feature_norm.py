"""Feature norm: keep the tokens with the largest features.  A baseline without signals."""

from dataclasses import dataclass

from torch import Tensor

from tokenprune.compressor import ScoringCompressor
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("feature-norm")
@dataclass(frozen=True, kw_only=True)
class FeatureNorm(ScoringCompressor):
    """Keep the tokens of every view with the largest Euclidean norm after the projector.

    Args:
        allocator: How many tokens each view keeps.
    """

    card = Card(paper="Feature norm (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        norms: Tensor = tokens.features.float().norm(dim=-1)
        return norms
