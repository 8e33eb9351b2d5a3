"""The time of a comparison with shared work, against its cells run separately and the lower bound.

"Separately" means that each cell is a comparison with its own run of the vision encoder.  Answers
and ledgers of both must be equal.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import tokenprune as tp
from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.engine.decoder import cuts_of
from tokenprune.experiments.benchmarks.record import Figure
from tokenprune.experiments.benchmarks.shapes import (
    LLAVA_NEXT_7B,
    VISION_LAYERS,
    VISION_WIDTH,
    larger_testbed,
    vit_flops,
)
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Question, held_out
from tokenprune.experiments.common.request import RETENTION
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.compare.run import answer
from tokenprune.pipeline import Pipeline

METHODS = ("uniform", "globalcom2", "visionzip", "fastv", "dart", "pyramiddrop")
HARDER = (0.75, 0.5, 0.25, 0.1)  # without R = 1, which all methods share
SCALED = DecoderShape(layers=32, hidden=256, intermediate=688, heads=2, kv_heads=2, head_dim=128)
Answers = dict[tuple[str, str], dict[str, Any]]


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Time ratios, their lower bounds by FLOPs, and the quotients of both."""
    count, size = (4, 4) if quick else (50, 50)
    pipe = tp.load("testbed-next", device=device)
    several = held_out(5 * count, 0, "image")
    for label, ratios, asked, goal in (
        ("testbed-next, default grid", RETENTION, several[::5], 0.4),
        ("testbed-next, four compressed", HARDER, several[::5], None),
        ("testbed-next, 5 questions an image", RETENTION, several[:count], None),
    ):
        tell(label)
        yield from _grid(pipe, label, ratios, asked, size, new=8, goal=goal)
        if quick:
            return
    tell("decoder of 32 layers")
    larger = larger_testbed(SCALED)  # where the decoder dominates
    larger.model.to(device)
    asked = held_out(20, 0, "image")[::5]
    yield from _grid(larger, "32 layers of 256", HARDER, asked, 4, new=1, goal_of_bound=1.1)
    bound = _bound_7b(larger, cells(METHODS, HARDER)[1:])
    yield Figure(case="LLaVA-NeXT-7B", figure="bound on it", value=bound)


def _grid(
    pipe: Pipeline,
    case: str,
    ratios: Sequence[float],
    asked: Sequence[Question],
    size: int,
    *,
    new: int,
    goal: float | None = None,
    goal_of_bound: float | None = None,
) -> Iterator[Figure]:
    """All methods at all ``ratios``: the ratio of times, and the ratio of FLOPs."""
    together, alone, columns, answers = _both(pipe, ratios, asked, size, new)
    flops = {
        cell.key: sum(answers[cell.key, item.id]["flops"] for item in asked) for cell in columns
    }
    full = sum(answers[UNCOMPRESSED, item.id]["uncompressed_flops"] for item in asked)
    ratio, tower = together / alone, _tower_flops(pipe, asked)
    bound = _bound(pipe, columns, flops, full, tower)
    note = f"{len(METHODS)} methods x {len(ratios)} retentions, {len(asked)} questions"
    yield Figure(
        case=case, figure="time / separately", value=ratio, better="low", goal=goal, note=note
    )
    note = "FLOPs of prefill and vision encoder; no new tokens"
    yield Figure(case=case, figure="bound on it", value=bound, note=note)
    yield Figure(
        case=case, figure="time / bound", value=ratio / bound, better="low", goal=goal_of_bound
    )


def _both(
    pipe: Pipeline, ratios: Sequence[float], asked: Sequence[Question], size: int, new: int
) -> tuple[float, float, list[Cell], Answers]:
    """Seconds of the comparison and of all cells separately, the cells and the answers."""
    columns = cells(METHODS, ratios)
    _run(pipe, columns[-1:], asked[:1], size, new)  # warm up
    together, answers = _run(pipe, columns, asked, size, new)
    alone = 0.0
    for cell in columns[1:]:  # the uncompressed model comes on top of the grid
        seconds, same = _run(pipe, [cell], asked, size, new, shared=False)
        alone += seconds
        # At R = 1 the ledger of a separate cell includes the cost of selecting all tokens.
        if cell.retention < 1 and any(
            answers[key] != made | {"kl": answers[key]["kl"]} for key, made in same.items()
        ):
            raise RuntimeError(f"{cell} answers differently when it runs separately")
    return together, alone, columns[1:], answers


def _run(
    pipe: Pipeline,
    columns: Sequence[Cell],
    asked: Sequence[Question],
    size: int,
    new: int,
    *,
    shared: bool = True,
) -> tuple[float, Answers]:
    device = pipe.device
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal(Path(folder) / "answers.jsonl") as journal,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        start = time.perf_counter()
        answer(
            pipe,
            columns,
            asked,
            journal,
            max_new_tokens=new,
            batch_size=size,
            shared=shared,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if journal.failures:
            raise RuntimeError(next(iter(journal.failures.values())).traceback)
        return seconds, journal.answers


def _tower_flops(pipe: Pipeline, asked: Sequence[Question]) -> float:
    """FLOPs of the vision encoder, once for every image."""
    images = {item.image_id: item.images[0] for item in asked}.values()
    sizes = [image.open().size for image in images]
    vision = pipe.adapter.base.config.vision_config
    return vit_flops(
        sum(pipe.adapter.layout((height, width)).views for width, height in sizes),
        vision.image_size**2 // vision.patch_size**2,
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers,
    )  # fmt: skip


def _bound(
    pipe: Pipeline, columns: Sequence[Cell], flops: dict[str, float], full: float, tower: float
) -> float:
    """FLOPs with all shared work done once, over the FLOPs of all cells separately."""
    layers = len(pipe.adapter.decoder_layers)
    together = tower + full
    for cell in columns:
        if cell.key == UNCOMPRESSED:  # its answers at R = 1 are shared
            continue
        first = min(cuts_of(pipe.adapter, cell.compressor), default=0)
        together += flops[cell.key] - full * first / layers  # layers before the cut are shared
    return together / sum(tower + flops[cell.key] for cell in columns)


def _bound_7b(pipe: Pipeline, columns: Sequence[Cell]) -> float:
    """`_bound` for one square image in LLaVA-NeXT-7B, with the cuts and budgets of the methods."""
    shape, patches, rest = LLAVA_NEXT_7B, 2880, 48 + 64
    full = prefill_flops([patches + rest] * shape.layers, shape)
    flops = {}
    for cell in columns:
        # The decoder of `pipe` has 32 layers, too, so its cuts hold for the 7B model.
        cuts = sorted(cuts_of(pipe.adapter, cell.compressor)) or [0]
        tokens = []
        for layer in range(shape.layers):
            passed = sum(cut <= layer for cut in cuts)
            tokens.append(int(cell.retention ** (passed / len(cuts)) * patches) + rest)
        flops[cell.key] = prefill_flops(tokens, shape)
    tower = vit_flops(5, 576, VISION_WIDTH, 4 * VISION_WIDTH, VISION_LAYERS)
    return _bound(pipe, columns, flops, full, tower)
