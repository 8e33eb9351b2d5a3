"""Families whose images keep their resolution, such as Qwen-VL.

The patches of all images and videos are one sequence, (P, C), which the vision encoder takes with a
grid of frames, rows and columns for each of them.  Squares of patches become one visual token.
There are no crops, no thumbnail, no CLS token and no separators.  Position ids have a time, a row
and a column.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenprune.adapter import Adapter
from tokenprune.attention import Projections, packed_projections
from tokenprune.errors import UserError
from tokenprune.facts import ModulePaths, VisionFacts
from tokenprune.layout import TokenLayout, moved

__all__ = ["NativeAdapter", "rate"]


class _NativeInputs(Adapter):
    """The inputs of these families."""

    encoders: ClassVar[Mapping[str, str]] = {
        "image": "get_image_features",
        "video": "get_video_features",
    }
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    video_arguments: ClassVar[tuple[str, ...]] = ("pixel_values_videos", "video_grid_thw")
    paths: ClassVar[ModulePaths] = ModulePaths(vision="visual", projector="visual.merger")
    stacks_videos: ClassVar[bool] = False
    multimodal_positions: ClassVar[bool] = True

    @property
    def _merge(self) -> int:
        """Side of the square of patches that becomes one visual token."""
        return int(self.base.config.vision_config.spatial_merge_size)

    def prompt_arguments(self, ids: Tensor) -> dict[str, Tensor]:
        image, video = self.facts.placeholders["image"], self.facts.placeholders["video"]
        return {"mm_token_type_ids": (ids == image).int() + 2 * (ids == video).int()}

    def video_options(self, processor: Any, frames: Sequence[int]) -> dict[str, Any]:
        """The frames of a user count as sampled at the rate of the processor."""
        metadata = [
            {
                "total_num_frames": count,
                "fps": rate(processor),
                "frames_indices": [*range(count)],
            }
            for count in frames
        ]
        return {"do_sample_frames": False, "video_metadata": metadata}

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        ids, types = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        grids = {name: inputs.get(f"{name}_grid_thw") for name in self.encoders}
        encoded = any(grid is not None for grid in grids.values())
        encoded |= bool(inputs.get("mm_encoder_outputs"))
        if ids is None or not encoded:
            return
        axes = positions if positions is not None and positions.ndim == 3 else None
        if types is None and (axes is None or bool((axes[-1] == axes[-2]).all())):
            raise UserError(
                "mm_token_type_ids is missing, without which the images have no rows and columns; "
                "pass everything that the processor returns."
            )
        for name, grid in grids.items():
            where = ids == self.facts.placeholders[name]
            made = 0 if grid is None else int(grid.prod(-1).sum()) // self._merge**2
            if grid is not None and int(where.sum()) != made:
                raise UserError(
                    f"the prompts have {int(where.sum())} {name} placeholders, but their {name}s "
                    f"make {made} tokens; prepare both in one call of the processor, without "
                    "truncation."
                )
            if axes is None and mask is not None and mask.shape == ids.shape:
                hidden = int((where & (mask == 0)).sum())
                if hidden:
                    raise UserError(
                        f"the attention mask hides {hidden} of the {name} placeholders, which this "
                        "model cannot number; remove the whole image, or pass position_ids."
                    )

    def encoding_arguments(self, layouts: Sequence[TokenLayout]) -> dict[str, Tensor]:
        side = self._merge
        grids: dict[str, list[list[int]]] = {}
        for layout in layouts:
            whole = layout.views * math.prod(layout.view_shape)
            if len(layout) != whole:
                raise UserError(
                    f"an encoded {layout.modality} has {len(layout)} of its {whole} visual tokens, "
                    "and this model can only number all of them; pass the whole encoding and drop "
                    "tokens with tokenprune.compress."
                )
            sides = [side * length for length in layout.view_shape]
            grids.setdefault(f"{layout.modality}_grid_thw", []).append([layout.views, *sides])
        return {name: torch.tensor(some, device="cpu") for name, some in grids.items()}


class NativeAdapter(_NativeInputs):
    """A family whose images keep their resolution within bounds.

    Attributes:
        tokens: Fewest and most visual tokens of an image; by default, those of the published
            processors.
    """

    tokens: tuple[float, float]

    # -- facts and modules -----------------------------------------------------------------------

    def vision_facts(self) -> VisionFacts:
        config = self.base.config.vision_config
        return VisionFacts(
            model_type=config.model_type,
            layers=config.depth,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            view_shape=self.view_shape,
            patch_size=(config.patch_size, config.patch_size),
            prefix_tokens=0,
            has_cls=False,
            merge_size=config.spatial_merge_size,
            native=True,
            reducible=False,
            resizable=False,
            **self.layer_facts(config),
        )

    @abstractmethod
    def layer_facts(self, config: Any) -> dict[str, Any]:
        """The fields of `VisionFacts` in which the families differ."""

    @property
    def view_shape(self) -> tuple[int, int]:
        """The patches of the smallest image: two rows and columns of tokens."""
        side = 2 * self._merge
        return side, side

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        layers: Sequence[nn.Module] = self.vision_tower.blocks
        return layers

    def vision_attention(self, layer: int) -> nn.Module:
        return self.vision_layers[layer].get_submodule("attn")

    @property
    def pooling_head(self) -> Any:
        return None

    def tap(self, layer: int) -> AbstractContextManager[Projections]:
        return packed_projections(self.vision_tower, self.vision_attention(layer))

    # -- visual tokens ---------------------------------------------------------------------------

    def bind(self, processor: Any) -> None:
        size, area = processor.image_processor.size, self.side**2
        self.tokens = size["shortest_edge"] / area, size["longest_edge"] / area

    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        return self._grid_layout((1, *self.patches(image_size)), "image")

    def usual_layout(self) -> TokenLayout:
        """An image of 1008 x 1008 pixels: 36 x 36 tokens of Qwen2.5-VL, 32 x 32 of Qwen3-VL."""
        return self.layout((1008, 1008))

    def video_layout(self, frames: int) -> TokenLayout:
        return self._grid_layout((frames, *self.view_shape), "video")

    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        return [self._grid_layout(grid, modality) for grid in _grids(call, modality)]

    def _grid_layout(self, grid: Sequence[int], modality: str) -> TokenLayout:
        """Layout of a grid of frames, rows and columns of patches."""
        frames, *sides = grid
        rows, cols = (side // self._merge for side in sides)
        if modality == "video":
            return TokenLayout.video(frames, (rows, cols), newline=False, native=True)
        return TokenLayout.single((rows, cols), newline=False, native=True)

    @abstractmethod
    def resized(self, image_size: tuple[int, int], fewest: int, most: int) -> tuple[int, int]:
        """(height, width) to which the processor resizes an image.

        Args:
            image_size: (height, width) of the image.
            fewest, most: Bounds of the number of pixels.
        """

    def patches(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of (height, width) pixels."""
        patch, area = self.base.config.vision_config.patch_size, self.side**2
        fewest, most = (round(number * area) for number in self.tokens)
        tall, wide = self.resized(image_size, fewest, most)
        return tall // patch, wide // patch

    @property
    def side(self) -> int:
        """Side of the square of pixels that becomes one visual token."""
        return int(self.base.config.vision_config.patch_size * self._merge)

    def by_image(self, values: Tensor, layouts: Sequence[TokenLayout]) -> list[Tensor]:
        each = values.shape[1] // sum(map(len, layouts))  # the patches of a token, or 1
        return list(values[0].split([each * len(layout) for layout in layouts]))

    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        """Mean over the patches of every token, in the order of the tokens (N, C)."""
        orders = [self.order(grid) for grid in _grids(call, modality)]
        return [
            values.unflatten(0, (len(order), -1))[moved(order, values.device)].mean(1)
            for values, order in zip(maps, orders, strict=True)
        ]

    def order(self, grid: Sequence[int]) -> Tensor:
        """(N,) place of every visual token of a grid in the sequence of the vision encoder."""
        return torch.arange(math.prod(grid) // self._merge**2, device="cpu")

    def unprojected(self, inputs: Tensor) -> Tensor:
        """(1, N, 4D) the vectors of the four patches of every token, from (4N, D)."""
        joined: Tensor = inputs.unflatten(0, (-1, self._merge**2)).flatten(1)[None]
        return joined

    def project(self, vectors: Tensor) -> Tensor:
        width = self.base.config.vision_config.hidden_size
        features: Tensor = self.projector(vectors.reshape(-1, width))
        return features

    def pixels_of(
        self, call: Mapping[str, Any], modality: str, index: int, first_view: int
    ) -> Tensor:
        patches = [math.prod(grid) for grid in _grids(call, modality)]
        pixels: Tensor = call["pixel_values_videos" if modality == "video" else "pixel_values"]
        sample: Tensor = pixels.split(patches)[index][::7, ::7]
        return sample

    # -- tests -----------------------------------------------------------------------------------

    def dummy_images(
        self, sizes: Sequence[tuple[int, int]], seed: int = 0, *, same_prompt: bool = False
    ) -> dict[str, Tensor]:
        grids = [(1, *self.patches(size)) for size in sizes]
        return dict(zip(self.image_arguments, self._dummy(grids, seed), strict=True))

    def dummy_video(self, frames: int, seed: int = 0) -> dict[str, Tensor]:
        grids = [(frames, *self.view_shape)]
        return dict(zip(self.video_arguments, self._dummy(grids, seed), strict=True))

    def _dummy(self, grids: Sequence[tuple[int, int, int]], seed: int) -> tuple[Tensor, Tensor]:
        """Random patches (P, C), and their grids."""
        config, draw = self.base.config.vision_config, torch.Generator("cpu").manual_seed(seed)
        width = config.in_channels * config.temporal_patch_size * config.patch_size**2
        shape = sum(map(math.prod, grids)), width
        pixels = torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")
        return pixels, torch.tensor(grids, device="cpu")


def rate(processor: Any) -> float:
    """Frames per second at which the processor samples videos; 2 in the published ones."""
    return float(processor.video_processor.fps or 2.0)


def _grids(call: Mapping[str, Any], modality: str) -> list[list[int]]:
    """Frames, rows and columns of the patches of every image or video of an encoder call."""
    grids: list[list[int]] = call[f"{modality}_grid_thw"].tolist()
    return grids
