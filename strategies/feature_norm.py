"""Feature norm: the longest projected tokens.  The baseline that looks at nothing but features."""

from dataclasses import dataclass

from torch import Tensor

from tokenprune.compressor import ScoringCompressor
from tokenprune.ops.ranking import float_copy
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("feature-norm")
@dataclass(frozen=True, kw_only=True)
class FeatureNorm(ScoringCompressor):
    """Keep the tokens of every view with the largest Euclidean norm behind the projector.

    Args:
        allocator: How many tokens each view keeps.
    """

    card = Card(paper="Feature norm (baseline)")

    def flops(self, tokens: VisualTokens) -> float:
        """A square and a sum for every number."""
        return 2.0 * tokens.features.numel()

    def memory(self, tokens: VisualTokens) -> float:
        return super().memory(tokens) + float_copy(tokens.features)

    def score(self, tokens: VisualTokens) -> Tensor:
        norms: Tensor = tokens.features.float().norm(dim=-1)
        return norms
