"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): images, several images, videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
)

from tokenprune.adapter import Adapter, image_sizes, tiny_decoder
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.registry import register_adapter


@register_adapter("LLaVA-OneVision")
class LlavaOnevision(Adapter):
    """The packed sequence depends on the modality of the prompt.

    * One image: thumbnail, then the unpadded canvas of crops with a separator after each row.  A
      canvas with more patches than ``1.1² * 9`` views is resampled to about 9 views.
    * Several images: no crops.  Each image is padded to a square and becomes one view and one
      separator.
    * A video: every frame is one view, pooled to half its side.  One separator ends the video.
    """

    hosts: ClassVar[tuple[str, ...]] = (
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionModel",
    )
    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }
    fit = "pad"
    image_arguments: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_sizes",
        "batch_num_images",
    )

    def layout(
        self, image_size: tuple[int, int], *, same_prompt: bool = False, aspect: str | None = None
    ) -> TokenLayout:
        """Layout of an image of ``image_size`` = (height, width) pixels.

        Args:
            image_size: Size before any resizing.
            same_prompt: Whether there are other images in the prompt.
            aspect: ``anyres_max_9``, or another number of views; None takes that of the model.
        """
        config, shape = self.base.config, self.view_shape
        if same_prompt:
            return TokenLayout.single(shape)
        grid = get_anyres_image_grid_shape(
            image_size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        box = unpadded_box(image_size, (grid[0] * shape[0], grid[1] * shape[1]))
        rows, cols = box[1] - box[0], box[3] - box[2]
        most = int((aspect or config.vision_aspect_ratio).removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * cols / (most * shape[0] ** 2))
        resampled = (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else None
        return TokenLayout.anyres(grid, shape, box, canvas=resampled)

    def video_layout(self, frames: int) -> TokenLayout:
        """Layout of a video of ``frames`` frames."""
        rows, cols = self.view_shape
        return TokenLayout.video(frames, (math.ceil(rows / 2), math.ceil(cols / 2)))

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        if modality == "video":
            videos, frames = call["pixel_values_videos"].shape[:2]
            return [self.video_layout(frames)] * videos
        sizes, aspect = image_sizes(call), call.get("vision_aspect_ratio")
        numbers = call.get("batch_num_images")
        numbers = [1] * len(sizes) if numbers is None else [int(number) for number in numbers]
        together = [number > 1 for number in numbers for _ in range(number)]
        return [
            self.layout(size, same_prompt=others, aspect=aspect)
            for size, others in zip(sizes, together, strict=True)
        ]

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        separator = maps[0].new_full(maps[0].shape[-1:], torch.nan)
        if modality == "video":
            pooled = [self.base.apply_pooling(values).flatten(0, 1) for values in maps]
            return [torch.cat([values, separator[None].to(values)]) for values in pooled]
        packed, _ = self.base.pack_image_features(
            maps,
            image_sizes(call),
            image_newline=separator,
            vision_aspect_ratio=call.get("vision_aspect_ratio")
            or self.base.config.vision_aspect_ratio,
        )
        return list(packed)

    def grouped(self, images: list[list[Any]]) -> Any:
        return images  # the processor cuts no crops if a prompt has several images

    @classmethod
    def tiny(cls, decoder: str = "qwen2", seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying out a method."""
        torch.manual_seed(seed)
        vision = SiglipVisionConfig(  # type: ignore[call-arg]
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=12,
            patch_size=3,
            initializer_range=0.3,
            vision_use_head=False,
        )
        config = LlavaOnevisionConfig(
            text_config=tiny_decoder(decoder),
            vision_config=vision,
            image_token_index=63,
            video_token_index=62,
            image_grid_pinpoints=[[12, 24], [24, 12], [24, 24], [12, 36], [36, 12]],
            vision_aspect_ratio="anyres_max_2",  # a canvas of 2x2 crops is resampled
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        model.eval()
        return model
