"""InternVL: views and tokens against the real processor and the model's own packing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import internvl_processor, tiny_pipeline
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import tokenprune as tp
from tokenprune.adapter import adapter_of
from tokenprune.engine.session import compress
from tokenprune.engine.vision import watched
from tokenprune.errors import UserError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.models._tiles import grids, views_by_image
from tokenprune.models.internvl import InternVL
from tokenprune.pipeline import Pipeline
from tokenprune.spec import parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host
from tokenprune.testing.model_checks import check_equals_reference
from tokenprune.testing.runner import run

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

PATCH = 3


def _colours(pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
    """In place of the vision encoder: the mean colour of every patch, after a CLS token."""
    colours = nn.functional.avg_pool2d(pixel_values, PATCH).flatten(2).mT
    states = torch.cat([torch.full_like(colours[:, :1], torch.nan), colours], 1)
    return BaseModelOutputWithPooling(last_hidden_state=states)


@pytest.fixture(scope="module")
def coded() -> Pipeline:
    """The tiny model, whose features are the colours of the patches that a token merges."""
    model = InternVL.tiny()
    model.model.vision_tower.forward, model.model.multi_modal_projector = _colours, nn.Identity()
    return Pipeline(model, internvl_processor(model, do_normalize=False))


def _ramp(height: int, width: int, blue: int = 128) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    red, green = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.stack(np.broadcast_arrays(red[None], green[:, None], np.float64(blue)), -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def _located(layout: TokenLayout) -> Tensor:
    """(N, 2) x and y of every token's centre in the image, in [0, 1], from its layout."""
    whole = layout.kind != Kind.CROP
    row, col = (torch.where(whole, a, b) for a, b in (
        (layout.row, layout.canvas_row), (layout.col, layout.canvas_col)
    ))  # fmt: skip
    canvas = layout.canvas_shape if layout.grid != (0, 0) else layout.view_shape
    rows, cols = (torch.where(whole, a, b) for a, b in zip(layout.view_shape, canvas, strict=True))
    return torch.stack([(col + 0.5) / cols, (row + 0.5) / rows], -1)


def _check_locations(layout: TokenLayout, features: Tensor, size: tuple[int, int]) -> None:
    """Features (N, 4 * 3): the colours of four patches, whose mean is the token's location."""
    colours = features.unflatten(-1, (4, 3)).mean(1)[:, :2]
    # Resizing to fewer pixels than the image has, or to more, shifts a ramp by about one of them.
    slack = 0.02 + 1.0 / torch.tensor([size[1], size[0]]) + 1.0 / 24
    apart = (colours - _located(layout)).abs()
    assert (apart < slack).all(), (size, layout.grid, apart.amax(0))
    view = torch.unique_consecutive(layout.view).tolist()
    crops = layout.grid[0] * layout.grid[1]
    assert [*dict.fromkeys(view)] == ([*range(1, crops + 1), 0] if crops else [0])


def test_tokens_are_where_the_layout_says_for_2000_sizes(coded: Pipeline) -> None:
    """From the processor through the model's packing, 20 prompts of up to 3 images at a time."""
    draw, seen, found = random.Random(0), 0, set()
    while seen < 2000:
        rows = [
            [
                (int(2 ** draw.uniform(3, 7.6)), int(2 ** draw.uniform(3, 7.6)))
                for _ in range(draw.choice([0, 1, 1, 2, 3]))
            ]
            for _ in range(20)
        ]
        sizes = [size for some in rows for size in some]
        pictures = [[_ramp(*size, blue=draw.randrange(256)) for size in some] for some in rows]
        inputs = coded.prepare(pictures, ["w9"] * len(rows), longer=True)
        placeholders = {"image": inputs["input_ids"] == 63}
        encode = watched(
            coded.adapter, "image", frozenset(), prompts=lambda given=placeholders: given
        )
        output = encode(pixel_values=inputs["pixel_values"])
        assert len(output.pooler_output) == len(sizes)
        for feature, size in zip(output.pooler_output, sizes, strict=True):
            layout = feature.visual.layout
            assert layout.grid == coded.adapter.layout(size).grid
            assert len(layout) == len(feature)
            _check_locations(layout, feature, size)
            found.add(layout.grid)
        seen += len(sizes)
    assert len(found) > 20


# -- grids and runs ------------------------------------------------------------------------------


def test_an_image_of_one_colour_has_the_squarest_grid() -> None:
    blank = torch.full((7, 3, 24, 24), 0.5)
    assert grids([blank, blank[:1], blank[:5]]) == [(2, 3), None, (2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids_of_noise(dtype: torch.dtype) -> None:
    """Twelve crops can be arranged in six ways; the thumbnail tells which."""
    draw = torch.Generator().manual_seed(0)
    for rows, cols in ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)):
        image = torch.rand(3, rows * 24, cols * 24, generator=draw)
        strips = image.split(24, 1)
        crops = [crop for strip in strips for crop in strip.split(24, 2)]
        thumbnail = nn.functional.interpolate(image[None], (24, 24), mode="area")[0]
        assert grids([torch.stack([*crops, thumbnail]).to(dtype)]) == [(rows, cols)]


def test_runs_of_placeholders_counted_by_hand() -> None:
    rows = ["..xxxx.xx", "xx.xxxxxx", "........."]  # two tokens a view
    mask = torch.tensor([[mark == "x" for mark in row] for row in rows])
    assert views_by_image(mask, 2, 7, None) == [2, 1, 1, 3]
    with pytest.raises(UserError, match=r"runs of \[4, 2, 2, 6\] image placeholders for 6 views"):
        views_by_image(mask, 2, 6, None)
    mask[1, 3:] = mask[0, :6]
    assert views_by_image(mask[:2], 2, 6, [0, 2, 0]) == [2, 2, 2]
    for frames in ([0, 3, 0], [2, 0, 0], [0, 2], [0, 2, 0, 0]):
        with pytest.raises(UserError, match="which do not match images and videos"):
            views_by_image(mask[:2], 2, 6, frames)


# -- prompts -------------------------------------------------------------------------------------

CLIP = [_ramp(30, 40, blue) for blue in (0, 120, 250)]
IMAGES = [[_ramp(40, 60)], [], [_ramp(60, 20), _ramp(30, 30)]]
VIDEOS = [[], [CLIP], [CLIP]]
QUESTIONS = ["w9 w8", "w7", "<image> w6 <video> w11 <image> w12"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny_pipeline("InternVL", "qwen2")


def _answers(pipe: Pipeline, inputs: Any, **options: Any) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, **options}
    ids: Tensor = pipe.model.generate(**inputs, suppress_tokens=[62, 63], **options)
    return ids


def _kinds(trace: Any) -> list[tuple[int, str, int]]:
    return [(one.row, one.layout.modality, one.layout.views) for one in trace.selections]


def test_images_and_videos_of_a_batch_are_found(pipe: Pipeline) -> None:
    inputs = pipe.prepare(IMAGES, QUESTIONS, VIDEOS)
    with compress(pipe.model, "uniform", retention=0.5) as trace:
        ids = _answers(pipe, inputs)
        wanted = [
            (0, "image", 7), (1, "video", 3), (2, "image", 4), (2, "video", 3), (2, "image", 1),
        ]  # fmt: skip
        assert _kinds(trace) == wanted
        with torch.no_grad():
            pipe.model(**inputs)
        assert _kinds(trace) == wanted
        beams = _answers(pipe, inputs, num_beams=2)
    for row in range(3):
        alone = pipe.prepare([IMAGES[row]], [QUESTIONS[row]], [VIDEOS[row]])
        with compress(pipe.model, "uniform", retention=0.5):
            for got, options in ((ids, {}), (beams, {"num_beams": 2})):
                assert torch.equal(_answers(pipe, alone, **options)[0, -4:], got[row, -4:])


def test_without_the_note_every_frame_is_an_image(pipe: Pipeline) -> None:
    """A processor's own output does not say which views are frames."""
    inputs = pipe.prepare([[]], ["w7"], [[CLIP]])
    plain = inputs | {"pixel_values": inputs["pixel_values"].clone()}
    with compress(pipe.model, "uniform", retention=0.5) as trace:
        _answers(pipe, plain)
    assert _kinds(trace) == [(0, "image", 1)] * 3


@pytest.mark.parametrize("method", ["globalcom2", "visionzip", "dycoke", "fastv"])
def test_encoding_once_gives_what_pixels_give(pipe: Pipeline, method: str) -> None:
    compressor = tp.create(method, retention=0.5)
    inputs = pipe.prepare(IMAGES, QUESTIONS, VIDEOS)
    with compress(pipe.model, compressor) as trace:
        want = _answers(pipe, inputs)
        kept = [one.keep.tolist() for one in trace.selections]
    each = [pipe.encode(images, compressor.needs) for images in IMAGES if images]
    (first,), (second, third) = each
    (clip,) = pipe.encode_videos([CLIP], compressor.needs)
    encoded = [[first], [clip], [second, clip, third]]
    assembled = pipe.assemble(encoded, QUESTIONS)
    assert torch.equal(assembled["input_ids"], inputs["input_ids"])
    with compress(pipe.model, compressor) as trace:
        assert torch.equal(_answers(pipe, assembled), want)
    assert [one.keep.tolist() for one in trace.selections] == kept
    with pytest.raises(UserError, match="shows image, video, image, but its encoded list holds"):
        pipe.assemble([[second, third, clip]], QUESTIONS[2:])


def test_bad_input_is_refused_before_the_encoder_runs(pipe: Pipeline) -> None:
    inputs = pipe.prepare(IMAGES[:1], QUESTIONS[:1])
    pixels = inputs["pixel_values"]
    runs: list[Any] = []
    tower = pipe.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda *given: runs.append(given))
    with compress(pipe.model, "uniform", retention=0.5):
        with pytest.raises(UserError, match="image placeholders for 5 views of 16"):
            pipe.model.generate(**{**inputs, "pixel_values": pixels[:5]})
        with pytest.raises(UserError, match="no prompt came with these pixels"):
            pipe.model.model.get_image_features(pixels)
        noted = pixels.clone()
        noted.frames = [3]
        with pytest.raises(UserError, match="do not match images and videos of \\[3\\] frames"):
            pipe.model(**{**inputs, "pixel_values": noted})
    handle.remove()
    assert runs == []


def test_normalised_queries_and_keys_are_read() -> None:
    """The largest InternVL encoder normalises them over the full width."""
    model = InternVL.tiny()
    config = model.config
    config.vision_config.use_qk_norm = True
    torch.manual_seed(0)
    model = type(model)(config).eval()
    for name, weight in model.named_parameters():
        if "q_norm" in name or "k_norm" in name or "cls_token" in name:
            nn.init.uniform_(weight, 0.2, 2)
    host = Host(adapter_of(model), "InternVL", "qwen2")
    run(check_equals_reference, tp.create("fastervlm", retention=0.4), [host])


@pytest.mark.parametrize(
    "spec",
    ["globalcom2", "globalcom2:allocator=max", "fastervlm", "hired", "visionzip", "divprune"],
)
def test_a_method_keeps_the_same_tokens_as_in_the_order_of_llava_next(spec: str) -> None:
    """The crops of InternVL are those of the papers; only the order in the sequence differs."""
    method = parse(spec, retention=0.25)
    grid, shape = (2, 3), (4, 4)
    canvas = TokenLayout.anyres(grid, shape, (0, 8, 0, 12), newlines=False)
    tiled = TokenLayout.tiled(grid, shape)
    place = {where: index for index, where in enumerate(_places(canvas))}
    order = torch.tensor([place[where] for where in _places(tiled)])
    tokens = sample_tokens(method.needs, canvas, seed=3)
    moved = replace(
        tokens,
        layout=tiled,
        features=tokens.features[order],
        signals={name: values[order] for name, values in tokens.signals.items()},
    )
    want = method(tokens).keep
    assert len(want) < len(canvas) / 2
    assert order[method(moved).keep].sort().values.tolist() == want.tolist()


def _places(layout: TokenLayout) -> list[tuple[int, ...]]:
    """View, row and column, and the location on the canvas, of every token."""
    columns = layout.view, layout.row, layout.col, layout.canvas_row, layout.canvas_col
    return list(zip(*(values.tolist() for values in columns), strict=True))
