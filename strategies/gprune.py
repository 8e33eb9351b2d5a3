"""G-Prune: keep the tokens that collect the most information from similar ones.

Paper:  https://arxiv.org/abs/2501.02268 (AAAI 2025)
Code:   https://github.com/jytmelon/G-Prune, llava/model/llava_arch.py
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection
from tokenprune.ops.spatial import patches_by_plane
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("gprune")
@dataclass(frozen=True, kw_only=True)
class GPrune(Compressor):
    """Propagate the norms of a plane's tokens over a graph of similar tokens; keep the largest.

    Two tokens share an edge if their cosine is at least ``threshold``.  The weights ``A`` are a
    softmax of ``cosine / temperature`` over the edges of a token, and the score is
    ``(norms @ A^steps) / degree``.  The thumbnail, the canvas of crops and every frame are separate
    planes.  Each keeps ``floor(R * n)`` of its ``n`` tokens.

    Args:
        threshold: Smallest cosine of an edge.  Official: 0.5.
        temperature: Temperature of the softmax.  Official: 0.03.
        steps: Number of propagation steps.  Official: 5.
    """

    threshold: float = 0.5
    temperature: Annotated[float, Field(ge=1e-6)] = 0.03
    steps: Annotated[int, Field(ge=1, le=1000)] = 5

    card = Card(
        paper="G-Prune",
        arxiv="2501.02268",
        code="https://github.com/jytmelon/G-Prune",
        deviations=(
            "The visual span comes from the placeholders; officially it starts at position 46.",
        ),
    )

    def select(self, tokens: VisualTokens) -> Selection:
        kept, scores = [], []
        for patches in patches_by_plane(tokens.layout):
            scores.append(self.score(tokens.features[patches]))
            order = scores[-1].argsort(descending=True, stable=True)
            kept.append(patches[order[: budget(len(patches), self.retention)]])
        return Selection(torch.cat(kept).sort().values, scores=torch.cat(scores))

    def score(self, features: Tensor) -> Tensor:
        """(P,) float32 score of the tokens (P, D) of one plane."""
        features = features.float()
        unit = F.normalize(features, dim=-1)
        cosine = unit @ unit.T
        edge = cosine >= self.threshold
        flow = (cosine / self.temperature).masked_fill(~edge, -torch.inf).softmax(-1)
        flow = flow.nan_to_num()  # a token of zeros has no edge
        information = features.norm(dim=-1)
        for _ in range(self.steps):
            information = information @ flow
        score: Tensor = information / edge.sum(-1).clamp(min=1)
        return score
