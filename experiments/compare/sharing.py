"""Computes the shared work of the cells of a comparison once per batch of questions.

The vision encoder and its signals run before, once per image (`compare.loop`).  Of the rest:

* Prompts are tokenised once.
* The uncompressed model and cells that cut inside the language model run one after the other on the
  whole batch; the layers in front of their first cuts run once (`tokenprune.engine.prefix`).
* Cells that act in front of the language model give it shorter prompts, so several fit into the
  memory of one uncompressed batch.  Rows (a question in a cell) of about the same length run
  together, whatever their cell and question: there is little padding, and decoding takes few steps.

The batches depend on questions and cells alone, not on the answers that exist already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.compressor import Compressor, Stage
from tokenprune.engine.prefix import Prefix, in_front

if TYPE_CHECKING:
    from tokenprune.experiments.common.cells import Cell
    from tokenprune.experiments.compare.runner import ModelRunner, Runner
    from tokenprune.tokens import VisualTokens

__all__ = [
    "Job",
    "JobPlan",
    "separate",
    "together",
]


# The embeddings of all rows briefly exist at full length; a batch of this many uncompressed
# ones is less than the KV cache of one such batch in any decoder of a usual depth.
ROWS = 8


# On the CPU larger batches fall out of its caches: a fifth slower on the testbed.
TOKENS = 4096


# Rows shorter than this share of the longest one go to a batch of their own length.
ALIKE = 0.85


@dataclass(frozen=True)
class Job:
    """Answers that are computed together.

    Attributes:
        rows: Index of the cell and of the question of each.
        run: Makes their records, in that order; None for one cell that runs alone.
    """

    rows: Sequence[tuple[int, int]]
    run: Callable[[], Sequence[dict[str, Any]]] | None = None


JobPlan = Callable[[Any, Sequence["Cell"], Sequence[Sequence[Any]], Sequence[str]], Iterator[Job]]
"""Makes the jobs of a runner, from the runner, the cells, the encoded images and the prompts."""


def separate(
    runner: Runner, cells: Sequence[Cell], images: Sequence[Sequence[Any]], prompts: Sequence[str]
) -> Iterator[Job]:
    """One cell after the other."""
    for cell in range(len(cells)):
        yield Job([(cell, question) for question in range(len(prompts))])


def together(
    runner: ModelRunner,
    cells: Sequence[Cell],
    images: Sequence[Sequence[VisualTokens]],
    prompts: Sequence[str],
) -> Iterator[Job]:
    """Compute the shared work of cells once; see the module."""
    pipe = runner.pipe
    inputs = pipe.assemble(images, prompts)
    methods = [cell.compressor for cell in cells]
    everything = range(len(prompts))

    same_input: dict[str, list[int]] = {}
    joined: dict[bool, list[int]] = {}
    for index, method in enumerate(methods):
        parts = list(method.parts()) if method is not None else []
        stages = {part.stage for part in parts}
        if Stage.ENCODER in stages:
            yield Job([(index, question) for question in everything])
        elif stages == {Stage.PRE_LLM} and method is not None and method.retention < 1:
            joined.setdefault(parts[0].keeps_positions, []).append(index)
        else:
            same_input.setdefault(repr(in_front(method)), []).append(index)

    for group in same_input.values():
        prefix = Prefix(pipe.adapter, [methods[index] for index in group])
        for index in group:
            taken = pipe.take(inputs, images, everything)
            run = functools.partial(_generate, runner, methods[index], taken, prefix)
            yield Job([(index, question) for question in everything], run)
        prefix.clear()

    for group in joined.values():
        lengths = _lengths(methods, group, images, inputs["attention_mask"].sum(1).tolist())
        width = inputs["attention_mask"].shape[1]
        most = len(prompts) * width
        if pipe.device.type == "cpu":
            most = min(most, max(TOKENS, width))
        for rows in _of_equal_length(lengths, most, width):
            taken = pipe.take(inputs, images, [question for _, question in rows])
            mixed = [method for cell, _ in rows if (method := methods[cell])]
            run = functools.partial(runner.generate, mixed, taken)
            yield Job(rows, run)


def _generate(
    runner: ModelRunner, compressor: Compressor | None, inputs: dict[str, Any], prefix: Prefix
) -> list[dict[str, Any]]:
    try:
        return runner.generate(compressor, inputs, prefix)
    except BaseException:
        prefix.clear()  # it may have caused the lack of memory
        raise


def _lengths(
    methods: Sequence[Compressor | None],
    group: Sequence[int],
    images: Sequence[Sequence[VisualTokens]],
    full: Sequence[int],
) -> dict[tuple[int, int], int]:
    """Cell and question to the approximate number of tokens in the language model."""
    found = {}
    for question, some in enumerate(images):
        patches = [len(tokens.layout.patches) for tokens in some]
        for cell in group:
            method = methods[cell]
            ratio = method.retention if method is not None else 1.0
            kept = sum(math.ceil(ratio * count) for count in patches)
            found[cell, question] = full[question] - sum(patches) + kept
    return found


def _of_equal_length(
    lengths: dict[tuple[int, int], int], most: int, width: int
) -> Iterator[list[tuple[int, int]]]:
    """Rows in batches of at most ``most`` tokens, where an uncompressed row has ``width``."""
    count = most // width
    batch: list[tuple[int, int]] = []
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        longest = lengths[batch[0]] if batch else lengths[row]
        full = (len(batch) + 1) * longest > most or len(batch) == ROWS * count
        if batch and (full or (lengths[row] < ALIKE * longest and len(batch) >= count)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
