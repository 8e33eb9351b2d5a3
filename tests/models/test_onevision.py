"""LLaVA-OneVision: geometry against the model's own packing, its processor, and the API."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

import tokenprune as tp
from tokenprune.adapter import adapter_of
from tokenprune.allocators import ThumbnailCommand
from tokenprune.compatibility import check_compatible
from tokenprune.engine.session import compress
from tokenprune.engine.vision import describe
from tokenprune.errors import UserError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.models.llava_onevision import LlavaOnevision
from tokenprune.ops.spatial import summary_distance
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.testing.host import Host
from tokenprune.testing.runner import MODEL_CHECKS, run
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

SIDES = st.integers(1, 4000)
SIZES = st.tuples(SIDES, SIDES)
PINPOINTS = LlavaOnevisionImageProcessor().image_grid_pinpoints  # of the published checkpoints


def _adapter(config: LlavaOnevisionConfig) -> LlavaOnevision:
    """An adapter that has a config and nothing else."""
    return LlavaOnevision(SimpleNamespace(config=config))  # type: ignore[arg-type]


def _real() -> LlavaOnevision:
    config = LlavaOnevisionConfig(image_grid_pinpoints=PINPOINTS)
    assert config.vision_config.image_size // config.vision_config.patch_size == 27
    assert config.vision_aspect_ratio == "anyres_max_9"
    return _adapter(config)


REAL, TINY = _real(), _adapter(LlavaOnevision.tiny().config)


# -- geometry ------------------------------------------------------------------------------------


def _packed_codes(adapter: LlavaOnevision, size: tuple[int, int], same_prompt: bool) -> Tensor:
    """(N, 3) as the model packs them: 1 in crops, and row and column on the padded canvas.

    A resampled canvas has blends of these; newlines are -1.
    """
    config, (side, _) = adapter.base.config, adapter.view_shape
    layout = adapter.layout(size, same_prompt=same_prompt)
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    codes = [torch.stack([torch.zeros_like(row), row, col], -1).flatten(0, 1)]
    for y in range(layout.grid[0]):
        for x in range(layout.grid[1]):
            inside = [torch.ones_like(row), y * side + row, x * side + col]
            codes.append(torch.stack(inside, -1).flatten(0, 1))
    packed, _ = LlavaOnevisionModel.pack_image_features(
        SimpleNamespace(config=config),
        [torch.stack(codes).double()],
        [list(size)],
        image_newline=torch.full((3,), -1.0),
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
    return packed[0]


def _check_layout(
    adapter: LlavaOnevision, size: tuple[int, int], same_prompt: bool = False
) -> None:
    layout, codes = adapter.layout(size, same_prompt=same_prompt), None
    canvas = layout.canvas_shape
    try:
        codes = _packed_codes(adapter, size, same_prompt)
    except RuntimeError:  # the model cannot resample a canvas to nothing
        assert 0 in canvas
        assert layout.grid != (0, 0)
        return
    assert len(layout) == len(codes)
    separator = codes[:, 0] < 0
    assert torch.equal(layout.is_separator, separator)
    assert torch.equal(layout.kind == Kind.THUMBNAIL, codes[:, 0] == 0)
    assert torch.equal(layout.kind == Kind.CROP, codes[:, 0] > 0)
    # A token belongs to the patch nearest to its location on the canvas.
    side = adapter.view_shape[0]
    crop = layout.kind == Kind.CROP
    cell = (layout.view - 1).clamp(min=0)
    y = torch.where(crop, cell // max(layout.grid[1], 1) * side, 0) + layout.row
    x = torch.where(crop, cell % max(layout.grid[1], 1) * side, 0) + layout.col
    for mine, true in ((y, codes[:, 1]), (x, codes[:, 2])):
        assert ((mine - true).abs()[~separator] <= 0.5 + 1e-9).all()
    assert len(layout.patches) == sum(layout.view_sizes)
    rows = int(separator.sum())
    if layout.grid != (0, 0):
        assert rows == canvas[0]
        assert int(crop.sum()) == canvas[0] * canvas[1]
        assert torch.equal(layout.canvas_row[crop], torch.arange(rows).repeat_interleave(canvas[1]))
        assert torch.equal(layout.canvas_col[crop], torch.arange(canvas[1]).repeat(rows))
        assert torch.equal(layout.canvas_row[separator], torch.arange(rows))
    else:
        assert rows == 1


@settings(max_examples=2000)
@given(SIZES)
@example((1, 4000))
@example((4000, 1))
@example((20, 30))
def test_layout_is_the_models_packing_tiny(size: tuple[int, int]) -> None:
    _check_layout(TINY, size)


@settings(max_examples=1000)
@given(SIZES)
@example((2304, 2304))
@example((1536, 768))
@example((1, 4000))
@example((4000, 1))
def test_layout_is_the_models_packing_real(size: tuple[int, int]) -> None:
    _check_layout(REAL, size)


@settings(max_examples=50)
@given(SIZES)
def test_layout_of_several_images_is_the_models_packing(size: tuple[int, int]) -> None:
    _check_layout(REAL, size, same_prompt=True)


@pytest.mark.parametrize(
    ("size", "grid", "canvas"),
    [
        ((384, 384), (1, 1), (27, 27)),
        ((1152, 1152), (3, 3), (81, 81)),  # exactly nine views: as it is
        ((1152, 1536), (3, 4), (70, 93)),  # 81 * 108 / 6561 = 1.33, ratio 1.155
        ((2304, 2304), (6, 6), (81, 81)),  # 162 * 162 / 6561 = 4, ratio 2
    ],
)
def test_known_counts(size: tuple[int, int], grid: Any, canvas: tuple[int, int]) -> None:
    layout = REAL.layout(size)
    assert (layout.grid, layout.canvas_shape) == (grid, canvas)
    assert len(layout) == 729 + canvas[0] * (canvas[1] + 1)


def test_resampled_canvas_by_hand() -> None:
    """Two crops of 2x2 side by side, 2 rows and 4 columns, resampled to 1 row and 3 columns."""
    layout = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 0, 4), canvas=(1, 3))
    # Centres at row 1, columns 4/6, 2 and 20/6: patches (1, 0), (1, 2) and (1, 3) of the canvas.
    assert layout.view.tolist() == [0, 0, 0, 0, 1, 2, 2, -1]
    assert layout.row.tolist()[4:] == [1, 1, 1, -1]
    assert layout.col.tolist()[4:] == [0, 0, 1, -1]
    assert layout.canvas_col.tolist()[4:] == [0, 1, 2, -1]
    assert layout.view_sizes == (4, 1, 2)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_video_layout_is_the_models_pooling(frames: int) -> None:
    model = LlavaOnevision.tiny().model
    adapter = LlavaOnevision(model)
    layout = adapter.video_layout(frames)
    side = adapter.view_shape[0]
    code = torch.arange(frames * side * side).view(frames, -1)
    frame, place = code // (side * side), code % (side * side)
    coded = torch.stack([frame, place // side, place % side], -1).double()
    pooled = model.apply_pooling(coded).flatten(0, 1)
    patches = layout.patches
    assert patches.tolist() == list(range(len(pooled)))
    assert torch.equal(layout.view[patches].double(), pooled[:, 0])
    half = layout.view_shape[0]
    # The token in row i is a blend around row (i + 0.5) * side / half - 0.5 of the frame.
    for mine, true in ((layout.row, pooled[:, 1]), (layout.col, pooled[:, 2])):
        expected = (mine[patches].double() + 0.5) * side / half - 0.5
        torch.testing.assert_close(true, expected)
    with torch.no_grad():
        features = model.get_video_features(**adapter.dummy_video(frames)).pooler_output
    assert len(features[0]) == len(layout)
    torch.testing.assert_close(features[0][-1], model.image_newline)
    assert layout.kind.tolist() == [Kind.FRAME] * (len(layout) - 1) + [Kind.SEPARATOR]
    assert (layout.views, layout.modality) == (frames, "video")


def test_a_video_keeps_frames_that_lost_everything() -> None:
    left = TokenLayout.video(3, (2, 2)).take(torch.tensor([0, 5, 12]))
    assert (left.views, left.view_sizes, left.modality) == (3, (1, 1, 0), "video")


# -- the processor -------------------------------------------------------------------------------


def _processor(model: Any) -> LlavaOnevisionProcessor:
    """A real processor for the tiny model: its ids are the words w0 to w61."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 62)}}
    words |= {"<video>": 62, "<image>": 63}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    side = model.config.vision_config.image_size
    patches = (side // model.config.vision_config.patch_size) ** 2
    size = {"height": side, "width": side}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=model.config.image_grid_pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=patches,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=model.config.vision_aspect_ratio,
    )


REAL_PROCESSOR = _processor(REAL.model)


@settings(max_examples=2000)
@given(SIZES)
@example((2304, 2304))
def test_processor_counts_as_many_placeholders_real(size: tuple[int, int]) -> None:
    counts = REAL_PROCESSOR._get_num_multimodal_tokens(image_sizes=[size])
    assert counts["num_image_tokens"] == [len(REAL.layout(size))]


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    model = LlavaOnevision.tiny()
    return Pipeline(model, _processor(model))


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.tuples(st.integers(4, 90), st.integers(4, 90)), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_processor_and_model_agree_on_any_batch(
    pipe: Pipeline, batch: list[tuple[list[tuple[int, int]]]]
) -> None:
    """Prompts of none, one or several images of any size, together."""
    rows = [sizes for (sizes,) in batch]
    inputs = pipe.prepare([[_image(*s) for s in sizes] for sizes in rows], ["w5"] * len(rows))
    for ids, sizes in zip(inputs["input_ids"], rows, strict=True):
        expected = sum(len(pipe.adapter.layout(size, same_prompt=len(sizes) > 1)) for size in sizes)
        assert int((ids == 63).sum()) == expected
    with compress(pipe.model, None) as trace, torch.no_grad():
        pipe.model(**inputs)
    flat = [(row, i) for row, sizes in enumerate(rows) for i in range(len(sizes))]
    ledgers = trace.ledgers
    assert [len(ledger.patches_per_view) for ledger in ledgers] == [len(sizes) for sizes in rows]
    for row, index in flat:
        sizes = rows[row]
        layout = pipe.adapter.layout(sizes[index], same_prompt=len(sizes) > 1)
        assert ledgers[row].patches_per_view[index] == layout.view_sizes


# -- what users call -----------------------------------------------------------------------------

VIDEO = [_image(12, 12, seed) for seed in range(3)]
LONGER = np.stack([np.asarray(_image(12, 12, seed)) for seed in range(5)])
QUESTIONS = ["w4 w5", "w6", "w7 w8 w9", "w10"]
IMAGES = [[_image(24, 24)], [], [_image(10, 30), _image(24, 20)], [_image(24, 12)]]
VIDEOS = [[], [VIDEO], [VIDEO], []]


def _generate(pipe: Pipeline, inputs: Any, **options: Any) -> Tensor:
    ids: Tensor = pipe.model.generate(
        **inputs, do_sample=False, max_new_tokens=4, suppress_tokens=[62, 63, 2], **options
    )
    return ids


# Beams differ for the engine, not for a method: one for each stage and kind of signal.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in tp.list_methods()),
        *((name, {"num_beams": 2}) for name in ("uniform", "globalcom2", "fastv")),
    ],
)
def test_encoding_once_gives_what_pixels_give(
    pipe: Pipeline, name: str, options: dict[str, Any]
) -> None:
    method = create(name, retention=0.4)
    try:
        check_compatible(pipe.adapter.facts, method)
    except UserError as error:
        pytest.skip(str(error))
    with compress(pipe.model, method) as trace:
        pixels = _generate(pipe, pipe.prepare(IMAGES, QUESTIONS, VIDEOS), **options)
        kept = [chosen.keep.tolist() for chosen in trace.selections]
    encoded = [
        [
            *pipe.encode(images, method.needs, method, same_prompt=len(images) > 1),
            *pipe.encode_videos(videos, method.needs, method),
        ]
        if images or videos
        else []
        for images, videos in zip(IMAGES, VIDEOS, strict=True)
    ]
    with compress(pipe.model, method) as trace:
        for _ in range(2):  # beams expand their inputs in place; the second call must not see that
            ids = _generate(pipe, pipe.assemble(encoded, QUESTIONS), **options)
            assert torch.equal(ids, pixels)
            assert [chosen.keep.tolist() for chosen in trace.selections] == kept


@pytest.mark.parametrize("name", ["uniform", "fastv", "globalcom2"])
def test_videos_of_different_length_in_one_batch(pipe: Pipeline, name: str) -> None:
    """The model stacks videos of a batch; encoded one by one they may differ in length."""
    method = create(name, retention=0.5)
    encoded = [[video] for video in pipe.encode_videos([VIDEO, LONGER], method.needs)]
    with compress(pipe.model, method):
        together = _generate(pipe, pipe.assemble(encoded, ["w4", "w5 w6"]))[:, -4:]
        for row, (video, question) in enumerate([(VIDEO, "w4"), (LONGER, "w5 w6")]):
            alone = _generate(pipe, pipe.prepare(None, [question], [video]))[:, -4:]
            assert torch.equal(alone[0], together[row])


def test_the_short_sequence_of_a_video_built_by_hand(pipe: Pipeline) -> None:
    """Features of the plain model, gathered by hand, through the plain model."""
    inputs = pipe.prepare(None, ["w4 w5"], [VIDEO])
    model = pipe.model
    with torch.no_grad():
        video = model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0]
        for spec in ("uniform", "random", "globalcom2"):
            with compress(model, spec, retention=0.5) as trace:
                got = _generate(pipe, inputs, return_dict_in_generate=True, output_logits=True)
            (chosen,) = trace.selections
            assert len(chosen.layout) == len(video) == 3 * 4 + 1
            assert int(chosen.keep[-1]) == len(video) - 1  # the separator stays
            ids = inputs["input_ids"][0]
            embeds = model.get_input_embeddings()(ids)
            visual = (ids == 62).nonzero().squeeze(1)
            embeds[visual] = video
            stays = torch.ones(len(ids), dtype=torch.bool)
            stays[visual] = False
            stays[visual[chosen.keep]] = True
            short = embeds[stays]
            for step, logits in enumerate(got.logits):
                want = model(inputs_embeds=short[None]).logits[0, -1]
                torch.testing.assert_close(logits[0], want, atol=1e-4, rtol=1e-4)
                token = got.sequences[0, len(ids) + step]
                short = torch.cat([short, model.get_input_embeddings()(token[None])])
    ledger = trace.ledger
    assert ledger.patches_per_view == ((4, 4, 4),)
    assert ledger.kept_separators == 1


def test_an_image_behind_a_video(pipe: Pipeline) -> None:
    """Selections and ledgers follow the order of the prompt, not that of the modalities."""
    inputs = pipe.prepare([IMAGES[0]], ["<video> w5 <image> w6"], [VIDEO])
    with compress(pipe.model, "uniform", retention=0.5) as trace, torch.no_grad():
        pipe.model(**inputs)
    first, second = trace.selections
    assert (first.layout.modality, first.image) == ("video", 0)
    assert (second.layout.modality, second.image) == ("image", 1)
    assert trace.ledger.patches_per_view == (first.layout.view_sizes, second.layout.view_sizes)


def test_bad_videos_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match=r"videos have \[3, 5\] frames"):
        pipe.prepare(None, ["w4", "w5"], [VIDEO, LONGER])
    with pytest.raises(UserError, match="from 0 to 300 has no known range"):
        pipe.prepare(None, ["w4"], [np.linspace(0, 300, 864).reshape(2, 12, 12, 3)])
    with pytest.raises(UserError, match="of one size"):
        pipe.prepare(None, ["w4"], [[_image(12, 12), _image(12, 13)]])
    with pytest.raises(UserError, match="at least one frame"):
        pipe.encode_videos([[]])
    with pytest.raises(UserError, match=r"has 1 '<video>' placeholders but 0 videos"):
        pipe.prepare([IMAGES[0]], ["<video> <image> w4"])
    with pytest.raises(UserError, match="2 video lists for 1 prompts"):
        pipe.prepare(None, ["w4"], [VIDEO, VIDEO])
    still = Pipeline(Host.tiny("LLaVA-NeXT").model, None)
    with pytest.raises(UserError, match="takes images only, got 1 videos"):
        still.prepare(None, ["w4"], [VIDEO])


# -- saliency without CLS ------------------------------------------------------------------------


def _with_head() -> Host:
    torch.manual_seed(0)
    config = LlavaOnevision.tiny().config
    config.vision_config.vision_use_head = True
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    return Host(adapter_of(model), "LLaVA-OneVision with a pooling head", "qwen2")


def test_head_attention_is_the_row_of_the_pooling_head() -> None:
    adapter = _with_head().adapter
    tower, signal = adapter.base.vision_tower, Signal("head_attention")
    call = adapter.dummy_images([(12, 30), (24, 24)], same_prompt=True)
    tokens = describe(adapter, call, *_features_and_maps(adapter, call, signal), "image")
    states = tower(call["pixel_values"].flatten(0, 1)).last_hidden_state
    head = tower.head.attention
    width, heads = head.embed_dim, head.num_heads
    wq, wk, _ = head.in_proj_weight.split(width)
    bq, bk, _ = head.in_proj_bias.split(width)
    query = (tower.head.probe[0] @ wq.T + bq).view(heads, -1)
    key = (states @ wk.T + bk).unflatten(-1, (heads, -1))
    logits = torch.einsum("hd,vnhd->vhn", query, key) / (width // heads) ** 0.5
    wanted = logits.softmax(-1).mean(1)
    for view, one in zip(wanted, tokens, strict=True):
        torch.testing.assert_close(one[signal][:-1], view)
        assert one[signal][-1].isnan()


def _features_and_maps(adapter: Any, call: Any, signal: Signal) -> tuple[Any, Any]:
    from tokenprune.engine.vision import _tapped

    with torch.no_grad(), _tapped(adapter, frozenset({signal}), None) as maps:
        features = adapter.base.get_image_features(**call).pooler_output
    return features, maps()


def test_globalcom2_by_the_pooling_head_keeps_the_contract() -> None:
    method = create("globalcom2", retention=0.4, score="head_attention")
    for check in MODEL_CHECKS:
        if check.__name__ in {"check_batch_equals_single", "check_restores_model"}:
            run(check, method, [_with_head()])


def test_signals_that_an_encoder_lacks_are_refused() -> None:
    plain = Host.tiny("LLaVA-OneVision").adapter
    with pytest.raises(UserError, match="needs the attention of a pooling head"):
        check_compatible(plain.facts, create("globalcom2", retention=0.5, score="head_attention"))
    with pytest.raises(UserError, match="needs the attention of a CLS token"):
        check_compatible(plain.facts, create("globalcom2", retention=0.5, score="cls_logits"))


def test_saliency_depends_on_the_encoder() -> None:
    for name, stands_for in (("LLaVA-NeXT", "cls_logits"), ("LLaVA-OneVision", "received")):
        host = Host.tiny(name)
        kept = []
        for score in ("saliency", stands_for):
            method = create("globalcom2", retention=0.5, score=score)
            with compress(host.model, method) as trace:
                host.logits(host.inputs())
            kept.append([chosen.keep.tolist() for chosen in trace.selections])
            spent = trace.ledgers[0].selector_flops
        assert kept[0] == kept[1]
        assert spent > 0


# -- GlobalCom² on videos ------------------------------------------------------------------------


def _video(features: Tensor, frames: int) -> VisualTokens:
    layout = TokenLayout.video(frames, (1, 2))
    signal = torch.tensor([0.2, 0.8] * frames + [torch.nan])
    newline = torch.zeros(1, features.shape[1])
    return VisualTokens(layout, torch.cat([features, newline]), {Signal("received"): signal})


def test_distance_from_the_summary_by_hand() -> None:
    """Two of three frames show x at the left; at the right all show y."""
    x, y, z = torch.eye(3)
    tokens = _video(torch.stack([2 * x, y, x, 3 * y, z, y]), 3)
    distance = summary_distance(tokens.layout, tokens.features)
    near = 1 - 2 / math.sqrt(5)  # the mean of x, x, z has the direction (2, 0, 1)
    far = 1 - 1 / math.sqrt(5)
    expected = torch.tensor([near, 0, near, 0, far, 0])
    torch.testing.assert_close(distance[:-1], expected)
    assert distance[-1].isnan()


def test_the_frame_that_differs_keeps_more() -> None:
    x, y, z = torch.eye(3)
    frames = [torch.stack([x, y]).repeat_interleave(8, 0)] * 3
    frames.append(torch.stack([z, y]).repeat_interleave(8, 0))
    layout = TokenLayout.video(4, (4, 4))
    features = torch.cat([*frames, torch.zeros(1, 3)])
    signal = torch.arange(65.0).masked_fill(layout.is_separator, torch.nan)
    tokens = VisualTokens(layout, features, {Signal("received"): signal})
    # Locations 0-7: the mean of x, x, x, z has the direction (3, 0, 1).
    near, far = 8 * (1 - 3 / math.sqrt(10)), 8 * (1 - 1 / math.sqrt(10))
    weight = torch.tensor([near, near, near, far], dtype=torch.float64).softmax(0)
    expected = (16 * 0.5 * (1 + weight - 0.25)).long()
    assert ThumbnailCommand(tau=1.0).counts(tokens, signal, 0.5).tolist() == expected.tolist()
    keep = create("globalcom2", retention=0.5, tau=1.0)(tokens).keep
    counts = torch.bincount(layout.view[keep[:-1]], minlength=4)
    assert counts.tolist() == expected.tolist()
    assert counts[3] > counts[0]


def test_a_tiny_budget_leaves_the_richest_frame_a_token() -> None:
    x, y, z = torch.eye(3)
    tokens = _video(torch.stack([x, y, x, y, z, y]), 3)
    counts = ThumbnailCommand().counts(tokens, tokens[Signal("saliency")], 0.01)
    assert counts.tolist() == [0, 0, 1]
