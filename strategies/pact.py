"""PACT: prune what the prompt ignores, then merge near duplicates and count them in attention.

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

from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.layout import listed, moved
from tokenprune.ops.clustering import kernel_density, least_cutoff
from tokenprune.ops.merging import group_means, tally
from tokenprune.ops.ranking import top
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

GLOBAL, KEYS = Signal("llm_global"), Signal("llm_keys_ahead")


@register("pact")
@dataclass(frozen=True, kw_only=True)
class PACT(Compressor):
    """Two steps in front of a layer, both from that layer's own queries and keys.

    EUTI ranks by the attention that a global query, the mean of all queries up to the image's last
    token, pays without rotation, times the norm of the hidden state; the share ``important`` stays.
    DBDPC takes of these, densest first, every token whose key is farther than a cutoff from all
    taken before as a centre (cosine distance; density ``sum_j exp(-(d_ij / 2)^2)``).  A token
    joins its nearest centre, one that EUTI dropped only within ``recover`` times the cutoff.  What
    is left are the means of the clusters, in the places of their centres, and attention counts each
    as often as it has members (`Selection.sizes`).

    At most ``floor(R * P)`` clusters are left: the cutoff is the smallest that does it, but not
    less than ``cutoff``, with which fewer may be left.

    Args:
        depth: Where, as a share of the decoder's depth.  Official: in front of layer 4 of 28.
        important: Official: 0.55, with ``cutoff=0.21``.  0 stands for 0.55, or from R = 0.3 on for
            ``sqrt(R)``, which leaves both steps the same factor.
        cutoff: Smallest cutoff.  Official: 0.21 and no other bound.
        recover: Official: 1.5.
        proportional: Whether attention counts the members.
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
            "The earlier of equally dense tokens counts as denser; officially the sort decides.",
            "Every image and row is treated by itself; officially batches of one, all images of a "
            "prompt together. Separators are neither pruned nor merged.",
        ),
    )

    @property
    def cuts(self) -> tuple[float, ...]:
        return (self.depth,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({GLOBAL, KEYS})

    def _stay(self, patches: int) -> int:
        """How many of the patch tokens EUTI keeps."""
        same = math.ceil(round(patches * math.sqrt(self.retention), 6))
        return budget(patches, self.important) if self.important else max(int(0.55 * patches), same)

    @property
    def fills_budget(self) -> bool:
        return not self.cutoff

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        vectors = tokens.features[patches].float()
        scores = tokens[GLOBAL][patches].float() * vectors.norm(dim=-1)
        stay = top(scores, self._stay(len(patches)))
        unit = F.normalize(tokens[KEYS][patches].float(), dim=-1)
        far = (1 - unit[stay] @ unit[stay].T).clamp(min=0)
        far = torch.maximum(far, far.T).fill_diagonal_(0)  # rounding is not symmetric
        count = budget(len(patches), self.retention)
        cutoff, is_centre = least_cutoff(far, kernel_density(far), count, self.cutoff)
        centres = stay[moved(listed(is_centre), stay.device)]
        nearest, cluster = (1 - unit @ unit[centres].T).min(1)
        joins = nearest <= self.recover * cutoff
        joins[stay] = True
        cluster[centres] = torch.arange(len(centres), device=centres.device)
        cluster[~joins] = len(centres)  # what belongs to nobody meets in one more
        merged = group_means(vectors, cluster, len(centres) + 1)[:-1]
        sizes = tally(cluster, len(centres) + 1)[:-1].to(vectors)
        features = merged.to(tokens.features)
        return Selection(patches[centres], features, sizes if self.proportional else None, scores)
