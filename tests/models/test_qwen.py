"""Qwen2.5-VL and Qwen3-VL: geometry, processors, positions, deepstack, and the contract.

The contract runs every method on both families.  Methods differ for the engine by stage and by the
kind of their signals: one of each kind gets all checks, the others two that a fixed seed draws,
after the comparison with the prompt that is built by hand.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen_checkpoints import FAMILIES, picture, processor, write
from samples import drawn
from torch import Tensor
from transformers import AutoConfig
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Selection
from tokenprune.cost.arithmetic import view_flops
from tokenprune.engine.cache import CACHE
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.facts import VisionFacts
from tokenprune.forecast import forecast
from tokenprune.layout import TokenLayout
from tokenprune.models.qwen2_5_vl import Qwen25VL
from tokenprune.models.qwen3_vl import Qwen3VL
from tokenprune.pipeline import Pipeline
from tokenprune.registry import adapters
from tokenprune.signals import Signal
from tokenprune.spec import create, parse
from tokenprune.testing.asserting import kept_in
from tokenprune.testing.host import Host, example, refusal, tiny_host
from tokenprune.testing.model_checks import check_equals_reference, check_positions
from tokenprune.testing.reference import reference
from tokenprune.testing.runner import MODEL_CHECKS, run
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

HOSTS = {name: tiny_host(name, adapters.get(name).decoders[0]) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


# -- the contract --------------------------------------------------------------------------------

# By stage and kind of signals: none; of the vision encoder, with merging; attention of a layer that
# has run; of the next layer, with merging.
IN_FULL = {
    "Qwen2.5-VL": ("uniform", "fastv"),
    "Qwen3-VL": ("visionzip:score=received", "pact"),
}
CHEAP = [check for check in MODEL_CHECKS if check.__name__ not in {"check_compiled"}]
SPECS = [
    *tp.list_methods(),
    "visionzip:score=received",
    "globalcom2:score=received,region=3",
    "uniform:position_ids=compact",
    "fastv:position_ids=compact,layer=1",
    "sparsevlm:recycle=1,position_ids=compact",
    "globalcom2@0.6 + fastv:layer=1@0.6",
]


def _method(spec: str) -> Any:
    if "+ " in spec:
        return parse(spec)
    return example(spec) if ":" not in spec else parse(spec, retention=0.4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_runs_or_is_refused(family: str, spec: str) -> None:
    host, method = HOSTS[family], _method(spec)
    why = refusal(host, method)
    if why:
        assert "a CLS token" in why or "inside the vision encoder" in why
        assert why.count(". ") <= 1
        assert "Methods that work here: " in why
        return
    other = random.Random(f"{family} {spec}").choice(CHEAP)
    for check in dict.fromkeys([check_equals_reference, other]):
        run(check, method, [host])


@pytest.mark.parametrize(
    ("check", "family_and_spec"),
    drawn(0.5, MODEL_CHECKS, [(name, spec) for name, specs in IN_FULL.items() for spec in specs]),
    ids=lambda one: getattr(one, "__name__", " ".join(one) if isinstance(one, tuple) else one),
)
def test_the_whole_contract(family_and_spec: tuple[str, str], check: Any) -> None:
    family, spec = family_and_spec
    run(check, _method(spec), [HOSTS[family]])


def test_what_needs_a_cls_token_is_refused(host: Host) -> None:
    refused = {name for name in tp.list_methods() if refusal(host, create(name, retention=0.4))}
    assert {"fastervlm", "hired", "prumerge", "prumerge+", "visionzip"} <= refused
    assert {"tome", "downsample"} <= refused
    with pytest.raises(UserError, match=r"needs the attention of a CLS token"):
        check_compatible(host.adapter.facts, create("fastervlm", retention=0.4))


def test_experts_take_the_same_path() -> None:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    config = HOSTS["Qwen3-VL"].model.config
    text = config.text_config.to_dict() | {
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    }
    vision = config.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"}
    made = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, image_token_id=63, video_token_id=62
    )
    model = Qwen3VLMoeForConditionalGeneration(made).eval()
    host = Host(Qwen3VL(model), "Qwen3-VL", "qwen3_vl_moe_text")
    assert Pipeline(model, None).adapter.name == "Qwen3-VL"
    assert host.adapter.facts.decoder.intermediate == 2 * 16
    for spec in ("uniform", "fastv:layer=1"):
        check_equals_reference(_method(spec), host)


# -- geometry ------------------------------------------------------------------------------------


def _published(family: type[Any], kind: str) -> Any:
    """An adapter with the sizes of the published vision encoders, and nothing else."""
    return family(SimpleNamespace(config=AutoConfig.for_model(kind)))


REAL = {
    "Qwen2.5-VL": _published(Qwen25VL, "qwen2_5_vl"),
    "Qwen3-VL": _published(Qwen3VL, "qwen3_vl"),
}


def _in_the_encoder(adapter: Any, grids: Tensor, values: Tensor) -> Tensor:
    """Values of patches in the order of the vision encoder, which sorts them by window."""
    config = adapter.base.config.vision_config
    if not hasattr(config, "window_size"):
        return values
    order, _ = get_vision_window_index(
        grids, config.spatial_merge_size, config.window_size, config.patch_size
    )
    return values.unflatten(0, (-1, 4))[order].flatten(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_is_the_models_packing_of_coordinates(family: str) -> None:
    """2,000 images of any size in one call: every token has the mean place of its patches."""
    adapter, draw = REAL[family], random.Random(1)
    adapter.tokens = (4, 150)  # sizes of the grids, not of the pixels, matter
    sizes = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(1990)]
    sizes += [(1, 190), (190, 1), (14, 14), (28, 28), (32, 32), (3000, 20), (20, 3000)]
    sizes += [(448, 448), (1, 1), (2000, 2000)]
    sizes = [size for size in sizes if max(size) <= 200 * min(size)]
    assert len(sizes) >= 1950
    layouts = [adapter.layout(size) for size in sizes]
    grids = torch.tensor([[1, *(2 * side for side in one.view_shape)] for one in layouts])
    codes = get_vision_position_ids(grids, 2).double()
    seen = _in_the_encoder(adapter, grids, codes)[None]
    maps = adapter.by_image(seen, layouts)
    packed = adapter.pack(maps, {"image_grid_thw": grids}, "image")
    for layout, places in zip(layouts, packed, strict=True):
        mine = torch.stack([layout.row, layout.col], -1)
        assert torch.equal(2 * mine + 0.5, places)
        assert (layout.views, layout.grid) == (1, (0, 0))
        assert not layout.is_separator.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_and_layout_count_the_same(family: str) -> None:
    real, draw = processor(family), random.Random(2)
    adapter = Pipeline(HOSTS[family].model, real).adapter
    sizes = [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(2000)]
    sizes = [size for size in sizes if max(size) < 200 * min(size)]
    counts = real._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    assert counts == [len(adapter.layout(size)) for size in sizes]


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_of_a_stillare_where_the_layout_says(family: str) -> None:
    """The real processor cuts pictures whose pixels tell their row and column."""
    made = processor(family).image_processor
    adapter = Pipeline(HOSTS[family].model, processor(family)).adapter
    for size in ((8, 8), (20, 32), (12, 60), (44, 28)):
        row, col = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        pixels = torch.stack([row, col, row]).float()
        batch = made([pixels], do_rescale=False, do_normalize=False, return_tensors="pt")
        values = batch["pixel_values"].unflatten(1, (3, 2, 2, 2)).mean((2, 3, 4))[:, :2]
        layout = adapter.layout(size)
        tokens = values.unflatten(0, (-1, 4)).mean(1)
        torch.testing.assert_close(tokens[:, 0], 4.0 * layout.row + 1.5)
        torch.testing.assert_close(tokens[:, 1], 4.0 * layout.col + 1.5)


# -- positions -----------------------------------------------------------------------------------


def test_compact_is_the_models_numbering_of_a_smaller_image(host: Host) -> None:
    """A kept rectangle of rows and columns is numbered like an image of that size."""
    adapter, ids = host.adapter, host.prompt(0)
    (layout,) = host.layouts(0)
    rows, cols = (0, 2, 3), (1, 4)
    stays = [
        place
        for place in range(len(layout))
        if int(layout.row[place]) in rows and int(layout.col[place]) in cols
    ]

    class Rectangle(type(create("uniform", retention=0.4))):  # type: ignore[misc]
        def select(self, tokens: Any) -> Selection:
            return Selection(torch.tensor(stays))

    with compress(host.model, Rectangle(retention=0.4, position_ids="compact")), torch.no_grad():
        got = host.model(**host.inputs([0])).logits[0, -1]
    kept = [*range(3), *(3 + place for place in stays), *range(3 + len(layout), len(ids))]
    short = torch.tensor([[ids[column] for column in kept]])
    grid = torch.tensor([[1, 2 * len(rows), 2 * len(cols)]])
    types = adapter.prompt_arguments(short)["mm_token_type_ids"]
    positions, _ = adapter.base.get_rope_index(short, types, image_grid_thw=grid)
    wanted = reference(host, Rectangle(retention=0.4, position_ids="compact"), 0)
    assert torch.equal(positions[:, 0], wanted.positions[0])
    torch.testing.assert_close(got, wanted.logits[-1], atol=1e-4, rtol=1e-4)


def test_positions_stay_by_default_in_front_of_the_language_model(host: Host) -> None:
    check_positions(_method("uniform"), host)
    compact, plain = (_method(f"uniform:position_ids={kind}") for kind in ("compact", "auto"))
    original = _method("uniform:position_ids=original")
    with compress(host.model, plain):
        got = host.logits(host.inputs())
    with compress(host.model, original):
        assert torch.equal(host.logits(host.inputs()), got)
    with compress(host.model, compact):
        assert not torch.allclose(host.logits(host.inputs()), got, atol=1e-3)


@pytest.mark.parametrize("spec", ["uniform", "fastv", "uniform:position_ids=compact"])
def test_a_direct_forward_continues_a_compressed_cache(host: Host, spec: str) -> None:
    """The model numbers the next tokens from its `rope_deltas` and the length of the cache."""
    method, found = _method(spec), []
    with compress(host.model, method), torch.no_grad():
        out = host.model(**host.inputs([0]), use_cache=True)
        for token in (7, 9):
            out = host.model(input_ids=torch.tensor([[token]]), **{CACHE: out[CACHE]})
            found.append(out.logits[0, -1])
    for step, logits in enumerate(found):
        wanted = reference(host, method, 0, [7, 9][: step + 1])
        torch.testing.assert_close(logits, wanted.logits[-1], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_slides_is_right_within_its_window() -> None:
    host = HOSTS["Qwen2.5-VL"].like(window=4000)
    assert "sliding_attention" in host.adapter.language_model.config.layer_types
    for spec in ("uniform", "fastv:layer=3"):
        check_equals_reference(_method(spec), host)


def test_the_row_of_the_text_counts_the_tokens_that_are_left(host: Host) -> None:
    """Gaps in it would be taken for the borders of packed sequences."""
    seen: list[Tensor] = []
    layer = host.adapter.decoder_layers[-1]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        for spec in ("uniform", "fastv", "uniform:position_ids=compact"):
            with compress(host.model, _method(spec)):
                host.generate(host.inputs([0]))
            prefill = seen[0][0]
            assert torch.equal(prefill, torch.arange(len(prefill)))
            seen.clear()
    finally:
        handle.remove()


# -- videos and deepstack ------------------------------------------------------------------------


def test_a_video_is_one_image_with_frames_and_one_budget(host: Host) -> None:
    with compress(host.model, "uniform", retention=0.5) as trace:
        host.logits(host.inputs([2]))
    video = trace.selections[-1]
    assert (video.layout.modality, video.layout.views) == ("video", 3)
    assert video.kept_patches == len(video.layout) // 2
    assert len(kept_in(trace, 0)) == 3


def test_merging_merges_deepstack_features_too() -> None:
    """The whole image becomes one token: its mean, with the mean of the deepstack features."""
    host = HOSTS["Qwen3-VL"]

    class Mean(type(create("uniform", retention=0.4))):  # type: ignore[misc]
        def select(self, tokens: Any) -> Selection:
            return Selection(
                torch.tensor([0]),
                tokens.features.mean(0, keepdim=True),
                merging=lambda vectors: vectors.mean(0, keepdim=True),
            )

    inputs = host.inputs([0])
    with compress(host.model, Mean(retention=0.4)), torch.no_grad():
        got = host.model(**inputs).logits[0, -1]
    with torch.no_grad():
        output = host.adapter.base.get_image_features(**host.media(0)["image"])
        ids = inputs["input_ids"][0]
        visual = (ids == 63).nonzero().squeeze(1)
        kept = torch.cat([torch.arange(3), visual[:1], torch.arange(int(visual[-1]) + 1, len(ids))])
        embeds = host.model.get_input_embeddings()(ids[kept])
        embeds[3] = output.pooler_output[0].mean(0)
        positions, _ = host.adapter.base.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
        mask = torch.zeros(1, len(kept), dtype=torch.bool)
        mask[0, 3] = True
        out = host.adapter.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, :, kept],
            visual_pos_masks=mask,
            deepstack_visual_embeds=[
                level[0].mean(0, keepdim=True) for level in output.deepstack_features
            ],
        )
        wanted = host.model.lm_head(out.last_hidden_state[0, -1])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_video_may_come_before_an_image() -> None:
    """Then features of the second modality come first in the prompt."""
    host = HOSTS["Qwen3-VL"]
    adapter, model = host.adapter, host.model
    inputs = {**adapter.dummy_video(2, seed=3), **adapter.dummy_images([(20, 30)], seed=4)}
    frame, image = 4, len(adapter.layout((20, 30)))
    ids = torch.tensor([[1, 5, *[62] * frame, 6, *[62] * frame, 7, *[63] * image, 8, 9]])
    inputs |= {"input_ids": ids, **adapter.prompt_arguments(ids)}
    method = _method("uniform")
    with compress(model, method) as trace, torch.no_grad():
        got = model(**inputs).logits[0, -1]
    video, still = trace.selections
    assert (video.layout.modality, still.layout.modality) == ("video", "image")
    places = [(ids[0] == token).nonzero().squeeze(1) for token in (62, 63)]
    kept = [places[0][video.keep], places[1][still.keep]]
    stays = torch.cat([(ids[0] < 60).nonzero().squeeze(1), *kept]).sort().values
    with torch.no_grad():
        base = adapter.base
        videos = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        images = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        embeds = model.get_input_embeddings()(ids[0])
        embeds[places[0]], embeds[places[1]] = videos.pooler_output[0], images.pooler_output[0]
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
        positions, _ = base.get_rope_index(ids, inputs["mm_token_type_ids"], **grids)
        out = adapter.language_model(
            inputs_embeds=embeds[stays][None],
            position_ids=positions[:, :, stays],
            visual_pos_masks=(ids[0][stays] >= 60)[None],
            deepstack_visual_embeds=[
                torch.cat([first[0][video.keep], second[0][still.keep]])
                for first, second in zip(
                    videos.deepstack_features, images.deepstack_features, strict=True
                )
            ],
        )
        wanted = model.lm_head(out.last_hidden_state[0, -1])
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# -- GlobalCom² without a thumbnail --------------------------------------------------------------


def _commanded(scores: Tensor, region: int, tau: float, retention: float) -> list[int]:
    """The tokens (H, W) that GlobalCom² keeps, by loops over tokens."""
    height, width = scores.shape
    rows, cols = max(1, round(height / region)), max(1, round(width / region))
    places = [(row, col) for row in range(height) for col in range(width)]

    def region_of(row: int, col: int) -> tuple[int, int]:
        return min(row // (height // rows), rows - 1), min(col // (width // cols), cols - 1)

    def small(row: int, col: int) -> float:
        square = [
            (row // 2 * 2 + down, col // 2 * 2 + right) for down in (0, 1) for right in (0, 1)
        ]
        there = [float(scores[at]) for at in square if at[0] < height and at[1] < width]
        return sum(there) / len(there)

    names = [(row, col) for row in range(rows) for col in range(cols)]
    members = {name: [at for at in places if region_of(*at) == name] for name in names}
    rich = [sum(small(*at) for at in members[name]) / 4 for name in names]
    weights = [math.exp((one - max(rich)) / tau) for one in rich]
    share = [one / (sum(weights) + 1e-8) for one in weights]
    kept = []
    for name, mine in zip(names, share, strict=True):
        ratio = min(retention * (1 + mine - sum(share) / len(share)), 1)
        inside = members[name]
        guide = math.sqrt(sum(small(*at) ** 2 for at in inside))
        own = math.sqrt(sum(float(scores[at]) ** 2 for at in inside))
        ranked = sorted(
            inside, key=lambda at: -(0.5 * small(*at) / guide + 0.5 * float(scores[at]) / own)
        )
        kept += ranked[: int(ratio * len(inside) + 1e-6)]
    return sorted(row * width + col for row, col in kept)


@pytest.mark.parametrize("shape", [(6, 8), (5, 7), (9, 4), (3, 3)])
def test_a_pooled_map_commands_the_regions(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    scores = torch.rand(*shape, generator=draw)
    layout = TokenLayout.single(shape, newline=False, native=True)
    signal = Signal("received")
    tokens = VisualTokens(layout, torch.zeros(len(layout), 4), {signal: scores.flatten()})
    whole = parse("globalcom2:score=received,region=3,tau=0.5", retention=0.4)
    assert whole(tokens).keep.tolist() == _commanded(scores, 3, 0.5, 0.4)
    alone = parse("globalcom2:score=received,region=0", retention=0.4)
    best = scores.flatten().argsort(descending=True)[: int(0.4 * len(layout))]
    assert alone(tokens).keep.tolist() == best.sort().values.tolist()
    view = TokenLayout.single(shape, newline=False)  # a view of fixed size, as in LLaVA-1.5
    fixed = VisualTokens(view, torch.zeros(len(view), 4), {signal: scores.flatten()})
    assert whole(fixed).keep.tolist() == best.sort().values.tolist()


# -- what users call -----------------------------------------------------------------------------

VIDEO = [picture(12, 16, seed) for seed in range(4)]
IMAGES = [[picture(24, 24)], [], [picture(10, 30), picture(24, 20)], [picture(50, 12)]]
VIDEOS = [[], [VIDEO], [VIDEO[:2], VIDEO], []]
QUESTIONS = ["w4 w5", "w6", "w7 w8 w9", "w10"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder: Path = write(tmp_path_factory.mktemp("checkpoint"), request.param)
    return tp.load(str(folder))


def _generate(pipe: Pipeline, inputs: Any, **options: Any) -> list[list[int]]:
    new = {"do_sample": False, "max_new_tokens": 3, "suppress_tokens": [62, 63, 2]}
    ids: Tensor = pipe.model.generate(**inputs, **new, **options)
    return ids[:, -3:].tolist()


@pytest.mark.parametrize("spec", ["uniform", "visionzip:score=received", "fastv"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_encoding_once_gives_what_pixels_give(
    pipe: Pipeline, spec: str, options: dict[str, Any]
) -> None:
    method = parse(spec, retention=0.4)
    with compress(pipe.model, method) as trace:
        wanted = _generate(pipe, pipe.prepare(IMAGES, QUESTIONS, VIDEOS), **options)
        kept = [record.keep.tolist() for record in trace.selections]
    encoded = [
        [*pipe.encode(images, method.needs), *pipe.encode_videos(videos, method.needs)]
        for images, videos in zip(IMAGES, VIDEOS, strict=True)
    ]
    with compress(pipe.model, method) as trace:
        inputs = pipe.assemble(encoded, QUESTIONS)
        assert _generate(pipe, inputs, **options) == wanted
        assert [record.keep.tolist() for record in trace.selections] == kept
        if not options:
            some = pipe.take(inputs, encoded, [2, 1])
            assert _generate(pipe, some) == [wanted[2], wanted[1]]


def test_a_part_of_an_encoding_is_refused(pipe: Pipeline) -> None:
    whole = pipe.encode([IMAGES[0][0]])[0]
    part = whole.take(torch.arange(len(whole) - 1))
    with pytest.raises(UserError, match=rf"has {len(part)} of its {len(whole)} visual tokens"):
        pipe.assemble([[part]], QUESTIONS[:1])


def test_answers_of_a_mixed_batch_are_those_of_single_prompts(pipe: Pipeline) -> None:
    options = {"max_new_tokens": 3, "do_sample": False}
    with tp.compress(pipe, "uniform", retention=0.5):
        together = pipe(IMAGES, QUESTIONS, VIDEOS, **options)
        for images, text, videos, answer in zip(IMAGES, QUESTIONS, VIDEOS, together, strict=True):
            assert pipe(images=images, text=text, videos=videos, **options) == answer


def test_selecting_without_the_language_model(pipe: Pipeline) -> None:
    (record,) = pipe.select("uniform", [picture(24, 36)], retention=0.5)
    assert record.kept_patches == len(record.layout) // 2
    assert record.layout.view_shape == (6, 9)
    drawn = record.show(picture(24, 36))
    assert (drawn.height, drawn.width) == (336, 504)


def test_a_video_is_drawn_by_its_pairs_of_frames(pipe: Pipeline) -> None:
    with tp.compress(pipe, "uniform", retention=0.5) as trace:
        pipe(videos=[VIDEO], text="w4", max_new_tokens=1)
    (record,) = trace.selections
    assert record.layout.views == 2
    assert record.show(VIDEO).width > record.show(VIDEO).height
    with pytest.raises(UserError, match="frames"):
        record.show(VIDEO[:2])


# -- bad input -----------------------------------------------------------------------------------


def test_prompts_and_images_that_do_not_belong_together(host: Host) -> None:
    whole = host.inputs([0])
    with compress(host.model, "uniform", retention=0.5):
        bare = {name: value for name, value in whole.items() if name != "mm_token_type_ids"}
        with pytest.raises(UserError, match="mm_token_type_ids is missing"):
            host.model(**bare)
        with pytest.raises(UserError, match="mm_token_type_ids is missing"):
            host.generate(bare)
        short = {**whole, "input_ids": whole["input_ids"].clone()}
        short["input_ids"][0, 5] = 9
        with pytest.raises(UserError, match=r"39 image placeholders.* 40 tokens|image placeholder"):
            host.model(**short)
        gone = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        with pytest.raises(UserError, match="no image reached this forward"):
            host.model(**gone)


def test_images_in_another_order_are_refused(host: Host) -> None:
    """The prompt has the placeholders of two images the other way round."""
    whole = host.inputs([2])
    grids = whole["image_grid_thw"]
    patches = grids.prod(-1).tolist()
    first, second = whole["pixel_values"].split(patches)
    swapped = {**whole, "image_grid_thw": grids.flip(0)}
    swapped["pixel_values"] = torch.cat([second, first])
    with (
        compress(host.model, "uniform", retention=0.5),
        pytest.raises(UserError, match="in another order"),
    ):
        host.model(**swapped)


# -- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["uniform", "visionzip:score=received", "pact"])
def test_forecasts_are_the_ledgers_of_real_forwards(host: Host, spec: str) -> None:
    method, layouts = _method(spec), host.layouts(0)
    text = len(host.prompt(0)) - sum(map(len, layouts))
    with compress(host.model, method) as trace, torch.no_grad():
        host.model(**host.inputs([0]), use_cache=True)
    asking = len(host.prompt(0)) - 3 - len(layouts[0])
    told = forecast(host.model, method, layouts, text, asking=asking, size=4, draws=1)
    assert told.ledger == trace.ledger


def test_flops_of_the_vision_encoder_by_hand() -> None:
    """A view of 5 x 3 tokens in windows of 2 x 2 tokens, with one global layer of two."""
    facts = VisionFacts(
        model_type="any",
        layers=2,
        hidden=8,
        intermediate=12,
        heads=2,
        view_shape=(10, 6),
        patch_size=(2, 2),
        prefix_tokens=0,
        has_cls=False,
        merge_size=2,
        native=True,
        gated=True,
        window=2,
        global_layers=(1,),
        mergers=3,
    )
    windows = [rows * cols * 4 for rows in (2, 2, 1) for cols in (2, 1)]
    assert (facts.pairs(0), facts.pairs(1)) == (sum(n * n for n in windows), 60 * 60)
    per_patch = 4 * (2 * 8 * 8) + 3 * (2 * 8 * 12)
    attention = [2 * 2 * 8 * pairs for pairs in (sum(n * n for n in windows), 3600)]
    merger = 15 * (2 * 32 * 32 + 2 * 32 * 20)
    assert view_flops(facts, 20) == 2 * 60 * per_patch + sum(attention) + 3 * merger
