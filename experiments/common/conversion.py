"""Translates between the retention ratios of different papers.

A method at a retention ratio has a layer average, a share of the FLOPs and an equivalent
``pre_llm`` retention ratio.  Each of these can be the target for which a retention ratio is solved.
All are step functions of the retention ratio, one step per token; the solution is the nearest step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from tokenprune.compressor import Chain, Compressor, cut_layer
from tokenprune.cost.ledger import Ledger
from tokenprune.errors import UserError
from tokenprune.experiments.common.prompt import DRAWS, Prompt

__all__ = [
    "MEASURES",
    "WORDS",
    "Measure",
    "Solution",
    "equivalent",
    "solve",
    "translate",
]


Measure = Literal["tokens", "flops", "equivalent"]


def equivalent(ledger: Ledger) -> float:
    """Retention ratio of a ``pre_llm`` method with the same layer average and all separators.

    ``(layer average - separators) / patch tokens``: all layers of such a method process what it
    keeps.  Not positive if the layer average is below the number of separators.
    """
    return (ledger.layer_average - ledger.separators) / max(1, ledger.patch_tokens)


MEASURES: dict[Measure, Callable[[Ledger], float]] = {
    "tokens": lambda ledger: ledger.layer_average,
    "flops": lambda ledger: ledger.flops / ledger.uncompressed_flops,
    "equivalent": equivalent,
}


WORDS: dict[Measure, str] = {
    "tokens": "visual tokens per layer on average",
    "flops": "of the prefill's FLOPs",
    "equivalent": "equivalent retention in front of the language model",
}


_DIGITS = 6  # of a solved retention ratio; no prompt has a million tokens


_PLACES = 128  # points at which to evaluate a cost that is not monotonic in the retention ratio


@dataclass(frozen=True)
class Solution:
    """A method at the retention ratio that comes nearest to a cost.

    Attributes:
        method: At the retention ratio that was found.
        cost: Its cost.
        target: The target cost.
        token: The cost of one more token.
    """

    method: Compressor
    cost: float
    target: float
    token: float

    @property
    def coarse(self) -> bool:
        """Whether the nearest step is more than one token away from the target."""
        return abs(self.cost - self.target) > self.token * (1 + 1e-9)


def translate(prompt: Prompt, method: Compressor) -> dict[str, float]:
    """Every measure of ``method`` on ``prompt``, and the underlying counts."""
    ledger = prompt.forecast(method).ledger
    found = {
        "retention": method.retention,
        "kept_patches": ledger.kept_patches,
        "kept_separators": ledger.kept_separators,
        "tokens_with_text": ledger.layer_average_with_text,
        "selector_flops": ledger.selector_flops / ledger.uncompressed_flops,
        "vision_flops": ledger.vision_flops / ledger.uncompressed_vision_flops,
    }
    return {**found, **{name: measure(ledger) for name, measure in MEASURES.items()}}


def solve(
    prompt: Prompt,
    method: Compressor,
    target: float,
    cost: Callable[[Compressor], float] | Measure = "tokens",
    *,
    what: str = "",
    slack: float | None = None,
) -> Solution:
    """Find the retention ratio at which ``method`` costs ``target``.

    Args:
        prompt: The prompt that costs refer to.
        method: Its own retention ratio has no effect.
        target: The target cost.
        cost: A measure, or another cost that mostly rises with the retention ratio.
        what: Name of the cost, for messages; known for measures.
        slack: Largest distance of the nearest step from the target; default: the cost of two
            tokens in all layers.

    Raises:
        UserError: The target is below the least cost of the method or above the cost of the
            uncompressed model, or the method is a chain with retention ratios of its parts.
    """
    if isinstance(method, Chain):
        raise UserError(
            f"{method.label} has its own retention; only the retention of single methods can "
            "be solved for."
        )
    if not math.isfinite(target):
        raise UserError(f"the cost to reach must be a number, got {target}.")
    if callable(cost):
        return _solve(prompt, method, target, cost, what, slack, why=False)
    what = what or WORDS[cost]
    measure = MEASURES[cost]
    # One draw of the content suffices if the counts do not depend on it.
    quick = partial(_price, prompt, measure, 1)
    found = _solve(prompt, method, target, quick, what, slack, why=True)
    if prompt.forecast(found.method).exact:
        return found
    return _solve(
        prompt, method, target, partial(_price, prompt, measure, DRAWS), what, slack, True
    )


def _price(
    prompt: Prompt, measure: Callable[[Ledger], float], draws: int, method: Compressor
) -> float:
    return measure(prompt.forecast(method, draws).ledger)


def _solve(
    prompt: Prompt,
    method: Compressor,
    target: float,
    price: Callable[[Compressor], float],
    what: str,
    slack: float | None,
    why: bool,
) -> Solution:
    known: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in known:
            known[step] = price(_at(method, step))
        return known[step]

    low, high = 1, 10**_DIGITS
    least, most = at(low), at(high)
    token = (most - least) / max(1, prompt.patches)
    slack = 2 * token if slack is None else slack
    if target < least - slack:
        raise UserError(
            f"{method.label} cannot go down to {target:.4g} {what}: whatever its retention, it "
            f"costs at least {least:.4g} here{_why(prompt, method) if why else ''}."
        )
    if target > most + slack:
        raise UserError(
            f"{method.label} cannot go up to {target:.4g} {what}; keeping everything costs "
            f"{most:.4g}."
        )

    def miss(step: int) -> float:
        return abs(at(step) - target)

    _bisect(at, target, low, high)
    if min(map(miss, known)) > token:
        # Grids round to whole rows, so keeping more may cost less: search everywhere.
        count = min(prompt.patches, _PLACES)
        places = [max(1, round(high * place / count)) for place in range(count + 1)]
        for one, other in pairwise(places):
            if (at(one) <= target) != (at(other) <= target) and min(map(miss, known)) > token:
                _bisect(at, target, one, other)
    nearest = min(known, key=lambda step: (miss(step), step))
    for digits in range(1, _DIGITS):  # the shortest decimal
        step = round(nearest, digits - _DIGITS)
        if step > 0 and at(step) == at(nearest):
            nearest = step
            break
    return Solution(_at(method, nearest), at(nearest), target, token)


def _bisect(at: Callable[[int], float], target: float, one: int, other: int) -> None:
    """Bisect between two steps, one of which costs more than the target."""
    while abs(other - one) > 1:
        middle = (one + other) // 2
        if (at(middle) <= target) == (at(one) <= target):
            one = middle
        else:
            other = middle


def _at(method: Compressor, step: int) -> Compressor:
    return replace(method, retention=round(step / 10**_DIGITS, _DIGITS))


def _why(prompt: Prompt, method: Compressor) -> str:
    """A clause about layers that run at full length, if any do."""
    full = min(
        (cut_layer(cut, prompt.adapter.facts.decoder.layers) for cut in method.cuts), default=0
    )
    depth = prompt.shape.layers
    return f", because {full} of {depth} layers run at full length" if full else ""
