"""Drops columns of the prompt and packs what is left."""

from __future__ import annotations

from tokenprune.signals import Signal

__all__ = [
    "BEFORE",
    "PROMPT",
]


PROMPT = Signal("llm_prompt")


BEFORE = -1  # in place of a layer's index: in front of the language model
