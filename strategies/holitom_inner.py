"""HoliTom inside the language model: merge the tokens that FastV drops into similar kept ones.

Paper:  https://arxiv.org/abs/2505.21334 (NeurIPS 2025), inner-LLM merging
Code:   https://github.com/cokeshao/HoliTom, holitom/modeling_qwen2.py (e9b2972)
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.compressor import Selection
from tokenprune.layout import moved
from tokenprune.ops.merging import group_means
from tokenprune.ops.similarity import most_similar
from tokenprune.registry import Card, register
from tokenprune.strategies.fastv import FastV
from tokenprune.tokens import VisualTokens


@register("holitom-inner")
@dataclass(frozen=True, kw_only=True)
class HoliTomInner(FastV):
    """Select as FastV does, then merge every other token into the most similar kept one, by cosine.

    A kept token becomes the mean of itself and the tokens merged into it.  The whole method is a
    chain: ``holitom@0.2 + holitom-inner:layer=18@0.5`` in a language model of 28 decoder layers.

    Args:
        layer: K, counted from 0: tokens are merged in front of decoder layer K.  Official: 18 of
            28.  The default is that of FastV, which exists in shallow language models too.
    """

    card = Card(
        paper="HoliTom (inside the language model)",
        arxiv="2505.21334",
        code="https://github.com/cokeshao/HoliTom (e9b2972)",
        deviations=(
            "Tokens are averaged with equal weights; officially each one is averaged with the "
            "result so far, so that later ones weigh more.",
            "Every image and row is treated separately; officially a batch has one row. Separators "
            "are neither ranked nor merged.",
        ),
    )

    def select(self, tokens: VisualTokens) -> Selection:
        chosen, patches = super().select(tokens), tokens.layout.patches
        keep = moved(chosen.keep, patches.device)
        unit = F.normalize(tokens.features.float(), dim=-1)
        cluster = most_similar(unit[patches], unit[keep])
        cluster[torch.searchsorted(patches, keep)] = torch.arange(len(keep), device=keep.device)

        def merging(vectors: Tensor) -> Tensor:
            return group_means(vectors[patches], cluster, len(keep)).to(vectors)

        return replace(chosen, features=merging(tokens.features), merging=merging)
