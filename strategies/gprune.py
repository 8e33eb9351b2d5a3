"""G-Prune: keep the tokens that collect the most information from similar ones.

Paper:  https://arxiv.org/abs/2501.02268 (AAAI 2025)
Code:   https://github.com/jytmelon/G-Prune, llava/model/llava_arch.py
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection
from tokenprune.layout import TokenLayout
from tokenprune.ops.similarity import parts, unit
from tokenprune.ops.spatial import patches_by_plane
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens

HELD = 16  # blocks of the weights that exist at a time, 512 MiB; others are made in every step


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

    def patch_count(self, layout: TokenLayout) -> int:
        return sum(budget(len(plane), self.retention) for plane in patches_by_plane(layout))

    def select(self, tokens: VisualTokens) -> Selection:
        kept, scores = [], []
        for patches in patches_by_plane(tokens.layout):
            scores.append(self.score(tokens.features[patches]))
            order = scores[-1].argsort(descending=True, stable=True)
            kept.append(patches[order[: budget(len(patches), self.retention)]])
        return Selection(torch.cat(kept).sort().values, scores=torch.cat(scores))

    def score(self, features: Tensor) -> Tensor:
        """(P,) float32 score of the tokens (P, D) of one plane."""
        vectors = unit(features)
        some = parts(len(vectors), len(vectors))
        held = [self._flow(vectors, part) for part in some[:HELD]]
        information = features.float().norm(dim=-1)
        for _ in range(self.steps):
            sums, degrees = torch.zeros_like(information), torch.empty_like(information)
            for place, part in enumerate(some):
                flow, degrees[part] = held[place] if place < HELD else self._flow(vectors, part)
                sums += information[part] @ flow
            information = sums
        score: Tensor = information / degrees.clamp(min=1)
        return score

    def _flow(self, vectors: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Some rows of ``A``, and the degrees of their tokens, from unit vectors (P, D)."""
        cosine = vectors[part] @ vectors.T
        edge = cosine >= self.threshold
        degree = edge.float().sum(-1)
        flow = (cosine / self.temperature).masked_fill(~edge, -torch.inf).softmax(-1)
        return flow.nan_to_num(), degree  # a token of zeros has no edge
