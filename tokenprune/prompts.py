"""Brings the images, videos and questions of users into the order of the prompts.

A question may mark the places of its images and videos, as LLaVA's training data do:
``<image>\\nWhat is this?``.  Marks become content parts of the chat template, so that the prompt is
the same as for the question without marks.  Only a text with the template's turn markers is a
finished prompt.
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
    """The images of every prompt, each read by `picture`.  Raises `UserError`."""
    return [
        [picture(one) for one in ([some] if is_one_picture(some) else some)]
        for some in _by_prompt(images, prompts, "image")
    ]


def clips_by_prompt(videos: Any, prompts: int) -> list[list[np.ndarray[Any, Any]]]:
    """The videos of every prompt, each read by `frames`.  Raises `UserError`."""
    return [
        [frames(one) for one in ([some] if _is_one_video(some) else some)]
        for some in _by_prompt(videos, prompts, "video")
    ]


def channels_first(clip: np.ndarray[Any, Any]) -> Tensor:
    """(frames, 3, height, width) tensor of a video (frames, height, width, 3).

    Processors guess the channel axis of an array, and guess wrong for frames of 1, 3 or 4 rows.
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
    """The prompts as a list.  Raises `UserError` for a single prompt or one that is not a text."""
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
    question: str,
    processor: Any,
    counts: Mapping[str, int],
    tokens: Mapping[str, str],
    *,
    system: str | None = None,
) -> str:
    """The prompt of ``question``, with one placeholder for each image and video.

    Args:
        question: A question with or without marks, or a finished prompt.  ``<image>`` and
            ``<video>`` mark places in front of every model.
        processor: Processor of the model.  If it has no chat template, a question with marks is the
            prompt.
        counts: Modality to the number of images or videos of the question.
        tokens: Modality to the text of its placeholder, which is also its mark.
        system: System message; None for that of the template, or none.

    Raises:
        UserError: The number of marks differs from the number of images or videos, or the chat
            template does not show them or the system message.
    """
    for name, token in tokens.items():
        question = question.replace(f"<{name}>", token)
    finished = _is_finished(processor, question)
    marked = any(token in question for token in tokens.values())
    if finished or marked:
        _check_counts(question, counts, tokens, finished)
    if not getattr(processor, "chat_template", None):
        if system and not finished:
            raise UserError("the model has no chat template to show a system message.")
        front = "".join(f"{token}\n" * counts[name] for name, token in tokens.items())
        return question if marked else front + question
    if finished:
        return question
    if marked:
        content = _parts(question, tokens)
    else:
        content = [{"type": name} for name in tokens for _ in range(counts[name])]
        content.append({"type": "text", "text": question})
    messages: list[Message] = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = _rendered_question(processor, messages, system)
    if any(text.count(token) != counts[name] for name, token in tokens.items()):
        raise UserError(
            f"the model's chat template does not show {_listed_counts(counts)} in the prompt "
            f"{question[:60]!r}; write the whole prompt, with the template's turn markers."
        )
    return text


def _rendered_question(processor: Any, messages: list[Message], system: str | None) -> str:
    """The prompt of ``messages``.  Raises `UserError` if it does not show ``system``."""
    why = ""
    try:
        text = _render(processor, messages, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a system message
        if not system:
            raise
        text, why = "", f" ({error})"
    if system and system.strip() not in text:
        raise UserError(
            f"the model's chat template does not show a system message{why}; leave --system out, "
            "or write the text into the questions."
        )
    return text


def _check_counts(
    question: str, counts: Mapping[str, int], tokens: Mapping[str, str], finished: bool
) -> None:
    way_out = "" if finished else ", or none to have them added in front"
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

    A line break next to a mark belongs to the mark.  So does the space after marks that begin the
    text.
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
            if not piece.strip():  # only white space between two marks
                continue
        if piece:
            content.append({"type": "text", "text": piece})
    if all(part["type"] != "text" for part in content):
        content.append({"type": "text", "text": ""})
    return content


def _render(processor: Any, messages: list[Message], **options: Any) -> str:
    return str(processor.apply_chat_template(messages, **options))


def _is_finished(processor: Any, text: str) -> bool:
    """Whether ``text`` has the turn markers of the processor's chat template, in order."""
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
    """The text that a chat template writes before and after a user's text, without white space.

    It is read from a conversation of three turns.  The marker of the answer follows the first text.
    The end of an answer and the marker of the user follow the second text.  A marker is empty if
    the template has none.
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
    except Exception:  # a template may refuse this conversation and accept the question
        return "", ""
    ends = os.path.commonprefix([between, end])  # noqa: RUF071  # of texts, not of paths
    opening = between[len(ends) :]
    return "".join(opening.split()), "".join(closing.split())
