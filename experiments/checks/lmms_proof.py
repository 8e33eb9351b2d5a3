"""Runs lmms-eval on questions of the testbeds, and compares its answers with ``compare``.

    python -m tokenprune.experiments.checks.lmms_proof /tmp/proof

Needs ``pip install 'tokenprune[lmms-eval]'`` and no network.  Every run is a command of its own, as
a user types it.  The logs become run folders (``tokenprune import-lmms``), whose answers, scores
and ledgers must be those of ``tokenprune compare``.  Exit status 1 if any differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.cost.ledger import FIGURES
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.questions import held_out

__all__ = ["main", "write_task"]


TASK = "scenes"


RETENTION = 0.25


_YAML = """\
task: {task}
dataset_path: {folder}/data
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function {task}_utils.visuals
doc_to_text: question
doc_to_target: answer
process_results: !function {task}_utils.score
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""


_UTILS = """\
def visuals(doc):
    return [doc["image"]]


def score(doc, results):
    return {"right": float(results[0].strip().lower() == doc["answer"])}
"""


_FAMILIES = {
    "testbed-next": ("tokenprune_llava_hf", ("globalcom2", "fastv:layer=2")),
    "testbed-onevision": ("tokenprune_llava_onevision", ("dart",)),
    "testbed-qwen": ("tokenprune_qwen2_5_vl", ("divprune",)),
}
"""Testbed to its model id and the methods that run beside the baseline."""


def write_task(folder: Path, count: int) -> None:
    """A task of lmms-eval with the first ``count`` held-out questions, and its data."""
    from datasets import Dataset, DatasetDict

    asked = held_out(count, 0)
    rows: dict[str, list[Any]] = {
        "image": [item.images[0].open() for item in asked],
        "question": [item.question for item in asked],
        "answer": [item.answer for item in asked],
    }
    DatasetDict({"test": Dataset.from_dict(rows)}).save_to_disk(str(folder / "data"))
    text = _YAML.format(task=TASK, folder=folder.resolve())
    (folder / f"{TASK}.yaml").write_text(text, encoding="utf-8")
    (folder / f"{TASK}_utils.py").write_text(_UTILS, encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run the proof.  Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="Folder that receives everything.")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=[*_FAMILIES], choices=[*_FAMILIES])
    asked = parser.parse_args(words)
    folder: Path = asked.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_task(folder, asked.questions)
    runs = [
        _evaluation(folder, model, method, asked.batch_size)
        for model in asked.models
        for method in ("none", *_FAMILIES[model][1])
    ]
    (folder / "runs.json").write_text(json.dumps(runs, indent=2), encoding="utf-8")  # also YAML
    _run("lmms_eval", "--config", folder / "runs.json")
    wrong = [model for model in asked.models if not _same(folder, model, asked.questions)]
    return int(bool(wrong))


def _evaluation(folder: Path, model: str, method: str, size: int) -> dict[str, Any]:
    """One run of lmms-eval, as options of its command line."""
    arguments = f"pretrained={model},method={method},save_images={folder / 'images'}"
    arguments += "" if method == "none" else f",retention={RETENTION}"
    return {
        "model": _FAMILIES[model][0],
        "model_args": arguments,
        "device": "cpu",
        "include_path": str(folder),
        "tasks": TASK,
        "batch_size": str(size),
        "log_samples": True,
        "output_path": str(folder / "logs" / model / method.replace(":", "-")),
    }


def _same(folder: Path, model: str, count: int) -> bool:
    """Import the logs of ``model``, run the comparison, and say whether they agree."""
    imported, compared = folder / "imported" / model, folder / "compared" / model
    logs, images = folder / "logs" / model, folder / "images"
    fast = ("--format", "png")
    _run("tokenprune", "import-lmms", logs, "--images", images, "--out", imported, *fast)
    _run(
        *("tokenprune", "compare", "--model", model, "--questions", count, "--device", "cpu"),
        *("--retention", RETENTION, "--methods", *_FAMILIES[model][1], "--out", compared),
        *fast,
    )
    found = differences(imported, compared)
    print(f"{model}: {found or 'the same answers, scores and ledgers'}", flush=True)
    return not found


def _run(module: str, *words: Any) -> None:
    """Run a module in a process without network.  Raises `SystemExit` if it fails."""
    print("$", module, *words, flush=True)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, **offline}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{module} failed.")


def differences(ours: Path, other: Path) -> str:
    """How the answers of two run folders differ; empty if they do not.

    Questions are matched by their text and their true answer, in order.
    """
    mine, theirs = (_answers(folder) for folder in (ours, other))
    if list(mine) != list(theirs):
        return f"cells {list(mine)} and {list(theirs)}"
    found = []
    for cell, rows in mine.items():
        for column in ("question", "truth", "answer", "correct", *FIGURES):
            unlike = rows[column].to_numpy() != theirs[cell][column].to_numpy()
            if unlike.any():
                found.append(f"{cell}: {unlike.sum()} of {len(rows)} differ in {column}")
    return "; ".join(found)


def _answers(folder: Path) -> dict[str, pd.DataFrame]:
    """The answers of every method, in the order of the questions."""
    table = read_answers(folder).dropna(subset="retention")
    table = table.assign(cell=table["label"] + "@" + table["retention"].astype(str))
    return {str(cell): rows for cell, rows in sorted(table.groupby("cell"), key=lambda one: one[0])}


if __name__ == "__main__":
    sys.exit(main())
