"""Checks tokenprune on a checkpoint that you have: run it once, and attach the file to an issue.

    python -m tokenprune.experiments.checks.real_checkpoint llava-hf/llava-1.5-7b-hf --device cuda

Full retention is compared with the plain model.  Then every method runs at R = 0.25 on the images
of ten bundled scenes.  Logits must be finite, and the ledger must say what hooks count and the KV
cache holds: the tokens of every decoder layer and the bytes of their keys and values.  Prints a
table and writes it as JSON.  A line that says FAILED belongs into an issue.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import tokenprune
from tokenprune.compatibility import lacking
from tokenprune.console import quiet
from tokenprune.errors import RetentionWarning
from tokenprune.models.testbed.scenes import questions
from tokenprune.pipeline import Pipeline
from tokenprune.registry import strategies
from tokenprune.spec import create

__all__ = ["check", "main"]

RETENTION = 0.25


def check(pipe: Pipeline, images: int = 10) -> list[dict[str, Any]]:
    """One row for full retention and one for every method: its name, ``status``, and figures.

    ``status`` is ``ok``, ``needs`` with what the model lacks, or ``FAILED`` with what was wrong.
    A method that raises an exception fails alone.

    Args:
        pipe: The model and its processor.
        images: Number of scenes.
    """
    asked = {one.image_id: one for one in questions(8 * images, seed=0)}
    prompts = [
        pipe.prepare([list(one.images)], [one.question]) for one in [*asked.values()][:images]
    ]
    rows = [_full(pipe, prompts)]
    for name in strategies.names():
        method = create(name, retention=RETENTION)
        missing = lacking(pipe.adapter.facts, method)
        row: dict[str, Any] = {"status": f"needs {missing}"}
        if not missing:
            try:
                row = _run(pipe, prompts, method)
            except Exception as error:  # the other methods still run
                row = {"status": f"FAILED: {type(error).__name__}: {error}"}
        rows.append({"method": name, **row})
    return rows


def _full(pipe: Pipeline, prompts: Sequence[Any]) -> dict[str, Any]:
    """Full retention against the plain model."""
    status = "ok"
    for inputs in prompts:
        plain = _forward(pipe, inputs).logits
        with tokenprune.compress(pipe.model, "uniform", retention=1.0):
            full = _forward(pipe, inputs).logits
        if not torch.equal(full, plain):  # NaN differs too
            gap = (full - plain).abs().max()
            status = f"FAILED: differs from the plain model by up to {gap:.3g}"
    return {"method": "R = 1", "status": status, "realised": 1.0}


def _run(pipe: Pipeline, prompts: Sequence[Any], method: Any) -> dict[str, Any]:
    """One method on all prompts."""
    realised, average, status = 0.0, 0.0, "ok"
    for inputs in prompts:
        counted: list[int] = []
        handles = [
            layer.get_submodule("self_attn").register_forward_pre_hook(
                lambda _, args, kwargs, seen=counted: seen.append(
                    (args[0] if args else kwargs["hidden_states"]).shape[1]
                ),
                with_kwargs=True,
            )
            for layer in pipe.adapter.decoder_layers
        ]
        try:
            with tokenprune.compress(pipe.model, method) as trace:
                out = _forward(pipe, inputs)
        finally:
            for handle in handles:
                handle.remove()
        ledger = trace.ledger
        realised += ledger.realised / len(prompts)
        average += ledger.layer_average / len(prompts)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
        if not out.logits.isfinite().all():
            status = "FAILED: logits are not finite"
        elif counted != [*ledger.tokens_per_layer]:
            said = [*ledger.tokens_per_layer]
            status = f"FAILED: layers process {counted}, the ledger says {said}"
        elif held != ledger.kv_bytes:
            status = f"FAILED: the KV cache has {held} bytes, the ledger says {ledger.kv_bytes}"
    return {"status": status, "realised": realised, "layer_average": average}


@torch.no_grad()
def _forward(pipe: Pipeline, inputs: Any) -> Any:
    return pipe.model(**inputs, use_cache=True)


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Check tokenprune on a checkpoint.")
    parser.add_argument("model", help="a testbed, a local folder or a Hub id")
    parser.add_argument("--images", type=int, default=10, help="number of images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("real_checkpoint.json"))
    asked = parser.parse_args(words)
    if asked.images < 1:
        parser.error(f"--images must be at least 1, not {asked.images}")
    quiet()
    warnings.simplefilter("ignore", RetentionWarning)
    pipe = tokenprune.load(asked.model, device=asked.device, dtype=asked.dtype)
    rows = check(pipe, asked.images)
    versions = {one.__name__: one.__version__ for one in (tokenprune, torch, transformers)}
    about = {"model": asked.model, "device": asked.device, "dtype": str(pipe.model.dtype)}
    asked.out.write_text(json.dumps({**about, **versions, "rows": rows}, indent=1) + "\n")
    for row in rows:
        share = f"{100 * row['realised']:.1f} %" if "realised" in row else ""
        print(f"{row['method']:16} {share:>8}  {row['status']}")
    failed = [row for row in rows if row["status"].startswith("FAILED")]
    print(f"{asked.out}: {len(failed)} of {len(rows)} failed" if failed else f"{asked.out}: all ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
