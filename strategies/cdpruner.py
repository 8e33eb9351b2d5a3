"""CDPruner: a diverse subset of what matters to the question, by a determinantal point process.

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
from tokenprune.ops.diversity import dpp_greedy_map
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
    """Of every view a subset ``S`` of large ``det L_S``, with ``L_ij = q_i * cos(x_i, x_j) * q_j``.

    ``x`` is what the language model would get, and ``q`` the relevance to the question, brought to
    (0, 1] over all views together: ``(r - min r + 1e-6) / (max r - min r)``.

    Args:
        relevance: ``r``.  Official is ``clip``: minus the cosine of patch and question in CLIP's
            joint space, mean over the question's segments.  It needs a CLIP text tower, which no
            model here has; bring its signals (``given`` of `tokenprune.compress`) or choose a
            substitute: ``text`` is the cosine of ``x`` and the mean input embedding of the
            prompt's text behind the image, ``saliency`` that of the vision tower, and ``none``
            takes ``q = 1``, the plain determinantal point process.  To bring them with a
            ``CLIPModel`` that shares the vision tower: ``clip_patches`` is its
            ``visual_projection`` of the ``post_layernorm`` of ``unprojected``, ``clip_text`` its
            text features, one row for every 77 tokens of the question.
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
            "relevance=text, saliency and none are substitutes of ours for hosts without a CLIP "
            "text tower; only relevance=clip is the paper's method and verified.",
            "A constant relevance gives q = 1; officially a division by zero.",
            "More tokens than the rank of the features are no error; officially NaN.",
            "Every prompt is compared with its own question; officially all questions of a batch "
            "are averaged.",
            "Of equal gains the token least like the others goes first, wherever it lies; "
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
                raise UserError("cdpruner:relevance=text needs text behind the image.")
            related = _cosines(tokens.features[patches], words.mean(0, keepdim=True)).squeeze(1)
        elif self.relevance == "saliency":
            related = tokens[SALIENCY][patches].float()
        else:
            related = tokens.features.new_zeros(len(patches), dtype=torch.float32)
        low, high = related.aminmax()
        scaled = (related - low + 1e-6) / (high - low)
        return torch.where(high > low, scaled, 1.0)

    def kernel(self, features: Tensor, quality: Tensor) -> Tensor:
        """(P, P) ``L`` of features (P, D) of a view and their ``q`` (P,)."""
        alike = _cosines(features, features).fill_diagonal_(1)  # exactly, so that ties are ties
        return quality[:, None] * alike * quality

    def select(self, tokens: VisualTokens) -> Selection:
        quality = tokens.features.new_zeros(len(tokens), dtype=torch.float32)
        quality[tokens.layout.patches] = self.quality(tokens)
        counts = self.allocator.counts(tokens, quality, self.retention).tolist()
        kept = []
        for patches, count in zip(patches_by_view(tokens.layout), counts, strict=True):
            kernel = self.kernel(tokens.features[patches], quality[patches])
            kept.append(patches[dpp_greedy_map(kernel, count)])
        norms = lengths(tokens.features)[tokens.layout.patches]
        return Selection(torch.cat(kept).sort().values, scores=norms)


def _cosines(left: Tensor, right: Tensor) -> Tensor:
    """(P, Q) cosines of rows (P, D) and (Q, D), in float32."""
    return F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).T
