"""Checks tokenprune on a checkpoint that you have: run it once, and attach the file to an issue.

    python -m tokenprune.experiments.checks.real_checkpoint llava-hf/llava-1.5-7b-hf --device cuda

Full retention is compared with the plain model.  Then every method runs at R = 0.25 on the images
of ten bundled scenes.  Logits must be finite, and the ledger must say what hooks count: the tokens
of every decoder layer.  Prints a table and writes it as JSON.
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

    ``status`` is ``ok``, the reason why the model refuses the method, or what was wrong.

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
        row = {"status": f"needs {missing}"} if missing else _run(pipe, prompts, method)
        rows.append({"method": name, **row})
    return rows


def _full(pipe: Pipeline, prompts: Sequence[Any]) -> dict[str, Any]:
    """Full retention against the plain model."""
    status = "ok"
    for inputs in prompts:
        plain = _logits(pipe, inputs)
        with tokenprune.compress(pipe.model, "uniform", retention=1.0):
            full = _logits(pipe, inputs)
        if not torch.equal(full, plain):  # NaN differs too
            status = f"differs from the plain model by up to {(full - plain).abs().max():.3g}"
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
                logits = _logits(pipe, inputs)
        finally:
            for handle in handles:
                handle.remove()
        ledger = trace.ledger
        realised += ledger.realised / len(prompts)
        average += ledger.layer_average / len(prompts)
        if not logits.isfinite().all():
            status = "logits that are not finite"
        elif counted != [*ledger.tokens_per_layer]:
            status = f"layers process {counted}, the ledger says {[*ledger.tokens_per_layer]}"
    return {"status": status, "realised": realised, "layer_average": average}


@torch.no_grad()
def _logits(pipe: Pipeline, inputs: Any) -> torch.Tensor:
    found: torch.Tensor = pipe.model(**inputs, use_cache=True).logits
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Run the script; the exit status is 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Check tokenprune on a checkpoint.")
    parser.add_argument("model", help="a testbed, a local folder or a Hub id")
    parser.add_argument("--images", type=int, default=10, help="number of images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=Path("real_checkpoint.json"))
    asked = parser.parse_args(words)
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
    failed = [row for row in rows if row["status"] != "ok" and "needs" not in row["status"]]
    print(f"{asked.out}: {len(failed)} of {len(rows)} failed" if failed else f"{asked.out}: all ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
