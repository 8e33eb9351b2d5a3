"""Limits of the numbers and of the prompts of a request."""

from collections.abc import Iterable
from dataclasses import replace

from PIL import Image

from tokenprune.adapter import Adapter
from tokenprune.errors import UserError, shown
from tokenprune.experiments.common.questions import Picture, Question

__all__ = [
    "LIMITS",
    "check_lengths",
    "check_number",
    "with_long_ones",
]


LIMITS: dict[str, tuple[int, int]] = {
    "batch_size": (1, 100_000),
    "frames": (1, 100_000),
    "images": (1, 1_000_000),
    "layers": (1, 1_000),
    "max_image_pixels": (1, 2**31 - 1),
    "max_new_tokens": (1, 1_000_000),
    "questions": (1, 1_000_000),
    "repeats": (1, 100_000),
    "seed": (0, 2**32 - 1),  # what every random generator takes
    "seeds": (1, 1_000),
    "text_tokens": (0, 1_000_000),
}
"""The least and the largest value of every whole number in a request."""


_ORIENTATION = 0x0112  # EXIF; from 5 on the sides are swapped


def check_number(name: str, value: int | None, *, least: int | None = None) -> None:
    """Raise `UserError` unless ``value`` lies within `LIMITS`, or is None.

    Args:
        name: As in `LIMITS`; the option is spelled like it.
        value: What was asked for.
        least: Replaces the least value there.
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


def check_lengths(adapter: Adapter, questions: Iterable[Question], new: int = 0) -> None:
    """Raise `UserError` if a prompt has more tokens than the decoder has positions.

    Args:
        adapter: Of the model.
        questions: Their prompts are checked, with all visual tokens.
        new: Tokens of the answer.
    """
    for item in with_long_ones(adapter, questions, new):
        if item.fault:
            raise UserError(f"the question {item.id!r} cannot be asked: {item.fault}")


def with_long_ones(adapter: Adapter, questions: Iterable[Question], new: int = 0) -> list[Question]:
    """The questions, with a `Question.fault` where `check_lengths` would raise.

    Questions that have a fault already, or whose images cannot be read, stay as they are.

    Args:
        adapter, questions, new: As of `check_lengths`.
    """
    if not adapter.has_language_model or adapter.positions is None:
        return list(questions)
    seen: dict[tuple[object, ...], int] = {}  # texts and sizes repeat
    found = []
    for item in questions:
        sizes = None if item.fault else _sizes(adapter, item)
        if sizes is not None:
            key = (item.question, len(item.images), item.video, sizes)
            if key not in seen:
                seen[key] = _visual(adapter, item, sizes) + _text(adapter, item)
            try:
                adapter.check_length(seen[key], new)
            except UserError as error:
                item = replace(item, fault=str(error))
        found.append(item)
    return found


def _sizes(adapter: Adapter, item: Question) -> tuple[tuple[int, int], ...] | None:
    """(height, width) of the images, or of a video's first frame; None if unknown."""
    if item.video and "video" not in adapter.encoders:
        return None
    try:
        return tuple(map(_size, item.images[:1] if item.video else item.images))
    except (OSError, ValueError, SyntaxError):  # what Pillow raises at torn headers
        return None


def _visual(adapter: Adapter, item: Question, sizes: tuple[tuple[int, int], ...]) -> int:
    if item.modality == "video":
        return len(adapter.video_layout(len(item.images)))  # type: ignore[attr-defined]
    return sum(len(adapter.layout(size, same_prompt=len(sizes) > 1)) for size in sizes)


def _text(adapter: Adapter, item: Question) -> int:
    video = item.modality == "video"
    text = adapter.prompt(item.question, 0 if video else len(item.images), int(video))
    ids = adapter.processor.tokenizer(text)["input_ids"]
    return sum(each not in adapter.placeholders.values() for each in ids)


def _size(picture: Picture) -> tuple[int, int]:
    """(height, width) after EXIF rotation, from the header of the file."""
    if isinstance(picture.source, Image.Image):
        return picture.source.height, picture.source.width
    with Image.open(picture.source) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)
