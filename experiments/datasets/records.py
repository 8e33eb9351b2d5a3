"""Records of a data set, and the questions that they describe."""

from __future__ import annotations

import hashlib
import math
import os
import reprlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tokenprune.errors import UserError
from tokenprune.experiments.common.names import OVERALL
from tokenprune.experiments.common.questions import (
    Encoded,
    Modality,
    Picture,
    Question,
    check_text,
)
from tokenprune.experiments.datasets.wording import PLAIN, Wording
from tokenprune.texts import is_remote

__all__ = [
    "FIELDS",
    "Asked",
    "Records",
    "questions_of",
    "sampled",
]


FIELDS = 'such as {"image": "cat.png", "question": "…", "answer": "…"}'
"""An example of a record, for messages."""


_LINES = 8  # malformed records that are explained; of the others, only the numbers are listed


_MOST_TOKENS = 1_000_000  # of an answer, as for --max-new-tokens


_LAYOUT = "\t\n\r"  # control characters that are allowed in texts


T = TypeVar("T")


Fields = Mapping[str, Any]
"""The fields of a record; an image is a path or `Encoded`."""


@dataclass(frozen=True)
class Records:
    """The records of a data set.

    Attributes:
        path: The file or folder, for messages.
        folder: Paths of images are relative to it.
        entries: The number of each record, and its fields or why it cannot be read.
        noun: What a record is called: ``line``, ``row`` or ``image``.
        form: What a record must be, for messages; by default an object with fields.
        wording: The usual wording of its prompts.
    """

    path: Path
    folder: Path
    entries: Iterable[tuple[int, Fields | UserError]]
    noun: str = "line"
    form: str = ""
    wording: Wording = PLAIN

    @property
    def hint(self) -> str:
        """What a record must be."""
        return self.form or f"each {self.noun} is an object {FIELDS}"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which questions of a data set are wanted, and what they must have.

    Attributes:
        count: The number of questions; None for all.
        modality: Only questions of this modality; None for all.
        seed: Seed of the sample of ``count`` questions; None for the first ones.
        check_images: Whether to decode the images; otherwise they may be missing.
        keep_faulty: Whether to record a missing or broken image in `Question.fault` instead of
            raising, so that the other questions can be asked.
        prompt: The question of records without one; None if every record needs its own.
        needs_answers: Whether every record needs a true answer; otherwise it may be unknown.
        wording: What becomes of a question; its parts replace those of `Records.wording`.
    """

    count: int | None = None
    modality: Modality | None = None
    seed: int | None = None
    check_images: bool = True
    keep_faulty: bool = False
    prompt: str | None = None
    needs_answers: bool = True
    wording: Wording = PLAIN


@dataclass(frozen=True)
class _Draft:
    """A question whose images are not opened yet."""

    number: int
    media: Sequence[str | Encoded]
    question: Question

    @property
    def modality(self) -> Modality:
        if self.question.video:
            return "video"
        return "image" if len(self.media) == 1 else "multi-image"


def questions_of(records: Records, asked: Asked) -> list[Question]:
    """The questions of ``records`` that are ``asked`` for, in their order.

    Raises:
        UserError: Records are malformed (all are named), an image is missing or broken, or there
            are fewer than ``asked.count`` questions.
    """
    asked = replace(asked, wording=asked.wording.over(records.wording))
    drafts, faults = _drafts(records, asked)
    there = [one for one in drafts if asked.modality in (None, one.modality)]
    if not faults:
        _check_number(records, asked, drafts, there)
    chosen = sampled(there, asked.count, asked.seed, lambda one: one.question.id)
    pictures = _Pictures(records, asked)
    found = []
    for draft in chosen:
        try:
            found.append(pictures.completed(draft))
        except UserError as error:
            faults[draft.number] = str(error)
    if faults:
        raise UserError(_faulty(records, dict(sorted(faults.items()))))
    return found


def _check_number(
    records: Records, asked: Asked, drafts: Sequence[_Draft], there: Sequence[_Draft]
) -> None:
    """Raise `UserError` unless there are questions, and as many as asked for.

    Args:
        records, asked: As of `questions_of`.
        drafts: Of all records.
        there: Those of the modality that is asked for.
    """
    if not there:
        what = f" of the modality {asked.modality}" if drafts else f"; {records.hint}"
        raise UserError(f"{records.path} holds no question{what}.")
    if asked.count is not None and len(there) < asked.count:
        raise UserError(
            f"{records.path} holds {len(there)} questions, fewer than the {asked.count} asked for; "
            "ask for at most as many, or leave --questions out to use all."
        )


def _drafts(records: Records, asked: Asked) -> tuple[list[_Draft], dict[int, str]]:
    """The drafts of all records, or of the first ones if these are enough; and what is wrong."""
    drafts: list[_Draft] = []
    faults: dict[int, str] = {}
    seen: dict[str, int] = {}
    wanted = 0
    for number, entry in records.entries:
        if asked.seed is None and wanted == asked.count:
            break
        try:
            if isinstance(entry, UserError):
                raise entry
            draft = _draft(entry, number, records, asked)
            if (name := draft.question.id) in seen:
                raise UserError(f"the id {name!r} is already used on {records.noun} {seen[name]}.")
        except UserError as error:
            faults[number] = str(error)
            continue
        seen[name] = number
        drafts.append(draft)
        wanted += asked.modality in (None, draft.modality)
    return drafts, faults


def sampled(items: Sequence[T], count: int | None, seed: int | None, name: Any) -> list[T]:
    """``count`` of ``items`` in their order: a random sample, or the first ones without ``seed``.

    A larger sample contains every smaller one of the same seed, and the sample does not depend on
    the order of the items, so that a run can grow.

    Args:
        items: What to choose from.
        count: How many; None for all.
        seed: Of the sample.
        name: A function of an item: its name, which no other item has.
    """
    if count is None or count >= len(items):
        return list(items)
    if seed is None:
        return list(items[:count])

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed} {name(items[index])}".encode()).digest()

    return [items[index] for index in sorted(sorted(range(len(items)), key=draw)[:count])]


# --- messages -------------------------------------------------------------------------------------


def _faulty(records: Records, faults: Mapping[int, str]) -> str:
    """A message about all malformed records: why the first ones are, and the others' numbers.

    Args:
        records: All of them.
        faults: Number of a record to what is wrong with it.
    """
    noun = records.noun
    if len(faults) == 1:
        return "".join(f"{records.path}, {noun} {number}: {why}" for number, why in faults.items())
    hint = f"; {records.hint}."
    known = list(faults.items())
    listed = [
        f"{noun} {number}: {textwrap.shorten(why.removesuffix(hint).rstrip('.'), 120)}"
        for number, why in known[:_LINES]
    ]
    if len(known) > _LINES:
        numbers = textwrap.shorten(_ranges([number for number, _ in known[_LINES:]]), 250)
        listed.append(f"and the {noun}s {numbers}")
    return "\n  ".join([f"{len(known)} {noun}s of {records.path} cannot be used{hint}", *listed])


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


# --- images ---------------------------------------------------------------------------------------


class _Pictures:
    """The pictures of a data set; equivalent paths, and equal bytes, give the same picture.

    Attributes:
        faults: Name of a picture to why it cannot be opened.
    """

    def __init__(self, records: Records, asked: Asked) -> None:
        self.folder, self.noun = records.folder, records.noun
        self.decode, self.keep_faulty = asked.check_images, asked.keep_faulty
        self.faults: dict[str, str] = {}
        self._known: dict[str, Picture] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def completed(self, draft: _Draft) -> Question:
        """The question with its pictures.

        Raises:
            UserError: One of them cannot be opened, or the frames of a video differ in size; unless
                faults are kept.
        """
        images = tuple(map(self._get, draft.media))
        fault = self._fault(images, video=draft.question.video)
        where = f"{self.noun} {draft.number}"
        return replace(draft.question, images=images, fault=f"{where}: {fault}" if fault else "")

    def _get(self, given: str | Encoded) -> Picture:
        if isinstance(given, str):
            name, source = self._place(given)
            return self._opened(name, source)
        try:
            name = hashlib.sha256(given.read()).hexdigest()
        except OSError as error:
            if not self.keep_faulty:
                raise UserError(f"its image cannot be read: {error}.") from error
            name = hashlib.sha256(repr(given).encode()).hexdigest()
        return self._opened(f"image-{name[:16]}", given)

    def _opened(self, name: str, source: Path | Encoded) -> Picture:
        if name not in self._known:
            found = Picture(name, source)
            try:
                if self.decode:
                    self._sizes[name] = found.open().size
            except UserError as error:
                if not self.keep_faulty:
                    raise
                self.faults[name] = str(error)
            self._known[name] = found
        return self._known[name]

    def _place(self, path: str) -> tuple[str, Path]:
        # "./a.png" and "a.png" are one picture, but ".." after a symbolic link leads elsewhere.
        name = Path(os.path.normpath(path)).as_posix()
        if os.path.realpath(self.folder / name) != os.path.realpath(self.folder / path):
            name = path
        return name, self.folder / name

    def _fault(self, shown: Sequence[Picture], *, video: bool) -> str:
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


# --- fields ---------------------------------------------------------------------------------------


def _draft(fields: Fields, number: int, records: Records, asked: Asked) -> _Draft:
    """The question that one record describes, without its images.  Raises `UserError`."""
    noun, prompt = records.noun, asked.prompt
    answered = "answers" if "answers" in fields else "answer"
    needed = ["question"] * (prompt is None) + [answered] * asked.needs_answers
    missing = [name for name in needed if name not in fields]
    given = [name for name in ("image", "images", "video") if name in fields]
    if not given:
        missing.insert(0, "image")
    if missing:
        listed = " and ".join(repr(name) for name in missing)
        verb = "s {} are" if len(missing) > 1 else " {} is"
        raise UserError(f"the field{verb.format(listed)} missing; {records.hint}.")
    if len(given) > 1:
        raise UserError("give one of 'image', 'images' and 'video', not several.")
    media = _media(fields, given[0])
    kind = _text(fields, "kind", "other")
    if kind == OVERALL:
        raise UserError(f"the kind {kind!r} stands for all questions together; choose another.")
    answers, choices = _answers(fields), _choices(fields)
    text = _text(fields, "question", prompt, allowed=_LAYOUT)
    question = Question(
        id=_text(fields, "id", f"{noun}-{number}"),
        images=(),
        question=asked.wording.applied(text, choices),
        answer=answers[0] if answers else "",
        kind=kind,
        video=given[0] == "video",
        place=_place(fields.get("place")),
        answers=answers,
        choices=choices,
        metric=_text(fields, "metric") if "metric" in fields else None,
        max_new_tokens=_tokens(fields.get("max_new_tokens")),
    )
    return _Draft(number, media, question)


def _media(fields: Fields, name: str) -> list[str | Encoded]:
    given = [fields["image"]] if name == "image" else fields[name]
    if not isinstance(given, list) or not all(isinstance(one, str | Encoded) for one in given):
        given = []
    if not given:
        raise UserError(
            "'image' must be a path, 'images' and 'video' must be a non-empty list of paths."
        )
    for path in given:
        if isinstance(path, Encoded):
            continue
        check_text("a path", path)
        if is_remote(path):
            raise UserError(
                f"{path!r} is a remote address; download it and write the path of the file."
            )
    return given


def _answers(fields: Fields) -> tuple[str, ...]:
    """All true answers; the one in 'answer', if it is there, comes first."""
    first = _text(fields, "answer", allowed=_LAYOUT) if "answer" in fields else None
    if "answers" not in fields:
        return () if first is None else (first,)
    found = _texts(fields, "answers")
    if first is None:
        return tuple(found)
    if first not in found:
        raise UserError(f"'answer' is not among 'answers': {_short(first)}; leave one of them out.")
    found.remove(first)
    return (first, *found)


def _choices(fields: Fields) -> tuple[str, ...] | None:
    return tuple(_texts(fields, "choices")) if "choices" in fields else None


def _texts(fields: Fields, name: str) -> list[str]:
    """The texts of a field that holds a list."""
    values = fields[name]
    if not isinstance(values, list) or not values:
        raise UserError(f"{name!r} must be a non-empty list of texts, got {_short(values)}.")
    return [_text({name: value}, name, allowed=_LAYOUT) for value in values]


def _tokens(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is float and value.is_integer():  # as in a column that is empty elsewhere
        value = int(value)
    if type(value) is not int or not 1 <= value <= _MOST_TOKENS:
        raise UserError(
            f"'max_new_tokens' must be a whole number from 1 to {_MOST_TOKENS}, got "
            f"{_short(value)}."
        )
    return value


def _short(value: Any) -> str:
    return reprlib.repr(value)[:80]


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


def _text(fields: Fields, name: str, default: str | None = None, allowed: str = "") -> str:
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
