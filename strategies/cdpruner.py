"""CDPruner: a diverse subset of relevant tokens, by a determinantal point process.

Paper:  https://arxiv.org/abs/2506.10967 (NeurIPS 2025)
Code:   https://github.com/Theia-4869/CDPruner, llava/model/llava_arch.py (9541616)
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.allocators import Allocator, Proportional
from tokenprune.compressor import Compressor, Selection
from tokenprune.errors import UserError
from tokenprune.ops.diversity import dpp_greedy, dpp_kernel
from tokenprune.ops.ranking import lengths
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

PATCHES, QUESTION, PROMPT = Signal("clip_patches"), Signal("clip_text"), Signal("llm_prompt")
SALIENCY = Signal("saliency")


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Keep of every view a subset ``S`` with a large ``det L_S``, found greedily.

    ``L_ij = q_i * cos(x_i, x_j) * q_j``, where ``x`` are the features.  ``q`` is the relevance
    ``r`` scaled over all views together: ``(r - min r + 1e-6) / (max r - min r)``.

    Args:
        relevance: What ``r`` is.

            - ``clip`` (official): minus the cosine of patch and question in CLIP's joint space,
              mean over the question's segments.  It needs a CLIP text encoder, which no model here
              has. The caller can provide its signals (``extra_signals`` of `tokenprune.compress`).
              With a ``CLIPModel`` that shares the vision encoder, ``clip_patches`` is its
              ``visual_projection`` of the ``post_layernorm`` of ``unprojected``, and ``clip_text``
              is its text features, one row for every 77 tokens of the question.
            - ``text``: the cosine of ``x`` and the mean input embedding of the text after the
              image.
            - ``saliency``: the saliency of the vision encoder.
            - ``none``: ``q = 1``, the plain determinantal point process.
        allocator: How many tokens each view keeps.
    """

    relevance: Literal["clip", "text", "saliency", "none"] = "clip"
    allocator: Allocator = field(default_factory=lambda: Proportional("half-even"))

    card = Card(
        paper="Beyond Attention or Similarity (CDPruner)",
        arxiv="2506.10967",
        code="https://github.com/Theia-4869/CDPruner (9541616)",
        verified="cdpruner",
        deviations=(
            "relevance=text, saliency and none are our substitutes for models without a CLIP text "
            "encoder; only relevance=clip is the paper's method, and only it is verified.",
            "A constant relevance gives q = 1; officially it is a division by zero.",
            "A budget above the rank of the features is allowed; officially the result is NaN.",
            "Every prompt is compared with its own question; officially the questions of a batch "
            "are averaged.",
            "Of tokens with equal gain, the one least similar to the others comes first; "
            "officially the earlier one.",
            "The canvas is unpadded and its rows keep their separators; officially neither.",
        ),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        own = {"clip": {PATCHES, QUESTION}, "text": {PROMPT}, "saliency": {SALIENCY}, "none": set()}
        return self.allocator.needs | own[self.relevance]

    def quality(self, tokens: VisualTokens) -> Tensor:
        """(P,) ``q`` of the patch tokens, float32."""
        patches = tokens.layout.patches
        if self.relevance == "clip":
            related = -_cosines(tokens[PATCHES][patches], tokens.of_text(QUESTION)).mean(1)
        elif self.relevance == "text":
            words = tokens.of_text(PROMPT).float()
            if not len(words):
                raise UserError("cdpruner:relevance=text needs text after the image.")
            related = _cosines(tokens.features[patches], words.mean(0, keepdim=True)).squeeze(1)
        elif self.relevance == "saliency":
            related = tokens[SALIENCY][patches].float()
        else:
            related = tokens.features.new_zeros(len(patches), dtype=torch.float32)
        low, high = related.aminmax()
        scaled = (related - low + 1e-6) / (high - low)
        return torch.where(high > low, scaled, 1.0)

    def kernel(self, features: Tensor, quality: Tensor) -> Tensor:
        """(P, P) ``L`` of a view, from its features (P, D) and their ``q`` (P,)."""
        return dpp_kernel(features, quality)

    def select(self, tokens: VisualTokens) -> Selection:
        quality = tokens.features.new_zeros(len(tokens), dtype=torch.float32)
        quality[tokens.layout.patches] = self.quality(tokens)
        counts = self.allocator.counts(tokens, quality, self.retention).tolist()
        kept = []
        for patches, count in zip(patches_by_view(tokens.layout), counts, strict=True):
            kept.append(dpp_greedy(tokens.features, quality, count, patches))
        norms = lengths(tokens.features)[tokens.layout.patches]
        return Selection(torch.cat(kept).sort().values, scores=norms)


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """(P, Q) cosines of rows (P, D) and (Q, D), in float32."""
    return F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).T
