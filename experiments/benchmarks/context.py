"""What an open context costs at full retention, where it changes nothing.

The plain model and the model inside `tokenprune.compress` run in turn, so that both see the same
machine.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tokenprune as tp
from tokenprune.experiments.benchmarks.prefill import SMALLER, TOY
from tokenprune.experiments.benchmarks.record import Figure, noise_of
from tokenprune.experiments.benchmarks.shapes import FIVE_VIEWS, llava, prompt_of, tokens_at
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.timing import Timing, median_of, timed
from tokenprune.layout import TokenLayout

METHODS = ("globalcom2", "fastv:layer=1")  # one in front of the language model, and one inside it
SPARE = 1.05  # the goal for a model of some size
NEW = 32  # generated tokens


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Prefill and generation inside a context, over the same without it."""
    shape = TOY if quick else SMALLER
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12)) if quick else FIVE_VIEWS
    adapter = llava(shape, device, torch.float32)
    width = adapter.base.config.vision_config.hidden_size
    pipe = tp.load("testbed-next", device=device)
    (item,) = held_out(1, 0, "image")
    words = pipe.prepare([item.images[0].open()], [item.question])
    for spec in METHODS:
        method = tp.parse(spec, retention=1.0)
        signals = frozenset(one for one in method.needs if not one.in_llm)
        tokens = tokens_at(layout, signals, shape.hidden, vision=width, device=device)
        inputs = prompt_of(adapter, tokens)
        tell(f"prefill, {method.name}")
        ratio, _, note = _compared(
            adapter.model, method, signals,
            functools.partial(adapter.model, **inputs, use_cache=True, logits_to_keep=1),
            1 if quick else 7, device,
        )  # fmt: skip
        yield Figure(
            case=f"prefill of {len(layout)} tokens, {method.name}", figure="time at R = 1 / plain",
            value=ratio.median, better="low", goal=SPARE, noise=noise_of(ratio), note=note,
        )  # fmt: skip
        tell(f"generation, {method.name}")
        _, added, note = _compared(
            pipe.model, method, frozenset(),
            functools.partial(pipe.model.generate, **words, max_new_tokens=NEW, min_new_tokens=NEW),
            1 if quick else 9, device,
        )  # fmt: skip
        yield Figure(
            case=f"generation, {method.name}", figure="added to each forward",
            value=1000 * added.median / NEW, unit="ms", better="low", noise=noise_of(added),
            note=f"testbed-next, {NEW} tokens, {note}",
        )  # fmt: skip


@torch.no_grad()
def _compared(
    model: Any,
    method: tp.Compressor,
    signals: frozenset[tp.Signal],
    work: Callable[[], Any],
    repeats: int,
    device: str,
) -> tuple[Timing, Timing, str]:
    """Ratios and differences of adjacent runs inside and outside a context, and a note."""

    def run(opened: bool) -> None:
        given = tp.compress(model, method, extra_signals=signals)
        with given if opened else contextlib.nullcontext():
            work()

    run(True)
    pairs = []
    for turn in range(repeats):
        both = {}
        for opened in (turn % 2 > 0, turn % 2 == 0):
            one = functools.partial(run, opened)
            both[opened] = timed(one, warmup=0, repeats=1, device=device).median
        pairs.append((both[True], both[False]))
    ratios, added = ([one / other for one, other in pairs], [one - other for one, other in pairs])
    plain = statistics.median(other for _, other in pairs)
    return median_of(ratios), median_of(added), f"plain {1000 * plain:.4g} ms"
