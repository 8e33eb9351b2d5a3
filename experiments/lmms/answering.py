"""Answers the messages of a harness with a compressed model, and accounts for every answer.

This module does not import lmms-eval.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.engine.trace import Trace
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell, CellRecord
from tokenprune.experiments.common.kept_bits import packed_rows
from tokenprune.pictures import frames, picture
from tokenprune.pipeline import Pipeline
from tokenprune.spec import parse, registered

__all__ = [
    "BASELINE",
    "Answer",
    "Answerer",
    "Likelihood",
    "Message",
    "Talk",
    "batches",
    "compressor_of",
    "generation",
    "messages_of",
    "talk_of",
]


Message = dict[str, Any]
"""``role`` and ``content``, a list of parts.  A part has ``type`` and ``text`` or ``url``."""


BASELINE = "none"
"""The method that keeps all tokens."""


MARK = "<image>"
"""How tasks mark the place of an image in a text."""


_LENGTH = 1024  # maximum number of new tokens where the task states none


_SAMPLING = ("temperature", "top_p", "top_k")


_KNOWN = {"until", "max_new_tokens", "max_gen_toks", "num_beams", "do_sample", *_SAMPLING}


# --- arguments ------------------------------------------------------------------------------------


def compressor_of(
    method: str, retention: float | None = None, options: Mapping[str, Any] | None = None
) -> Compressor | None:
    """The compressor of the model arguments; None for the baseline.

    Args:
        method: ``none`` or a spec; quotes around it are removed.
        retention: Its retention ratio, unless the spec has one.
        options: Options of the method.

    Raises:
        UserError: As `parse`, or the baseline has a retention below 1 or options.
    """
    spec, fields = method.strip().strip("\"'"), dict(options or {})
    if spec == BASELINE:
        if fields or retention not in (None, 1):
            given = ", ".join([*fields, *(["retention"] if retention not in (None, 1) else [])])
            raise UserError(f"method=none keeps all tokens; leave out {given}, or name a method.")
        return None
    if retention is not None:
        fields["retention"] = retention
    return parse(registered(spec), **{name: _text(value) for name, value in fields.items()})


def _text(value: Any) -> Any:
    """A value as on a command line; the harness has turned some into numbers."""
    return value if isinstance(value, bool | int | float) else str(value)


def generation(given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of ``model.generate``, and the texts at which an answer ends.

    Decoding is greedy unless the task asks for a temperature above 0.

    Args:
        given: ``generation_kwargs`` of a task.

    Warns:
        UserWarning: An argument is not known here and has no effect.
    """
    for name in given.keys() - _KNOWN:
        warnings.warn(f"the generation argument {name!r} has no effect.", UserWarning, stacklevel=2)
    temperature = given.get("temperature")
    drawn = bool(given.get("do_sample", temperature)) and temperature != 0
    length = given.get("max_new_tokens", given.get("max_gen_toks", _LENGTH))
    made = {
        "max_new_tokens": int(length),
        "num_beams": int(given.get("num_beams") or 1),
        "do_sample": drawn,
        **{name: given.get(name) if drawn else None for name in _SAMPLING},
    }
    until = given.get("until") or ()
    ends = (until,) if isinstance(until, str) else tuple(until)
    return made, tuple(filter(None, ends))


def batches(keys: Sequence[Any], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of up to ``size`` requests with equal keys, long ones first."""
    order = sorted(range(len(keys)), key=lambda index: -lengths[index])
    groups: dict[str, list[int]] = {}
    for index in order:
        groups.setdefault(repr(keys[index]), []).append(index)
    for group in groups.values():
        yield from (group[start : start + size] for start in range(0, len(group), size))


# --- prompts --------------------------------------------------------------------------------------


def messages_of(context: str, visuals: Iterable[Any]) -> list[Message]:
    """One user turn that shows ``visuals``.

    An image is a picture; a video is an array of frames.  If ``context`` has one `MARK` for each of
    them, they stand there; otherwise they come before the text.
    """
    media = [
        {"type": "video" if isinstance(one, np.ndarray) else "image", "url": one} for one in visuals
    ]
    pieces = context.split(MARK)
    if not media or len(pieces) != len(media) + 1:
        content = [*media, {"type": "text", "text": context}]
    else:
        content = []
        for piece, medium in zip(pieces, [*media, None], strict=True):
            piece = piece.strip("\n")
            content += [{"type": "text", "text": piece}] if piece.strip() else []
            content += [medium] if medium else []
    return [{"role": "user", "content": content}]


@dataclass(frozen=True, eq=False)
class Talk:
    """A finished prompt with its images and videos (frames, height, width, 3), in its order."""

    text: str
    images: tuple[Any, ...] = ()
    clips: tuple[Any, ...] = ()

    @property
    def shapes(self) -> tuple[int, ...]:
        """Number of frames of every video; prompts with equal ones can share a batch."""
        return tuple(map(len, self.clips))

    def digests(self) -> list[str]:
        """A name for every image and video, equal for equal pixels."""
        pixels = [*map(np.asarray, self.images), *self.clips]
        return [
            hashlib.sha256(
                f"{one.shape}".encode() + np.ascontiguousarray(one).tobytes()
            ).hexdigest()[:24]
            for one in pixels
        ]


def talk_of(pipe: Pipeline, messages: Sequence[Message]) -> Talk:
    """The prompt of ``messages`` in the model's chat template.

    Placeholders inside texts are removed, because a placeholder stands for an image.

    Raises:
        UserError: A part is of a modality that the model does not take, or the template does not
            show all images.
    """
    turns: list[Message] = []
    media: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": _without_marks(part["text"], pipe)})
            elif kind in pipe.adapter.modalities:
                media[kind].append(picture(part["url"]) if kind == "image" else frames(part["url"]))
                parts.append({"type": kind})
            else:
                taken = ", ".join(pipe.adapter.modalities)
                raise UserError(
                    f"the task shows {kind}, but {pipe.adapter.name} takes only text and {taken}."
                )
        turns.append({"role": message["role"], "content": parts})
    return Talk(_rendered(pipe, turns), tuple(media["image"]), tuple(media["video"]))


def _without_marks(text: str, pipe: Pipeline) -> str:
    for token in (MARK, *pipe.placeholder_texts.values()):
        text = text.replace(token, "")
    return text


def _rendered(pipe: Pipeline, turns: Sequence[Message]) -> str:
    tokens = pipe.placeholder_texts
    if not getattr(pipe.processor, "chat_template", None):
        parts = [part for turn in turns for part in turn["content"]]
        return "".join(part.get("text", f"{tokens.get(part['type'])}\n") for part in parts)
    text = str(pipe.processor.apply_chat_template(turns, add_generation_prompt=True))
    counts = [sum(p["type"] == kind for t in turns for p in t["content"]) for kind in tokens]
    if pipe.prompt(text, *counts) != text:
        raise UserError(
            "the model's chat template has no turn markers, so prompts of several messages cannot "
            "be told from questions; use a model with the chat template of its family."
        )
    return text


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An answer and its account.

    Attributes:
        text: The answer.
        read, written: Number of tokens of the prompt before compression, and of the answer.
        record: Cell, setting and images of the answer, the figures of its ledger,
            ``visual_per_layer``, and the packed selections of its images.
    """

    text: str
    read: int
    written: int
    record: dict[str, Any]


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a given answer, and its account.

    Attributes:
        loss: Mean negative log-likelihood of the tokens of the answer, in nats.
        greedy: Whether the model would give this answer.
        read, written, record: As in `Answer`.
    """

    loss: float
    greedy: bool
    read: int
    written: int
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Answerer:
    """A loaded model with one method.

    Attributes:
        pipe: The model.
        compressor: The method; None for the uncompressed model.
        about: What else the answers depend on, such as model, dtype and device.
        pictures: Folder that receives every image once, named by its digest; None for no folder.
    """

    pipe: Pipeline
    compressor: Compressor | None
    about: Mapping[str, Any]
    pictures: Path | None = None

    def answer(
        self, talks: Sequence[Talk], options: Mapping[str, Any], ends: Sequence[str] = ()
    ) -> list[Answer]:
        """Answer a batch of prompts.

        Args:
            talks: The prompts.
            options: Arguments of ``model.generate``.
            ends: Texts at which an answer ends; they are cut off with what follows.
        """
        found: dict[int, Answer] = {}
        for shapes in dict.fromkeys(talk.shapes for talk in talks):
            rows = [row for row, talk in enumerate(talks) if talk.shapes == shapes]
            some = self._together([talks[row] for row in rows], options, ends)
            found.update(zip(rows, some, strict=True))
        return [found[row] for row in range(len(talks))]

    def _together(
        self, talks: Sequence[Talk], options: Mapping[str, Any], ends: Sequence[str]
    ) -> list[Answer]:
        inputs = self._inputs(talks)
        with tp.compress(self.pipe.model, self.compressor) as trace:
            ids = self.pipe.model.generate(**inputs, **options)
        records = self._records(talks, trace, options.get("num_beams", 1))
        read = inputs["attention_mask"].sum(1).tolist()
        written = self._lengths(ids[:, inputs["input_ids"].shape[1] :])
        answers = []
        for row, text in enumerate(self.pipe.decode(ids, inputs)):
            for end in ends:
                text = text.split(end)[0]
            answers.append(Answer(text.strip(), read[row], written[row], records[row]))
        return answers

    def _records(self, talks: Sequence[Talk], trace: Trace, beams: int = 1) -> list[dict[str, Any]]:
        """What goes into the log of every prompt; ``beams`` rows of the batch belong to each."""
        cell = asdict(CellRecord.of(Cell(self.compressor)))
        kept = packed_rows(trace.selections, len(talks) * beams)[::beams]
        found = []
        for talk, ledger, bits in zip(talks, trace.ledgers[::beams], kept, strict=True):
            names = talk.digests()
            self._store(names, talk)
            record = {"cell": cell, "setting": dict(self.about), "media": names, **ledger.figures}
            record["visual_per_layer"] = list(ledger.visual_per_layer)
            found.append(record | ({"kept": bits} if bits else {}))
        return found

    def _store(self, names: Sequence[str], talk: Talk) -> None:
        for name, image in zip(names, talk.images, strict=False):  # videos come after images
            if self.pictures is not None and not (self.pictures / f"{name}.png").exists():
                self.pictures.mkdir(parents=True, exist_ok=True)
                image.save(self.pictures / f"{name}.png")

    def _inputs(self, talks: Sequence[Talk]) -> Any:
        return self.pipe.prepare(
            [list(talk.images) for talk in talks],
            [talk.text for talk in talks],
            [list(talk.clips) for talk in talks],
        )

    def _lengths(self, new: torch.Tensor) -> list[int]:
        """The number of generated tokens of every row, without padding and end of text."""
        tokenizer = self.pipe.processor.tokenizer
        ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
        return [sum(token not in ends for token in row) for row in new.tolist()]

    def likelihood(self, talk: Talk, said: str) -> Likelihood:
        """How likely the answer ``said`` is.

        The answer is forced token by token, so that the prompt is compressed as for a free answer.
        """
        words = self._words(talk.text, said)
        inputs = self._inputs([talk])
        length = inputs["input_ids"].shape[1]
        with tp.compress(self.pipe.model, self.compressor) as trace:
            output = self.pipe.model.generate(
                **inputs,
                max_new_tokens=len(words),
                do_sample=False,
                num_beams=1,
                prefix_allowed_tokens_fn=lambda _, ids: [words[len(ids) - length]],
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.cat(output.logits).float()  # (words, V), before the other words are masked
        target = torch.tensor(words, device=logits.device)
        loss = float(torch.nn.functional.cross_entropy(logits, target))
        greedy = bool((logits.argmax(-1) == target).all())
        return Likelihood(loss, greedy, length, len(words), self._records([talk], trace)[0])

    def _words(self, prompt: str, answer: str) -> list[int]:
        """The tokens of ``answer`` where it follows ``prompt``."""
        tokenizer = self.pipe.processor.tokenizer
        joint = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
        before = tokenizer(prompt)["input_ids"]
        words = tokenizer(f"{prompt}{joint}{answer}")["input_ids"][len(before) :]
        if not words:
            raise UserError(f"the answer {answer!r} has no token, so it has no likelihood.")
        return list(map(int, words))
