"""DART: keep what is least like a few pivots; duplicates go.

Paper:  https://arxiv.org/abs/2502.11494 (EMNLP 2025)
Code:   ports in LightCompress, llmc/compression/token_reduction/dart.py (9701d03), and
        VLMUniPruneBench, methods/DART_IntraLLM.py (f93768f); the authors' own was not at hand
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
    """Each pivot in turn picks the tokens that are least like it, by cosine in front of layer K.

    Pivots are the image tokens and the text tokens behind the image whose keys in layer K - 1 have
    the largest L1 norm.  Image pivots stay; of the rest of ``floor(R * P)`` every pivot picks an
    equal share among the tokens that nobody has picked.

    Args:
        layer: K, counted from 0.  Official: 2.
        image_pivots: Official: 4.
        text_pivots: Official: 4.
        official: Share and order of the ports: ``int(P * R / pivots)`` tokens a pivot on top of the
            image pivots, in the order in which CPython walks through a set of the positions.
        start: Where the official code takes the image to begin; only for ``official``.
    """

    layer: Annotated[int, Field(ge=1)] = 2
    image_pivots: Annotated[int, Field(ge=1)] = 4
    text_pivots: Annotated[int, Field(ge=0)] = 4
    official: bool = False
    start: Annotated[int, Field(ge=0)] = 35

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="Duplication Matters More (DART)",
        arxiv="2502.11494",
        code="ports: LightCompress (9701d03), VLMUniPruneBench (f93768f)",
        verified="dart",
        deviations=(
            "The budget is kept; officially the image pivots come on top of it (official=True).",
            "Pivots pick in the order of their norms, image before text; officially in the order "
            "of a Python set of positions, which changes the choice (official=True).",
            "Every row of a batch and every image is treated by itself; officially batches of one.",
        ),
    )

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def keys(self) -> Signal:
        """Whose norms make the pivots."""
        return Signal("llm_keys", self.layer - 1)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.keys, Signal("llm_states")})

    def limit(self, tokens: VisualTokens) -> int:
        """Officially the image pivots come on top."""
        return super().limit(tokens) + (self.image_pivots if self.official else 0)

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        norms = _norms(tokens[self.keys][patches])
        image, text = self.pivots(tokens, norms)
        picked, alike = self.picks(tokens, image, text)
        chosen = torch.cat([self._kept(tokens, image), *picked]).sort().values
        return Selection(patches[chosen], scores=torch.stack([norms, alike]))

    def pivots(self, tokens: VisualTokens, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the patch tokens, of these ``norms``, and of the text tokens are pivots.

        The largest norm first.
        """
        words = _norms(tokens.text[self.keys].to(norms.device))
        return _largest(norms, self.image_pivots), _largest(words, self.text_pivots)

    def order(self, tokens: VisualTokens, image: Tensor, text: Tensor) -> list[int]:
        """In which order the pivots pick: places among ``image`` and then ``text``."""
        if not self.official:
            return list(range(len(image) + len(text)))
        behind = self.start + len(tokens.layout.patches)
        places = [*(self.start + image).tolist(), *(behind + text).tolist()]
        return [places.index(place) for place in set(places)]

    def _kept(self, tokens: VisualTokens, image: Tensor) -> Tensor:
        """The pivots that stay: officially all, whatever the budget."""
        most = len(image) if self.official else budget(len(tokens.layout.patches), self.retention)
        return image[:most]

    def picks(
        self, tokens: VisualTokens, image: Tensor, text: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """What each pivot in turn picks of the patch tokens, the least similar first.

        Beside it the cosines (P,) of the last one.
        """
        patches, states = tokens.layout.patches, Signal("llm_states")
        unit = F.normalize(tokens[states][patches].float(), dim=-1)
        behind = F.normalize(tokens.text[states].to(patches.device)[text].float(), dim=-1)
        pivots, kept = torch.cat([unit[image], behind]), self._kept(tokens, image)
        number, left = len(pivots), len(patches) - len(kept)
        if self.official:
            shares = [int(len(patches) * self.retention / number)] * number
        else:
            rest = budget(len(patches), self.retention) - len(kept)
            shares = [rest // number + (turn < rest % number) for turn in range(number)]
        free = torch.ones(len(patches), dtype=torch.bool, device=patches.device)
        free[kept] = False
        picked = []
        for pivot, share in zip(pivots[self.order(tokens, image, text)], shares, strict=True):
            alike = unit @ pivot
            order = alike.masked_fill(~free, torch.inf).argsort(stable=True)
            picked.append(order[: min(share, left)])
            free[picked[-1]] = False
            left -= len(picked[-1])
        return picked, alike


def _norms(keys: Tensor) -> Tensor:
    """(P,) L1 norms of the keys (P, C)."""
    return keys.float().abs().sum(-1)


def _largest(norms: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest ``norms`` (P,), the largest first."""
    return norms.argsort(descending=True, stable=True)[:count]
