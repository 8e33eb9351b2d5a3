"""Answers about one prompt: what each method keeps, what it costs, and what the model says."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.cost.ledger import Ledger
from tokenprune.drawing import draw_kept
from tokenprune.encoder import encoder_part
from tokenprune.engine.trace import SelectionRecord
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.experiments.common.kept_bits import final
from tokenprune.experiments.common.limits import check_lengths
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.timing import synchronise
from tokenprune.experiments.demo.source import Clip, Source
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.spec import format, has_retention, parse
from tokenprune.tokens import VisualTokens

__all__ = [
    "GENERATION",
    "MOST",
    "Answer",
    "Answerer",
    "Answers",
    "chosen",
]


LEAST, MOST = 2, 4
"""Number of methods that are shown side by side."""


GENERATION: dict[str, Any] = {"do_sample": False, "num_beams": 1}
"""Arguments of ``model.generate`` besides the length, for answers without chance."""


_REMEMBERED = 4  # prompts whose images stay encoded
_SHARPEST = 1344  # pixels of the longer side of a picture that masks are drawn on


@dataclass(frozen=True, eq=False)
class Answer:
    """What one method does to a prompt.

    Attributes:
        compressor: The method; None for the uncompressed model.
        text: The answer of the model.
        ledger: The cost.
        milliseconds: Duration of the prefill, selection included and vision encoder excluded: one
            run.
        drawings: For every image, or for the video, the kept patches (`draw_kept`).
        where: The place of the last selection, in words.
        warnings: What the method warned of.
    """

    compressor: Compressor | None
    text: str
    ledger: Ledger
    milliseconds: float
    drawings: tuple[Image.Image, ...]
    where: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "uncompressed" if self.compressor is None else self.compressor.label


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers to one prompt, the uncompressed model's first; and its opened pictures."""

    clip: Clip
    each: tuple[Answer, ...]


def chosen(specs: Sequence[str], retention: float) -> list[Compressor]:
    """The methods that ``specs`` name; those without their own retention get ``retention``.

    A spec is text: nothing is imported for it.

    Raises:
        UserError: Fewer than two or more than four methods, one of them twice, or as
            `tokenprune.parse`.
    """
    specs = [spec.strip() for spec in specs if spec.strip()]
    if not LEAST <= len(specs) <= MOST:
        raise UserError(f"choose two to four methods, got {len(specs)}.")
    found = [
        parse(spec) if has_retention(spec) else parse(spec, retention=retention) for spec in specs
    ]
    labels = [format(method) for method in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label} is chosen twice; choose another method.")
    return found


@dataclass(frozen=True, eq=False)
class _Encoded:
    """The images of a prompt after the vision encoder.

    Attributes:
        clip: The opened pictures.
        signals: The signals that are in ``tokens``.
        tokens: The packed sequence of every image, or of the video.
    """

    clip: Clip
    signals: frozenset[Signal]
    tokens: list[VisualTokens]


class Answerer:
    """Loaded models that answer about prompts, one at a time.

    The vision encoder runs once per image and model, and again only for a method that needs a
    further signal or acts inside the encoder.  Safe to use from several threads.

    Args:
        models: Name to loaded model.
        max_new_tokens: Maximum length of an answer.
    """

    def __init__(self, models: Mapping[str, Pipeline], max_new_tokens: int = 8) -> None:
        self.models = models
        self.max_new_tokens = max_new_tokens
        self._lock = threading.Lock()
        self._encoded: OrderedDict[tuple[str, Source], _Encoded] = OrderedDict()

    def answers(
        self, model: str, source: Source, question: str, compressors: Sequence[Compressor]
    ) -> Answers:
        """The answers of the uncompressed model and with every method.

        Raises:
            UserError: No question, a video for a model that takes none, a prompt that is too long,
                a picture that cannot be decoded, or a method that does not run in the model.
        """
        if model not in self.models:
            raise UserError(f"no model {model!r} is loaded; choose {' or '.join(self.models)}.")
        if not question.strip():
            raise UserError("the question is empty; type one.")
        pipe = self.models[model]
        for compressor in compressors:
            check_compatible(pipe.adapter.facts, compressor)
        with self._lock:
            encoded = self._encode(model, source, question, compressors)
            each = [self._answer(pipe, encoded, question, one) for one in (None, *compressors)]
        return Answers(encoded.clip, tuple(each))

    def _encode(
        self, model: str, source: Source, question: str, compressors: Sequence[Compressor]
    ) -> _Encoded:
        """The encoded images with the signals of ``compressors``, from memory if possible."""
        pipe, key = self.models[model], (model, source)
        known = self._encoded.get(key)
        clip = source.open() if known is None else known.clip
        if clip.video and "video" not in pipe.adapter.modalities:
            others = [n for n, one in self.models.items() if "video" in one.adapter.modalities]
            choice = f"choose {' or '.join(others)}, or give" if others else "give"
            raise UserError(f"the model {model} takes images only; {choice} single frames.")
        named = tuple(Picture(str(index), one) for index, one in enumerate(clip.pictures))
        asked = Question("typed here", named, question, "", video=clip.video)
        check_lengths(pipe, [asked], self.max_new_tokens)
        signals = frozenset[Signal]().union(*(one.needs for one in compressors))
        outside = frozenset(one for one in signals if not one.in_llm)
        if known is None:
            known = _Encoded(clip, outside, _through_encoder(pipe, clip, outside))
            self._answer(pipe, known, question, None)  # the first run is slower
        elif not outside <= known.signals:
            more = known.signals | outside
            known = _Encoded(clip, more, _through_encoder(pipe, clip, more))
        self._encoded[key] = known
        self._encoded.move_to_end(key)
        while len(self._encoded) > _REMEMBERED:
            self._encoded.popitem(last=False)
        return known

    def _answer(
        self, pipe: Pipeline, encoded: _Encoded, question: str, compressor: Compressor | None
    ) -> Answer:
        """Run the model once."""
        tokens = encoded.tokens
        if compressor is not None and encoder_part(compressor) is not None:
            outside = [signal for signal in compressor.needs if not signal.in_llm]
            tokens = _through_encoder(pipe, encoded.clip, outside, compressor)
        inputs = pipe.assemble([tokens], [question])
        first = _FirstToken(pipe.device)
        with (
            warnings.catch_warnings(record=True) as heard,
            tp.compress(pipe.model, compressor) as trace,
        ):
            warnings.simplefilter("always", RetentionWarning)
            synchronise(pipe.device)
            start = time.perf_counter()
            ids = pipe.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                stopping_criteria=[first],
                **GENERATION,
            )
        (text,) = pipe.decode(ids, inputs)
        said = [str(one.message) for one in heard if one.category is RetentionWarning]
        made = final(trace.selections)
        return Answer(
            compressor,
            text,
            trace.ledger,
            1000 * (first.time - start),
            tuple(_drawn(pipe, encoded, made)),
            _where(next(iter(made.values()), None)),
            tuple(dict.fromkeys(said)),
        )


class _FirstToken:
    """A stopping criterion that never stops, and records when the first token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.time = 0.0

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.time:
            synchronise(self.device)
            self.time = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _through_encoder(
    pipe: Pipeline, clip: Clip, signals: Any, compressor: Compressor | None = None
) -> list[VisualTokens]:
    if clip.video:
        return pipe.encode_videos([list(clip.pictures)], signals, compressor)
    together = len(clip.pictures) > 1
    return pipe.encode(clip.pictures, signals, compressor, same_prompt=together)


def _drawn(
    pipe: Pipeline, encoded: _Encoded, made: Mapping[tuple[int, int], SelectionRecord]
) -> list[Image.Image]:
    """The kept patches of every image, or of the video."""
    clip, found = encoded.clip, []
    groups = [clip.pictures] if clip.video else [(one,) for one in clip.pictures]
    for number, (group, tokens) in enumerate(zip(groups, encoded.tokens, strict=True)):
        record = made.get((0, number))
        keep = torch.arange(len(tokens)) if record is None else record.keep
        shown = [_small(one) for one in group]
        found.append(draw_kept(tokens.layout, keep, shown, pipe.adapter.fit))
    return found


def _small(image: Image.Image) -> Image.Image:
    """``image``, reduced if it is much larger than a drawing."""
    if max(image.size) <= _SHARPEST:
        return image
    reduced = image.copy()
    reduced.thumbnail((_SHARPEST, _SHARPEST))
    return reduced


def _where(record: SelectionRecord | None) -> str:
    if record is None:
        return "all tokens"
    if record.stage is Stage.ENCODER:
        return "in the vision encoder"
    return "before the LLM" if record.layer is None else f"before layer {record.layer}"
