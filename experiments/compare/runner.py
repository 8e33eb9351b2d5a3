"""Answers questions with a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine.prefix import Prefix
from tokenprune.experiments.common.kept_bits import packed_rows
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.compare.cut_short import CUT_SHORT
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal

__all__ = [
    "FIRST_TOKEN",
    "ModelRunner",
    "Runner",
    "limited",
]


FIRST_TOKEN = "first_token"


class Runner(Protocol):
    """Answers questions: a model, or a stand-in for tests."""

    def encode(
        self,
        questions: Sequence[Question],
        signals: frozenset[Signal],
        encoder: EncoderCompressor | None = None,
    ) -> Sequence[Sequence[Any]]:
        """Run the vision encoder, compressed by ``encoder``; per question its images or video."""

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        """Answer one batch.

        Returns:
            For every prompt its ``answer``, the figures of its ledger, and, if known, in
            `FIRST_TOKEN` the log-probabilities (V,) of the first token of the answer.
        """

    def answer_without_images(
        self, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        """Answer the prompts without visual tokens."""


@dataclass(frozen=True)
class ModelRunner:
    """Greedy answers of a loaded model."""

    pipe: Pipeline
    max_new_tokens: int

    def encode(
        self,
        questions: Sequence[Question],
        signals: frozenset[Signal],
        encoder: EncoderCompressor | None = None,
    ) -> Sequence[Sequence[Any]]:
        opened = [[picture.open() for picture in item.images] for item in questions]
        encode = self.pipe.encode
        # Single images, the common case, are encoded in one batch.
        alone = [index for index, item in enumerate(questions) if item.modality == "image"]
        single = iter(encode([opened[index][0] for index in alone], signals, encoder))
        found = []
        for item, images in zip(questions, opened, strict=True):
            if item.modality == "image":
                found.append([next(single)])
            elif item.modality == "video":
                found.append(self.pipe.encode_videos([images], signals, encoder))
            else:
                found.append(encode(images, signals, encoder, same_prompt=True))
        return found

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        return self.generate(compressor, self.pipe.assemble(images, prompts))

    def answer_without_images(
        self, images: Sequence[Sequence[Any]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        return self.generate(None, self.pipe.assemble(images, prompts, without_images=True))

    def generate(
        self,
        compressor: Compressor | Sequence[Compressor] | None,
        inputs: Mapping[str, Any],
        prefix: Prefix | None = None,
    ) -> list[dict[str, Any]]:
        """The record of every row of ``inputs``; ``compressor`` and ``prefix`` as `tp.compress`."""
        with tp.compress(self.pipe.model, compressor, prefix=prefix) as trace:
            output = self.pipe.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        texts = self.pipe.decode(output.sequences, inputs)
        cut = self._cut_short(output.sequences[:, inputs["input_ids"].shape[1] :])
        first = output.logits[0].float().log_softmax(-1)
        keeps = packed_rows(trace.selections, len(texts))
        return [
            {
                "answer": text,
                FIRST_TOKEN: row,
                **ledger.figures,
                "visual_per_layer": list(ledger.visual_per_layer),
                **({"kept": keep} if keep else {}),
                **({CUT_SHORT: True} if index in cut else {}),
            }
            for index, (text, row, ledger, keep) in enumerate(
                zip(texts, first, trace.ledgers, keeps, strict=True)
            )
        ]

    def _cut_short(self, answers: Tensor) -> set[int]:
        """The rows of ``answers`` (B, S), new token ids, that end at their maximum length."""
        if answers.shape[1] < self.max_new_tokens:
            return set()
        settings = self.pipe.model.generation_config
        ends = settings.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), settings.pad_token_id}
        return {row for row, last in enumerate(answers[:, -1].tolist()) if last not in ends}


def limited(runner: Runner, questions: Sequence[Question]) -> Runner:
    """``runner`` with the maximum length of the answers to ``questions``, which all have the same.

    Args:
        runner: A runner; only that of a model has such a length.
        questions: A batch.
    """
    limit = questions[0].max_new_tokens
    if limit is None or not isinstance(runner, ModelRunner):
        return runner
    return replace(runner, max_new_tokens=limit)
