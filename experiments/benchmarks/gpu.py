"""Prefill time and memory of two 7B models on one GPU, with four methods.

    python -m tokenprune.experiments.benchmarks.gpu

LLaVA-NeXT-7B and Qwen2.5-VL-7B have their published shapes and random weights in bfloat16.  A
square image makes 2880 and 2916 patch tokens.  Every method runs at R = 0.5, 0.25 and 0.1, for one
prompt and for eight at once, with the ``sdpa`` kernel, and with flash attention if it is installed.
For every cell the file has

* the time of the prefill: vision encoder with the signals of the method, selection, language model;
* its speed-up over the uncompressed model, and the share of selection and signals in its time;
* the peak memory, weights included;
* the synchronisations with the GPU in the language model's forward, as CUDA reports them.

The file is written after every kernel and batch size.  Cells that would begin after ``--minutes``
are left out, which the script says.  ``--tiny`` rehearses everything on the CPU with tiny models;
its figures mean nothing, and it writes only to ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.adapter import Adapter, adapter_of
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.benchmarks.record import Figure, noise_of, save
from tokenprune.experiments.benchmarks.run import machine
from tokenprune.experiments.benchmarks.watching import cuda_waits
from tokenprune.experiments.common.bench import Bench
from tokenprune.experiments.common.files import check_file
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.models.checkpoints import device_of
from tokenprune.models.loading import adapter_at_random
from tokenprune.registry import adapters

__all__ = ["main", "measure"]

METHODS = ("uniform", "globalcom2", "fastv", "divprune")
RETENTION = (0.5, 0.25, 0.1)
TEXT = 64  # tokens of a prompt that are not visual
RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"


@dataclass(frozen=True)
class Subject:
    """A measured model.

    Attributes:
        name: Its published config, or the family of a tiny model.
        image_size: (height, width) of the image in pixels.
    """

    name: str
    image_size: tuple[int, int]


LARGE = Subject("llava-v1.6-vicuna-7b", (672, 672)), Subject("Qwen2.5-VL-7B", (1512, 1512))
TINY = Subject("LLaVA-NeXT", (24, 24)), Subject("Qwen2.5-VL", (32, 32))


def measure(*, tiny: bool, seconds: float = float("inf")) -> Iterator[list[Figure]]:
    """The figures of every model, kernel and batch size, one list for each.

    Args:
        tiny: Whether to run tiny models on the CPU.
        seconds: No cell begins later than this.
    """
    deadline = time.monotonic() + seconds
    for subject in TINY if tiny else LARGE:
        if time.monotonic() > deadline:
            yield [_late(subject.name)]
            continue
        adapter = _model(subject.name, tiny=tiny)
        layout = adapter.layout(subject.image_size)
        size = adapter.model.dtype.itemsize
        prompt = Prompt(adapter, (layout,), TEXT, size=size, image_size=subject.image_size)
        for kernel in _kernels(tiny=tiny):
            adapter.model.set_attn_implementation(kernel)
            for rows in (1, 2 if tiny else 8):
                bench = Bench(adapter, prompt, rows, repeats=1 if tiny else 3)
                yield [*_figures(bench, f"{subject.name}, {kernel}, batch {rows}", deadline)]
        del adapter, prompt, bench
        torch.cuda.empty_cache()


def _model(name: str, *, tiny: bool) -> Adapter:
    """A model with random weights."""
    if not tiny:
        return adapter_at_random(name, device="cuda", dtype=torch.bfloat16)
    family: Any = adapters.get(name)
    return adapter_of(family.tiny(family.decoders[0]))


def _kernels(*, tiny: bool) -> list[str]:
    """``sdpa``, and flash attention where it is installed."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash = not tiny and is_flash_attn_2_available()
    return ["sdpa", "flash_attention_2"] if flash else ["sdpa"]


def _late(case: str) -> Figure:
    """States that there was no time for a case."""
    return Figure(case=case, figure="left out", value=1, unit="count", note="no time was left")


def _figures(bench: Bench, case: str, deadline: float) -> Iterator[Figure]:
    """The figures of the uncompressed model and of every method."""
    methods = [tp.create(name, retention=ratio) for name in METHODS for ratio in RETENTION]
    full = 0.0  # seconds of the uncompressed model
    for method in (None, *methods):
        place = f"{case}, {'R = 1' if method is None else f'{method.name}@{method.retention:g}'}"
        if time.monotonic() > deadline:
            yield _late(place)
            continue
        try:
            found = [*_cell(bench, method, place, full)]
        except torch.cuda.OutOfMemoryError as error:
            note = str(error).partition(".")[0]
            yield Figure(case=place, figure="out of memory", value=1, unit="count", note=note)
            torch.cuda.empty_cache()
            continue
        full = full or found[0].value
        yield from found


def _cell(bench: Bench, method: Compressor | None, case: str, full: float) -> Iterator[Figure]:
    """Time, speed-up, share of selection, memory and synchronisations of one method.

    Args:
        bench: The model and its prompts.
        method: The method; None for the uncompressed model.
        case: Its name.
        full: Seconds of the uncompressed model; 0 if they are not known.
    """
    run = bench.run(method)
    vision = bench.vision(method.needs if method is not None else frozenset())
    taken = vision.median + run.selector.median + run.prefill.median
    parts = {"vision": vision, "selection": run.selector, "language model": run.prefill}
    noise = sum((noise_of(one) * one.median) ** 2 for one in parts.values()) ** 0.5 / taken
    yield Figure(
        case=case, figure="prefill", value=taken, unit="s", better="low", noise=noise,
        note=", ".join(f"{name} {1000 * one.median:.4g} ms" for name, one in parts.items()),
    )  # fmt: skip
    if method is not None and full:
        yield Figure(case=case, figure="speed-up", value=full / taken, better="high", noise=noise)
    if method is not None:
        yield Figure(
            case=case, figure="selection / prefill", better="low", noise=noise,
            value=(run.selector.median + bench.signals(method)) / taken,
            note="selection with the signals of the vision encoder and of the decoder",
        )  # fmt: skip
    peak = (run.peak + bench.prompt.weight_bytes) / 2**30
    yield Figure(
        case=case, figure="peak memory", value=peak, unit="GiB", better="low",
        note=f"weights included; {run.peak / 2**30:.4g} GiB without, vision encoder not run",
    )  # fmt: skip
    if bench.device.type == "cuda":
        waits = bench.watched(method, cuda_waits)
        yield Figure(case=case, figure="synchronisations", value=waits, unit="count", better="low")


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 2 for bad input."""
    parser = argparse.ArgumentParser(description="Measure prefills of 7B models on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--out", type=Path, help="CSV file; default: in experiments/results")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--minutes", type=float, default=8, help="begin no cell later")
    asked = parser.parse_args(words)
    try:
        path = _run(asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {path}.")
    return 0


def _run(asked: argparse.Namespace) -> Path:
    """Measure and write; the file.

    Raises:
        UserError: No GPU, a rehearsal without ``--out``, or a file that cannot be written.
    """
    place = "cpu" if asked.tiny else "cuda"
    device_of(place)
    if asked.tiny and asked.out is None:
        raise UserError("a rehearsal is not stored with the results; name a file with --out.")
    path: Path = asked.out or RESULTS / f"{_slug(torch.cuda.get_device_name())}.csv"
    check_file(path, new=not asked.force)
    rows: list[dict[str, Any]] = []
    setting = machine(place, asked.tiny)
    for figures in measure(tiny=asked.tiny, seconds=60 * asked.minutes):
        for one in figures:
            rows.append({"benchmark": "gpu", **dataclasses.asdict(one), "met": one.met, **setting})
            unit = "" if one.unit in ("ratio", "count") else f" {one.unit}"
            print(f"{one.case}: {one.figure} {one.value:.4g}{unit}", flush=True)
        save(pd.DataFrame(rows).astype({"goal": float, "met": "boolean"}), path)
    return path


def _slug(device: str) -> str:
    """``gpu-`` and the name of a device in lower case, without blanks."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
