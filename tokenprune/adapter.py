"""Adapters: the description of a model family that lets every compressor run in its models."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from tokenprune.deprecated import renamed_arguments
from tokenprune.errors import UserError, unknown
from tokenprune.facts import DecoderFacts, ModelFacts, VisionFacts
from tokenprune.inputs import ModelInputs
from tokenprune.layout import TokenLayout
from tokenprune.parts import pair
from tokenprune.registry import adapters
from tokenprune.unwrap import unwrapped

__all__ = [
    "Adapter",
    "HasAdapter",
    "ModelLike",
    "adapter_of",
    "image_sizes",
    "position_table",
    "tiny_decoder",
]


class Adapter(ModelInputs, ABC):
    """One family of Hugging Face models.

    A subclass states where the modules of the family are, how images become visual tokens
    (`layout`, `layouts`), and how the model packs them (`pack`).  It does not change the model.

    Attributes:
        hosts: Names of the ``transformers`` classes of the family.
        encoders: Modality (``image``, ``video``) to the method of `base` that encodes it.
        image_arguments: Outputs of the image processor that the method for images takes.
        video_arguments: Outputs of the video processor that the method for videos takes.
        image_options: Options of the image processor that the processor of the model sets.
        notes: Entries of `encoder_call` that describe the pixels.  `layouts` reads them; the
            encoder does not take them.
        reads_prompt: Whether `layouts` needs the placeholders of the prompts if there are no notes.
        has_language_model: Whether a language model follows the vision encoder.
        paths: Where the modules are in `base`.
        fit: How the processor makes an image without crops square: ``stretch`` its sides, ``pad``
            the shorter ones, or ``crop`` the longer ones.
        decoders: Model types of the decoders that `tiny` can build.
        multimodal_positions: Whether position ids have a time, a row and a column.
        stacks_videos: Whether all videos of a batch have the same number of frames.
        model: The model.
    """

    hosts: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}
    fit: Literal["stretch", "pad", "crop"] = "stretch"
    decoders: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2")
    multimodal_positions: ClassVar[bool] = False

    # -- facts -----------------------------------------------------------------------------------

    @property
    def facts(self) -> ModelFacts:
        """Facts about the model in its current state.  Read the record once and keep it."""
        config = self.base.config
        decoder: DecoderFacts | None = None
        placeholders: dict[str, int] = {}
        if self.has_language_model:
            decoder = replace(
                DecoderFacts.of(config.get_text_config()), query_norms=self._normalises_queries()
            )
            if self.multimodal_positions:  # which a config need not state
                decoder = replace(decoder, position_scheme="multimodal-rotary")
            placeholders = {
                name: int(getattr(config, f"{name}_token_id")) for name in self.encoders
            }
        return ModelFacts(
            family=self.name,
            vision=self.vision_facts(),
            language_model=decoder,
            placeholders=MappingProxyType(placeholders),
            paths=self.paths,
        )

    def _normalises_queries(self) -> bool:
        if not hasattr(self.base, self.paths.text):  # a config without modules
            return False
        return hasattr(self.decoder_layers[0].get_submodule("self_attn"), "q_norm")

    def vision_facts(self) -> VisionFacts:
        """Facts about the vision encoder, most of them from its config."""
        config = self.base.config.vision_config
        has_cls = "clip" in config.model_type
        stated = VisionFacts(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_attention_heads,
            view_shape=self.view_shape,
            patch_size=pair(config.patch_size),
            prefix_tokens=int(has_cls),
            has_cls=has_cls,
        )
        if not hasattr(self.base, self.paths.vision):  # a config without modules
            return stated
        tower, parts = self.vision_tower, ("layer_norm1", "self_attn", "layer_norm2", "mlp")
        return replace(
            stated,
            has_head=self.pooling_head is not None,
            attention=getattr(tower.config, "_attn_implementation", stated.attention),
            reducible=all(hasattr(layer, part) for layer in self.vision_layers for part in parts),
            resizable="interpolate_pos_encoding" in inspect.signature(tower.forward).parameters,
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that a prompt may have: ``image`` and perhaps ``video``."""
        return tuple(self.encoders)

    def stream(self, modality: str) -> str:
        """The key of `encoders` for a modality: ``image`` if videos are encoded as images."""
        return modality if modality in self.encoders else "image"

    # -- visual tokens ---------------------------------------------------------------------------

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "layout" in vars(cls):
            rename = renamed_arguments(together="same_prompt")
            cls.layout = rename(cls.layout)  # type: ignore[method-assign]

    @abstractmethod
    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        """Layout of an image of ``image_size`` = (height, width) pixels.

        Args:
            image_size: Size before any resizing.
            same_prompt: Whether the prompt has other images as well.
        """

    def usual_layout(self) -> TokenLayout:
        """Layout of the image that a forecast counts if none is given.

        A thumbnail and 2x2 full crops without separators, as efficiency tables of papers count for
        families with crops; the only view for families without.
        """
        rows, cols = self.view_shape
        box = (0, 2 * rows, 0, 2 * cols)
        return TokenLayout.anyres((2, 2), self.view_shape, box, newlines=False)

    def video_layout(self, frames: int) -> TokenLayout:
        """Layout of a video of ``frames`` frames.  Raises `UserError` if the model takes none."""
        raise UserError(f"{self.name} takes images only; load a model that takes videos.")

    @abstractmethod
    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        """Layout of every image or video of one encoder call.

        Args:
            call: Arguments of the call, and `notes` if they are known.  For an adapter that
                `reads_prompt`, ``placeholders`` (B, S) bool, on the CPU.
            modality: One of `encoders`.
        """

    @abstractmethod
    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        """Pack maps of values per view exactly as the model packs features.

        Args:
            maps: For every image or video, values (views, patches, C).
            call: As in `layouts`.
            modality: As in `layouts`.

        Returns:
            For every image or video, values (N, C), NaN at separators.
        """

    def by_image(self, values: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        """Values (all views, patches, C) of one encoder call, for every image or video."""
        return list(values.split([layout.views for layout in layouts]))

    def pixels_of(
        self, call: Mapping[str, Any], modality: str, index: int, first_view: int
    ) -> Tensor:
        """Some pixels of an image's first view or of a video's frames, the same in every batch.

        Args:
            call, modality: As in `layouts`.
            index: Index of the image or video in the call.
            first_view: Number of views of the images before it.
        """
        if "pixel_values_videos" in call:
            view = call["pixel_values_videos"][index]
        else:
            pixels = call["pixel_values"]
            view = pixels[index, 0] if pixels.ndim == 5 else pixels[first_view]
        sample: Tensor = view[..., ::7, ::7]
        return sample

    @renamed_arguments(together="same_prompt")
    def dummy_images(
        self, sizes: Sequence[tuple[int, int]], seed: int = 0, *, same_prompt: bool = False
    ) -> dict[str, Tensor]:
        """Random encoder inputs of the shapes that the processor makes.

        Args:
            sizes: (height, width) of every image.
            seed: Seed of the pixels.
            same_prompt: Whether all images belong to one prompt.
        """
        draw = torch.Generator("cpu").manual_seed(seed)
        side = self.base.config.vision_config.image_size
        views = max(self.layout(size, same_prompt=same_prompt).views for size in sizes)
        numbers = [len(sizes)] if same_prompt else [1] * len(sizes)
        made = {
            "pixel_values": _pixels(draw, len(sizes), views, 3, side, side),
            "image_sizes": torch.tensor(sizes, device="cpu"),
            "batch_num_images": torch.tensor(numbers, device="cpu"),
        }
        return {name: made[name] for name in self.image_arguments}

    def dummy_video(self, frames: int, seed: int = 0) -> dict[str, Tensor]:
        """Random encoder inputs for one video of ``frames`` frames."""
        draw = torch.Generator("cpu").manual_seed(seed)
        side = self.base.config.vision_config.image_size
        return {"pixel_values_videos": _pixels(draw, 1, frames, 3, side, side)}


class HasAdapter(Protocol):
    """An object that holds an adapter, such as a `Pipeline`."""

    @property
    def adapter(self) -> Adapter: ...


ModelLike: TypeAlias = nn.Module | Adapter | HasAdapter
"""A model, with or without wrappers, its adapter, or its pipeline."""


def position_table(adapter: Adapter) -> nn.Module:
    """Embedding table of the positions in the vision encoder, as CLIP and SigLIP have it."""
    tower = adapter.vision_tower
    table: nn.Module = getattr(tower, "vision_model", tower).embeddings.position_embedding
    return table


def image_sizes(call: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of every image of an encoder call."""
    return [(int(height), int(width)) for height, width in call["image_sizes"]]


def tiny_decoder(kind: str, **fields: Any) -> Any:
    """Config of a decoder of a few thousand weights; ``kind`` is its ``model_type``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
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
        **fields,
    )


def _pixels(draw: torch.Generator, *shape: int) -> Tensor:
    """Random pixels on the CPU in float32, independent of PyTorch's default device and dtype."""
    return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")


def adapter_of(model: ModelLike) -> Adapter:
    """The adapter of ``model``, found by the name of its class or of a parent class.

    Args:
        model: A model, possibly wrapped by ``torch.compile``, PEFT, Accelerate,
            `torch.nn.DataParallel` on one device or ``DistributedDataParallel``; its adapter; or
            its pipeline.

    Raises:
        UnknownNameError: No adapter is registered for the class.
        UserError: ``model`` is not a model, or its wrapper is not supported.
    """
    held = model if isinstance(model, Adapter) else getattr(model, "adapter", None)
    if isinstance(held, Adapter):
        return held
    families = [adapters.get(name) for name in adapters.names()]
    hosts = {host: family for family in families for host in family.hosts}
    inner = unwrapped(model, hosts)
    for parent in type(inner).__mro__:
        if parent.__name__ in hosts:
            found: Adapter = hosts[parent.__name__](inner)
            return found
    raise unknown("model class with an adapter", type(inner).__name__, hosts)
