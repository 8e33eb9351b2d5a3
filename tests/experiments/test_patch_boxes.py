"""Locations of tokens, against coordinates that pass through the real processors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionVideoProcessor,
    SiglipVisionConfig,
)

import tokenprune as tp
from tokenprune.adapter import tiny_decoder
from tokenprune.errors import UserError
from tokenprune.experiments.common.patch_boxes import ViewSize, crop_boxes, lattices, patch_boxes
from tokenprune.layout import TokenLayout
from tokenprune.models.llava_onevision import LlavaOnevision
from tokenprune.pipeline import Pipeline

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def _family(kind: str, side: int, patch: int, shapes: list[tuple[int, int]]) -> Pipeline:
    """A tiny model with views of ``side`` pixels, its real processors, and these crop grids."""
    pinpoints = [[rows * side, cols * side] for rows, cols in shapes]
    sizes: dict[str, Any] = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": side,
        "patch_size": patch,
    }
    shared: dict[str, Any] = {
        "text_config": tiny_decoder("qwen2"),
        "image_token_index": 63,
        "image_grid_pinpoints": pinpoints,
    }
    size = {"height": side, "width": side}
    if kind == "next":
        vision = CLIPVisionConfig(**sizes)
        model: Any = LlavaNextForConditionalGeneration(
            LlavaNextConfig(vision_config=vision, **shared)
        )
        images: Any = LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size=size, image_grid_pinpoints=pinpoints
        )
        return Pipeline(model, SimpleNamespace(image_processor=images))
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(vision_use_head=False, **sizes),  # type: ignore[call-arg]
            video_token_index=62,
            vision_aspect_ratio="anyres_max_4",
            **shared,
        )
    )
    images = LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints)
    videos = LlavaOnevisionVideoProcessor(size=size)
    return Pipeline(model, SimpleNamespace(image_processor=images, video_processor=videos))


GRIDS = [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
MANY = [(rows, cols) for rows in range(1, 5) for cols in range(1, 5)]
FAMILIES = {
    "LLaVA-NeXT": _family("next", 24, 6, GRIDS),
    "OneVision": _family("onevision", 24, 6, MANY),
    "patches that leave pixels over": _family("onevision", 26, 7, MANY),
    "timm": tp.load("timm/vit_tiny_patch16_224", img_size=24, patch_size=6, depth=1),
    "timm, oblong patches": tp.load(
        "timm/vit_tiny_patch16_224", img_size=24, patch_size=(6, 4), depth=1
    ),
}


def _ramp(size: tuple[int, int]) -> Tensor:
    """(3, height, width): x and y in pixels, and 1; each pixel's own coordinates."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)])


def _codes(pipe: Pipeline, pixels: Tensor) -> Tensor:
    """(views, patches, 7): of the image's pixels in each patch the mean x, y and share, and ends.

    Args:
        pipe: Whose patches.
        pixels: (views, 3, side, side) input of the vision encoder for a `_ramp`.
    """
    size = pipe.adapter.facts.vision.patch_size
    mean, high = F.avg_pool2d(pixels, size), F.max_pool2d(pixels[:, :2], size)
    low = -F.max_pool2d(-pixels[:, :2], size)
    return torch.cat([mean, low, high], 1).flatten(2).transpose(1, 2)


def _seen(
    pipe: Pipeline, size: tuple[int, int], same_prompt: bool
) -> tuple[Tensor, TokenLayout, tuple[int, int] | None]:
    """(N, 7) what each token saw of the image, by the real processor and the real packing.

    And the layout, and (width, height) to which the image was resized to be cut into crops.
    """
    image = _ramp(size)
    grouped = [[image] * 2] if same_prompt else [[image]]
    processor = pipe.processor.image_processor
    processor.image_mean = [0.0] * 3  # the colour of padding as well
    plain = {"do_rescale": False, "image_std": [1.0] * 3}
    batch = processor(pipe.adapter.grouped(grouped), return_tensors="pt", **plain)  # type: ignore[arg-type]
    call = {name: batch[name] for name in pipe.adapter.image_arguments}
    layout = pipe.adapter.layouts(call, "image")[0]
    pixels = batch["pixel_values"][0].reshape(-1, 3, *batch["pixel_values"].shape[-2:]).double()
    resized = None
    if layout.grid != (0, 0):
        rows, cols = layout.grid
        ones = pixels[1 : layout.views, 2].reshape(rows, cols, *pixels.shape[-2:])
        canvas = ones.transpose(1, 2).flatten(2).flatten(0, 1) > 0.5
        resized = int(canvas.any(0).sum()), int(canvas.any(1).sum())
    maps = [_codes(pipe, pixels[: layout.views])] * len(call["image_sizes"])
    return pipe.adapter.pack(maps, call, "image")[0], layout, resized


def _check(pipe: Pipeline, size: tuple[int, int], same_prompt: bool = False) -> None:
    layout = pipe.adapter.layout(size, same_prompt=same_prompt)
    if 0 in layout.canvas_shape and layout.grid != (0, 0):
        return  # the model itself cannot pack an image of so extreme a shape
    codes, true_layout, resized = _seen(pipe, size, same_prompt)
    assert len(true_layout) == len(layout) == len(codes)
    view = ViewSize.of(pipe.adapter)
    boxes = torch.from_numpy(patch_boxes(layout, size, view))
    assert torch.equal(boxes.isnan().all(1), layout.is_separator)
    patches = layout.patches
    codes, boxes = codes[patches], boxes[patches]
    height, width = size
    centre = torch.stack([boxes[:, 0] + boxes[:, 2], boxes[:, 1] + boxes[:, 3]], 1) / 2
    extent = torch.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)
    assert (extent >= 0).all()
    # Pixels of the image per pixel of the view, by token.
    whole = torch.tensor([width, height]) / view.side
    if same_prompt:
        whole = torch.full((2,), max(size) / view.side)
    on_canvas = layout.canvas_row[patches] >= 0
    scale = whole.expand(len(boxes), 2).clone()
    if resized is not None:
        scale[on_canvas] = torch.tensor([width / resized[0], height / resized[1]])
    inside, middle = codes[:, 2], codes[:, :2] / codes[:, 2:3]  # padding is all zeros
    resampled = on_canvas & torch.tensor(_is_resampled(pipe, layout, size))
    patch = torch.tensor(pipe.adapter.facts.vision.patch_size[::-1]) * scale
    share, off = extent.prod(1) / patch.prod(1), (centre - middle).abs()
    # Resizing bends a ramp near the image's edges; a token in the middle must fit to a hair.
    pixel = scale.clamp(min=1)  # of the view or of the image, whichever is coarser
    limits = torch.tensor([width, height])
    inner = ((boxes[:, :2] > 4 * pixel) & (boxes[:, 2:] < limits - 4 * pixel)).all(1)
    exact = inner & ~resampled
    assert ((share - 1).abs()[exact] < 1e-6).all()
    assert ((inside - 1).abs()[exact] < 1e-6).all()
    assert (off[exact] < 0.1 * pixel[exact]).all()
    first, last = boxes[:, :2] + scale / 2, boxes[:, 2:] - scale / 2  # middles of the end pixels
    assert ((first - codes[:, 3:5]).abs()[exact] < 0.1 * pixel[exact]).all()
    assert ((last - codes[:, 5:7]).abs()[exact] < 0.1 * pixel[exact]).all()
    # At the edges, the canvas padding is cut off, to about a pixel.
    edge = ~inner & ~resampled & (inside > 0.3)
    assert (off[edge] < 1.5 * pixel[edge]).all()
    slack = 1.5 * (pixel / patch).sum(1)
    assert ((share - inside).abs() < slack)[~resampled].all()
    # A blend of neighbouring patches is nearest to the patch that it is drawn over.
    blend = inner & resampled
    assert (off[blend] < 0.5 * patch[blend] + pixel[blend]).all()


def _is_resampled(pipe: Pipeline, layout: TokenLayout, size: tuple[int, int]) -> bool:
    if not isinstance(pipe.adapter, LlavaOnevision) or layout.grid == (0, 0):
        return False
    return pipe.adapter.layout(size, aspect="anyres_max_999").canvas_shape != layout.canvas_shape  # type: ignore[call-arg]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25)
@given(size=SIZES)
@example(size=(300, 300))
@example(size=(8, 300))
@example(size=(300, 8))
@example(size=(24, 24))
@example(size=(100, 26))
def test_tokens_are_drawn_over_the_pixels_they_saw(name: str, size: tuple[int, int]) -> None:
    _check(FAMILIES[name], size)


@settings(max_examples=25)
@given(size=SIZES)
@example(size=(20, 300))
@example(size=(301, 20))
def test_images_of_a_prompt_with_several_are_padded(size: tuple[int, int]) -> None:
    for name in ("OneVision", "patches that leave pixels over"):
        _check(FAMILIES[name], size, same_prompt=True)


@settings(max_examples=10)
@given(size=st.tuples(st.integers(8, 200), st.integers(8, 200)), frames=st.integers(1, 3))
def test_pooled_frames(size: tuple[int, int], frames: int) -> None:
    for name in ("OneVision", "patches that leave pixels over"):
        pipe: Any = FAMILIES[name]
        video = _ramp(size)[None].expand(frames, -1, -1, -1)
        plain = {"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        batch = pipe.processor.video_processor([video], return_tensors="pt", **plain)
        call = {"pixel_values_videos": batch["pixel_values_videos"]}
        maps = _codes(pipe, batch["pixel_values_videos"][0].double())
        (codes,) = pipe.adapter.pack([maps], call, "video")
        layout = pipe.adapter.video_layout(frames)
        view = ViewSize.of(pipe.adapter)
        boxes = torch.from_numpy(patch_boxes(layout, size, view))[:-1]
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        token = (boxes[:, 2:] - boxes[:, :2]).amax(0)
        assert ((centre - codes[:-1, :2]).abs() < 0.3 * token + 1).all()


@settings(max_examples=20)
@given(size=st.tuples(st.integers(24, 200), st.integers(24, 200)))
def test_an_image_that_is_cropped_to_a_square(size: tuple[int, int]) -> None:
    """The shorter side resized to the view's, the middle of the longer one: LLaVA-1.5."""
    side = {"height": 24, "width": 24}
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=side)
    plain = {"do_rescale": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    pixels = processor(_ramp(size), return_tensors="pt", **plain)["pixel_values"].double()
    codes = F.avg_pool2d(pixels[:, :2], 6).flatten(2)[0].T
    layout = TokenLayout.single((4, 4), newline=False)
    boxes = torch.from_numpy(patch_boxes(layout, size, ViewSize(24, (24, 24), "crop")))
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert ((centre - codes).abs() < 1.01 * max(1, min(size) / 24)).all()


def test_real_sizes_of_the_published_checkpoints() -> None:
    """384 pixels hold 27 patches of 14 pixels; six pixels are in no patch."""
    pipe = _family("onevision", 384, 14, [(1, 1), (1, 2), (2, 2)])
    assert ViewSize.of(pipe.adapter) == ViewSize(384, (378, 378), "pad")
    _check(pipe, (500, 700))
    _check(_family("next", 336, 14, GRIDS), (480, 640))
    layout = pipe.adapter.layout((768, 768))
    boxes = patch_boxes(layout, (768, 768), ViewSize.of(pipe.adapter))
    crops = boxes[27 * 27 :].reshape(54, 55, 4)
    assert crops[0, 26].tolist() == [364, 0, 378, 14]
    assert crops[0, 27].tolist() == [384, 0, 398, 14]
    assert np.isnan(crops[0, 54]).all()


@settings(max_examples=30)
@given(size=SIZES, data=st.data())
def test_a_location_finds_its_token(size: tuple[int, int], data: st.DataObject) -> None:
    """The rectangles equal a drawing pixel by pixel."""
    pipe = FAMILIES[data.draw(st.sampled_from(list(FAMILIES)))]
    layout, view = pipe.adapter.layout(size), ViewSize.of(pipe.adapter)
    boxes = patch_boxes(layout, size, view)
    height, width = size
    y = np.array(data.draw(st.lists(st.floats(0, height, exclude_max=True), min_size=1)))
    x = np.array(data.draw(st.lists(st.floats(0, width, exclude_max=True), min_size=1)))
    for lattice in lattices(layout, size, view):
        found = lattice.at(y, x)
        for i, j in np.ndindex(found.shape):
            mine = boxes[lattice.index.ravel()]
            inside = (mine[:, 0] <= x[j]) & (x[j] < mine[:, 2])
            inside &= (mine[:, 1] <= y[i]) & (y[i] < mine[:, 3])
            said = lattice.index.ravel()[inside].tolist()
            assert said == ([found[i, j]] if found[i, j] >= 0 else [])


def test_crops_tile_the_image() -> None:
    pipe = FAMILIES["LLaVA-NeXT"]
    for size in ((80, 112), (112, 80), (20, 300), (7, 11)):
        layout = pipe.adapter.layout(size)
        crops = crop_boxes(layout, size, ViewSize.of(pipe.adapter))
        area = (crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])
        assert area.sum() == pytest.approx(size[0] * size[1])
        boxes = patch_boxes(layout, size, ViewSize.of(pipe.adapter))
        for view in range(1, layout.views):
            left, top, right, bottom = crops[view - 1] + [-1e-9, -1e-9, 1e-9, 1e-9]
            mine = boxes[(layout.view == view).numpy()]
            assert (mine[:, [0, 1]] >= (left, top)).all()
            assert (mine[:, [2, 3]] <= (right, bottom)).all()


def test_a_layout_of_another_size_is_refused() -> None:
    pipe = FAMILIES["LLaVA-NeXT"]
    with pytest.raises(UserError, match="give the size the layout was made for"):
        patch_boxes(pipe.adapter.layout((50, 100)), (100, 50), ViewSize.of(pipe.adapter))
