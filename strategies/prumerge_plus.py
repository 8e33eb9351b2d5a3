"""PruMerge+: PruMerge with mostly evenly spaced centres.

Paper:  https://arxiv.org/abs/2403.15388 (ICCV 2025)
Code:   https://github.com/42Shawn/LLaVA-PruMerge, multimodal_encoder/clip_encoder.py (097c041)
"""

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from tokenprune.ops.ranking import outliers, with_others
from tokenprune.registry import register
from tokenprune.strategies.prumerge import PruMerge


@register("prumerge+")
@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """Merge as `PruMerge` does, around attended patches and evenly spaced samples.

    Args:
        spatial: Share of the centres that are samples.  Official: about three quarters.
        adaptive: Whether the number of `outliers` of the attention is the number of attended
            centres.  Samples are then every ``s``-th patch, ``s = int(int(P / outliers) / 3)``.
            Both together stay within the budget.
    """

    spatial: Annotated[float, Field(ge=0, le=1)] = 0.75

    location_aware = True  # the samples
    card = replace(
        PruMerge.card,
        deviations=(
            *PruMerge.card.deviations,
            "A patch is a centre at most once; officially, samples of the training path repeat "
            "attended patches, which merge twice, and as many dropped patches are lost.",
        ),
    )

    def centres(self, scores: Tensor, count: int) -> Tensor:
        patches, samples = len(scores), round(count * self.spatial)
        attended, step = count - samples, max(1, patches // max(samples, 1))
        if self.adaptive:
            attended = max(1, min(outliers(scores), count))
            samples, step = count - attended, max(1, patches // attended // 3)
        best = scores.argsort(descending=True, stable=True)[:attended]
        spaced = self.samples(patches, step)
        return with_others(best, patches, spaced, samples, preferred_only=self.adaptive)

    def samples(self, patches: int, step: int) -> slice:
        """The samples among the patches of a view; as officially, never the last patch."""
        return slice(0, patches - 1, step)
