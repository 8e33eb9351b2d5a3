"""PyramidDrop: drop visual tokens stage by stage, more the deeper the layer.

Paper:  https://arxiv.org/abs/2410.17247 (CVPR 2025)
Code:   https://github.com/Cooperx521/PyramidDrop, llava/model/modeling_llama_pdrop.py (6444f30)
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tokenprune.budget import left_at
from tokenprune.compressor import Compressor, Selection, Stage, check_cuts
from tokenprune.ops.ranking import top
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

Cut = Annotated[float, Field(gt=0, lt=1)]


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Compressor):
    """At each of ``n`` cuts keep what the last prompt token attends to in the layer behind it.

    At cut ``i`` of ``n``, ``floor(R^(i/n) * P)`` of the ``P`` tokens that entered are left, so that
    ``R`` is what is left at the end; the ledger tells the average over layers.  ``R = 0.125`` with
    three cuts is the official schedule 0.5, 0.25, 0.125.

    Args:
        depths: Cuts as shares of the decoder's depth.  Official: in front of layers 8, 16 and 24 of
            32.
        positions: Officially what is left is numbered anew.
        cut: Which of the cuts this one is, counted from 1; 0 stands for all.
    """

    depths: Annotated[tuple[Cut, ...], Field(min_length=1, max_length=1000)] = (0.25, 0.5, 0.75)
    positions: Literal["auto", "compact", "original"] = "compact"
    cut: Annotated[int, Field(ge=0)] = 0

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="PyramidDrop",
        arxiv="2410.17247",
        code="https://github.com/Cooperx521/PyramidDrop (6444f30)",
        verified="pyramiddrop",
        deviations=(
            "Every cut drops the same share of what is left; officially any list of ratios.",
            "Every image of a prompt is ranked; officially the first only.",
            "Separators are not ranked; the separator policy decides about them.",
            "Key and value heads may be fewer than query heads; officially they may not.",
            "Padding on either side and any attention kernel; officially on the right with "
            "flash-attention.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuts(self, self.cut)

    @property
    def cuts(self) -> tuple[float, ...]:
        return self.depths

    def at(self, cut: int | float) -> Compressor:
        return replace(self, cut=1 + self.depths.index(cut))

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("llm_ahead")})

    def ranking(self, tokens: VisualTokens) -> Tensor:
        return tokens[Signal("llm_ahead")]

    def limit(self, tokens: VisualTokens) -> int:
        stage = self.cut or len(self.depths)
        return left_at(tokens, self.retention, stage / len(self.depths))

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        scores = self.ranking(tokens)[patches]
        return Selection(patches[top(scores, self.limit(tokens))], scores=scores)
