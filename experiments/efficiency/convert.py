"""Translation between retention ratio, tokens per layer, FLOPs and the equivalent ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.common.conversion import MEASURES, WORDS, Measure, solve, translate
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.experiments.efficiency.run import PromptRequest, prompt_for, stand_in
from tokenprune.spec import has_retention, parse, registered

__all__ = [
    "ConvertRequest",
    "Converted",
    "convert",
]


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(PromptRequest):
    """Which method to translate.

    Attributes:
        method: A spec with its retention ratio, or without one if there is a target.
        targets: Measure to the target cost for which to find a retention ratio; at most one.
    """

    method: str
    targets: Mapping[Measure, float]


@dataclass(frozen=True)
class Converted:
    """A method in all terms.

    Attributes:
        method: The method, at the given or found retention ratio.
        prompt: The prompt that the costs refer to.
        terms: As `translate` returns them.
        mark: "≈" if counts depend on the content, otherwise empty.
        notes: Sentences that a reader must know.
    """

    method: Compressor
    prompt: Prompt
    terms: Mapping[str, float]
    mark: str
    notes: tuple[str, ...]


def convert(request: ConvertRequest) -> Converted:
    """Translate a method at its retention ratio, or find the ratio for a target.

    Raises:
        UserError: Bad input, or a target that cannot be met.
    """
    spec = registered(request.method)
    if len(request.targets) > 1:
        names = " and ".join(f"--{name}" for name in request.targets)
        raise UserError(f"give one target, not {names}.")
    for name, share in request.targets.items():
        if name != "tokens" and 1 < share <= 100:
            raise UserError(
                f"--{name} is a share of at most 1, got {share:g}; for {share:g} % write "
                f"{share / 100:g}."
            )
    own = has_retention(spec)
    if own == bool(request.targets):
        raise UserError(
            f"{spec!r} needs a retention (fastv@0.25) or a target (--tokens, --flops or "
            "--equivalent), and not both."
        )
    prompt = prompt_for(request)
    found = parse(spec) if own else parse(spec, retention=0.5)
    check_compatible(prompt.adapter.facts, found)
    notes = []
    for name in MEASURES:
        if name in request.targets:
            solution = solve(prompt, found, request.targets[name], name)
            found = solution.method
            if solution.coarse:
                notes.append(
                    f"No retention gives {solution.target:g} {WORDS[name]}: {found.label} goes "
                    f"in larger steps, the nearest of which is {solution.cost:.4g}."
                )
    notes += stand_in(prompt, [found])
    mark = prompt.forecast(found).mark
    return Converted(found, prompt, translate(prompt, found), mark, tuple(notes))
