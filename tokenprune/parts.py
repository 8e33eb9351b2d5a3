"""Where the parts of a model are: what the adapters of all families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.attention import Projections, head_rows, projections
from tokenprune.facts import ModulePaths, no_language_model
from tokenprune.offload import execution_device

__all__ = ["ModelParts", "pair"]


class ModelParts:
    """The modules of a model, by the names that nearly all of ``transformers`` uses."""

    name: ClassVar[str] = ""
    has_language_model: ClassVar[bool] = True
    paths: ClassVar[ModulePaths] = ModulePaths()

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @property
    def base(self) -> Any:
        """The module that encodes images and calls the language model."""
        return getattr(self.model, "model", self.model)

    @property
    def device(self) -> torch.device:
        """The device on which the model takes its inputs."""
        return execution_device(self.model)

    @property
    def language_model(self) -> Any:
        """The language model.  Raises `UserError` if there is none."""
        if not self.has_language_model:
            raise no_language_model(self.name)
        return getattr(self.base, self.paths.text)

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Layers of the language model.  Raises `UserError` if there is none."""
        layers: Sequence[nn.Module] = self.language_model.layers
        return layers

    @property
    def vision_tower(self) -> Any:
        """The vision encoder: it maps views to hidden states."""
        return getattr(self.base, self.paths.vision)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision encoder."""
        tower = self.vision_tower
        layers: Sequence[nn.Module] = getattr(tower, "vision_model", tower).encoder.layers
        return layers

    def vision_attention(self, layer: int) -> nn.Module:
        """Attention module of encoder layer ``layer``; a negative index counts from the end."""
        return self.vision_layers[layer].get_submodule("self_attn")

    def vision_block(
        self,
        layer: Any,
        states: Tensor,
        mask: Tensor | None,
        between: Callable[[Tensor], Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """Run an encoder layer of CLIP or SigLIP, with a function between attention and MLP.

        Args:
            layer: One of `vision_layers`.
            states: (V, n, D) input of the layer.
            mask: (V, 1, 1, n) term added to the attention logits of each key, or None.
            between: Maps the states after the attention, (V, n, D), to the input of the MLP,
                (V, m, D).
            **kwargs: Other arguments that the encoder passes to its layers.

        Returns:
            (V, m, D) output of the layer.
        """
        normed = layer.layer_norm1(states)
        attended = layer.self_attn(hidden_states=normed, attention_mask=mask, **kwargs)[0]
        states = between(states + attended)
        result: Tensor = states + layer.mlp(layer.layer_norm2(states))
        return result

    def used_vision_layers(self, call: Mapping[str, Any]) -> int:
        """Number of encoder layers before the hidden states that the projector receives.

        Args:
            call: Arguments of one call of an encoder method.
        """
        chosen = call.get("vision_feature_layer")
        if chosen is None:
            chosen = self.base.config.vision_feature_layer
        states = len(self.vision_layers) + 1
        return max(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))

    @property
    def pooling_head(self) -> Any:
        """Attention module of the vision encoder's pooling head, or None if it has no head."""
        tower = self.vision_tower
        head = getattr(getattr(tower, "vision_model", tower), "head", None)
        return getattr(head, "attention", None)

    @property
    def view_shape(self) -> tuple[int, int]:
        """(rows, columns) of the patches of one view."""
        config = self.base.config.vision_config
        (height, width), (tall, wide) = pair(config.image_size), pair(config.patch_size)
        return height // tall, width // wide

    @property
    def projector(self) -> Any:
        """Module that maps the vision encoder's output to the width of the language model."""
        return self.base.get_submodule(self.paths.projector)

    def unprojected(self, inputs: Tensor) -> Tensor:
        """(views, tokens, C) vectors of the tokens, from the projector's input."""
        return inputs

    def project(self, vectors: Tensor) -> Tensor:
        """Features (M, D) that the projector makes of vectors (M, C) of `unprojected`."""
        features: Tensor = self.projector(vectors)
        return features

    def tap(self, layer: int) -> AbstractContextManager[Projections]:
        """Record queries and keys of encoder layer ``layer`` while the context is open."""
        return projections(self.vision_attention(layer))

    def tap_head(self) -> AbstractContextManager[list[Tensor]]:
        """Record the attention (views, patches) of the pooling head while the context is open."""
        return head_rows(self.pooling_head)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size in a config: one number for both, or two."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
