"""The time of a selection against a plain loop from the paper's equations, on the same tensors.

Both must keep the same tokens.
"""

import functools
from collections.abc import Callable, Iterator

import torch

import tokenprune as tp
from tokenprune.experiments.benchmarks.plain import LOOPS
from tokenprune.experiments.benchmarks.record import Figure, noise_of
from tokenprune.experiments.benchmarks.shapes import FIVE_VIEWS, tokens_at
from tokenprune.experiments.common.timing import timed
from tokenprune.layout import TokenLayout

RETENTION, WIDTH = 0.1, 1024


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Time of every method with a plain loop as a share of the loop's."""
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12)) if quick else FIVE_VIEWS
    width = 32 if quick else WIDTH
    for name, loop in LOOPS.items():
        tell(name)
        compressor = tp.create(name, retention=RETENTION, separators="none")
        given = tokens_at(layout, compressor.needs, width, device=device)
        here = tokens_at(layout, compressor.needs, width)
        kept = compressor(given).keep.tolist()
        found: list[int] = []
        with torch.no_grad():
            slow = timed(lambda: found.extend(loop(here, RETENTION)), warmup=0, repeats=1)  # noqa: B023
        if found != kept:
            raise RuntimeError(f"{name} does not keep the tokens of its plain loop")
        fast = timed(functools.partial(compressor, given), repeats=7, device=device)
        yield Figure(
            case=name, figure="time / plain loop", value=fast.median / slow.median, better="low",
            noise=noise_of(fast),
            note=f"{1000 * fast.median:.3g} of {1000 * slow.median:.4g} ms, {len(layout)} tokens",
        )  # fmt: skip
