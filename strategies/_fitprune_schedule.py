"""The calibration of FitPrune: which share of the tokens a model can spare behind every layer.

Paper:  https://arxiv.org/abs/2409.10197 (AAAI 2025)
Code:   https://github.com/ywh187/FitPrune, llava/eval/statistical_analysis.py (d28e418)
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenprune.compressor import Compressor, Selection
from tokenprune.strategies.fitprune import CROSS, SELF, FitPrune
from tokenprune.tokens import VisualTokens


class _Notes:
    """What one pass over the calibration prompts saw, selection by selection.

    Attributes:
        whole: (2,) sums of both scores in the first pass, in which nothing was dropped.
        shares: For every cut, of every image, the share that was left behind it.
    """

    def __init__(self, whole: list[Tensor] | None = None) -> None:
        self.whole = [] if whole is None else whole
        self.shares: dict[int, list[float]] = {}
        self.turn = 0


@dataclass(frozen=True, kw_only=True)
class _Fitting(FitPrune):
    """Drops what both attentions can spare: of either, the share ``tolerance`` of the first pass's
    sum.  At ``tolerance < 0`` it drops nothing and notes the sums."""

    tolerance: float = -1.0
    notes: _Notes = field(default_factory=_Notes)

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens.layout.patches)  # R is what the fit is after

    def select(self, tokens: VisualTokens) -> Selection:
        notes, patches = self.notes, tokens.layout.patches
        scores = torch.stack([tokens[signal][patches].float() for signal in (SELF, CROSS)])
        if self.tolerance < 0:
            notes.whole.append(scores.sum(1))
            return Selection(patches)
        spare = scores.sum(1) - (1 - self.tolerance) * notes.whole[notes.turn].to(scores.device)
        ascending, order = scores.sort(dim=1, stable=True)
        cheap = (ascending.cumsum(1) <= spare[:, None]).gather(1, order.argsort(1))
        stays = ~cheap.all(0)
        stays[scores.prod(0).argmax()] = True
        notes.turn += 1
        left = patches[stays]
        notes.shares.setdefault(self.cut, []).append(len(left) / (tokens.entered or len(patches)))
        return Selection(left)


def fit(run: Callable[[Compressor], object], layers: int, retention: float) -> tuple[float, ...]:
    """A schedule for `FitPrune.shares`, by the paper's procedure.

    Behind every layer both rankings give up their tail as long as their sum stays above ``1 -
    tolerance`` times that of a pass in which nothing is dropped; what is in both tails goes.  The
    tolerance is found by halving, in steps of 1/128, such that ``retention`` of the tokens are left
    at the end, on average (officially: such that FLOPs are reduced by a given share), and the
    schedule is the average over images.

    Args:
        run: Runs the prefill of the same calibration prompts under the compressor it is given, for
            instance ``lambda method: [answer(method, prompt) for prompt in prompts]``.
        layers: Depth of the decoder.
        retention: R, in (0, 1).

    Returns:
        ``layers - 1`` shares.
    """
    first = _Notes()
    run(_Fitting(retention=retention, steps=layers - 1, notes=first))
    low, high, found = 0, 128, (retention,) * (layers - 1)
    while high - low > 1:
        middle = (low + high) // 2
        notes = _Notes(first.whole)
        method = _Fitting(
            retention=retention, steps=layers - 1, tolerance=middle / 128, notes=notes
        )
        run(method)
        shares = tuple(sum(some) / len(some) for _, some in sorted(notes.shares.items()))
        if shares[-1] <= retention:
            high, found = middle, shares
        else:
            low = middle
    return found
