"""Costs of methods on a model, of which only the configuration is needed.

Tokens, FLOPs and bytes are forecasts (`tokenprune.forecast`): the methods' own code on synthetic
tokens, and the arithmetic and the conventions of the ledger.
"""

from collections.abc import Callable, Sequence

import pandas as pd

from tokenprune.compressor import Compressor
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.cost.ledger import Ledger
from tokenprune.experiments.common.conversion import equivalent
from tokenprune.experiments.common.prompt import Prompt

__all__ = [
    "activation_bytes",
    "analytic_break_even",
    "break_even",
    "costs",
    "layers",
    "pays_from",
]


def activation_bytes(shape: DecoderShape, tokens: int, size: int) -> int:
    """Bytes that a decoder layer holds at its peak while it processes ``tokens`` tokens.

    In the MLP: hidden states before the layer and after attention, normalised ones, and the
    three intermediate products of a gated MLP.  Attention without an N×N matrix needs less.
    """
    return tokens * size * (3 * shape.hidden + 3 * shape.intermediate)


def costs(prompt: Prompt, methods: Sequence[Compressor]) -> pd.DataFrame:
    """One row for the uncompressed model and one for every method.

    Columns are those of the ledger, and ``estimate`` (whether counts depend on the content),
    ``flops_share`` (of the uncompressed prefill's FLOPs, selection included), ``equivalent`` (the
    retention ratio of a ``pre_llm`` method with equal layer average, see `equivalent`),
    ``weight_bytes``, ``activation_bytes`` and ``memory_bytes``: weights, KV cache, and the larger
    of activations and selector, for one prompt; without the activations of the vision encoder and
    without memory of libraries and of the device's allocator.
    """
    rows = []
    for method in (None, *methods):
        found = prompt.forecast(method)
        ledger = found.ledger
        working = activation_bytes(prompt.shape, max(ledger.tokens_per_layer), prompt.size)
        rows.append(
            {
                "method": "uncompressed" if method is None else method.name,
                "label": "uncompressed" if method is None else method.label,
                "retention": ledger.requested,
                "estimate": not found.exact,
                **ledger.figures,
                "flops_share": ledger.flops / ledger.uncompressed_flops,
                "equivalent": equivalent(ledger),
                "weight_bytes": prompt.weight_bytes,
                "activation_bytes": working,
                "memory_bytes": prompt.weight_bytes
                + ledger.kv_bytes
                + max(working, ledger.selector_bytes),
            }
        )
    return pd.DataFrame(rows)


def layers(prompt: Prompt, methods: Sequence[Compressor]) -> pd.DataFrame:
    """Visual tokens that enter every decoder layer: one row per method, retention and layer."""
    rows = []
    for method in (None, *methods):
        ledger = prompt.forecast(method).ledger
        label = "uncompressed" if method is None else method.label
        for layer, visual in enumerate(ledger.visual_per_layer):
            rows.append(
                {
                    "label": label,
                    "retention": ledger.requested,
                    "layer": layer,
                    "visual_tokens": visual,
                    "tokens": visual + ledger.text_tokens,
                }
            )
    return pd.DataFrame(rows)


# --- break-even -----------------------------------------------------------------------------------


def pays_from(lengths: Sequence[int], pays: Sequence[bool]) -> int | None:
    """The smallest of ``lengths`` (ascending) from which on a method pays; None if none."""
    found = None
    for length, good in zip(reversed(lengths), reversed(pays), strict=True):
        if not good:
            break
        found = length
    return found


def break_even(
    prompt: Prompt,
    method: Compressor,
    compressed: Callable[[Ledger], float],
    uncompressed: Callable[[Ledger], float],
) -> int | None:
    """The number of visual tokens from which on ``method`` is cheaper than no compression.

    Tried on single views of 1x1, 2x2, ... patches up to as many tokens as the prompt has.

    Args:
        prompt: Gives model and text.
        method: With its retention ratio.
        compressed: Maps a ledger to its cost, selection included.
        uncompressed: The cost of the same prompt without a method.

    Returns:
        Visual tokens, or None if it never pays.
    """
    longest = max(2, round(prompt.visual**0.5))
    step = max(1, longest // 24)
    sides = sorted({*range(1, min(9, longest)), *range(9, longest, step), longest})
    pays = []
    for side in sides:
        ledger = prompt.square(side).forecast(method, draws=1).ledger
        pays.append(compressed(ledger) < uncompressed(ledger))
    return pays_from([side * side for side in sides], pays)


def analytic_break_even(prompt: Prompt, method: Compressor) -> int | None:
    """`break_even` in FLOPs of prefill and selection."""
    return break_even(
        prompt, method, lambda ledger: ledger.flops, lambda ledger: ledger.uncompressed_flops
    )
