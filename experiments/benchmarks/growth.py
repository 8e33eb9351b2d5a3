"""How the time and memory of a selection grow with the number of visual tokens, as in long videos.

The exponent is the slope of the least-squares line through the logarithms of the three largest
sizes.  A method stops at the last size that is expected to fit `LONGEST` and `LARGEST`; the note
of its figures names that size.
"""

import functools
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderCompressor
from tokenprune.experiments.benchmarks import tower
from tokenprune.experiments.benchmarks.record import Figure
from tokenprune.experiments.benchmarks.shapes import tokens_at
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.layout import TokenLayout

FRAME = (14, 14)
FRAMES = (5, 15, 51, 128, 256)  # about 1,000 to 50,000 tokens
WIDTH = 64
RETENTION = 0.1
LONGEST, LARGEST = 4.0, 3 * 2**30  # limits for the next size, extrapolated: seconds and bytes


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """The growth exponents of every registered method."""
    for name in tp.list_methods():
        compressor = tp.create(name, retention=RETENTION)
        tell(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sizes, seconds, held = _grown(compressor, (2, 4) if quick else FRAMES, device)
        if len(sizes) < 2:
            continue
        note = f"up to {sizes[-1]} tokens: {1000 * seconds[-1]:.3g} ms, {held[-1] / 2**20:.3g} MiB"
        for what, values in (("time", seconds), ("memory", held)):
            yield Figure(
                case=name, figure=f"growth of {what}", value=_exponent(sizes, values),
                unit="exponent", better="low", note=note,
            )  # fmt: skip


def _grown(
    compressor: Compressor, frames: tuple[int, ...], device: str
) -> tuple[list[int], list[float], list[int]]:
    """Tokens, seconds and bytes at every size that fits."""
    part = compressor.at(compressor.cuts[0]) if compressor.cuts else compressor
    sizes: list[int] = []
    seconds: list[float] = []
    held: list[int] = []
    for count in frames:
        layout = TokenLayout.video(count, FRAME)
        if sizes:
            factor = (len(layout) / sizes[-1]) ** 2  # no method grows faster than quadratically
            if seconds[-1] * factor > LONGEST or held[-1] * factor > LARGEST:
                break
        work = _work(part, layout, device)
        sizes.append(len(layout))
        seconds.append(timed(work, warmup=1, repeats=2, device=device).median)
        held.append(peak_memory(work, device))
    return sizes, seconds, held


def _work(part: Compressor, layout: TokenLayout, device: str) -> Callable[[], object]:
    """The work of one selection; for an encoder method with its steps inside the encoder."""
    if isinstance(part, EncoderCompressor):
        adapter = tower.clip(FRAME[0], device, torch.float32, **tower.SMALL)
        steps = tower.Steps(adapter, part, layout, WIDTH)
        return lambda: part(steps.shown(steps()))
    tokens = tokens_at(layout, part.needs, WIDTH, vision=WIDTH, device=device)
    return functools.partial(part, tokens)


def _exponent(sizes: list[int], values: list[float] | list[int]) -> float:
    last = slice(-3, None)
    logs = np.log(np.maximum(np.asarray(values[last], dtype=float), 1e-9))
    return float(np.polyfit(np.log(sizes[last]), logs, 1)[0])
