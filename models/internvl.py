"""InternVL3 (`InternVLForConditionalGeneration`): images, several images, videos."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from tokenprune.adapter import Adapter, tiny_decoder
from tokenprune.facts import VisionFacts
from tokenprune.layout import TokenLayout
from tokenprune.models._tiles import grids, views_by_image
from tokenprune.registry import register_adapter
from tokenprune.tokens import VisualTokens

TILES = 12  # crops of an image at most, as in the processors of the checkpoints


@register_adapter("InternVL")
class InternVL(Adapter):
    """Crops one after the other, then the thumbnail; 2x2 patches make one token; no separators.

    * An image is stretched to a grid of up to 12 crops.  A grid of one crop has no thumbnail.
    * The encoder receives the views of all images and frames in one batch, without their numbers.
      A run of placeholders in the prompt is one image.  Its number of views is known from the run,
      its grid from comparing the crops with the thumbnail.
    * A video is encoded as images too.  Each frame is one view and one run of placeholders, with
      text between the runs, so that a video cannot be told from single images.  `Pipeline.prepare`
      notes the numbers of frames at the pixels; without this note every frame is an image.
    * A signal of the encoder's patches is averaged over the 2x2 patches of a token.
    """

    hosts: ClassVar[tuple[str, ...]] = ("InternVLForConditionalGeneration", "InternVLModel")
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "num_patches")
    image_options: ClassVar[Mapping[str, Any]] = {"crop_to_patches": True}
    notes: ClassVar[tuple[str, ...]] = ("num_patches", "frames")
    reads_prompt: ClassVar[bool] = True

    @property
    def modalities(self) -> tuple[str, ...]:
        return ("image", "video")

    # -- the vision encoder ----------------------------------------------------------------------

    @property
    def _merge(self) -> int:
        return int(1 / self.base.config.downsample_ratio)

    @property
    def _token_shape(self) -> tuple[int, int]:
        """(rows, columns) of the visual tokens of one view."""
        rows, cols = self.view_shape
        return rows // self._merge, cols // self._merge

    def vision_facts(self) -> VisionFacts:
        stated = super().vision_facts()
        return replace(stated, prefix_tokens=1, has_cls=True, merge_size=self._merge)

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self.vision_tower.encoder.layer
        return layers

    def vision_attention(self, layer: int) -> nn.Module:
        return self.vision_layers[layer].get_submodule("attention")

    # -- layouts ---------------------------------------------------------------------------------

    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        tile = tuple(self.base.config.vision_config.image_size)
        cols, rows = get_optimal_tiled_canvas(image_size, tile, 1, TILES)
        return self._image((rows, cols) if rows * cols > 1 else None)

    def _image(self, grid: tuple[int, int] | None) -> TokenLayout:
        if grid is None:
            return TokenLayout.single(self._token_shape, newline=False)
        return TokenLayout.tiled(grid, self._token_shape)

    def usual_layout(self) -> TokenLayout:
        return TokenLayout.tiled((2, 2), self._token_shape)

    def runs(self, layout: TokenLayout) -> list[int]:
        """Lengths of the runs of placeholders, between which there is text: one for each frame."""
        frames = layout.frames if layout.modality == "video" else 1
        return [len(layout) // frames] * frames

    def video_layout(self, frames: int) -> TokenLayout:
        """Layout of a video of ``frames`` frames."""
        return TokenLayout.video(frames, self._token_shape, newline=False)

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        pixels, size = call["pixel_values"], math.prod(self._token_shape)
        frames = call.get("frames", getattr(pixels, "frames", None))
        if "num_patches" in call:
            views = [int(number) for number in call["num_patches"]]
        else:
            views = views_by_image(call.get("placeholders"), size, len(pixels), frames)
        frames = [0] * len(views) if frames is None else [int(number) for number in frames]
        parts = zip(pixels.split(views), frames, strict=True)
        grid = iter(grids([part for part, number in parts if not number]))
        return [self.video_layout(count) if count else self._image(next(grid)) for count in frames]

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        rows, cols = self._token_shape
        squares = "v (r a c b) d -> (v r c) d"
        return [
            values.flatten(0, 1)  # one vector for each token: the projector's input
            if values.shape[1] == rows * cols
            else reduce(values, squares, "mean", r=rows, c=cols, a=self._merge)
            for values in maps
        ]

    # -- inputs ----------------------------------------------------------------------------------

    def encoder_call(self, modality: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        if modality == "image":
            found = {name: batch[name] for name in self.image_arguments}
            return found | {"num_patches": torch.as_tensor(found["num_patches"], device="cpu")}
        videos: Tensor = batch["pixel_values_videos"]
        each = torch.full((videos.shape[0],), videos.shape[1], device="cpu")
        return {"pixel_values": videos.flatten(0, 1), "num_patches": each, "frames": each}

    def annotate(self, inputs: Mapping[str, Any], frames: Sequence[int]) -> None:
        if any(frames):
            inputs["pixel_values"].frames = [*frames]

    def spelled(self, tokens: VisualTokens, length: int, processor: Any) -> str:
        begin, end = processor.start_image_token, processor.end_image_token
        layout = tokens.layout
        if layout.modality == "image":
            return f"{begin}{processor.image_token * length}{end}"
        frame = begin + processor.image_token * (length // layout.frames) + end
        return "\n".join(f"Frame{index + 1}: {frame}" for index in range(layout.frames))

    # -- for tests -------------------------------------------------------------------------------

    def dummy_images(
        self, sizes: Sequence[tuple[int, int]], seed: int = 0, *, same_prompt: bool = False
    ) -> dict[str, Tensor]:
        """Random crops with their thumbnails, one image after the other."""
        draw = torch.Generator("cpu").manual_seed(seed)
        tall, wide = self.base.config.vision_config.image_size
        views = []
        for size in sizes:
            rows, cols = self.layout(size).grid
            whole = torch.randn(
                3, max(rows, 1) * tall, max(cols, 1) * wide, generator=draw, device="cpu"
            )
            crops = rearrange(whole, "c (r h) (q w) -> (r q) c h w", h=tall, w=wide)
            thumbnail = F.adaptive_avg_pool2d(whole, (tall, wide))[None]
            views.append(torch.cat([crops, thumbnail]) if len(crops) > 1 else crops)
        return {
            "pixel_values": torch.cat(views),
            "num_patches": torch.tensor([*map(len, views)], device="cpu"),
            "frames": torch.zeros(len(views), dtype=torch.long, device="cpu"),
        }

    def dummy_video(self, frames: int, seed: int = 0) -> dict[str, Tensor]:
        """Random encoder inputs for one video of ``frames`` frames."""
        draw = torch.Generator("cpu").manual_seed(seed)
        size = self.base.config.vision_config.image_size
        pixels = torch.randn(1, frames, 3, *size, generator=draw, device="cpu")
        return self.encoder_call("video", {"pixel_values_videos": pixels})

    @classmethod
    def tiny(cls, decoder: str = "qwen2", seed: int = 0) -> InternVLForConditionalGeneration:
        """A model of a few thousand random weights, for tests and for trying out a method."""
        torch.manual_seed(seed)
        vision = InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=24,
            patch_size=3,
            initializer_range=0.3,
            layer_scale_init_value=1.0,
        )
        config = InternVLConfig(
            text_config=tiny_decoder(decoder),
            vision_config=vision,
            image_token_id=63,
            image_seq_length=16,
            tie_word_embeddings=False,
        )
        model = InternVLForConditionalGeneration(config)
        embeddings = model.model.vision_tower.embeddings
        for weight in (embeddings.cls_token, embeddings.position_embeddings):
            nn.init.normal_(weight)  # zeros by default
        model.eval()
        return model
