"""HoliTom: merge what is static over frames, prune the rest by attention.

Paper:  https://arxiv.org/abs/2505.21334 (NeurIPS 2025)
Code:   https://github.com/cokeshao/HoliTom, holitom/llava_arch.py (e9b2972)
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import apportion, budget
from tokenprune.compressor import Compressor, Selection
from tokenprune.layout import TokenLayout, moved
from tokenprune.ops.clustering import density_peaks, others
from tokenprune.ops.diversity import static_segments
from tokenprune.ops.ranking import top
from tokenprune.ops.spatial import patch_table, patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("holitom")
@dataclass(frozen=True, kw_only=True)
class HoliTom(Compressor):
    """Merge static locations over segments of frames, then cut static and dynamic tokens to R.

    A location is static in the frames ``s .. e`` if the cosine of its tokens in any two successive
    frames is larger than ``tau``.  Merging them saves ``e - s`` tokens.  The video is cut into the
    segments that save the most.

    1. The static tokens of a location become one: their mean over the segment.
    2. The merged tokens of each segment and the dynamic tokens of each frame keep the same share,
       such that ``floor(R * P)`` are left in all, or fewer if step 1 leaves fewer.
    3. Merged tokens are clustered (`density_peaks` over ``neighbours``).  A cluster becomes
       ``beta`` times its centre plus ``1 - beta`` times the mean of its other members, in the first
       frame of the segment.
    4. Of the dynamic tokens, those with the largest received attention are kept.

    Views of an image are not merged; they are pruned by attention.  After a method in the vision
    encoder, frames lack tokens.  A location is then static only if all frames of the segment have a
    token there.

    Args:
        tau: Cosine above which a location is static.  Official: 0.8 for LLaVA-OneVision, 0.65 for
            LLaVA-Video.
        beta: Weight of the centre of a cluster.  Official: 0.6.
        neighbours: Number of neighbours that determine a density.  Official: 7.
        layer: Encoder layer whose attention ranks.  Official: the last one.
    """

    tau: Annotated[float, Field(ge=-1, le=1)] = 0.8
    beta: Annotated[float, Field(ge=0, le=1)] = 0.6
    neighbours: Annotated[int, Field(ge=1)] = 7
    layer: int = -1

    location_aware = True  # compares the same location of successive frames
    card = Card(
        paper="HoliTom (before the language model)",
        arxiv="2505.21334",
        code="https://github.com/cokeshao/HoliTom (e9b2972)",
        deviations=(
            "The budget is kept exactly, by largest remainders; officially counts are rounded up "
            "frame by frame.",
            "Tokens stay in sequence order; officially the static tokens of a segment come first.",
            "Equally dense tokens rank by location; officially random noise decides.",
            "Dynamic tokens are not clustered, as in the official settings (D = 0). The step "
            "inside the language model is a method of its own name, holitom-inner.",
            "Images are pruned by attention; officially they are not compressed.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks dynamic tokens."""
        return Signal("received", self.layer)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.saliency})

    def patch_count(self, layout: TokenLayout) -> int | None:
        merges = layout.modality == "video" and layout.views > 1  # as many as are static
        return None if merges else budget(len(layout.patches), self.retention)

    def groups(self, tokens: VisualTokens) -> list[tuple[Tensor, bool]]:
        """Patch indices (F, L) of the F frames that share L locations, and whether they are static.

        Everything is on the CPU, where segments are found and counted.  This costs one
        synchronisation with the device.
        """
        layout = tokens.layout.host
        if layout.modality != "video" or layout.views == 1:
            return [(patches[None], False) for patches in patches_by_view(layout)]
        table = patch_table(layout)
        there = table >= 0
        frames = tokens.features.float()[moved(table.clamp(min=0), tokens.features.device)]
        still = (F.cosine_similarity(frames[1:], frames[:-1], dim=-1) > self.tau).cpu()
        still &= there[1:] & there[:-1]
        groups = []
        for s, e in static_segments(still):
            static = still[s:e].all(0) & (e > s)
            groups.append((table[s : e + 1, static], True))
            groups += [(table[f][~static & there[f]][None], False) for f in range(s, e + 1)]
        return groups

    def select(self, tokens: VisualTokens) -> Selection:
        scores, groups = tokens[self.saliency].float(), self.groups(tokens)
        sizes = [places.shape[1] for places, _ in groups]
        total = min(budget(len(tokens.layout.patches), self.retention), sum(sizes))
        kept, features = [], []
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for (places, shared), count in zip(groups, apportion(total, sizes), strict=True):
            places = moved(places, scores.device)
            if shared and count:
                means = tokens.features[places].float().mean(0)
                chosen, cluster = density_peaks(means, count, self.neighbours)
                vectors = self._blended(means, chosen, cluster)
            else:
                chosen, cluster = top(scores[places[0]], count), None
                vectors = tokens.features[places[0, chosen]].float()
            kept.append(places[0, chosen])
            features.append(vectors)
            parts.append((places, chosen, cluster))
        keep, order = torch.cat(kept).sort()

        def merging(values: Tensor) -> Tensor:
            made = [
                values[places[0, chosen]].float()
                if cluster is None
                else self._blended(values[places].float().mean(0), chosen, cluster)
                for places, chosen, cluster in parts
            ]
            return torch.cat(made)[order].to(values)

        merged = torch.cat(features)[order].to(tokens.features)
        patches = tokens.layout.patches
        return Selection(keep, merged, scores=scores[patches], merging=merging)

    def _blended(self, means: Tensor, centres: Tensor, cluster: Tensor) -> Tensor:
        """(C, D) vectors of the clusters (L,) of the static locations, from their means (L, D)."""
        return self.beta * means[centres] + (1 - self.beta) * others(means, centres, cluster)
