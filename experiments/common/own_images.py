"""Images that a user names: files, folders and patterns, each asked about with one prompt.

This module imports PyTorch only to open an image.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import (
    Modality,
    Picture,
    Question,
    check_text,
)
from tokenprune.experiments.datasets.benchmarks import benchmark_records
from tokenprune.experiments.datasets.files import records_of
from tokenprune.experiments.datasets.records import Asked, questions_of, sampled
from tokenprune.experiments.datasets.wording import PLAIN, Wording
from tokenprune.texts import is_remote

__all__ = [
    "PROMPT",
    "check_prompt",
    "image_files",
    "is_group",
    "own_questions",
    "with_answers",
]


PROMPT = "What is in the image?"
"""The question about images that come without one."""


_DATA = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")


def own_questions(
    paths: Sequence[str | Path],
    data: Path | None,
    prompt: str | None = None,
    *,
    benchmark: str | None = None,
    root: Path | None = None,
    split: str | None = None,
    count: int | None = None,
    seed: int | None = None,
    modality: Modality | None = None,
    check_images: bool = True,
    keep_faulty: bool = False,
    needs_answers: bool = False,
    wording: Wording = PLAIN,
) -> list[Question]:
    """The questions of a data set, or one question about each of a user's images.

    Args:
        paths: Image files, folders and patterns (`image_files`).  Their questions have no true
            answer.
        data: A file or folder of questions (`files.records_of`), instead of ``paths``.
        prompt: The question about images that come without one; None for `PROMPT` with ``paths``.
        benchmark, root: The name of a benchmark and the folder with its files
            (`benchmarks.benchmark_records`), instead of ``data``.
        split: The split of ``data`` or of the benchmark.
        count: The number of questions; None for all.
        seed: Seed of the sample of ``count`` questions; None for the first ones.
        modality, check_images, keep_faulty: As in `records.Asked`; ``paths`` are single images.
        needs_answers: Whether every question of ``data`` must have a true answer.
        wording: What becomes of a question.

    Raises:
        UserError: As `questions_of`, `records_of`, `benchmark_records` and `image_files`; several
            of ``paths``, ``data`` and ``benchmark`` are given; or ``benchmark`` without ``root``.
    """
    check_prompt(prompt)
    _check_sources(paths, data, benchmark, root, split)
    asked = Asked(
        count=count,
        modality=modality,
        seed=seed,
        check_images=check_images,
        keep_faulty=keep_faulty,
        prompt=prompt,
        needs_answers=needs_answers,
        wording=wording,
    )
    if benchmark is not None and root is not None:
        return questions_of(benchmark_records(benchmark, root, split), asked)
    if data is not None:
        return questions_of(records_of(data, split), asked)
    return _about_images(paths, asked)


def _about_images(paths: Sequence[str | Path], asked: Asked) -> list[Question]:
    """One question about each image.  Raises `UserError`."""
    modality, count = asked.modality, asked.count
    if modality not in (None, "image"):
        raise UserError(
            f"images of your own are single images, not of the modality {modality}; write videos "
            "and prompts of several images into a data file (--data)."
        )
    files = image_files(paths)
    if count is not None and len(files) < count:
        raise UserError(
            f"there are {len(files)} images, fewer than the {count} asked for; leave the number "
            "out to use all."
        )
    named = [Picture(name, file) for name, file in zip(_names(files), files, strict=True)]
    pictures = sampled(named, count, asked.seed, lambda one: one.id)
    keep = asked.keep_faulty
    faults = {picture.id: _fault(picture, keep) for picture in pictures if asked.check_images}
    text = asked.wording.applied(asked.prompt or PROMPT)
    return [Question(one.id, (one,), text, "", fault=faults.get(one.id, "")) for one in pictures]


def _check_sources(
    paths: Sequence[str | Path],
    data: Path | None,
    benchmark: str | None,
    root: Path | None,
    split: str | None,
) -> None:
    """Raise `UserError` unless one source of questions is given, with what belongs to it."""
    if paths and data is not None:
        raise UserError("give either images or --data, not both.")
    if benchmark is not None and (paths or data is not None):
        raise UserError("give --benchmark without images and --data.")
    if (benchmark is None) != (root is None):
        raise UserError(
            "--benchmark and --root belong together: the name of a benchmark and the folder with "
            "its files."
        )
    if split is not None and benchmark is None and data is None:
        raise UserError("--split is for --data and --benchmark; give one of them.")


def check_prompt(prompt: str | None) -> None:
    """Raise `UserError` if the text is empty or has characters that are no text."""
    if prompt is None:
        return
    if not prompt.strip():
        raise UserError("--prompt is empty; give the question about every image.")
    check_text("--prompt", prompt, "\t\n\r")


def _fault(picture: Picture, keep: bool) -> str:
    """Why a picture cannot be opened, or an empty text.  Raises it unless ``keep``."""
    try:
        picture.open()
    except UserError as error:
        if not keep:
            raise
        return str(error)
    return ""


def _names(files: Sequence[Path]) -> list[str]:
    """The paths below the folder that all files share, which do not depend on its place."""
    whole = [os.path.abspath(file) for file in files]
    shared = os.path.commonpath([os.path.dirname(file) for file in whole])
    return [Path(os.path.relpath(file, shared)).as_posix() for file in whole]


def image_files(words: Iterable[str | Path]) -> list[Path]:
    """The files that ``words`` name, in their order, each once.

    Args:
        words: Files, folders (the images in them, by name) and patterns such as
            ``photos/**/*.jpg`` (what matches them, by name).  ``~`` is the home folder.

    Raises:
        UserError: A folder or a pattern holds no image, or a word is a data file.
    """
    found: dict[str, Path] = {}
    for word in words:
        for file in _files_of(word):
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def is_group(word: str | Path) -> bool:
    """Whether ``word`` is a folder, or a pattern that is not a file itself."""
    place = _local(word)
    if os.path.lexists(place):
        return os.path.isdir(place)
    return glob.has_magic(place) and (_is_image(place) or any(map(_is_image, _matches(place))))


def _local(word: str | Path) -> str:
    """The path or pattern that ``word`` names.  Raises `UserError` for a remote address."""
    place = os.path.expanduser(word)
    if place.startswith("file:/"):
        return unquote(urlsplit(place).path)
    if is_remote(place) and not os.path.lexists(place):
        raise UserError(
            f"{place!r} is a remote address; download it and give the path of the file."
        )
    return place


def _files_of(word: str | Path) -> list[Path]:
    place = _local(word)
    if os.path.isdir(place):
        files, what = [os.path.join(place, name) for name in os.listdir(place)], "in the folder"
    elif is_group(place):
        files, what = _matches(place), "that matches"
    elif place.lower().endswith(_DATA):
        raise UserError(f"{place!r} is a data file; give it with --data.")
    else:
        return [Path(place)]
    images = [Path(file) for file in sorted(files) if _is_image(file)]
    if not images:
        raise UserError(f"there is no image {what} {place!r}; check the path.")
    return images


def _matches(pattern: str) -> list[str]:
    try:
        return [file for file in glob.glob(pattern, recursive=True) if not os.path.isdir(file)]
    except (OSError, ValueError):  # longer than a path can be, or with a null byte
        return []


def _is_image(file: str) -> bool:
    return os.path.splitext(file)[1].lower() in Image.registered_extensions()


def with_answers(questions: Sequence[Question]) -> bool:
    """Whether the true answers are known.

    Raises:
        UserError: Only those of some questions are.
    """
    lacking = [item for item in questions if not item.answer]
    if lacking and len(lacking) < len(questions):
        raise UserError(
            f"{len(lacking)} of {len(questions)} questions have no answer, the first is "
            f"{lacking[0].id!r}; give all true answers, or none to measure the agreement with the "
            "uncompressed model."
        )
    return not lacking
