"""Tiny checkpoints of the Qwen-VL families with real processors, built without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tokenprune.registry import adapters

FAMILIES = ("Qwen2.5-VL", "Qwen3-VL")
SPECIAL = {
    "image_token": ("<|image_pad|>", 63),
    "video_token": ("<|video_pad|>", 62),
    "vision_start_token": ("<|vision_start|>", 61),
    "vision_end_token": ("<|vision_end|>", 60),
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} "
    "{% for part in message.content %}"
    "{% if part.type == 'text' %} {{ part.text }} "
    "{% else %} <|vision_start|><|{{ part.type }}_pad|><|vision_end|> {% endif %}"
    "{% endfor %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def processor(family: str) -> Any:
    """A real processor for the tiny model, of 2 x 2 pixels a patch: its ids are words w4 to w57."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 58)}}
    words |= {"<|im_start|>": 58, "<|im_end|>": 59} | dict(SPECIAL.values())
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={name: token for name, (token, _) in SPECIAL.items()},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    sizes = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}
    size = {"shortest_edge": 64, "longest_edge": 4096}
    makes, video = {
        "Qwen2.5-VL": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
        "Qwen3-VL": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
    }[family]
    return makes(
        image_processor=Qwen2VLImageProcessor(size=size, **sizes),
        tokenizer=tokenizer,
        video_processor=video(size=size, **sizes),
        chat_template=TEMPLATE,
    )


def write(folder: Path, family: str) -> Path:
    """The tiny model of a family and its processor in ``folder``."""
    made: Any = adapters.get(family)
    made.tiny().save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
