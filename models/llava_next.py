"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): Vicuna, Mistral, Llama and Qwen2 decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenprune.adapter import Adapter, image_sizes, tiny_decoder
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.registry import register_adapter


@register_adapter("LLaVA-NeXT")
class LlavaNext(Adapter):
    """Thumbnail, then the unpadded canvas of crops with a separator after each row."""

    hosts: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration", "LlavaNextModel")

    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        config, shape = self.base.config, self.view_shape
        grid = get_anyres_image_grid_shape(
            image_size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        box = unpadded_box(image_size, (grid[0] * shape[0], grid[1] * shape[1]))
        return TokenLayout.anyres(grid, shape, box)

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        return [self.layout(size) for size in image_sizes(call)]

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        packed, _ = self.base.pack_image_features(
            maps,
            image_sizes(call),
            vision_feature_select_strategy="full",
            image_newline=maps[0].new_full(maps[0].shape[-1:], torch.nan),
        )
        return list(packed)

    @classmethod
    def tiny(cls, decoder: str = "llama", seed: int = 0) -> LlavaNextForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying out a method."""
        torch.manual_seed(seed)
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=12,
            patch_size=3,
            projection_dim=16,
            initializer_range=0.3,
        )
        config = LlavaNextConfig(
            text_config=tiny_decoder(decoder),
            vision_config=vision,
            image_token_index=63,
            image_grid_pinpoints=[[12, 24], [24, 12], [24, 24], [12, 36], [36, 12]],
            image_seq_length=16,
        )
        model = LlavaNextForConditionalGeneration(config)
        model.eval()
        return model
