"""How the time and memory of a selection grow with the number of visual tokens.

Every method selects from videos, and from single views of about the same numbers of tokens, in
bfloat16 on one thread.  Memory is the resident size that the operating system reports.  The
exponent is the slope of the least-squares line through the logarithms of the three largest sizes.
A method stops at the last size that is expected to take at most `LONGEST`; the note of its figures
names that size.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderCompressor
from tokenprune.experiments.benchmarks import tower
from tokenprune.experiments.benchmarks.outside import Outside, run_outside
from tokenprune.experiments.benchmarks.record import Figure, noise_of
from tokenprune.experiments.benchmarks.shapes import tokens_at
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.layout import TokenLayout

FRAME = (14, 14)
FRAMES = (5, 16, 51, 128, 256)  # about 1,000 to 50,000 tokens
SIDES = (32, 56, 100, 160, 224)  # of a single view
WIDTH = 256
RETENTION = 0.1
LONGEST = 20.0  # limit for the next size, extrapolated: seconds
LEAST = 2.0**20  # bytes; the resident size is not more exact
MANY, MOST = 50_000, 2048  # tokens, and the MiB that no method should exceed with them


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Growth, time and memory of every registered method."""
    frames, sides = ((2, 4), (14, 20)) if quick else (FRAMES, SIDES)
    videos = [TokenLayout.video(count, FRAME) for count in frames]
    views = [TokenLayout.single((side, side)) for side in sides]
    for name in tp.list_methods():
        compressor = tp.create(name, retention=RETENTION)
        tell(name)
        yield from _figures(f"{name}, video", compressor, videos, device)
        if not isinstance(compressor, EncoderCompressor):  # the size of its views is fixed
            yield from _figures(f"{name}, one view", compressor, views, device)


@dataclass
class _Grown:
    """Tokens, and what selecting from them took, at every size."""

    sizes: list[int] = field(default_factory=list)
    runs: list[Outside] = field(default_factory=list)


def _figures(
    case: str, compressor: Compressor, layouts: Sequence[TokenLayout], device: str
) -> Iterator[Figure]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grown = _grown(compressor, layouts, device)
    seconds, memory = grown.runs[-1].timing, grown.runs[-1].bytes / 2**20
    size, noise = grown.sizes[-1], noise_of(grown.runs[-1].timing)
    values = {
        "growth of time": [one.timing.median for one in grown.runs],
        "growth of memory": [max(float(one.bytes), LEAST) for one in grown.runs],
    }
    note = f"at {size} tokens"
    for what, each in values.items():
        if len(each) > 1:
            exponent = _exponent(grown.sizes, each)
            yield Figure(
                case=case, figure=what, value=exponent, unit="exponent", better="low",
                noise=noise if what.endswith("time") else 0.0, note=f"up to {size} tokens",
            )  # fmt: skip
    yield Figure(
        case=case, figure="time", value=1000 * seconds.median, unit="ms", better="low",
        noise=noise, note=note,
    )  # fmt: skip
    yield Figure(
        case=case, figure="memory", value=memory, unit="MiB", better="low",
        goal=MOST if size > MANY else None, note=note,
    )  # fmt: skip


def _grown(compressor: Compressor, layouts: Sequence[TokenLayout], device: str) -> _Grown:
    """What every size took that does not take too long."""
    part = compressor.at(compressor.cuts[0]) if compressor.cuts else compressor
    grown = _Grown()
    warm = _work(part, layouts[0], device)
    for layout in layouts:
        if grown.runs:
            factor = (len(layout) / grown.sizes[-1]) ** 2  # no method grows faster
            if grown.runs[-1].timing.median * factor > LONGEST:
                break
        work = _work(part, layout, device)
        grown.sizes.append(len(layout))
        if device.startswith("cuda"):
            timing = timed(work, warmup=1, repeats=3, device=device)
            grown.runs.append(Outside(timing, peak_memory(work, device)))
        else:
            grown.runs.append(run_outside(work, warm=warm))
    return grown


def _work(part: Compressor, layout: TokenLayout, device: str) -> Callable[[], object]:
    """The work of one selection; for an encoder method with its steps inside the encoder."""
    if isinstance(part, EncoderCompressor):
        adapter = tower.clip(FRAME[0], device, torch.float32, **tower.SMALL)
        steps = tower.Steps(adapter, part, layout, WIDTH)
        return lambda: part(steps.shown(steps()))
    tokens = tokens_at(layout, part.needs, WIDTH, vision=WIDTH, dtype=torch.bfloat16, device=device)
    return functools.partial(part, tokens)


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    last = slice(-3, None)
    return float(np.polyfit(np.log(sizes[last]), np.log(values[last]), 1)[0])
