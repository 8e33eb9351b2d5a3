"""PyramidDrop: drop visual tokens at several depths of the language model.

Paper:  https://arxiv.org/abs/2410.17247 (CVPR 2025)
Code:   https://github.com/Cooperx521/PyramidDrop, llava/model/modeling_llama_pdrop.py (6444f30)
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tokenprune.compressor import Selection
from tokenprune.ops.ranking import top
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.staged import Depths, StagedCompressor
from tokenprune.tokens import VisualTokens


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(StagedCompressor):
    """At each of ``n`` cuts, keep what the last prompt token attends to in the next layer.

    At cut ``i`` of ``n``, ``floor(R^(i/n) * P)`` of the ``P`` tokens that entered are left.
    ``R = 0.125`` with three cuts is the official schedule 0.5, 0.25, 0.125.

    Args:
        depths: Cuts as shares of the decoder's depth.  Official: in front of layers 8, 16 and 24 of
            32.
        position_ids: Official: ``compact``.
        cut: Which of the cuts this one is, counted from 1; 0 stands for the last.
    """

    depths: Depths = (0.25, 0.5, 0.75)
    position_ids: Literal["auto", "compact", "original"] = "compact"

    card = Card(
        paper="PyramidDrop",
        arxiv="2410.17247",
        code="https://github.com/Cooperx521/PyramidDrop (6444f30)",
        verified="pyramiddrop",
        deviations=(
            "Every cut drops the same share of the tokens; officially any list of ratios.",
            "Every image of a prompt is ranked; officially only the first.",
            "Separators are not ranked; the option separators decides about them.",
            "Grouped-query attention is supported; officially it is not.",
            "Prompt padding on either side and any attention kernel are supported; officially "
            "padding on the right with flash-attention.",
        ),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("llm_ahead")})

    def ranking(self, tokens: VisualTokens) -> Tensor:
        return tokens[Signal("llm_ahead")]

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        scores = self.ranking(tokens).index_select(0, patches).float()
        best = top(scores, self.limit(tokens))
        return Selection(patches.index_select(0, best), scores=scores)
