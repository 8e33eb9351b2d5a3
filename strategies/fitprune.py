"""FitPrune: after every layer, drop the tokens that neither image nor text attends to.

Paper:  https://arxiv.org/abs/2409.10197 (AAAI 2025)
Code:   https://github.com/ywh187/FitPrune, llava/model/language_model/modeling_llama.py and
        llava/eval/statistical_analysis.py (d28e418)
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar

from pydantic import Field

from tokenprune.budget import left_at
from tokenprune.compressor import Compressor, Selection, Stage, check_cuts
from tokenprune.errors import UserError
from tokenprune.ops.ranking import top
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

SELF, CROSS = Signal("llm_self"), Signal("llm_cross")
Share = Annotated[float, Field(gt=0, le=1)]


@register("fitprune")
@dataclass(frozen=True, kw_only=True)
class FitPrune(Compressor):
    """After layer ``i`` of ``n + 1``, keep the largest products of self- and cross-attention.

    With ``A`` the largest attention of any head in that layer, the score of token ``j`` is
    ``mean_i A_ij`` over the image's tokens ``i`` times ``mean_t A_tj`` over the text ``t`` after
    the image.  Of the ``P`` tokens that entered, ``floor(R^e * P)`` are left after cut ``i``.
    Without ``shares``, ``e = i / n``: every cut drops the same share.  With the shares ``s_1 ..
    s_n`` of a fitted schedule, ``e = log s_i / log s_n``: the schedule keeps its shape and ends at
    R.  The ledger gives the layer average.

    Args:
        steps: ``n``, the number of cuts, at ``i / (n + 1)`` of the depth.  Official: every layer of
            32.
        shares: A fitted schedule, one share per cut, in place of ``steps``
            (`_fitprune_schedule.fit`).
        cut: Which of the cuts this one is, counted from 1; 0 stands for the last.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 31
    shares: Annotated[tuple[Share, ...], Field(max_length=1000)] = ()
    cut: Annotated[int, Field(ge=0)] = 0

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="FitPrune",
        arxiv="2409.10197",
        code="https://github.com/ywh187/FitPrune (d28e418)",
        deviations=(
            "Without shares, every cut drops the same share; officially tables for LLaVA-1.5 give "
            "the counts, one table for every reduction of FLOPs.",
            "Tokens are dropped after the layer whose attention ranks them; officially between "
            "its attention and its MLP, which saves the MLP and changes nothing else.",
            "Every image and row is ranked separately. Separators are not ranked and do not rank.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuts(self, self.cut)
        rising = any(late > early for early, late in pairwise(self.shares))
        if self.shares and (rising or self.shares[-1] == 1):
            raise UserError(
                "fitprune: shares must fall from layer to layer and end below 1, "
                f"got {self.shares}."
            )

    @property
    def cuts(self) -> tuple[float, ...]:
        number = len(self.shares) or self.steps
        return tuple(i / (number + 1) for i in range(1, number + 1))

    def at(self, cut: int | float) -> Compressor:
        return replace(self, cut=1 + self.cuts.index(float(cut)))

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({SELF, CROSS})

    @property
    def _exponent(self) -> float:
        """``e``: after this cut ``R^e`` of the tokens are left."""
        if not self.cut:
            return 1.0
        if self.shares:
            return math.log(self.shares[self.cut - 1]) / math.log(self.shares[-1])
        return self.cut / self.steps

    def limit(self, tokens: VisualTokens) -> int:
        return left_at(tokens, self.retention, self._exponent)

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        by_image, by_text = (
            tokens[signal].index_select(0, patches).float() for signal in (SELF, CROSS)
        )
        scores = by_image * by_text
        best = top(scores, self.limit(tokens))
        return Selection(patches.index_select(0, best), scores=scores)
