"""Questions with true answers."""

import hashlib
import io
import json
import reprlib
import string
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from PIL import Image

from tokenprune.errors import UserError
from tokenprune.texts import is_plain, is_whole

if TYPE_CHECKING:
    from tokenprune.pipeline import Pipeline

__all__ = [
    "MODALITIES",
    "Encoded",
    "Modality",
    "Picture",
    "Question",
    "check_placeholders",
    "check_text",
    "fingerprint",
    "held_out",
    "normalise",
]


Modality = Literal["image", "multi-image", "video"]


MODALITIES: tuple[Modality, ...] = get_args(Modality)


_QUOTES = "‘’“”«»"


# Not all of `string.punctuation`: "-5", "5%" and "$5" are not "5".
_SURROUNDING = "".join(set(string.punctuation) - set("+-%$#&@")) + _QUOTES + string.whitespace


class Encoded(ABC):
    """An encoded image, such as a JPEG, inside a larger file."""

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes.  Raises `OSError` if they cannot be read."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An image with a name; a file is opened only when needed.

    Attributes:
        id: Equal for equal sources.  Images are encoded once per id, and statistics are clustered
            by it.
        source: A file, the image itself, or where its bytes are.
    """

    id: str
    source: Path | Image.Image | Encoded

    def open(self) -> Image.Image:
        """The image, as `pictures.picture` opens it, which may raise `UserError`."""
        from tokenprune.pictures import (
            picture,
        )  # imports PyTorch, which questions without images do not need

        if not isinstance(self.source, Encoded):
            return picture(self.source)
        try:
            return picture(io.BytesIO(self.source.read()))
        except OSError as error:
            raise UserError(f"cannot read the image {self.id!r}: {error}.") from error

    def digest(self) -> str:
        """SHA-256 of the file or of the bytes, or of the pixels of an image in memory.

        Raises:
            OSError: The file cannot be read, or is no regular file.
        """
        if isinstance(self.source, Path):
            if not self.source.is_file():
                raise OSError(f"{str(self.source)!r} is not a regular file")
            return hashlib.sha256(self.source.read_bytes()).hexdigest()
        if isinstance(self.source, Encoded):
            return hashlib.sha256(self.source.read()).hexdigest()
        header = f"{self.source.mode} {self.source.size} ".encode()
        return hashlib.sha256(header + self.source.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Question:
    """A question about an image, several images or a video, and its true answer.

    Attributes:
        id: Unique in a data set.
        images: In the order in which the model receives them; for a video, its frames.
        question: The text.
        answer: The true answer, the first of ``answers``; empty if unknown.
        kind: The category by which accuracies are broken down.
        video: Whether the images are the frames of a video.
        place: The spot in a single image that shows the answer, (x, y) as shares of width and
            height; None if unknown.
        fault: Why the question cannot be asked; empty if it can.
        answers: All true answers, such as those of ten annotators; by default ``answer`` alone.
        choices: The texts of the options that the question offers, in order; None if it offers
            none.
        metric: The metric that scores its answers; None if the run decides.
        max_new_tokens: Maximum length of the answer; None if the run decides.

    Raises:
        ValueError: ``answer`` is not the first of ``answers``.
    """

    id: str
    images: tuple[Picture, ...]
    question: str
    answer: str
    kind: str = "other"
    video: bool = False
    place: tuple[float, float] | None = None
    fault: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    metric: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.answers and self.answer:
            object.__setattr__(self, "answers", (self.answer,))
        if self.answer != next(iter(self.answers), ""):
            raise ValueError(f"answer {self.answer!r} is not the first of {self.answers!r}")

    @property
    def modality(self) -> Modality:
        """``image``, ``multi-image`` or ``video``."""
        if self.video:
            return "video"
        return "image" if len(self.images) == 1 else "multi-image"

    @property
    def image_id(self) -> str:
        """The id of all its images; questions with the same id are not independent."""
        names = " ".join(_quoted(picture.id) for picture in self.images)
        return f"video {names}" if self.video else names


def _quoted(name: str) -> str:
    """``name``, quoted if it could be read as several names or as a quoted one."""
    return json.dumps(name, ensure_ascii=False) if " " in name or name.startswith('"') else name


def normalise(answer: str) -> str:
    """The form in which answers are compared: no case, no outer punctuation, single spaces.

    >>> normalise(" Yes.") == normalise("yes")
    True
    >>> normalise("-5") == normalise("5")
    False
    """
    folded = " ".join(answer.casefold().split())
    return folded.strip(_SURROUNDING) or folded


def held_out(count: int, seed: int, modality: Modality = "image") -> list[Question]:
    """The first ``count`` held-out questions; consecutive ones may share an image."""
    from tokenprune.models.testbed import scenes

    pictures: dict[str, Picture] = {}

    def shown(item: scenes.SceneQuestion) -> tuple[Picture, ...]:
        names = [item.image_id]
        if modality != "image":
            names = [f"{item.image_id}-{index}" for index in range(len(item.images))]
        return tuple(
            pictures.setdefault(name, Picture(name, image))
            for name, image in zip(names, item.images, strict=True)
        )

    return [
        Question(
            item.id,
            shown(item),
            item.question,
            item.answer,
            item.kind,
            modality == "video",
            item.place,
        )
        for item in scenes.questions(count, seed=seed, split="test", modality=modality)
    ]


def _short(value: str) -> str:
    return reprlib.repr(value)[:80]


def check_text(what: str, value: str, allowed: str = "") -> None:
    """Raise `UserError` for lone surrogates and for control characters."""
    if not is_whole(value):
        raise UserError(
            f"{what} has half a character (a lone surrogate) in {_short(value)}; write the "
            "whole one."
        )
    if not is_plain(value, allowed):
        raise UserError(f"{what} has a control character in {_short(value)}; leave it out.")


def check_placeholders(questions: Iterable[Question], pipe: "Pipeline") -> None:
    """Raise `UserError` unless the model can be asked every question.

    A question may have placeholders for all its images, or for its video.  Without any, the images
    come before the text (`Pipeline.prompt`).

    Args:
        questions: All of them.
        pipe: The model and its processor; the model needs no weights.
    """
    for item in with_faults(questions, pipe):
        if item.fault:
            raise UserError(f"the question {item.id!r} cannot be asked: {item.fault}")


def with_faults(questions: Iterable[Question], pipe: "Pipeline") -> list[Question]:
    """The questions, with a `Question.fault` where placeholders and images do not match.

    Args:
        questions: All of them.
        pipe: The model and its processor; the model needs no weights.

    Raises:
        UserError: The model does not take videos, but a question is about one.
    """
    found = []
    for item in questions:
        if item.video and "video" not in pipe.adapter.modalities:
            raise UserError(
                f"the question {item.id!r} is about a video, but this model takes images only; "
                "choose another model or --modality image."
            )
        try:
            pipe.prompt(item.question, 0 if item.video else len(item.images), int(item.video))
        except UserError as error:
            item = replace(item, fault=item.fault or str(error))
        found.append(item)
    return found


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of texts and of the content of images; the metric is left out."""
    shown = {p.id: p for item in questions if not item.fault for p in item.images}
    digests = {name: picture.digest() for name, picture in shown.items()}
    total = hashlib.sha256()
    for item in questions:
        images = [digests.get(picture.id, "") for picture in item.images]
        record: list[Any] = [item.id, images, item.question, item.answer, item.kind, item.video]
        # Questions without these fields keep the fingerprint that older runs recorded. Another
        # metric scores the same answers.
        if (more := (item.answers[1:], item.choices)) != ((), None):
            record.append(more)
        if item.max_new_tokens is not None:
            record.append(item.max_new_tokens)
        total.update(json.dumps(record).encode())
    return total.hexdigest()
