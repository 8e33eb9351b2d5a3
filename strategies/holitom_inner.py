"""HoliTom inside the language model: what FastV would drop joins what it resembles.

Paper:  https://arxiv.org/abs/2505.21334 (NeurIPS 2025), inner-LLM merging
Code:   https://github.com/cokeshao/HoliTom, holitom/modeling_qwen2.py (e9b2972)
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from tokenprune.compressor import Selection
from tokenprune.layout import moved
from tokenprune.ops.merging import group_means
from tokenprune.registry import Card, register
from tokenprune.strategies.fastv import FastV
from tokenprune.tokens import VisualTokens


@register("holitom-inner")
@dataclass(frozen=True, kw_only=True)
class HoliTomInner(FastV):
    """Choose like FastV; every other token is averaged into the kept one most like it, by cosine.

    A kept token becomes the mean of itself and all that joined it.  The whole method is a chain,
    ``holitom@0.2 + holitom-inner:layer=18@0.5`` in a decoder of 28 layers.

    Args:
        layer: K, counted from 0: tokens are merged in front of decoder layer K.  Official: 18 of
            28; the default is FastV's, which also a shallow decoder has.
    """

    card = Card(
        paper="HoliTom (inside the language model)",
        arxiv="2505.21334",
        code="https://github.com/cokeshao/HoliTom (e9b2972)",
        deviations=(
            "A true mean; officially tokens join one after the other by halves, so that the later "
            "ones weigh more.",
            "Every image and row is treated by itself; officially batches of one. Separators are "
            "neither ranked nor merged.",
        ),
    )

    def select(self, tokens: VisualTokens) -> Selection:
        chosen, patches = super().select(tokens), tokens.layout.patches
        keep = moved(chosen.keep, patches.device)
        unit = F.normalize(tokens.features.float(), dim=-1)
        joins = (unit[patches] @ unit[keep].T).argmax(1)
        place = torch.searchsorted(patches, keep)
        joins[place] = torch.arange(len(keep), device=keep.device)
        merged = group_means(tokens.features[patches], joins, len(keep))
        return replace(chosen, features=merged.to(tokens.features))
