"""Measures time and memory of the methods of a comparison on this device.

All cells answer one question, the one with the median number of visual tokens, alone and with the
same number of new tokens.  They run in turn, so that a slower or faster phase of the machine
affects them alike, and all with the attention kernel of the loaded model.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.errors import RetentionWarning
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.times import TIMES
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.experiments.compare.matching import median_question
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "measure",
]


REPEATS = 7


WARM_UP = 2


NEW_TOKENS = 8
"""Tokens of every timed answer."""


def measure(
    pipe: Pipeline,
    cells: Sequence[Cell],
    questions: Sequence[Question],
    folder: Path,
    progress: ProgressCallback = silent,
) -> pd.DataFrame:
    """Time the uncompressed model and every method, and write ``times.csv``.

    One row per cell and timed run: ``prefill_ms`` (vision encoder, selection and prefill, until the
    logits of the first token), ``total_ms`` (until the last of `NEW_TOKENS` tokens), ``token_ms``
    (mean of the tokens after the first), ``peak_bytes`` (weights and all tensors of an answer).
    ``status`` is "ok", or why the cell could not be measured.  References are left out.

    Args:
        pipe: Of the model.
        cells: The cells of the run.
        questions: The questions of the run.
        folder: The run folder.
        progress: Called before every step.
    """
    item = median_question(pipe, [one for one in questions if not one.fault])
    chosen = [cell for cell in cells if not cell.name]
    keys: dict[str, Cell] = {}
    for cell in chosen:
        keys.setdefault(cell.key, cell)  # at R = 1 all methods are the uncompressed model
    timer = _Timer(pipe, item)
    found, failed = _timed(timer, keys, progress)
    peaks = {key: tried(partial(timer.peak, keys[key])) for key in keys if key not in failed}
    same = {**timer.setting, "question_id": item.id}
    rows = []
    for cell in {(one.label, one.retention, one.parameters): one for one in chosen}.values():
        key = cell.key
        about: dict[str, Any] = {name: getattr(cell, name) for name in _CELL}
        about["status"] = failed.get(key, "ok")
        peak = peaks.get(key)
        if not isinstance(peak, Failure):  # there are devices that do not count memory
            about["peak_bytes"] = peak
        runs = [{}] if key in failed else found[key]
        rows += [{**about, **same, "run": index, **run} for index, run in enumerate(runs)]
    table = pd.DataFrame(rows).reindex(columns=_COLUMNS)
    with replace_file(folder / TIMES) as temporary:
        write_csv(table, temporary)
    return table


def _timed(
    timer: _Timer, keys: Mapping[str, Cell], progress: ProgressCallback
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Cell key to the times of its runs, and to why it could not be run."""
    found: dict[str, list[dict[str, Any]]] = {key: [] for key in keys}
    failed: dict[str, str] = {}
    total = (WARM_UP + REPEATS) * len(keys)
    for index in range(total):
        key = list(keys)[index % len(keys)]
        cell = keys[key]
        if key in failed:
            continue
        progress(index, total, f"time of {cell}")
        run = timer.run if index >= WARM_UP * len(keys) else timer.warm_up
        row = tried(partial(run, None if key == UNCOMPRESSED else cell.compressor))
        if isinstance(row, Failure):
            failed[key] = row.error
        elif row:
            found[key].append(row)
    return found, failed


_CELL = ("method", "label", "parameters", "retention")


_COLUMNS = [
    *(*_CELL, "status", "run"),
    *("prefill_ms", "total_ms", "token_ms", "peak_bytes"),
    *("new_tokens", "warm_up", "attention", "dtype", "device", "question_id"),
]


class _Timer:
    """Times answers to one prompt."""

    def __init__(self, pipe: Pipeline, item: Question) -> None:
        shown = [picture.open() for picture in item.images]
        images, videos = (None, [[shown]]) if item.video else ([shown], None)
        self.pipe, self.inputs = pipe, pipe.prepare(images, [item.question], videos)
        model = pipe.model
        held = [*model.parameters(), *model.buffers()]
        self.weights = sum(one.numel() * one.element_size() for one in held)

    @property
    def setting(self) -> dict[str, Any]:
        """What is the same for all cells."""
        model, device = self.pipe.model, self.pipe.device
        gpu = device.type == "cuda"
        return {
            "new_tokens": NEW_TOKENS,
            "warm_up": WARM_UP,
            "attention": getattr(model.config, "_attn_implementation", None),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(device) if gpu else platform.machine(),
        }

    def _prefill(self) -> None:
        with torch.no_grad():
            self.pipe.model(**self.inputs, use_cache=True, logits_to_keep=1)

    def _answer(self) -> None:
        self.pipe.model.generate(
            **self.inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
        )

    def run(self, method: Compressor | None) -> dict[str, float]:
        """Milliseconds of one prefill and of one answer; the device is synchronised (`timed`)."""
        once = partial(timed, warmup=0, repeats=1, device=self.pipe.device)
        with warnings.catch_warnings(), tp.compress(self.pipe.model, method):
            warnings.simplefilter("ignore", RetentionWarning)
            prefill, total = (1000 * once(work).median for work in (self._prefill, self._answer))
        token = max(0.0, total - prefill) / (NEW_TOKENS - 1)
        return {"prefill_ms": prefill, "total_ms": total, "token_ms": token}

    def warm_up(self, method: Compressor | None) -> dict[str, float]:
        """As `run`, but its times do not count."""
        self.run(method)
        return {}

    def peak(self, cell: Cell) -> int:
        """Bytes of the weights and, at their peak, of all tensors of an answer."""
        method = None if cell.key == UNCOMPRESSED else cell.compressor
        with warnings.catch_warnings(), tp.compress(self.pipe.model, method):
            warnings.simplefilter("ignore", RetentionWarning)
            peak = peak_memory(self._answer, self.pipe.device)
        return int(self.weights + peak)
