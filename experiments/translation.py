"""What one paper calls 25 % in the terms of another.

A method at a retention has a layer average, a share of the FLOPs and an equivalent ``pre_llm``
retention; each of them, taken as the target, leads back to the retention.  All are step functions
of the retention, one token at a time, and the way back finds the step that comes nearest.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tokenprune.compressor import Chain, Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.efficiency import Prompt, equivalent
from tokenprune.ledger import Ledger

__all__ = ["MEASURES", "Measure", "Solution", "solve", "translate"]

Measure = Literal["tokens", "flops", "equivalent"]
MEASURES: dict[Measure, Callable[[Ledger], float]] = {
    "tokens": lambda ledger: ledger.layer_average,
    "flops": lambda ledger: ledger.flops / ledger.uncompressed_flops,
    "equivalent": equivalent,
}
_WORDS = {
    "tokens": "visual tokens a layer on average",
    "flops": "of the prefill's FLOPs",
    "equivalent": "equivalent retention in front of the language model",
}
_DIGITS = 6  # of a solved retention; no prompt has a million tokens


@dataclass(frozen=True)
class Solution:
    """A method brought to a cost.

    Attributes:
        method: With the retention that was found.
        cost: What it costs.
        target: What it was to cost.
    """

    method: Compressor
    cost: float
    target: float


def translate(prompt: Prompt, method: Compressor) -> dict[str, float]:
    """Every measure of ``method`` on ``prompt``, and the counts behind them."""
    ledger = prompt.forecast(method).ledger
    found = {
        "retention": method.retention,
        "kept_patches": ledger.kept_patches,
        "kept_separators": ledger.kept_separators,
        "tokens_with_text": ledger.layer_average_with_text,
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
        cost: A measure, or anything that does not fall as the retention rises.
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
    what = what or _WORDS.get(str(cost), "")

    def price(one: Compressor) -> float:
        if callable(cost):
            return cost(one)
        return MEASURES[cost](prompt.forecast(one, draws=1).ledger)

    known: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in known:
            known[step] = price(_at(method, step))
        return known[step]

    low, high = 1, 10**_DIGITS
    least, most = at(low), at(high)
    if slack is None:
        slack = 2 * (most - least) / max(1, prompt.patches)
    if target < least - slack:
        raise UserError(
            f"{method.label} cannot go down to {target:.4g} {what}: whatever its retention, it "
            f"costs at least {least:.4g} here{'' if callable(cost) else _why(prompt, method)}."
        )
    if target > most + slack:
        raise UserError(
            f"{method.label} cannot go up to {target:.4g} {what}; keeping everything costs "
            f"{most:.4g}."
        )
    while high - low > 1:  # at(low) <= target < at(high), or the target is at an end
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    nearest = min((low, high, 10**_DIGITS), key=lambda step: (abs(at(step) - target), step))
    for digits in range(1, _DIGITS):  # as short as it may be written
        step = round(nearest, digits - _DIGITS)
        if step > 0 and at(step) == at(nearest):
            nearest = step
            break
    return Solution(_at(method, nearest), at(nearest), target)


def _at(method: Compressor, step: int) -> Compressor:
    return replace(method, retention=round(step / 10**_DIGITS, _DIGITS))


def _why(prompt: Prompt, method: Compressor) -> str:
    """Which layers run at full length, if any do."""
    full = min((prompt.adapter.cut_layer(cut) for cut in method.cuts), default=0)
    depth = prompt.shape.layers
    return f", because {full} of {depth} layers run at full length" if full else ""
