"""PACT: prune by a global query, merge near duplicates, and weigh them in attention.

Paper:  https://arxiv.org/abs/2504.08966 (CVPR 2025)
Code:   https://github.com/orailix/PACT, transformers/models/qwen2/modeling_qwen2.py and
        transformers/PACT/utils.py (cf9a0c9)
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.layout import listed, moved
from tokenprune.ops.clustering import least_cosine_cutoff, nearest_centres
from tokenprune.ops.merging import group_means, tally
from tokenprune.ops.ranking import top
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

GLOBAL, KEYS = Signal("llm_global"), Signal("llm_keys_ahead")


@register("pact")
@dataclass(frozen=True, kw_only=True)
class PACT(Compressor):
    """Prune, then merge, in front of a decoder layer, with that layer's queries and keys.

    1. EUTI ranks by the unrotated attention of a global query, the mean of all queries up to the
       image's last token, times the norm of the hidden state.  The share ``important`` is kept.
    2. DBDPC visits these tokens, densest first.  A token whose key is farther than a cutoff from
       all centres so far becomes a centre (cosine distance ``d``; density ``sum_j exp(-(d_ij /
       2)^2)``).
    3. Every token joins its nearest centre.  A token that EUTI dropped joins only within
       ``recover`` times the cutoff.
    4. The mean of a cluster takes the place of its centre.  Proportional attention counts its
       members (`Selection.sizes`).

    The cutoff is the smallest one, not below ``cutoff``, that leaves at most ``floor(R * P)``
    clusters.  With ``cutoff`` above 0, fewer may be left.

    Args:
        depth: Place of the cut, as a share of the decoder layers.  Official: in front of layer 4 of
            28.
        important: Share of the tokens that EUTI keeps.  Official: 0.55, with ``cutoff=0.21``.  0
            stands for ``max(0.55, sqrt(R))``; with ``sqrt(R)`` both steps drop the same share.
        cutoff: Smallest cutoff.  Official: 0.21, whatever the number of clusters.
        recover: How much farther a token that EUTI dropped may be, as a factor.  Official: 1.5.
        proportional: Whether attention counts the members of a cluster.
    """

    depth: Annotated[float, Field(gt=0, lt=1)] = 4 / 28
    important: Annotated[float, Field(ge=0, le=1)] = 0.0
    cutoff: Annotated[float, Field(ge=0, le=2)] = 0.0
    recover: Annotated[float, Field(ge=0)] = 1.5
    proportional: bool = True

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="PACT",
        arxiv="2504.08966",
        code="https://github.com/orailix/PACT (cf9a0c9)",
        deviations=(
            "R bounds the number of clusters, and the cutoff follows; officially the cutoff is "
            "given and the number follows (important=0.55,cutoff=0.21 with a large R).",
            "Of equally dense tokens the earlier one comes first; officially the order of the sort "
            "decides.",
            "Every image and row is treated separately; officially a batch has one row, and all "
            "images of a prompt are treated together. Separators are neither pruned nor merged.",
        ),
    )

    @property
    def cuts(self) -> tuple[float, ...]:
        return (self.depth,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({GLOBAL, KEYS})

    def _important(self, patches: int) -> int:
        """How many of the patch tokens EUTI keeps."""
        root = math.ceil(round(patches * math.sqrt(self.retention), 6))
        return budget(patches, self.important) if self.important else max(int(0.55 * patches), root)

    @property
    def fills_budget(self) -> bool:
        return not self.cutoff

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        vectors = tokens.features[patches].float()
        scores = tokens[GLOBAL][patches].float() * vectors.norm(dim=-1)
        kept = top(scores, self._important(len(patches)))
        unit = F.normalize(tokens[KEYS][patches].float(), dim=-1)
        count = budget(len(patches), self.retention)
        cutoff, is_centre = least_cosine_cutoff(unit[kept], count, self.cutoff)
        centres = kept[moved(listed(is_centre), kept.device)]
        nearest, cluster = nearest_centres(unit, unit[centres])
        joins = nearest <= self.recover * cutoff
        joins[kept] = True
        cluster[centres] = torch.arange(len(centres), device=centres.device)
        cluster[~joins] = len(centres)  # tokens that join no centre form one more cluster
        merged = group_means(vectors, cluster, len(centres) + 1)[:-1]
        sizes = tally(cluster, len(centres) + 1)[:-1].to(vectors)
        features = merged.to(tokens.features)

        def merging(values: Tensor) -> Tensor:
            return group_means(values[patches], cluster, len(centres) + 1)[:-1].to(values)

        counted = sizes if self.proportional else None
        return Selection(patches[centres], features, counted, scores, merging)
