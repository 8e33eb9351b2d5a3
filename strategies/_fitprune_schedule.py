"""The calibration of FitPrune: the share of the tokens that a model can drop after every layer.

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


class _Statistics:
    """What one run over the calibration prompts records, selection by selection.

    Attributes:
        sums: For every selection the (2,) sums of both scores in the first run, which drops
        nothing.
        shares: For every cut the share that each image keeps there.
        selections: Number of selections so far, the index into ``sums``.
    """

    def __init__(self, sums: list[Tensor] | None = None) -> None:
        self.sums = [] if sums is None else sums
        self.shares: dict[int, list[float]] = {}
        self.selections = 0


@dataclass(frozen=True, kw_only=True)
class _Fitting(FitPrune):
    """Drop the tokens that lie in the tail of both rankings.

    The tail of a ranking holds its lowest scores, as many as sum to at most the share ``tolerance``
    of the first run.  At ``tolerance < 0`` nothing is dropped and the sums are recorded.
    """

    tolerance: float = -1.0
    statistics: _Statistics = field(default_factory=_Statistics)

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens.layout.patches)  # the fit searches for R

    def select(self, tokens: VisualTokens) -> Selection:
        statistics, patches = self.statistics, tokens.layout.patches
        scores = torch.stack([tokens[signal][patches].float() for signal in (SELF, CROSS)])
        if self.tolerance < 0:
            statistics.sums.append(scores.sum(1))
            return Selection(patches)
        total = statistics.sums[statistics.selections].to(scores.device)
        spare = scores.sum(1) - (1 - self.tolerance) * total
        ascending, order = scores.sort(dim=1, stable=True)
        in_tail = (ascending.cumsum(1) <= spare[:, None]).gather(1, order.argsort(1))
        stays = ~in_tail.all(0)
        stays[scores.prod(0).argmax()] = True
        statistics.selections += 1
        kept = patches[stays]
        share = len(kept) / (tokens.entered or len(patches))
        statistics.shares.setdefault(self.cut, []).append(share)
        return Selection(kept)


def fit(run: Callable[[Compressor], object], layers: int, retention: float) -> tuple[float, ...]:
    """A schedule for `FitPrune.shares`, by the paper's procedure.

    After every layer, each of the two rankings marks its lowest scores as long as the sum of the
    others stays above ``1 - tolerance`` times the sum of a run that drops nothing.  Tokens that
    both rankings mark are dropped.  Bisection in steps of 1/128 finds the tolerance at which an
    average of ``retention`` of the tokens is left at the end (officially: at which the FLOPs fall
    by a given share).  The schedule is the average over images.

    Args:
        run: Runs the prefill of the same calibration prompts under the given compressor, for
            instance ``lambda method: [answer(method, prompt) for prompt in prompts]``.
        layers: Number of decoder layers.
        retention: R, in (0, 1).

    Returns:
        ``layers - 1`` shares.
    """
    first = _Statistics()
    run(_Fitting(retention=retention, steps=layers - 1, statistics=first))
    low, high, found = 0, 128, (retention,) * (layers - 1)
    while high - low > 1:
        middle = (low + high) // 2
        statistics = _Statistics(first.sums)
        method = _Fitting(
            retention=retention, steps=layers - 1, tolerance=middle / 128, statistics=statistics
        )
        run(method)
        shares = tuple(sum(some) / len(some) for _, some in sorted(statistics.shares.items()))
        if shares[-1] <= retention:
            high, found = middle, shares
        else:
            low = middle
    return found
