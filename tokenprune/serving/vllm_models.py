"""The models of vLLM with two additions; vLLM itself is not changed.

* A client may send the embeddings of several images with unlike numbers of rows in one batch, which
  `tokenprune.serving.image_embeds` produces.  Embeddings that vLLM cannot run are refused before
  they reach the engine.
* With a spec in the config, the server compresses every image itself:
  ``--hf-overrides '{"tokenprune": "fastervlm@0.25"}'``.

This module imports vLLM.  Only vLLM imports it (`tokenprune.serving.vllm_plugin`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaConfig, PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import interns1, llava, llava_next, llava_onevision
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import EmbeddingItems

from tokenprune.errors import UserError
from tokenprune.serving import check_embeds
from tokenprune.serving.vllm_pruning import KEY, OTHERWISE, Plan, ServerPruner, planned
from tokenprune.serving.weights import NAMED, TOWER

__all__ = ["InternVL", "Llava", "LlavaNext", "LlavaOnevision"]


# --- the process that receives requests -----------------------------------------------------------


class _Checked:
    """Processing info that checks the embeddings of clients."""

    ctx: Any

    def parse_mm_data(self, mm_data: Any, *, validate: bool = True) -> Any:
        items = super().parse_mm_data(mm_data, validate=validate)  # type: ignore[misc]
        config = self.ctx.model_config
        if not config.get_multimodal_config().enable_mm_embeds:  # vLLM refuses all embeddings
            return items
        for modality, some in items.items():
            if modality != "image" and isinstance(some, EmbeddingItems):
                raise UserError(f"the server takes embeddings of images only, not of {modality}s.")
            # vLLM takes a tensor that does not look like embeddings for the pixels of an image.
            tensors = [one for one in some.get_all() if isinstance(one, torch.Tensor)]
            if modality == "image" and tensors:
                check_embeds(
                    tensors,
                    width=config.get_inputs_embeds_size(),
                    longest=config.max_model_len,
                    dtype=config.dtype,
                )
        return items


class _Counted(_Checked):
    """Processing info that knows how many visual tokens the server keeps of an image."""

    @cached_property
    def plan(self) -> Plan | None:
        return planned(self.ctx.model_config.hf_config)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        full: int = super().get_num_image_tokens(  # type: ignore[misc]
            image_width=image_width, image_height=image_height
        )
        if self.plan is None:
            return full
        return self.plan.kept((image_height, image_width), full)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return limits if self.plan is None else {"image": limits["image"]}


class LlavaInfo(_Counted, llava.LlavaProcessingInfo):
    """LLaVA-1.5."""


class LlavaNextInfo(_Counted, llava_next.LlavaNextProcessingInfo):
    """LLaVA-NeXT."""


class LlavaOnevisionInfo(_Counted, llava_onevision.LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision."""


class InternVLInfo(_Checked, interns1.InternS1ProcessingInfo):
    """InternVL."""


def _llava_info(ctx: Any) -> Any:
    """The info of LLaVA-1.5, or vLLM's own of Pixtral, which has the same architecture."""
    if isinstance(ctx.get_hf_config(LlavaConfig).vision_config, PixtralVisionConfig):
        return llava.PixtralHFProcessingInfo(ctx)
    return LlavaInfo(ctx)


# --- the engine -----------------------------------------------------------------------------------


class _Ragged:
    """A model that takes embeddings of unlike lengths."""

    def embed_multimodal(self, **kwargs: Any) -> Any:
        embeds = kwargs.get("image_embeds")
        if embeds is not None:
            return tuple(embeds)
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]


class _Pruned(_Ragged):
    """A model that compresses the images that it encodes."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        plan = planned(vllm_config.model_config.hf_config)
        self.pruner = None if plan is None else ServerPruner(plan, cast(nn.Module, self))

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.pruner is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        with self.pruner.watching() as seen:
            packed = super().embed_multimodal(**kwargs)
        return self.pruner.pruned(packed, kwargs, seen)


_NAMES = WeightsMapper(orig_to_new_regex={TOWER: NAMED})


@MULTIMODAL_REGISTRY.register_processor(
    llava._build_llava_or_pixtral_hf_processor,
    info=_llava_info,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class Llava(_Pruned, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | _NAMES


@MULTIMODAL_REGISTRY.register_processor(
    llava_next.LlavaNextMultiModalProcessor,
    info=LlavaNextInfo,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class LlavaNext(_Pruned, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | _NAMES


@MULTIMODAL_REGISTRY.register_processor(
    llava_onevision.LlavaOnevisionMultiModalProcessor,
    info=LlavaOnevisionInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevision(_Pruned, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision."""

    hf_to_vllm_mapper = (
        llava_onevision.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | _NAMES
    )


@MULTIMODAL_REGISTRY.register_processor(
    interns1.InternS1MultiModalProcessor,
    info=InternVLInfo,
    dummy_inputs=interns1.InternS1DummyInputsBuilder,
)
class InternVL(_Ragged, interns1.InternS1ForConditionalGeneration):
    """InternVL, for embeddings of clients."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if hasattr(vllm_config.model_config.hf_config, KEY):
            raise UserError(f"the server compresses no images of InternVL; {OTHERWISE}.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
