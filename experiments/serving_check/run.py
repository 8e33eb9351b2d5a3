"""Asks the same questions through Hugging Face and through a vLLM server."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from tokenprune.compressor import Compressor
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.questions import Question, held_out
from tokenprune.experiments.serving_check.server import (
    Reply,
    Server,
    embeds_part,
    image_part,
    require_vllm,
    running,
)
from tokenprune.models.loading import load
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.serving import check_served, image_embeds, served
from tokenprune.serving.vllm_pruning import Plan

__all__ = ["CheckRequest", "Checked", "malformed", "run"]


@dataclass(frozen=True)
class CheckRequest:
    """What to check.

    Attributes:
        model: Embedded testbed, Hub id or local folder.
        spec: The method with its retention.
        questions: Number of held-out questions.
        seed: Their seed.
        max_new_tokens: Maximum length of an answer.
        clients: Number of requests at once.
        device, dtype, trust_remote_code: Of the model in Hugging Face, as in `tokenprune.load`.
        timeout: Seconds within which a server must have started.
    """

    model: str
    spec: str
    questions: int = 40
    seed: int = 0
    max_new_tokens: int = 8
    clients: int = 8
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    timeout: float = 600


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        table: One row for the plain model and one for the spec: ``served``, ``questions``,
            ``same_ids``, ``probability`` (largest difference), ``same_prompts``, ``prompt`` (mean
            number of tokens), ``blocks`` (mean, of the KV cache), ``block_size``, ``rate``
            (requests a second), ``malformed`` (embeddings that the server refused) and ``sent``.
        way: Where the images are compressed, and why there.
    """

    table: pd.DataFrame
    way: str

    @property
    def passed(self) -> bool:
        """Whether all answers and prompt lengths are the same, and malformed requests refused."""
        same = self.table[["same_ids", "same_prompts"]].eq(self.table["questions"], axis=0)
        refused = self.table["malformed"] == self.table["sent"]
        return bool(same.all().all() and refused.all())


def run(request: CheckRequest, progress: ProgressCallback = silent) -> Checked:
    """Check a spec on a model.

    Raises:
        UserError: vLLM is not installed, the method cannot be served, or the server does not start.
    """
    check_number("questions", request.questions)
    check_number("clients", request.clients)
    compressor = served(request.spec)
    require_vllm()
    pipe = load(
        request.model,
        device=request.device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    check_served(pipe.adapter, compressor)
    try:
        Plan(pipe.model.config, request.spec)
        separate, way = False, "in the server."
    except UserError as error:
        separate, way = True, f"in front of the server: {error}"
    asked = held_out(request.questions, request.seed)
    plain = _hugging_face(pipe, asked, None, request, progress)
    compressed = _hugging_face(pipe, asked, compressor, request, progress)
    sources: list[tuple[str | None, list[dict[str, Any]]]]
    pictures = [image_part(item.images[0].open()) for item in asked]
    sources = [(None, pictures), (request.spec, pictures)]
    if separate:
        sources[1] = None, _embedded(pipe, asked, compressor)
    place, dtype = str(pipe.path or request.model), str(pipe.model.dtype).removeprefix("torch.")
    width = pipe.adapter.facts.decoder.hidden
    del pipe
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the server
    longest = max(reply.prompt for reply in plain) + request.max_new_tokens
    rows = []
    for expected, (spec, parts) in zip((plain, compressed), sources, strict=True):
        with running(
            place,
            spec,
            dtype=dtype,
            longest=64 * math.ceil(2 * longest / 64),
            timeout=request.timeout,
            progress=progress,
        ) as server:
            rows.append(_compared(server, expected, asked, parts, width, request))
    table = pd.DataFrame(rows)
    table.insert(0, "served", ["uncompressed", request.spec])
    return Checked(table, way)


def _hugging_face(
    pipe: Pipeline,
    asked: Sequence[Question],
    compressor: Compressor | None,
    request: CheckRequest,
    progress: ProgressCallback,
) -> list[Reply]:
    """The answers of the model in Hugging Face."""
    found = []
    with compress(pipe, compressor) as trace:
        for index, item in enumerate(asked):
            progress(index, len(asked), "Hugging Face")
            inputs = pipe.prepare([item.images[0].open()], [item.question])
            length = inputs["input_ids"].shape[1]
            made = pipe.model.generate(
                **inputs,
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            ids = made.sequences[0, length:].tolist()
            first = made.logits[0][0].double().softmax(-1)[ids[0]]
            dropped = sum(len(one.layout) - len(one.keep) for one in trace.selections)
            found.append(Reply(tuple(ids), float(first), length - dropped))
    return found


def _embedded(
    pipe: Pipeline, asked: Sequence[Question], compressor: Compressor
) -> list[dict[str, Any]]:
    """The images of the questions as embeddings, which another process could have made."""
    images = {item.image_id: item.images[0].open() for item in asked}
    made = dict(zip(images, image_embeds(pipe, [*images.values()], compressor), strict=True))
    return [embeds_part(made[item.image_id], item.image_id) for item in asked]


def _compared(
    server: Server,
    expected: Sequence[Reply],
    asked: Sequence[Question],
    parts: Sequence[dict[str, Any]],
    width: int,
    request: CheckRequest,
) -> dict[str, Any]:
    """The row of the table for one server.  Malformed embeddings come between the questions."""
    bad = malformed(width)

    def ask(index: int) -> Reply:
        return server.ask(parts[index], asked[index].question, request.max_new_tokens)

    def refused(index: int) -> bool:
        try:
            server.ask(bad[index], asked[0].question, 1)
        except UserError:
            return server.is_alive
        return False

    with ThreadPoolExecutor(request.clients) as pool:
        told = [pool.submit(refused, index) for index in range(len(bad))]
        replies = [*pool.map(ask, range(len(asked)))]
        wrong = [one.result() for one in told]
        started = time.monotonic()
        replies_again = [*pool.map(ask, range(len(asked)))]
        seconds = time.monotonic() - started
    both = [*zip(expected, replies, strict=True), *zip(expected, replies_again, strict=True)]
    size, count = server.block_size, len(asked)
    prompts = [reply.prompt for reply in replies]
    return {
        "questions": count,
        "same_ids": sum(
            all(one.ids == mine.ids for one in (first, second))
            for mine, first, second in zip(expected, replies, replies_again, strict=True)
        ),
        "probability": max(abs(one.probability - other.probability) for one, other in both),
        "same_prompts": sum(
            one.prompt == other.prompt for one, other in zip(expected, replies, strict=True)
        ),
        "prompt": sum(prompts) / count,
        "blocks": sum(math.ceil(length / size) for length in prompts) / count,
        "block_size": size,
        "rate": count / seconds,
        "malformed": sum(wrong),
        "sent": len(wrong),
    }


def malformed(width: int) -> list[dict[str, Any]]:
    """Embeddings that a server must refuse, as parts of a chat message.

    Args:
        width: Width of the language model.
    """
    good = torch.zeros(8, width)
    wrong = {
        "width": good[:, :-1],
        "axes": good[0],
        "dtype": good.long(),
        "values": good.clone().fill_(torch.nan),
        "none": good[:0],
        "many": torch.zeros(1 << 14, width),
    }
    return [embeds_part(value, f"malformed-{name}") for name, value in wrong.items()]
