"""What users hand over, brought into the order of the prompts: images, videos and questions.

A question may mark the places of its images and videos, in the way of LLaVA's own data:
``<image>\\nWhat is this?``.  Marks become content parts of the chat template, which so gives the
prompt that the question alone gives.  Only a text that carries the template's turn markers already
is a finished prompt.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.errors import UserError
from tokenprune.pictures import frames, is_one_picture, picture
from tokenprune.texts import is_whole

__all__ = [
    "channels_first",
    "chat_prompt",
    "clips_by_prompt",
    "images_by_prompt",
    "listed",
    "questions",
]


Message = dict[str, Any]


# --- images and videos ----------------------------------------------------------------------------


def images_by_prompt(images: Any, prompts: int) -> list[list[Image.Image]]:
    """For every prompt its images, each as `picture` makes it.  Raises `UserError`."""
    return [
        [picture(one) for one in ([some] if is_one_picture(some) else some)]
        for some in _by_prompt(images, prompts, "image")
    ]


def clips_by_prompt(videos: Any, prompts: int) -> list[list[np.ndarray[Any, Any]]]:
    """For every prompt its videos, each as `frames` makes it.  Raises `UserError`."""
    return [
        [frames(one) for one in ([some] if _is_one_video(some) else some)]
        for some in _by_prompt(videos, prompts, "video")
    ]


def channels_first(clip: np.ndarray[Any, Any]) -> Tensor:
    """(frames, 3, height, width) of a video; processors guess where the channels of an array are.

    Of frames of 1, 3 or 4 rows they would guess wrong.
    """
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2)))


def listed(media: Any, what: str) -> list[Any]:
    """The entries of a list of images or videos.  Raises `UserError` for a single one."""
    axes = 4 if what == "image" else 5
    is_array = isinstance(media, np.ndarray | Tensor)
    if media is None or (media.ndim < axes if is_array else is_one_picture(media)):
        kind = "None" if media is None else f"one object of type {type(media).__name__}"
        raise UserError(f"{what}s must be a list of {what}s, got {kind}; write [{what}].")
    return list(media)


def questions(prompts: Any) -> list[str]:
    """The prompts.  Raises `UserError` for a single one, or for what is no text."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UserError(
            f"prompts must be a list of texts, got one object of type {type(prompts).__name__}; "
            "write [question]."
        )
    found = list(prompts)
    for prompt in found:
        if not isinstance(prompt, str):
            raise UserError(f"a prompt must be a text, got {prompt!r:.60}.")
        if not is_whole(prompt):
            raise UserError(f"the prompt {prompt[:60]!r} has half a character (a lone surrogate).")
    return found


def _by_prompt(media: Any, prompts: int, what: str) -> list[Any]:
    lists = [[]] * prompts if media is None else listed(media, what)
    if len(lists) != prompts:
        raise UserError(f"{len(lists)} {what} lists for {prompts} prompts; give one per prompt.")
    return lists


def _is_one_video(some: Any) -> bool:
    """Whether a prompt's entry is one video, not a list of videos."""
    if isinstance(some, np.ndarray | Tensor):
        return some.ndim < 5
    return is_one_picture(some) or (len(some) > 0 and is_one_picture(some[0]))


# --- prompts --------------------------------------------------------------------------------------


def chat_prompt(
    question: str, processor: Any, counts: Mapping[str, int], tokens: Mapping[str, str]
) -> str:
    """``question`` as the model is asked it, with one placeholder for each image and video.

    Args:
        question: With or without marks, or a finished prompt.
        processor: Of the model; without a chat template a question with marks is the prompt.
        counts: Modality to how many images or videos the question is about.
        tokens: Modality to the text of its placeholder, which is its mark as well.

    Raises:
        UserError: The marks of the question are not as many as its images and videos.
    """
    finished = _is_finished(processor, question)
    marked = any(token in question for token in tokens.values())
    if finished or marked:
        _check_counts(question, counts, tokens, finished)
    if not getattr(processor, "chat_template", None):
        front = "".join(f"{token}\n" * counts[name] for name, token in tokens.items())
        return question if marked else front + question
    if finished:
        return question
    if marked:
        content = _parts(question, tokens)
    else:
        content = [{"type": name} for name in tokens for _ in range(counts[name])]
        content.append({"type": "text", "text": question})
    text = _render(processor, [{"role": "user", "content": content}], add_generation_prompt=True)
    if any(text.count(token) != counts[name] for name, token in tokens.items()):
        raise UserError(
            f"the model's chat template does not show {_listed_counts(counts)} in the prompt "
            f"{question[:60]!r}; write the whole prompt, with the template's turn markers."
        )
    return text


def _check_counts(
    question: str, counts: Mapping[str, int], tokens: Mapping[str, str], finished: bool
) -> None:
    way_out = "" if finished else ", or none to have them put in front"
    for name, token in tokens.items():
        found = question.count(token)
        if found != counts[name]:
            raise UserError(
                f"the prompt {question[:60]!r} has {found} {token!r} placeholders but "
                f"{counts[name]} {name}s; write one for each{way_out}."
            )


def _listed_counts(counts: Mapping[str, int]) -> str:
    return " and ".join(f"{count} {name}s" for name, count in counts.items() if count)


def _parts(question: str, tokens: Mapping[str, str]) -> list[Message]:
    """The content of a question with marks, in the order of the text.

    A line break beside a mark belongs to the mark, and so does the space behind marks that begin
    the text.
    """
    names = {token: name for name, token in tokens.items()}
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", question)
    content: list[Message] = []
    for index, piece in enumerate(pieces):
        if piece in names:
            content.append({"type": names[piece]})
            continue
        begins = all(part["type"] != "text" for part in content)
        if index > 0:
            piece = re.sub(r"^(\r?\n|[ \t])" if begins else r"^\r?\n", "", piece)
        if index < len(pieces) - 1:
            piece = re.sub(r"\r?\n$", "", piece)
            if not piece.strip():  # nothing but space between two marks
                continue
        if piece:
            content.append({"type": "text", "text": piece})
    if all(part["type"] != "text" for part in content):
        content.append({"type": "text", "text": ""})
    return content


def _render(processor: Any, messages: list[Message], **options: Any) -> str:
    return str(processor.apply_chat_template(messages, **options))


def _is_finished(processor: Any, text: str) -> bool:
    """Whether ``text`` has the turn markers of the processor's chat template, in their order."""
    template = getattr(processor, "chat_template", None)
    if not template:
        return False
    # Spaces and line breaks around the markers differ between the templates and their examples.
    opening, closing = _markers(processor, str(template))
    squeezed = "".join(text.split())
    place = squeezed.find(opening)
    return bool(opening + closing) and place >= 0 and closing in squeezed[place + len(opening) :]


@lru_cache(maxsize=32)
def _markers(processor: Any, template: str) -> tuple[str, str]:
    """What a chat template writes in front of a user's text and behind it, without white space.

    Read off a conversation of three turns: behind the first text comes the answer's marker, behind
    the second, after whatever ends an answer, the user's.  Empty where the template has none.
    """
    said = [f"Turn{place}Text" for place in ("One", "Two", "Three")]
    roles = ("user", "assistant", "user")
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(roles, said, strict=True)
    ]
    try:
        talk = _render(processor, turns)
        _, end = _render(processor, turns[:2]).split(said[1])
        _, closing, between, _ = re.split("|".join(said), talk)
    except Exception:  # a template may refuse any conversation; the question itself will tell
        return "", ""
    ends = os.path.commonprefix([between, end])  # noqa: RUF071  # of texts, not of paths
    opening = between[len(ends) :]
    return "".join(opening.split()), "".join(closing.split())
