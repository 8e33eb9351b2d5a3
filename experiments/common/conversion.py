"""What one paper calls 25 % in the terms of another.

A method at a retention has a layer average, a share of the FLOPs and an equivalent ``pre_llm``
retention; each of them, taken as the target, leads back to the retention.  All are step functions
of the retention, one token at a time, and the way back finds the step that comes nearest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from tokenprune.compressor import Chain, Compressor
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
    "tokens": "visual tokens a layer on average",
    "flops": "of the prefill's FLOPs",
    "equivalent": "equivalent retention in front of the language model",
}


_DIGITS = 6  # of a solved retention; no prompt has a million tokens


_PLACES = 128  # where to look for a cost that does not simply rise with the retention


@dataclass(frozen=True)
class Solution:
    """A method brought to a cost.

    Attributes:
        method: With the retention that was found.
        cost: What it costs.
        target: What it was to cost.
        token: What one token more costs.
    """

    method: Compressor
    cost: float
    target: float
    token: float

    @property
    def coarse(self) -> bool:
        """Whether the nearest step lies more than a token off the target."""
        return abs(self.cost - self.target) > self.token * (1 + 1e-9)


def translate(prompt: Prompt, method: Compressor) -> dict[str, float]:
    """Every measure of ``method`` on ``prompt``, and the counts behind them."""
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
    """Change the retention of ``method``, and nothing else, until it costs ``target``.

    Args:
        prompt: On which it costs that.
        method: Its own retention does not matter.
        target: The cost wanted.
        cost: A measure, or anything else that rises with the retention, by and large.
        what: What the cost is, for sentences; known for measures.
        slack: How far from the target the nearest step may lie; default: what two tokens in all
            layers are worth.

    Raises:
        UserError: The method cannot be brought so low, is a chain whose parts say themselves what
            they keep, or the target is above what the uncompressed model costs.
    """
    if isinstance(method, Chain):
        raise UserError(
            f"{method.label} says itself what it keeps; only the retention of single methods can "
            "be solved for."
        )
    if not math.isfinite(target):
        raise UserError(f"the cost to reach must be a number, got {target}.")
    if callable(cost):
        return _solve(prompt, method, target, cost, what, slack, why=False)
    what = what or WORDS[cost]
    measure = MEASURES[cost]
    # One draw of the content will do wherever the counts turn out not to depend on it.
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

    _close_in(at, target, low, high)
    if min(map(miss, known)) > token:
        # Grids round to whole rows, so that keeping more may cost less: look everywhere.
        count = min(prompt.patches, _PLACES)
        places = [max(1, round(high * place / count)) for place in range(count + 1)]
        for one, other in pairwise(places):
            if (at(one) <= target) != (at(other) <= target) and min(map(miss, known)) > token:
                _close_in(at, target, one, other)
    nearest = min(known, key=lambda step: (miss(step), step))
    for digits in range(1, _DIGITS):  # as short as it may be written
        step = round(nearest, digits - _DIGITS)
        if step > 0 and at(step) == at(nearest):
            nearest = step
            break
    return Solution(_at(method, nearest), at(nearest), target, token)


def _close_in(at: Callable[[int], float], target: float, one: int, other: int) -> None:
    """Halve the way between two steps, one of which costs more than the target, until they meet."""
    while abs(other - one) > 1:
        middle = (one + other) // 2
        if (at(middle) <= target) == (at(one) <= target):
            one = middle
        else:
            other = middle


def _at(method: Compressor, step: int) -> Compressor:
    return replace(method, retention=round(step / 10**_DIGITS, _DIGITS))


def _why(prompt: Prompt, method: Compressor) -> str:
    """Which layers run at full length, if any do."""
    full = min((prompt.adapter.cut_layer(cut) for cut in method.cuts), default=0)
    depth = prompt.shape.layers
    return f", because {full} of {depth} layers run at full length" if full else ""
