"""The table of expected GPU hours of `docs/lmms-eval.md`, computed by the forecast."""

from __future__ import annotations

from dataclasses import dataclass

from results import markdown

import tokenprune as tp
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.models.loading import adapter_without_weights

MODEL = "llava-v1.6-vicuna-7b"

PEAK, COMPUTING = 312e12, 0.5
"""FLOP/s of an A100 in bfloat16 (data sheet), and the share of it that a prefill reaches."""

BANDWIDTH, READING = 2.0e12, 0.6
"""Bytes/s of the memory of an A100 with 80 GB (data sheet), and the share that decoding reaches."""

BATCH = 8


@dataclass(frozen=True)
class Benchmark:
    """A task of lmms-eval.

    Attributes:
        task: Its name.
        questions: Number of documents of its split.
        image: A typical (height, width).
        text: Typical number of text tokens.
        new: Typical number of tokens of an answer.
    """

    task: str
    questions: int
    image: tuple[int, int]
    text: int
    new: int


BENCHMARKS = (
    Benchmark("vqav2_val", 214354, (480, 640), 60, 3),
    Benchmark("gqa", 12578, (480, 640), 60, 3),
    Benchmark("vizwiz_vqa_val", 4319, (1632, 1224), 80, 3),
    Benchmark("scienceqa_img", 2017, (384, 512), 120, 2),
    Benchmark("textvqa_val", 5000, (768, 1024), 60, 4),
    Benchmark("pope", 9000, (480, 640), 60, 2),
    Benchmark("mme", 2374, (480, 640), 60, 2),
    Benchmark("mmbench_en_dev", 4329, (384, 512), 120, 2),
    Benchmark("mmbench_cn_dev", 4329, (384, 512), 160, 2),
    Benchmark("mmvet", 218, (480, 640), 60, 150),
)
"""The ten benchmarks of arXiv 2501.05179.

Numbers of documents are those of the data sets on the Hub; the other figures are round and typical.
"""


def hours(benchmark: Benchmark, prompt: Prompt, method: tp.Compressor | None) -> float:
    """Expected hours of one GPU.

    Vision encoder and prefill are bound by arithmetic.  A decode step is bound by memory: it reads
    the weights once for a batch, and the KV cache of every prompt.
    """
    ledger = prompt.forecast(method, draws=1).ledger
    reading = (ledger.vision_flops + ledger.flops) / (PEAK * COMPUTING)
    step = (prompt.weight_bytes / BATCH + ledger.kv_bytes) / (BANDWIDTH * READING)
    return benchmark.questions * (reading + benchmark.new * step) / 3600


def gpu_hours(_: str = "") -> str:
    """One row per benchmark and their sum: uncompressed, and with GlobalCom² at two ratios."""
    adapter = adapter_without_weights(MODEL)
    methods = [None, *(tp.create("globalcom2", retention=share) for share in (0.25, 0.1))]
    prompts: dict[tuple[tuple[int, int], int], Prompt] = {}
    rows, totals = [], [0.0] * len(methods)
    for one in BENCHMARKS:
        key = one.image, one.text
        if key not in prompts:
            prompts[key] = Prompt(adapter, (adapter.layout(one.image),), one.text)
        found = [hours(one, prompts[key], method) for method in methods]
        totals = [total + new for total, new in zip(totals, found, strict=True)]
        size = "{}x{}".format(*one.image)
        head = (f"`{one.task}`", f"{one.questions:,}", size, prompts[key].visual, one.new)
        rows.append((*head, *(f"{value:.2f}" for value in found)))
    count = sum(one.questions for one in BENCHMARKS)
    rows.append(("all", f"{count:,}", "", "", "", *(f"{total:.1f}" for total in totals)))
    head = ("task", "questions", "image", "visual tokens", "new tokens")
    return markdown((*head, "uncompressed", "R = 0.25", "R = 0.1"), rows)


INSERTS = {"lmms-hours": gpu_hours}
