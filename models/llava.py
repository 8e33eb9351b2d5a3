"""LLaVA-1.5 (`LlavaForConditionalGeneration`) with a CLIP or SigLIP vision encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from tokenprune.adapter import Adapter, tiny_decoder
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.registry import register_adapter

_ENCODERS = ("clip_vision_model", "siglip_vision_model")


@register_adapter("LLaVA-1.5")
class Llava(Adapter):
    """One view per image, no crops, no separator.

    * A CLIP encoder has a CLS token, which the model drops in front of the projector.  The
      processor crops the longer side of the image.
    * A SigLIP encoder has no CLS token.  The processor stretches the image.

    Raises:
        UserError: The vision encoder is another one, such as Pixtral's, or the model keeps the CLS
            token among the visual tokens.
    """

    hosts: ClassVar[tuple[str, ...]] = ("LlavaForConditionalGeneration", "LlavaModel")
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.base.config
        kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if kind not in _ENCODERS:
            raise UserError(
                f"LLaVA-1.5 models are supported with the vision encoders {', '.join(_ENCODERS)}; "
                f"this one has {kind!r}."
            )
        wanted = "default" if "siglip" not in kind else "full"
        if strategy != wanted:
            raise UserError(
                f"this LLaVA-1.5 model has vision_feature_select_strategy={strategy!r}, but with "
                f"{kind!r} every patch is one visual token only under {wanted!r}."
            )
        self.fit = "stretch" if "siglip" in kind else "crop"

    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        return TokenLayout.single(self.view_shape, newline=False)

    def usual_layout(self) -> TokenLayout:
        return self.layout((0, 0))

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        return [self.layout((0, 0))] * len(call["pixel_values"])

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        return [values.flatten(0, 1) for values in maps]

    def dummy_images(
        self, sizes: Sequence[tuple[int, int]], seed: int = 0, *, same_prompt: bool = False
    ) -> dict[str, Tensor]:
        """As `Adapter.dummy_images`; the pixels have no axis of views."""
        made = super().dummy_images(sizes, seed, same_prompt=same_prompt)
        return {name: values.squeeze(1) for name, values in made.items()}

    @classmethod
    def tiny(cls, decoder: str = "llama", seed: int = 0) -> LlavaForConditionalGeneration:
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
        config = LlavaConfig(
            text_config=tiny_decoder(decoder),
            vision_config=vision,
            image_token_index=63,
            image_seq_length=16,
        )
        model = LlavaForConditionalGeneration(config)
        model.eval()
        return model
