"""Qwen3-VL (`Qwen3VLForConditionalGeneration`, dense or with experts): Qwen2.5-VL with deepstack.

What is special about the family, besides what `tokenprune.native` and `Qwen25VL` say:

* The decoder adds features of three earlier layers of the vision encoder to its visual tokens after
  the layers 0, 1 and 2 (deepstack).  They are cut and merged together with the tokens, also by a
  cut between these layers.
* A video of T frames has T runs of placeholders with a time stamp as text in front of each, and its
  frames have no time of their own.  It is one video to a method, with one budget.
* Every layer of the vision encoder attends to the whole view.  Positions are learned and rotary.
* Queries and keys of the decoder are normalised.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tokenprune.adapter import tiny_decoder
from tokenprune.layout import TokenLayout
from tokenprune.models.qwen2_5_vl import tiny_tower
from tokenprune.native import NativeAdapter, rate
from tokenprune.registry import register_adapter
from tokenprune.tokens import VisualTokens


@register_adapter("Qwen3-VL")
class Qwen3VL(NativeAdapter):
    """One view of any size for an image, one for each pair of frames of a video."""

    hosts: ClassVar[tuple[str, ...]] = (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeModel",
    )
    decoders: ClassVar[tuple[str, ...]] = ("qwen3_vl_text",)
    tokens: tuple[float, float] = (64, 16384)

    def layer_facts(self, config: Any) -> dict[str, Any]:
        return {"mergers": 1 + len(config.deepstack_visual_indexes)}

    def resized(self, image_size: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
        size: tuple[int, int] = smart_resize(*image_size, self.side, fewest, most)
        return size

    def runs(self, layout: TokenLayout) -> list[int]:
        return [*layout.view_sizes]

    def spelled(self, tokens: VisualTokens, length: int, processor: Any) -> str:
        if tokens.layout.modality != "video" or not length:
            return super().spelled(tokens, length, processor)
        step = self.base.config.vision_config.temporal_patch_size
        start, end = processor.vision_start_token, processor.vision_end_token
        text = ""
        for frame, size in enumerate(tokens.layout.view_sizes):
            seconds = (frame * step + (step - 1) / 2) / rate(processor)
            text += f"<{seconds:.1f} seconds>{start}{processor.video_token * size}{end}"
        return text

    @classmethod
    def tiny(cls, decoder: str = "qwen3_vl_text", seed: int = 0) -> Qwen3VLForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying out a method."""
        torch.manual_seed(seed)
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
        config = Qwen3VLConfig(
            text_config=tiny_decoder(decoder, rope_parameters=rope, head_dim=8).to_dict(),
            vision_config=tiny_tower()
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]},
            image_token_id=63,
            video_token_id=62,
        )
        model = Qwen3VLForConditionalGeneration(config)
        model.eval()
        return model
