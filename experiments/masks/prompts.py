"""The prompts whose masks are drawn: an example, a user's images, or the questions of a file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.own_images import (
    check_prompt,
    image_files,
    is_group,
    own_questions,
)
from tokenprune.experiments.common.questions import Picture, Question, held_out
from tokenprune.experiments.common.request import ModelRequest
from tokenprune.pictures import frames
from tokenprune.texts import is_remote

__all__ = [
    "MasksRequest",
    "Prompt",
    "prompts",
]


@dataclass(frozen=True, kw_only=True)
class MasksRequest(ModelRequest):
    """What to draw.

    Attributes:
        model: As for `tokenprune.load`; empty for a testbed that takes such images.
        words: Images (`own_images.image_files`), and last the question unless ``prompt`` is given;
            none for an example of the testbed.  Several files are the images of one prompt.  A
            folder or a pattern gives one prompt, and one figure, for every image.
        prompt: The question about every image.
        data: File of questions (`questions.read_jsonl`), which need no answers, instead of
            ``words``; one figure each.
        images: The number of figures of a folder, a pattern or a data file; None for all.
        methods: Specs; None for GlobalCom² and FastV, or those of them that need no question if
            there is none.
        retention: Retention ratios, each in (0, 1].
        video: Whether the images are the frames of one video.
        frames: Maximum number of frames.
        cuts: As of `look`.
        pretrained: Checkpoint of a timm model.
        max_new_tokens: Maximum length of an answer.
        force: Whether to replace the result of an earlier call in ``out``.
    """

    model: str = ""
    words: Sequence[str] = ()
    prompt: str | None = None
    data: Path | None = None
    images: int | None = None
    methods: Sequence[str] | None = None
    retention: Sequence[float] = (0.25,)
    video: bool = False
    frames: int = 8
    cuts: bool = False
    pretrained: str | None = None
    max_new_tokens: int = 8
    force: bool = False


@dataclass(frozen=True, eq=False)
class Prompt:
    """The images or the video of a prompt, with the question if there is one.

    Attributes:
        name: Of the prompt, for files and messages.
        pictures: Its images in order, or the frames of its video.
        question, truth: The question and its true answer, if known.
        video: Whether the pictures are the frames of a video.
    """

    name: str
    pictures: tuple[Picture, ...]
    question: str | None = None
    truth: str | None = None
    video: bool = False

    def asked(self) -> Question:
        """The prompt as a question."""
        return Question(self.name, self.pictures, self.question or "", "", video=self.video)


def prompts(request: MasksRequest) -> list[Prompt]:
    """The prompts of ``request``, at least one; every image is decoded once to check it.

    Raises:
        UserError: An image is missing or damaged, there is no image, or fewer prompts than asked
            for.
    """
    check_prompt(request.prompt)
    if request.data is not None:
        found = _of_data(request)
    elif request.words:
        found = _of_words(request)
    elif request.prompt is not None:
        raise UserError("--prompt asks about images of your own; give them, or --data.")
    else:
        found = [_example(request)]
    if request.images is not None and len(found) < request.images:
        raise UserError(
            f"there are {len(found)} images, fewer than the {request.images} asked for; leave "
            "--images out to use all."
        )
    return found[: request.images]


def _example(request: MasksRequest) -> Prompt:
    """A question of the testbed that needs the crops."""
    asked = held_out(50, request.seed, "video" if request.video else "image")
    item = next((item for item in asked if item.kind == "digit"), asked[0])
    return _prompt(item, f"example-{request.seed}")


def _prompt(item: Question, name: str) -> Prompt:
    return Prompt(name, item.images, item.question, item.answer or None, item.video)


def _of_data(request: MasksRequest) -> list[Prompt]:
    if request.video:
        raise UserError("--video is for images; a data file has videos in its field 'video'.")
    found = own_questions(request.words, request.data, request.prompt)
    return [_prompt(item, item.id) for item in found]


def _of_words(request: MasksRequest) -> list[Prompt]:
    words, question = list(request.words), request.prompt
    if question is None and not _names_images(words[-1]):
        question = words.pop()
    if not words:
        raise UserError(
            f"{question!r} is no image file; give images first, then the question: "
            'tokenprune masks photo.jpg "What is this?"'
        )
    strays = [word for word in words if not (_names_images(word) or is_remote(word))]
    if question is not None and strays and words[-len(strays) :] == strays != words:
        text = shlex.quote(" ".join([*strays, question]))
        raise UserError(
            f"{strays[0]!r} is no image; if it belongs to the question, write the question in "
            f"quotes: {text}"
        )
    name = Path(words[0]).stem[:80] or "picture"
    if request.video:
        return [Prompt(name, _frames(words, request.frames), question, video=True)]
    if any(map(is_group, words)):
        found = own_questions(words, None, request.prompt)
        return [Prompt(item.id, item.images, question) for item in found]
    files = [file for word in words for file in image_files([word])]  # one may appear twice
    pictures = tuple(Picture(str(index), file) for index, file in enumerate(files))
    for shown in pictures:
        shown.open()
    return [Prompt(name, pictures, question)]


def _names_images(word: str) -> bool:
    # os.path: a question may be too long for a name.
    suffix = os.path.splitext(word)[1].lower()
    return os.path.exists(word) or suffix in Image.registered_extensions() or is_group(word)


def _frames(words: Sequence[str], most: int) -> tuple[Picture, ...]:
    """At most ``most`` frames of a folder, an animation, or several images."""
    alone = len(words) == 1 and os.path.exists(words[0])
    clip = [Image.fromarray(frame) for frame in frames(words[0] if alone else image_files(words))]
    places = np.linspace(0, len(clip) - 1, min(most, len(clip))).round().astype(int)
    return tuple(Picture(str(place), clip[place]) for place in places)
