"""VisionZip: keep the dominant tokens of every view, merge the others into contextual tokens.

Paper:  https://arxiv.org/abs/2412.04467 (CVPR 2025)
Code:   https://github.com/dvlab-research/VisionZip, visionzip/clip_encoder.py (3151f6d)
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import Compressor, Selection
from tokenprune.ops.merging import assigned, group_sums, tally
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Compressor):
    """Of the ``T`` tokens of a view, ``T - C`` are its most attended patches and ``C`` are merged.

    Of the ``M`` other patches in raster order, those at ``0, s, 2s, ...`` with
    ``s = max(1, M // C)`` are targets.  Each of the others merges into the target with the nearest
    key, by cosine.  A target becomes itself plus the mean of the patches merged into it, before the
    projector.

    Args:
        contextual: Share ``C / T``.  Official: 10 of 64, 30 of 192.
        score: ``cls_attention``, or ``received`` for vision encoders without CLS token, as third
            parties do.
        layer: Encoder layer of attention and keys.  Official: the last but one, whose output
            the projector receives.
        merge: ``add`` as in the official code, or ``mean`` of the target and the patches merged
            into it.
        allocator: How many tokens each view keeps.
    """

    contextual: Annotated[float, Field(ge=0, lt=1)] = 10 / 64
    score: Literal["cls_attention", "received"] = "cls_attention"
    layer: int = -2
    merge: Literal["add", "mean"] = "add"
    allocator: Allocator = field(default_factory=lambda: Proportional("half-even"))

    location_aware = True
    card = Card(
        paper="VisionZip",
        arxiv="2412.04467",
        code="https://github.com/dvlab-research/VisionZip (3151f6d)",
        verified="visionzip",
        deviations=(
            "Contextual tokens take the place of their targets; officially they follow all others.",
            "The CLS token is not sent along, as no model here packs it; officially it is.",
            "The canvas is unpadded and its rows keep their separators; officially neither.",
            "If a model pools or resamples after the projector, merging happens after that.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the tokens; the largest are dominant."""
        return Signal(self.score, self.layer)

    @property
    def metric(self) -> Signal:
        """The keys by which the others are merged."""
        return Signal("keys", self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.allocator.needs | {self.saliency, self.metric, Signal("unprojected")}

    def select(self, tokens: VisualTokens) -> Selection:
        scores, vectors = tokens[self.saliency].float(), tokens[Signal("unprojected")]
        keys = F.normalize(tokens[self.metric].float(), dim=-1)
        counts = self.allocator.counts(tokens, scores, self.retention).tolist()
        dominant, parts = [], []
        for patches, count in zip(patches_by_view(tokens.layout), counts, strict=True):
            contextual = min(round(count * self.contextual), max(count - 1, 0))
            order = scores[patches].argsort(descending=True, stable=True)
            best, rest = order[: count - contextual], order[count - contextual :].sort().values
            dominant.append(patches[best])
            if contextual:
                parts.append(assigned(patches[rest], contextual, keys))
        first = torch.cat(dominant)
        keep, place = torch.cat([first, *(targets for targets, _, _ in parts)]).sort()

        def merged(values: Tensor) -> Tensor:
            """The targets' new values, from values (N, C) of all entries."""
            return torch.cat([self._merged(values, *part) for part in parts])

        def merging(values: Tensor) -> Tensor:
            own = values[first]
            return torch.cat([own, merged(values).to(values)] if parts else [own])[place]

        features = tokens.features[first]
        if parts:
            features = torch.cat([features, tokens.project(merged(vectors))])
        patches = tokens.layout.patches
        return Selection(keep, features[place], scores=scores[patches], merging=merging)

    def _merged(self, vectors: Tensor, targets: Tensor, others: Tensor, nearest: Tensor) -> Tensor:
        """(count, C) new vectors of the targets, from vectors (N, C) of all entries."""
        count = len(targets)
        sums = group_sums(vectors[others].float(), nearest, count)
        number = tally(nearest, count)[:, None]
        own = vectors[targets].float()
        if self.merge == "mean":
            return (own + sums) / (1 + number)
        return own + sums / number.clamp(min=1)
