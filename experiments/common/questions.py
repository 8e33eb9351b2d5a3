"""Questions with true answers, from a JSON-lines file or from the testbed's held-out set."""

import hashlib
import json
import math
import os
import reprlib
import shlex
import string
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.names import OVERALL
from tokenprune.texts import is_plain, is_remote, is_whole

if TYPE_CHECKING:
    from tokenprune.pipeline import Pipeline

__all__ = [
    "MODALITIES",
    "Modality",
    "Picture",
    "Question",
    "check_placeholders",
    "check_text",
    "fingerprint",
    "held_out",
    "normalise",
    "read_jsonl",
]


Modality = Literal["image", "multi-image", "video"]


MODALITIES: tuple[Modality, ...] = get_args(Modality)


_LINES = 8  # malformed lines that are explained; of the others, only the numbers are listed


_FIELDS = 'each line is an object such as {"image": "cat.png", "question": "…", "answer": "…"}'


_LAYOUT = "\t\n\r"  # control characters that are allowed in texts


_QUOTES = "‘’“”«»"


# Not all of `string.punctuation`: "-5", "5%" and "$5" are not "5".
_SURROUNDING = "".join(set(string.punctuation) - set("+-%$#&@")) + _QUOTES + string.whitespace


@dataclass(frozen=True, eq=False)
class Picture:
    """An image with a name; a file is opened only when needed.

    Attributes:
        id: Equal for equal sources.  Images are encoded once per id, and statistics are clustered
            by it.
        source: A file, or the image itself.
    """

    id: str
    source: Path | Image.Image

    def open(self) -> Image.Image:
        """The image, as `pictures.picture` opens it, which may raise `UserError`."""
        from tokenprune.pictures import (
            picture,
        )  # imports PyTorch, which questions without images do not need

        return picture(self.source)

    def digest(self) -> str:
        """SHA-256 of the file, or of the pixels of an image in memory.

        Raises:
            OSError: The file cannot be read, or is no regular file.
        """
        if isinstance(self.source, Path):
            if not self.source.is_file():
                raise OSError(f"{str(self.source)!r} is not a regular file")
            return hashlib.sha256(self.source.read_bytes()).hexdigest()
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


def read_jsonl(
    path: Path,
    count: int | None = None,
    modality: Modality | None = None,
    *,
    check_images: bool = True,
    keep_faulty: bool = False,
    prompt: str | None = None,
    needs_answers: bool = True,
) -> list[Question]:
    """The questions of a JSON-lines file, the first ``count`` of them or all.

    Every line has ``image`` (a path), ``images`` (a list of paths) or ``video`` (the paths of its
    frames), ``question`` and ``answer``, and may have ``kind``, ``id`` and ``place`` ([x, y] of the
    spot in the image that shows the answer, as shares of width and height).  Paths are relative to
    the file.  Other fields and blank lines are ignored.  Every image is decoded once, to check that
    it is intact and that the frames of a video have one size.

    Args:
        path: The file.
        count: The number of questions; None for all.
        modality: Only questions of this modality; None for all.
        check_images: Whether to decode the images; otherwise they may be missing.
        keep_faulty: Whether to record a missing or broken image in `Question.fault` instead of
            raising, so that the other questions can be asked.
        prompt: The question of lines without one; None if every line needs its own.
        needs_answers: Whether every line needs a true answer; otherwise it may be unknown.

    Raises:
        UserError: The file cannot be read or is empty, lines are malformed (all are named), an
            image is missing or broken, or there are fewer than ``count`` questions.
    """
    faults: dict[int, str] = {}
    questions: list[Question] = []
    pictures = _Pictures(path.parent, check_images, keep_faulty)
    seen: dict[str, int] = {}
    for number, line in _lines(path):
        if len(questions) == count:
            break
        try:
            item = _question(line, number, pictures, prompt, needs_answers)
            if item.id in seen:
                raise UserError(f"the id {item.id!r} is already used on line {seen[item.id]}.")
        except UserError as error:
            faults[number] = str(error)
            continue
        seen[item.id] = number
        if modality in (None, item.modality):
            questions.append(item)
    if faults:
        raise UserError(_faulty_lines(path, faults))
    if not questions:
        what = f" of the modality {modality}" if seen else f"; {_FIELDS}"
        raise UserError(f"{path} holds no question{what}.")
    if count is not None and len(questions) < count:
        raise UserError(
            f"{path} holds {len(questions)} questions, fewer than the {count} asked for; ask for "
            "at most as many, or leave --questions out to use all."
        )
    return questions


def _faulty_lines(path: Path, faults: Mapping[int, str]) -> str:
    """A message about all malformed lines: why the first ones are, and the numbers of the others.

    Args:
        path: The data file.
        faults: Number of a line to what is wrong with it.
    """
    if len(faults) == 1:
        return "".join(f"{path}, line {number}: {why}" for number, why in faults.items())
    hint = f"; {_FIELDS}."
    known = list(faults.items())
    listed = [
        f"line {number}: {textwrap.shorten(why.removesuffix(hint).rstrip('.'), 120)}"
        for number, why in known[:_LINES]
    ]
    if len(known) > _LINES:
        numbers = textwrap.shorten(_ranges([number for number, _ in known[_LINES:]]), 250)
        listed.append(f"and the lines {numbers}")
    return "\n  ".join([f"{len(known)} lines of {path} cannot be used{hint}", *listed])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short form.

    >>> _ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a data file that are not blank, and their numbers.

    Raises:
        UserError: It cannot be read, or is a JSON array.
    """
    content = _read(path).removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        raise UserError(
            f"{path} begins with '[', as a JSON array does; write one object per line instead, "
            f"without brackets and commas between them: jq -c '.[]' {shlex.quote(str(path))}"
        )
    return [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(None, "It is a pipe or a device, which can be read only once")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read the data file {str(path)!r}: {said}. Expected JSON lines; {_FIELDS}."
        ) from error


class _Pictures:
    """The pictures of a data file; equivalent paths give the same picture.

    Attributes:
        folder: The folder that paths are relative to.
        decode: Whether to decode every picture, to check it.
        keep_faulty: Whether to record errors in `faults` instead of raising.
        faults: Name of a picture to why it cannot be opened.
    """

    def __init__(self, folder: Path, decode: bool, keep_faulty: bool) -> None:
        self.folder, self.decode, self.keep_faulty = folder, decode, keep_faulty
        self.faults: dict[str, str] = {}
        self._known: dict[str, Picture] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def get(self, path: str) -> Picture:
        # "./a.png" and "a.png" are one picture, but ".." after a symbolic link leads elsewhere.
        name = Path(os.path.normpath(path)).as_posix()
        if os.path.realpath(self.folder / name) != os.path.realpath(self.folder / path):
            name = path
        if name not in self._known:
            found = Picture(name, self.folder / name)
            try:
                if self.decode:
                    self._sizes[name] = found.open().size
            except UserError as error:
                if not self.keep_faulty:
                    raise
                self.faults[name] = str(error)
            self._known[name] = found
        return self._known[name]

    def fault(self, shown: Sequence[Picture], *, video: bool) -> str:
        """Why a question cannot use these pictures; empty if it can.

        Raises:
            UserError: The frames of a video differ in size, and ``keep_faulty`` is false.
        """
        found = next((self.faults[one.id] for one in shown if one.id in self.faults), "")
        sizes = {self._sizes[one.id] for one in shown if one.id in self._sizes}
        if found or not video or len(sizes) < 2:
            return found
        found = f"the frames of a video must be of one size, got {sorted(sizes)} (width, height)."
        if not self.keep_faulty:
            raise UserError(found)
        return found


def _question(
    line: bytes, number: int, pictures: _Pictures, prompt: str | None, needs_answers: bool
) -> Question:
    """Parse one line; ``prompt`` and ``needs_answers`` as of `read_jsonl`."""
    try:
        fields = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise UserError("this is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"this is not JSON ({error.msg} at column {error.colno}); {_FIELDS}."
        ) from None
    except UserError:
        raise
    except ValueError:
        raise UserError(f"a number has more digits than can be read; {_FIELDS}.") from None
    except RecursionError:
        raise UserError(f"lists or objects are nested too deeply; {_FIELDS}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"expected an object, got {type(fields).__name__}; {_FIELDS}.")
    needed = ["question"] * (prompt is None) + ["answer"] * needs_answers
    missing = [name for name in needed if name not in fields]
    given = [name for name in ("image", "images", "video") if name in fields]
    if not given:
        missing.insert(0, "image")
    if missing:
        listed = " and ".join(repr(name) for name in missing)
        verb = "s {} are" if len(missing) > 1 else " {} is"
        raise UserError(f"the field{verb.format(listed)} missing; {_FIELDS}.")
    if len(given) > 1:
        raise UserError("give one of 'image', 'images' and 'video', not several.")
    paths = [fields["image"]] if "image" in fields else fields[given[0]]
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
        raise UserError(
            "'image' must be a path, 'images' and 'video' must be a non-empty list of paths."
        )
    kind = _text(fields, "kind", "other")
    if kind == OVERALL:
        raise UserError(f"the kind {kind!r} stands for all questions together; choose another.")
    for path in paths:
        check_text("a path", path)
        if is_remote(path):
            raise UserError(
                f"{path!r} is a remote address; download it and write the path of the file."
            )
    images = tuple(pictures.get(path) for path in paths)
    fault = pictures.fault(images, video="video" in fields)
    return Question(
        id=_text(fields, "id", f"line-{number}"),
        images=images,
        question=_text(fields, "question", prompt, allowed=_LAYOUT),
        answer=_text(fields, "answer", allowed=_LAYOUT) if "answer" in fields else "",
        kind=kind,
        video="video" in fields,
        place=_place(fields.get("place")),
        fault=f"line {number}: {fault}" if fault else "",
    )


def _short(value: Any) -> str:
    return reprlib.repr(value)[:80]


def _no_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is no JSON; write a text or a finite number.")


def _place(value: Any) -> tuple[float, float] | None:
    """(x, y), each from 0 to 1.  Raises `UserError` for anything else but None."""
    if value is None:
        return None
    numbers = isinstance(value, list) and [isinstance(v, int | float) for v in value] == [True] * 2
    if not numbers or not all(0 <= share <= 1 for share in value):
        raise UserError(
            "'place' must be [x, y] with shares of width and height from 0 to 1, got "
            f"{_short(value)}."
        )
    return float(value[0]), float(value[1])


def _text(fields: dict[str, Any], name: str, default: str | None = None, allowed: str = "") -> str:
    """The text of a field, which may contain the control characters ``allowed``."""
    value = fields.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not (isinstance(value, float) and not math.isfinite(value)):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{name!r} must be a non-empty text or a finite number, got {_short(value)}."
        )
    check_text(repr(name), value, allowed)
    return value


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
        total.update(json.dumps(record).encode())
    return total.hexdigest()
