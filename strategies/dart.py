"""DART: keep the tokens that are least similar to a few pivots, and so drop duplicates.

Paper:  https://arxiv.org/abs/2502.11494 (EMNLP 2025)
Code:   ports in LightCompress, llmc/compression/token_reduction/dart.py (9701d03), and
        VLMUniPruneBench, methods/DART_IntraLLM.py (f93768f); the authors' own code was not
        available
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("dart")
@dataclass(frozen=True, kw_only=True)
class DART(Compressor):
    """Each pivot in turn selects the tokens least similar to it, by cosine in front of layer K.

    Pivots are the patch tokens and the text tokens after the image whose keys in layer K - 1 have
    the largest L1 norm.  Image pivots are kept.  The rest of the budget ``floor(R * P)`` is divided
    equally: each pivot selects its share among the tokens that are not selected yet.

    Args:
        layer: K, counted from 0.  Official: 2.
        image_pivots: Number of pivots among the patch tokens.  Official: 4.
        text_pivots: Number of pivots among the text tokens.  Official: 4.
    """

    layer: Annotated[int, Field(ge=1)] = 2
    image_pivots: Annotated[int, Field(ge=1)] = 4
    text_pivots: Annotated[int, Field(ge=0)] = 4

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="Duplication Matters More (DART)",
        arxiv="2502.11494",
        code="ports: LightCompress (9701d03), VLMUniPruneBench (f93768f)",
        verified="dart",
        deviations=(
            "The budget is kept; officially the image pivots come on top of it.",
            "Pivots select in the order of their norms, image before text; officially in the order "
            "of a Python set of positions, which changes the selection.",
            "Every row of a batch and every image is treated separately; officially a batch has "
            "one row.",
        ),
    )

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def keys(self) -> Signal:
        """The keys whose norms determine the pivots."""
        return Signal("llm_keys", self.layer - 1)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.keys, Signal("llm_states")})

    def select(self, tokens: VisualTokens) -> Selection:
        patches, states = tokens.layout.patches, Signal("llm_states")
        norms, text_norms = (
            norms_of(tokens[self.keys][patches]),
            norms_of(tokens.of_text(self.keys)),
        )
        image, text = largest(norms, self.image_pivots), largest(text_norms, self.text_pivots)
        unit = F.normalize(tokens[states][patches].float(), dim=-1)
        text_unit = F.normalize(tokens.of_text(states)[text].float(), dim=-1)
        kept, shares = self.shares(image, len(text), len(patches))
        pivots = torch.cat([unit[image], text_unit])[self.order(image, text, len(patches))]
        picked = picks(unit, pivots, shares, kept)
        chosen = torch.cat([kept, *picked]).sort().values
        return Selection(patches[chosen], scores=torch.stack([norms, unit.sum(-1)]))

    def order(self, image: Tensor, text: Tensor, patches: int) -> list[int]:
        """The order in which the pivots select, as indices into ``image`` followed by ``text``."""
        return list(range(len(image) + len(text)))

    def shares(self, image: Tensor, text: int, patches: int) -> tuple[Tensor, list[int]]:
        """The image pivots that are kept, and how many tokens each pivot selects."""
        count, pivots = budget(patches, self.retention), len(image) + text
        kept = image[:count]
        rest = count - len(kept)
        return kept, [rest // pivots + (turn < rest % pivots) for turn in range(pivots)]


def picks(unit: Tensor, pivots: Tensor, shares: list[int], kept: Tensor) -> list[Tensor]:
    """Indices of the tokens that each pivot in turn selects, the least similar first.

    Args:
        unit: (P, D) tokens of unit length.
        pivots: (Q, D) pivots of unit length.
        shares: (Q,) how many tokens each pivot selects, as long as any are left.
        kept: (K,) indices of tokens that are kept already.
    """
    free = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    free[kept] = False
    left, picked = len(unit) - len(kept), []
    for pivot, share in zip(pivots, shares, strict=True):
        order = (unit @ pivot).masked_fill(~free, torch.inf).argsort(stable=True)
        picked.append(order[: min(share, left)])
        free[picked[-1]] = False
        left -= len(picked[-1])
    return picked


def norms_of(keys: Tensor) -> Tensor:
    """(P,) L1 norms of the keys (P, C)."""
    return keys.float().abs().sum(-1)


def largest(norms: Tensor, count: int) -> Tensor:
    """(count,) indices of the largest ``norms`` (P,), the largest first."""
    return norms.argsort(descending=True, stable=True)[:count]
