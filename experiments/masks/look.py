"""What methods see and keep of one prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.encoder import encoder_part
from tokenprune.engine.rankings import Note, noting
from tokenprune.engine.trace import SelectionRecord
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.kept_bits import final
from tokenprune.experiments.common.limits import check_lengths
from tokenprune.experiments.common.patch_boxes import ViewSize
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.layout import TokenLayout
from tokenprune.pictures import picture
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "SALIENCY",
    "Mask",
    "MaskedPrompt",
    "Medium",
    "check",
    "look",
]


SALIENCY = Signal("saliency")


@dataclass(frozen=True, eq=False)
class Medium:
    """An image or a video of the prompt.

    Attributes:
        pictures: The image, or the frames.
        tokens: Its packed sequence, with the saliency if the vision encoder has one.
    """

    pictures: tuple[Image.Image, ...]
    tokens: VisualTokens

    @property
    def layout(self) -> TokenLayout:
        return self.tokens.layout

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pictures[0].height, self.pictures[0].width


@dataclass(frozen=True, eq=False)
class Mask:
    """What one method keeps.

    Attributes:
        label: The method, ``uncompressed`` for all tokens.
        retention: The requested retention ratio.
        keeps: For every medium (M,) indices into its packed sequence.
        answer: The answer of the model; None without language model or question.
        where: The stage of the method, in words.
        scores: For every medium, the layout of the tokens of the last ranking and their scores
            (M,); empty for methods without ranking (`Compressor.ranking`).
    """

    label: str
    retention: float
    keeps: tuple[Tensor, ...]
    answer: str | None = None
    where: str = ""
    scores: tuple[tuple[TokenLayout, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class MaskedPrompt:
    """A prompt's images or video, and what every method keeps of them.

    Attributes:
        model: The name of the model.
        view: The geometry of its views.
        media: The images, or the video.
        masks: What every method keeps, all tokens first.
        question, truth: The question, and the true answer if known.
        saliency: The kind of saliency of the vision encoder, in words; empty if it has none.
    """

    model: str
    view: ViewSize
    media: tuple[Medium, ...]
    masks: tuple[Mask, ...]
    question: str | None = None
    truth: str | None = None
    saliency: str = ""

    def table(self) -> pd.DataFrame:
        """One row per method, retention, image and view: its patch tokens, and those kept."""
        rows = []
        for one in self.masks:
            for number, (medium, keep) in enumerate(zip(self.media, one.keeps, strict=True)):
                sizes = medium.layout.view_sizes
                counts = medium.layout.take(keep).view_sizes
                for view, (size, count) in enumerate(zip(sizes, counts, strict=True)):
                    rows.append(
                        {
                            "method": one.label,
                            "retention": one.retention,
                            "acts": one.where,
                            "image": number,
                            "view": view,
                            "kind": _view_kind(medium.layout, view),
                            "tokens": size,
                            "kept": count,
                            "share": count / size if size else math.nan,
                            "answer": one.answer,
                        }
                    )
        return pd.DataFrame(rows)


def check(pipe: Pipeline, compressor: Compressor, asks: bool) -> None:
    """Raise `UserError` if the method does not run on the model, or needs a question."""
    check_compatible(pipe.adapter.facts, compressor)
    stages = list(compressor.parts())
    inside = [part for part in stages if part.stage is Stage.LLM]
    if inside and not asks:
        raise UserError(f"{inside[0].name} acts inside the language model; ask a question.")
    if len(stages) > 1 and not asks:
        raise UserError(f"{compressor.label} acts in several places; ask a question.")


# --- what is kept ---------------------------------------------------------------------------------


def look(
    pipe: Pipeline,
    images: Sequence[Image.Image],
    question: str | None = None,
    methods: Sequence[str] = ("globalcom2", "fastv"),
    retention: float | Sequence[float] = 0.25,
    *,
    video: bool = False,
    cuts: bool = False,
    truth: str | None = None,
    name: str = "",
    max_new_tokens: int = 8,
    progress: ProgressCallback = silent,
) -> MaskedPrompt:
    """Run ``methods`` on one prompt and record what they keep.

    Args:
        pipe, images, question, methods, retention: As of `masks`.
        video: Whether the images are the frames of one video.
        cuts: Whether methods with several cuts are shown after every cut, not only the last.
        truth: The true answer, if known.
        name: Name of the model, for the title.
        max_new_tokens: Maximum length of an answer.
        progress: Called before every step.

    Raises:
        UserError: The model lacks what a method needs, a method acts inside the language model but
            there is none or no question, or there is no image.
    """
    if not images:
        raise UserError("there is nothing to draw; give at least one image.")
    ratios = [retention] if isinstance(retention, int | float) else retention
    columns = cells(methods, ratios)
    asks = question is not None and pipe.adapter.has_language_model
    for cell in columns:
        if cell.compressor is not None:
            check(pipe, cell.compressor, asks)
    pictures = [picture(image) for image in images]
    if question is not None and asks:
        named = tuple(Picture(str(index), one) for index, one in enumerate(pictures))
        check_lengths(pipe, [Question("0", named, question, "", video=video)], max_new_tokens)
    progress(0, len(columns), "vision encoder")
    signals = frozenset[Signal]().union(
        *(cell.compressor.needs for cell in columns if cell.compressor)
    )
    encoded, saliency = _encode_all(pipe, pictures, signals, video)
    asked = str(question) if asks else None
    prompt = _EncodedPrompt(pipe, pictures, encoded, video, asked, max_new_tokens)
    found: list[Mask] = []
    for index, cell in enumerate(columns):
        progress(index, len(columns), str(cell))
        if cell.compressor is None or cell.compressor.retention < 1:  # else as the first
            found += prompt.masks(cell, cuts)
    groups = [tuple(pictures)] if video else [(picture,) for picture in pictures]
    media = tuple(Medium(g, tokens) for g, tokens in zip(groups, encoded, strict=True))
    view = ViewSize.of(pipe.adapter)
    return MaskedPrompt(
        name or pipe.adapter.name, view, media, tuple(found), question, truth, saliency
    )


def _encode_all(
    pipe: Pipeline, pictures: Sequence[Image.Image], signals: frozenset[Signal], video: bool
) -> tuple[list[VisualTokens], str]:
    """The images with ``signals`` and, if the encoder has it, its saliency, named in words."""
    words = "attention received"
    if pipe.adapter.facts.vision.has_cls:
        words = "logits of the CLS token's attention"
    try:
        return _encode(pipe, pictures, signals | {SALIENCY}, video), words
    except UserError:  # an encoder of unknown attention
        return _encode(pipe, pictures, signals, video), ""


@dataclass(frozen=True, eq=False)
class _EncodedPrompt:
    """One prompt, encoded.

    Attributes:
        pictures: Its images, or the frames of its video.
        encoded: Their packed sequences.
        question: The question, or None.
        max_new_tokens: Maximum length of an answer.
    """

    pipe: Pipeline
    pictures: Sequence[Image.Image]
    encoded: Sequence[VisualTokens]
    video: bool
    question: str | None
    max_new_tokens: int

    def masks(self, cell: Cell, cuts: bool) -> Iterator[Mask]:
        """What the method of ``cell`` keeps, at the end or after every one of its ``cuts``."""
        compressor, heard = (None, []) if cell.compressor is None else noting(cell.compressor)
        answer, selections = self._run(compressor)
        made = _steps(selections) if cuts else [final(selections)]
        count = len(self.encoded)
        for step in made:
            keeps = tuple(
                step[0, number].keep.cpu() if (0, number) in step else torch.arange(len(tokens))
                for number, tokens in enumerate(self.encoded)
            )
            enough = step is made[-1] and len(heard) >= count
            scores = tuple(map(_on_cpu, heard[-count:] if enough else ()))
            where = _where(next(iter(step.values()), None))
            yield Mask(cell.label, cell.retention, keeps, answer, where, scores)

    def _run(self, compressor: Compressor | None) -> tuple[str | None, Sequence[SelectionRecord]]:
        """The answer, if there is a question, and the selections."""
        shown = self.encoded
        if compressor is not None and encoder_part(compressor) is not None:
            shown = _encode(self.pipe, self.pictures, compressor.needs, self.video, compressor)
        if self.question is None:
            return None, [
                SelectionRecord(
                    0, number, compressor.stage, None, tokens.layout, compressor(tokens).keep
                )
                for number, tokens in enumerate(shown)
                if compressor is not None
            ]
        inputs = self.pipe.assemble([shown], [self.question])
        with tp.compress(self.pipe.model, compressor) as trace:
            ids = self.pipe.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1
            )
        (answer,) = self.pipe.decode(ids, inputs)
        return answer, trace.selections


def _encode(
    pipe: Pipeline,
    pictures: Sequence[Image.Image],
    signals: frozenset[Signal],
    video: bool,
    compressor: Compressor | None = None,
) -> list[VisualTokens]:
    if video:
        return pipe.encode_videos([list(pictures)], signals, compressor)
    return pipe.encode(pictures, signals, compressor, same_prompt=len(pictures) > 1)


def _on_cpu(note: Note) -> tuple[TokenLayout, Tensor]:
    tokens, scores = note
    return tokens.layout.to("cpu"), scores.detach().float().cpu()


def _steps(selections: Sequence[SelectionRecord]) -> list[dict[tuple[int, int], SelectionRecord]]:
    """The kept tokens after every cut; all tokens without a cut."""
    layers = list(dict.fromkeys(chosen.layer for chosen in selections))
    return [final(c for c in selections if c.layer == layer) for layer in layers] or [{}]


def _where(chosen: SelectionRecord | None) -> str:
    if chosen is None:
        return ""
    if chosen.stage is Stage.ENCODER:
        return "in the encoder"
    return "before the LLM" if chosen.layer is None else f"before layer {chosen.layer}"


def _view_kind(layout: TokenLayout, view: int) -> str:
    if layout.modality == "video":
        return "frame"
    return "crop" if view and layout.grid != (0, 0) else "thumbnail"
