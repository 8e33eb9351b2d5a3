"""Prefill time and memory with fewer visual tokens, against the bound that the FLOPs set.

The model is LLaVA-NeXT with random weights, the image is square and has 2880 patch tokens, and
``uniform`` prunes it.  A GPU runs the 7B shape in bfloat16 with eight prompts at once.  The CPU
runs one prompt in a decoder of 8 layers of width 512, and in two layers of the 7B shape.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import tokenprune as tp
from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.experiments.benchmarks.record import Figure
from tokenprune.experiments.benchmarks.shapes import (
    FIVE_VIEWS,
    LLAVA_NEXT_7B,
    TEXT,
    dtype_of,
    llava,
    prompt_of,
    tokens_at,
)
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.layout import TokenLayout

RETENTION = (0.75, 0.5, 0.25, 0.1)
SMALLER = DecoderShape(layers=8, hidden=512, intermediate=1376, heads=8, kv_heads=8, head_dim=64)
TWO_OF_32 = replace(LLAVA_NEXT_7B, layers=2)
TOY = DecoderShape(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=4, head_dim=8)


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Speed-up and memory at every retention ratio, with the bound."""
    if quick:
        yield from _measure(TOY, device, torch.float32, 1, tell)
    elif device.startswith("cuda"):
        yield from _measure(LLAVA_NEXT_7B, device, torch.bfloat16, 3, tell)
    else:
        yield from _measure(SMALLER, device, torch.float32, 3, tell)
        yield from _measure(TWO_OF_32, device, dtype_of(device), 1, tell)


def _measure(
    shape: DecoderShape,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    tell: Callable[[str], None],
) -> Iterator[Figure]:
    cuda = device.startswith("cuda")
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12)) if shape == TOY else FIVE_VIEWS
    adapter = llava(shape, device, dtype)
    width = adapter.base.config.vision_config.hidden_size
    tokens = tokens_at(layout, frozenset(), shape.hidden, vision=width, dtype=dtype, device=device)
    rows = 8 if cuda else 1
    inputs = prompt_of(adapter, tokens, rows)
    kind = str(dtype).removeprefix("torch.")
    case = f"{shape.layers} layers of {shape.hidden}, {kind}, batch {rows}"
    weights = sum(one.numel() * one.element_size() for one in adapter.model.parameters())

    @torch.no_grad()
    def forward(ratio: float) -> None:
        method = None if ratio == 1 else tp.create("uniform", retention=ratio)
        with tp.compress(adapter.model, method):
            adapter.model(**inputs, use_cache=True, logits_to_keep=1)

    def cost(ratio: float) -> tuple[float, int]:
        tell(f"R = {ratio:g}")
        work = functools.partial(forward, ratio)
        taken = timed(work, warmup=1, repeats=repeats, device=device).median
        return taken, peak_memory(work, device)

    separators = len(layout) - len(layout.patches)
    full = prefill_flops([len(layout) + TEXT] * shape.layers, shape)
    seconds, memory = cost(1.0)
    for ratio in RETENTION:
        less, held = cost(ratio)
        count = int(ratio * len(layout.patches)) + separators + TEXT
        bound = full / prefill_flops([count] * shape.layers, shape)
        yield Figure(
            case=case, figure=f"speed-up at R = {ratio:g}", value=seconds / less, better="high",
            note=f"bound by FLOPs {bound:.2f}; {1000 * less:.4g} of {1000 * seconds:.4g} ms",
        )  # fmt: skip
        yield Figure(
            case=case, figure=f"of the promise at R = {ratio:g}", value=seconds / less / bound,
            better="high", goal=0.9 if cuda else None,
        )  # fmt: skip
        yield Figure(
            case=case, figure=f"memory at R = {ratio:g}", value=held / memory, better="low",
            note="activations and KV cache, without weights",
        )  # fmt: skip
        yield Figure(
            case=case, figure=f"peak memory at R = {ratio:g}",
            value=(held + weights) / (memory + weights), better="low",
            goal=0.6 if cuda and ratio == min(RETENTION) else None, note="weights included",
        )  # fmt: skip
