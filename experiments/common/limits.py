"""Limits of the numbers and of the prompts of a request."""

import io
from collections.abc import Iterable
from dataclasses import replace

from PIL import Image

from tokenprune.compatibility import check_length
from tokenprune.errors import UserError, shown
from tokenprune.experiments.common.questions import Encoded, Picture, Question
from tokenprune.pipeline import Pipeline

__all__ = [
    "LIMITS",
    "check_lengths",
    "check_number",
    "with_long_ones",
]


LIMITS: dict[str, tuple[int, int]] = {
    "batch_size": (1, 100_000),
    "clients": (1, 1_000),
    "frames": (1, 100_000),
    "images": (1, 1_000_000),
    "layers": (1, 1_000),
    "max_image_pixels": (1, 2**31 - 1),
    "max_new_tokens": (1, 1_000_000),
    "port": (1, 65_535),
    "questions": (1, 1_000_000),
    "repeats": (1, 100_000),
    "seed": (0, 2**32 - 1),  # the range of every random generator
    "seeds": (1, 1_000),
    "text_tokens": (0, 1_000_000),
}
"""The smallest and the largest value of every whole number in a request."""


_ORIENTATION = 0x0112  # EXIF; from 5 on the sides are swapped


def check_number(name: str, value: int | None, *, least: int | None = None) -> None:
    """Raise `UserError` unless ``value`` lies within `LIMITS`, or is None.

    Args:
        name: As in `LIMITS`; the option is spelled like it.
        value: The value.
        least: Replaces the smallest value there.
    """
    if value is None:
        return
    low, high = LIMITS[name]
    low = low if least is None else least
    option = "--" + name.replace("_", "-")
    if not isinstance(value, int):
        raise UserError(f"{option} must be a whole number, got {shown(value)}.")
    if value < low:
        raise UserError(f"{option} must be at least {low}, got {shown(value)}.")
    if value > high:
        raise UserError(f"{option} must be at most {high}, got {shown(value)}.")


def check_lengths(pipe: Pipeline, questions: Iterable[Question], new: int = 0) -> None:
    """Raise `UserError` if a prompt has more tokens than the decoder has positions.

    Args:
        pipe: The model and its processor.
        questions: Their prompts are checked, with all visual tokens.
        new: Tokens of an answer, unless its question has its own limit.
    """
    for item in with_long_ones(pipe, questions, new):
        if item.fault:
            raise UserError(f"the question {item.id!r} cannot be asked: {item.fault}")


def with_long_ones(pipe: Pipeline, questions: Iterable[Question], new: int = 0) -> list[Question]:
    """The questions, with a `Question.fault` where `check_lengths` would raise.

    Questions that have a fault already, or whose images cannot be read, stay as they are.

    Args:
        pipe, questions, new: As of `check_lengths`.
    """
    if not pipe.adapter.has_language_model or pipe.adapter.facts.decoder.positions is None:
        return list(questions)
    seen: dict[tuple[object, ...], int] = {}  # texts and sizes repeat
    found = []
    for item in questions:
        sizes = None if item.fault else _sizes(pipe, item)
        if sizes is not None:
            key = (item.question, len(item.images), item.video, sizes)
            if key not in seen:
                seen[key] = _visual(pipe, item, sizes) + _text(pipe, item)
            try:
                check_length(pipe.adapter.facts, seen[key], item.max_new_tokens or new)
            except UserError as error:
                item = replace(item, fault=str(error))
        found.append(item)
    return found


def _sizes(pipe: Pipeline, item: Question) -> tuple[tuple[int, int], ...] | None:
    """(height, width) of the images, or of a video's first frame; None if unknown."""
    if item.video and "video" not in pipe.adapter.modalities:
        return None
    try:
        return tuple(map(_size, item.images[:1] if item.video else item.images))
    except (OSError, ValueError, SyntaxError):  # Pillow raises these for broken headers
        return None


def _visual(pipe: Pipeline, item: Question, sizes: tuple[tuple[int, int], ...]) -> int:
    if item.modality == "video":
        return len(pipe.adapter.video_layout(len(item.images)))
    return sum(len(pipe.adapter.layout(size, same_prompt=len(sizes) > 1)) for size in sizes)


def _text(pipe: Pipeline, item: Question) -> int:
    video = item.modality == "video"
    text = pipe.prompt(item.question, 0 if video else len(item.images), int(video))
    ids = pipe.processor.tokenizer(text)["input_ids"]
    return sum(each not in pipe.adapter.facts.placeholders.values() for each in ids)


def _size(picture: Picture) -> tuple[int, int]:
    """(height, width) after EXIF rotation, from the header of the file."""
    if isinstance(picture.source, Image.Image):
        return picture.source.height, picture.source.width
    source = picture.source
    with Image.open(io.BytesIO(source.read()) if isinstance(source, Encoded) else source) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)
