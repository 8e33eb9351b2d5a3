"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): native resolution, M-RoPE, window attention.

What is special about the family:

* An image keeps its aspect and, within bounds, its resolution.  It is one view without crops,
  thumbnail, CLS token and separators.  The vision encoder takes the patches of all images as one
  sequence; its merger joins 2 x 2 patches into one visual token.
* A video is a sequence of frames, each made of two successive pictures, in one run of
  placeholders.
* A position id has a time, a row and a column.  An image of ``r`` rows and ``c`` columns of tokens
  takes ``max(r, c)`` steps of the text, however many tokens it has.
* Most layers of the vision encoder attend within windows of 112 pixels, for which patches are
  sorted by window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tokenprune.adapter import tiny_decoder
from tokenprune.native import NativeAdapter
from tokenprune.registry import register_adapter


@register_adapter("Qwen2.5-VL")
class Qwen25VL(NativeAdapter):
    """One view of any size for an image, one for each pair of frames of a video."""

    hosts: ClassVar[tuple[str, ...]] = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
    decoders: ClassVar[tuple[str, ...]] = ("qwen2_5_vl_text",)
    tokens: tuple[float, float] = (4, 16384)

    def layer_facts(self, config: Any) -> dict[str, Any]:
        return {
            "gated": True,
            "window": config.window_size // self.side,
            "global_layers": tuple(config.fullatt_block_indexes),
            "mergers": 1,
        }

    def resized(self, image_size: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
        size: tuple[int, int] = smart_resize(*image_size, self.side, fewest, most)
        return size

    def order(self, grid: Sequence[int]) -> Tensor:
        """The encoder goes window by window, and row by row in each of them."""
        window = self.base.config.vision_config.window_size // self.side
        frames, *sides = grid
        rows, cols = (side // self._merge for side in sides)
        frame, row, col = torch.meshgrid(
            *(torch.arange(length, device="cpu") for length in (frames, rows, cols)), indexing="ij"
        )
        down, across = row // window, col // window
        owner = (frame * rows + down) * cols + across
        place: Tensor = owner.flatten().argsort(stable=True).argsort()
        return place

    @classmethod
    def tiny(
        cls, decoder: str = "qwen2_5_vl_text", seed: int = 0
    ) -> Qwen2_5_VLForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying out a method."""
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
        config = Qwen2_5_VLConfig(
            text_config=tiny_decoder(decoder, rope_parameters=rope).to_dict(),
            vision_config=tiny_tower()
            | {"window_size": 8, "fullatt_block_indexes": [0, 2], "tokens_per_second": 2},
            image_token_id=63,
            video_token_id=62,
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        model.eval()
        return model


def tiny_tower() -> dict[str, Any]:
    """Sizes of a vision encoder of a few thousand weights."""
    return {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "initializer_range": 0.3,
    }
