"""Time and memory of methods on this device.

Real shapes with random content: speed and memory do not depend on weights and pixels (the selection
may: SparseVLM's number of raters).  If a model is built with fewer decoder layers than it has, the
cost of the others is extrapolated from a fit of a layer's time over the number of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.common.bench import Bench
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.experiments.efficiency.costs import break_even
from tokenprune.models.checkpoints import device_of
from tokenprune.models.loading import adapter_at_random
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "Measured",
    "measure",
]


# --- the experiment -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        table: One row for the uncompressed model and one for every method, in seconds and bytes.
        words: How it was measured, as sentences.
    """

    table: pd.DataFrame
    words: str


def measure(
    model: str,
    prompt: Prompt,
    methods: Sequence[Compressor],
    *,
    layers: int | None = None,
    batch_size: int = 1,
    repeats: int = 5,
    device: str | None = None,
    progress: ProgressCallback = silent,
) -> Measured:
    """Time methods on ``prompt``, on a model of its shapes with random weights.

    Columns of the table: ``vision`` (the encoder's signals included), ``selector``, ``prefill`` (of
    the language model, without the former two) and ``decode`` (one token) in seconds, each with
    ``_spread``; ``peak_bytes`` (weights, KV cache, and what the prefill needs besides);
    ``pays_from``; ``status``: ``ok`` or why a method does not run at this depth.

    Raises:
        UserError: A number out of range, or a device that does not exist.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("layers", layers)):
        check_number(name, value)
    place = device_of(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = {2: torch.bfloat16, 4: torch.float32}[prompt.size]
    dtype = torch.float32 if place.type == "cpu" else half
    total = 3 + len(methods)
    progress(0, total, "building the model")
    adapter = adapter_at_random(model, layers=layers, device=place, dtype=dtype)
    prompt = replace(prompt, size=dtype.itemsize)
    bench = Bench(adapter, prompt, batch_size, repeats)
    progress(1, total, "vision encoder and decoder layers")
    bench.vision()
    rows = []
    for index, method in enumerate((None, *methods)):
        label = "uncompressed" if method is None else method.label
        progress(2 + index, total, label)
        row = {
            "method": "uncompressed" if method is None else method.name,
            "label": label,
            "retention": 1.0 if method is None else method.retention,
        }
        try:
            if method is not None:
                check_compatible(adapter.facts, method)
        except UserError as error:
            rows.append(row | {"status": str(error)})
            continue
        rows.append(row | {"status": "ok"} | _row(bench, method))
    return Measured(pd.DataFrame(rows), _words(bench, model))


def _row(bench: Bench, method: Compressor | None) -> dict[str, Any]:
    prompt, run = bench.prompt, bench.run(method)
    forecast = prompt.forecast(method, draws=1).ledger
    deeper = prompt.shape.layers / bench.depth
    missing = prompt.shape.layers - bench.depth
    more = bench.layers_take(forecast) - bench.layers_take(run.ledger) if missing else 0.0
    weights = prompt.weight_bytes
    kv = bench.batch_size * (forecast.kv_bytes - run.ledger.kv_bytes) if missing else 0
    outside = min(bench.outside, run.decode.median)
    vision = bench.vision(method.needs if method is not None else frozenset())
    found = {
        "vision": vision.median,
        "vision_spread": vision.spread,
        "selector": run.selector.median,
        "selector_spread": run.selector.spread,
        "prefill": run.prefill.median + more,
        "prefill_spread": run.prefill.spread * deeper,
        "decode": outside + (run.decode.median - outside) * deeper,
        "decode_spread": run.decode.spread * deeper,
        "peak_bytes": weights + run.peak + kv,
        "layers_measured": bench.depth,
    }
    if method is None or method.retention == 1:
        return found | {"pays_from": None}
    choosing = bench.selector_curve(method, run)
    return found | {
        "pays_from": break_even(
            prompt,
            method,
            lambda ledger: choosing(ledger.patch_tokens) + bench.layers_take(ledger),
            lambda ledger: prompt.shape.layers * bench.layer(ledger.patch_tokens + prompt.text),
        )
    }


def _words(bench: Bench, model: str) -> str:
    device = bench.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kind = str(bench.adapter.model.dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    words = (
        f"{name}{threads}, {kind}, random weights, batch {bench.batch_size}; median ± half the "
        f"interquartile range of {bench.repeats} runs after one warm-up. Vision: encoder "
        "with the signals of the method. Prefill: language model without selection. Decode: one "
        "token. Pays: visual tokens from which on selection and prefill are faster than the "
        "uncompressed prefill, from fits over prompt lengths."
    )
    depth, there = bench.prompt.shape.layers, bench.depth
    if there < depth:
        words += (
            f" Only {there} of {depth} decoder layers were built: times and memory of the other "
            f"{depth - there} are EXTRAPOLATED from a layer's time over its tokens."
        )
    return words
