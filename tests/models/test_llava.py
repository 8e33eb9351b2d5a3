"""LLaVA-1.5: one view of any image, and the models that are refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import llava_processor, tiny_pipeline
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokenprune as tp
from tokenprune.adapter import adapter_of, tiny_decoder
from tokenprune.compatibility import check_compatible
from tokenprune.engine.session import compress
from tokenprune.engine.vision import watched
from tokenprune.errors import UserError
from tokenprune.models.llava import Llava
from tokenprune.pipeline import Pipeline
from tokenprune.testing.host import Host
from tokenprune.testing.model_checks import check_equals_reference
from tokenprune.testing.runner import run

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
VIEW = {"num_attention_heads": 2, "image_size": 12, "patch_size": 3}


def _llava(vision: Any, strategy: str) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=tiny_decoder("llama"),
        vision_config=vision,
        vision_feature_select_strategy=strategy,
        image_token_index=63,
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    model.eval()
    return model


def _colours(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
    """In place of the vision encoder: the mean colour of every patch, after a CLS token."""
    colours = nn.functional.avg_pool2d(pixel_values, 3).flatten(2).mT
    states = torch.cat([torch.full_like(colours[:, :1], torch.nan), colours], 1)
    return BaseModelOutputWithPooling(hidden_states=(states,) * 4)


def _ramp(height: int, width: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red, green = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack(np.broadcast_arrays(red[None], green[:, None], 0.0), -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def test_tokens_are_where_the_layout_says_for_2000_sizes() -> None:
    """From the processor, which crops the longer side, through the model's packing."""
    model = Llava.tiny()
    model.model.vision_tower.forward, model.model.multi_modal_projector = _colours, nn.Identity()
    processor = llava_processor(model)
    processor.image_processor.do_normalize = False
    pipe, draw = Pipeline(model, processor), random.Random(0)
    encode = watched(pipe.adapter, "image", frozenset())
    for _ in range(20):
        sizes = [tuple(int(2 ** draw.uniform(3.6, 8)) for _ in "hw") for _ in range(100)]
        inputs = pipe.prepare([[_ramp(*size)] for size in sizes], ["w9"] * len(sizes))
        features = encode(pixel_values=inputs["pixel_values"]).pooler_output
        placeholders = (inputs["input_ids"] == 63).sum(1).tolist()
        for size, feature, count in zip(sizes, features, placeholders, strict=True):
            layout = feature.visual.layout
            assert len(layout) == len(feature) == count == 16
            for channel, place, side in ((0, layout.col, size[1]), (1, layout.row, size[0])):
                pixel = (side - min(size)) / 2 + (place + 0.5) / 4 * min(size)
                # The processor resizes to whole pixels and crops at one: up to half a pixel of 12.
                slack = 0.11 * min(size) / side + 1.5 / side
                assert ((feature[:, channel] - pixel / side).abs() < slack).all(), size


def test_a_siglip_encoder_has_no_cls_token() -> None:
    vision = SiglipVisionConfig(**SIZES, **VIEW, vision_use_head=False, initializer_range=0.3)
    adapter = adapter_of(_llava(vision, "full"))
    assert not adapter.facts.vision.has_cls
    assert adapter.fit == "stretch"
    host = Host(adapter, "LLaVA-1.5", "llama")
    for spec in ("globalcom2", "fastv"):
        run(check_equals_reference, tp.create(spec, retention=0.4), [host])
    with pytest.raises(UserError, match="the attention of a CLS token"):
        check_compatible(adapter.facts, tp.create("fastervlm", retention=0.4))


def test_other_models_of_the_class_are_refused() -> None:
    clip = CLIPVisionConfig(**SIZES, **VIEW, projection_dim=16)
    with pytest.raises(UserError, match="one visual token only under 'default'"):
        adapter_of(_llava(clip, "full"))
    pixtral = PixtralVisionConfig(**SIZES, **VIEW)
    with pytest.raises(UserError, match="supported with the vision encoders clip_vision_model"):
        adapter_of(_llava(pixtral, "full"))


def test_images_that_do_not_match_the_prompt_are_refused() -> None:
    pipe = tiny_pipeline("LLaVA-1.5")
    inputs = pipe.prepare([[_ramp(20, 30), _ramp(30, 20)]], ["w9"])
    with compress(pipe.model, "uniform", retention=0.5):
        dropped = {**inputs, "pixel_values": inputs["pixel_values"][:1]}
        with pytest.raises(UserError, match="32 image placeholders"):
            pipe.model.generate(**dropped, max_new_tokens=2)
        without = {name: value for name, value in inputs.items() if name != "pixel_values"}
        with pytest.raises(UserError, match="no image reached this forward"):
            pipe.model.generate(**without, max_new_tokens=2)
