"""LLaVA-NeXT (`LlavaNextForConditionalGeneration`): Vicuna, Mistral, Llama and Qwen2 decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from tokenprune.models.adapter import Adapter
from tokenprune.registry import register_adapter
from tokenprune.tokens import TokenLayout, unpadded_box


@register_adapter("LLaVA-NeXT")
class LlavaNext(Adapter):
    """Thumbnail, then the unpadded canvas of crops with a separator after each row."""

    hosts: ClassVar[tuple[str, ...]] = ("LlavaNextForConditionalGeneration", "LlavaNextModel")

    def layout(self, image_size: tuple[int, int]) -> TokenLayout:
        """Layout of an image of ``image_size`` = (height, width) pixels."""
        config = self.base.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        grid = get_anyres_image_grid_shape(
            image_size, config.image_grid_pinpoints, config.vision_config.image_size
        )
        box = unpadded_box(image_size, (grid[0] * side, grid[1] * side))
        return TokenLayout.anyres(grid, (side, side), box)

    def layouts(self, call: Mapping[str, Any]) -> list[TokenLayout]:
        return [self.layout((height, width)) for height, width in _sizes(call)]

    def pack(self, maps: list[Tensor], call: Mapping[str, Any]) -> list[Tensor]:
        packed, _ = self.base.pack_image_features(
            [values[..., None] for values in maps],
            _sizes(call),
            vision_feature_select_strategy="full",
            image_newline=torch.full((1,), torch.nan),
        )
        return [values.squeeze(-1) for values in packed]

    @classmethod
    def tiny(cls, decoder: str = "llama", seed: int = 0) -> LlavaNextForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying a strategy out."""
        torch.manual_seed(seed)
        text = AutoConfig.for_model(
            decoder,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
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
            text_config=text,
            vision_config=vision,
            image_token_index=63,
            image_grid_pinpoints=[[12, 24], [24, 12], [24, 24], [12, 36], [36, 12]],
            image_seq_length=16,
        )
        model = LlavaNextForConditionalGeneration(config)
        model.eval()
        return model

    def dummy_images(self, sizes: Sequence[tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
        """Random ``pixel_values`` and ``image_sizes`` for images of ``sizes`` (height, width)."""
        draw = torch.Generator().manual_seed(seed)
        side = self.base.config.vision_config.image_size
        views = max(self.layout(size).views for size in sizes)
        pixels = torch.randn(len(sizes), views, 3, side, side, generator=draw)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _sizes(call: Mapping[str, Any]) -> list[list[int]]:
    sizes = call["image_sizes"]
    listed: list[list[int]] = sizes.tolist() if isinstance(sizes, Tensor) else [*map(list, sizes)]
    return listed
