"""Real processors for the tiny models: words w5 to w61 are ids, placeholders are the last ones."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokenprune.pipeline import Pipeline
from tokenprune.testing.host import Host


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Splits at white space and around the special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<img>": 3, "</img>": 4}
    words |= {f"w{number}": number for number in range(5, 62)} | {"<video>": 62, "<image>": 63}
    backend = Tokenizer(models.WordLevel(words, unk_token="w5"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=special,
    )


def llava_processor(model: Any) -> LlavaProcessor:
    """As of the LLaVA-1.5 checkpoints, for the views of ``model``."""
    vision = model.config.vision_config
    side = vision.image_size
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer(image_token="<image>"),
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def internvl_processor(model: Any, **options: Any) -> InternVLProcessor:
    """As of the InternVL3 checkpoints, for the views of ``model``."""
    height, width = model.config.vision_config.image_size
    size = {"height": height, "width": width}
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<image>", "video_token": "<video>"}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, **options),
        tokenizer(**names),
        InternVLVideoProcessor(size=size, **options),
        image_seq_length=model.config.image_seq_length,
    )


PROCESSORS = {"LLaVA-1.5": llava_processor, "InternVL": internvl_processor}


def tiny_pipeline(name: str, decoder: str = "llama") -> Pipeline:
    """The tiny model of a family in `PROCESSORS` with its processor."""
    model = Host.tiny(name, decoder).model
    return Pipeline(model, PROCESSORS[name](model))
