"""The models that figures are published for.  This module does not import pandas."""

from __future__ import annotations

from pathlib import Path

from tokenprune.models.published import known_name

__all__ = [
    "MODELS",
    "published_model",
]


_NAMES = {
    "llava-v1.6-vicuna-7b": "llava-next-7b",
    "llava-1.5-7b": "llava-1.5-7b",
    "llava-onevision-qwen2-7b": "llava-onevision-7b",
}


MODELS = tuple(_NAMES.values())
"""The models that figures are published for, as papers call them."""


def published_model(name: str) -> str | None:
    """The model of `MODELS` that a checkpoint is; None if there are no figures of it.

    Args:
        name: One of `MODELS`, or a Hub id or a folder with the checkpoint's usual name.

    >>> published_model("llava-hf/llava-v1.6-vicuna-7b-hf")
    'llava-next-7b'
    """
    last = Path(name).name
    return last.lower() if last.lower() in MODELS else _NAMES.get(known_name(last) or "")
