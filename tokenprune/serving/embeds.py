"""Features and prompts of compressed images, as a server receives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.compatibility import check_length
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.layout import moved
from tokenprune.pictures import is_one_picture
from tokenprune.prompts import clips_by_prompt, images_by_prompt, listed, questions
from tokenprune.serving.specs import check_served, served

if TYPE_CHECKING:
    from tokenprune.pipeline import Pipeline
    from tokenprune.tokens import VisualTokens

__all__ = ["image_embeds", "prompt_embeds"]


def image_embeds(
    pipeline: Pipeline,
    images: Sequence[Any],
    spec: Compressor | str,
    *,
    retention: float | None = None,
    same_prompt: bool = False,
) -> list[Tensor]:
    """The features of the visual tokens that stay of each image.

    They are what `tokenprune.compress` passes to the language model in the place of the image:
    selected or merged features, and the separators that stay.  All images are encoded in one batch.

    Args:
        pipeline: The model with its processor.
        images: Any number of images, as in `Pipeline.encode`.
        spec: A compressor or a spec.
        retention: With a spec without its own, the retention ratio.
        same_prompt: Whether all images belong to one prompt; LLaVA-OneVision then cuts no crops.

    Returns:
        For each image (M, D) on the device and in the dtype of the model; M may differ.

    Raises:
        UserError: The method cannot be served in this model (`check_served`), an entry is a video,
            or an image cannot be read.
    """
    compressor = _compressor(pipeline, spec, retention)
    images = listed(images, "image")
    for index, image in enumerate(images):
        if not is_one_picture(image):
            raise UserError(
                f"entry {index} of the images is a list or a video, which a server takes no "
                "features of; give single images, or embed the whole prompt with prompt_embeds."
            )
    encoded = pipeline.encode(images, compressor.needs, compressor, same_prompt=same_prompt)
    return [_kept(compressor, tokens)[1] for tokens in encoded]


def prompt_embeds(
    pipeline: Pipeline,
    images: Sequence[Any] | None,
    text: Sequence[str],
    spec: Compressor | str,
    *,
    retention: float | None = None,
    videos: Sequence[Any] | None = None,
) -> list[Tensor]:
    """Whole prompts as embeddings, in which the compressed images and videos are in their places.

    A server that takes prompts as embeddings needs no support for images or videos.

    Args:
        pipeline: The model with its processor.
        images: For every prompt an image or a list of images, as in `Pipeline.prepare`.
        text: Questions or finished prompts, as in `Pipeline.prompt`.
        spec, retention: As in `image_embeds`.
        videos: For every prompt a video or a list of videos, which follow its images.

    Returns:
        For each prompt (S, D) without padding, on the device and in the dtype of the model.

    Raises:
        UserError: As `image_embeds` and `Pipeline.assemble`; or a compressed prompt is longer than
            the language model can read.
    """
    compressor = _compressor(pipeline, spec, retention)
    prompts = questions(text)
    pictures = images_by_prompt(images, len(prompts))
    clips = clips_by_prompt(videos, len(prompts))
    encoded = [
        [*some, *pipeline.encode_videos(many, compressor.needs, compressor)]
        for some, many in zip(_encoded(pipeline, compressor, pictures), clips, strict=True)
    ]
    inputs = pipeline.assemble(encoded, prompts)
    ids, stays = inputs["input_ids"], inputs["attention_mask"].bool()
    adapter = pipeline.adapter
    with torch.no_grad():
        embeds = adapter.model.get_input_embeddings()(ids)
        for stream, placeholder in adapter.facts.placeholders.items():
            mine = [
                _kept(compressor, tokens)
                for some in encoded
                for tokens in some
                if adapter.stream(tokens.layout.modality) == stream
            ]
            places = (ids == placeholder).nonzero().split([size for _, _, size in mine])
            for place, (keep, features, _) in zip(places, mine, strict=True):
                stays[place.unbind(1)] = False
                kept = place[moved(keep, place.device)].unbind(1)
                stays[kept] = True
                embeds[kept] = features
    found = [row[here] for row, here in zip(embeds, stays, strict=True)]
    for row in found:
        check_length(adapter.facts, len(row), what="a compressed prompt")
    return found


def _compressor(pipeline: Pipeline, spec: Compressor | str, retention: float | None) -> Compressor:
    """The compressor of ``spec``.  Raises `UserError` unless it can be served in the model."""
    if isinstance(spec, Compressor):
        if retention is not None:
            raise UserError(f"{spec.label} has a retention; leave out retention={retention:g}.")
        compressor = spec
    else:
        compressor = served(spec, **({} if retention is None else {"retention": retention}))
    check_served(pipeline.adapter, compressor)
    return compressor


def _encoded(
    pipeline: Pipeline, compressor: Compressor, pictures: Sequence[Sequence[Any]]
) -> list[list[VisualTokens]]:
    """The encoded images of every prompt; those that are alone in theirs in one batch."""
    alone = [some[0] for some in pictures if len(some) == 1]
    singles = iter(pipeline.encode(alone, compressor.needs, compressor))
    return [
        [next(singles)]
        if len(some) == 1
        else pipeline.encode(some, compressor.needs, compressor, same_prompt=True)
        for some in pictures
    ]


def _kept(compressor: Compressor, tokens: VisualTokens) -> tuple[Tensor, Tensor, int]:
    """(M,) indices of the entries that stay, (M, D) their features, and the number of all."""
    entries, index = len(tokens), torch.arange(len(tokens), device="cpu")
    features = tokens.features
    for part in compressor.parts():
        chosen = part(tokens)
        features = features[moved(chosen.keep, features.device)]
        if chosen.features is not None:
            features = chosen.features.to(features)
        tokens, index = tokens.take(chosen.keep), index[chosen.keep]
    return index, features.detach(), entries
