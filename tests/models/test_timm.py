"""timm's vision transformers: geometry, features, saliency, selections, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import compatible_methods
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run as compare
from tokenprune.layout import Kind
from tokenprune.models.timm_vision import TimmVision
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

TINY = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}
# Name, options, CLS token, entries in front of the patches, pooling head.
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", TINY, True, 1, False),
    "clip": ("vit_base_patch16_clip_224", TINY, True, 1, False),
    "siglip": ("vit_base_patch16_siglip_224", TINY, False, 0, True),
    "dinov2": ("vit_small_patch14_reg4_dinov2", TINY, True, 5, False),
    "pooled with CLS": ("vit_pe_core_base_patch16_224", TINY, True, 1, True),
    "registers": ("vit_little_patch16_reg4_gap_256", TINY, False, 4, False),
    "qk norm": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True}, True, 1, False),
    "eva": ("eva_giant_patch14_224", {**TINY, "mlp_ratio": 2}, True, 1, False),
    "eva02": ("eva02_tiny_patch14_224", TINY, True, 1, False),
}


def _load(family: str) -> Pipeline:
    name, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    pipe = tp.load(f"timm/{name}", **options)
    assert isinstance(pipe.adapter, TimmVision)
    for parameter in pipe.model.parameters():  # random weights hardly attend otherwise
        torch.nn.init.normal_(parameter, std=0.2)
    return pipe


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Pipeline]:
    return request.param, _load(request.param)


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _matrices(pipe: Pipeline, pixels: Tensor, layer: int) -> Tensor:
    """(views, heads, N, N) attention of a block, from timm's own unfused code path."""
    attention: Any = pipe.adapter.vision_attention(layer)
    fused, attention.fused_attn = attention.fused_attn, False
    seen: list[Tensor] = []
    handle = attention.attn_drop.register_forward_hook(lambda m, args, out: seen.append(out))
    try:
        pipe.model.vit.forward_features(pixels)
    finally:
        attention.fused_attn = fused
        handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 0])
def test_signals_equal_those_of_the_full_matrix(family: tuple[str, Pipeline], layer: int) -> None:
    name, pipe = family
    _, _, has_cls, prefix, _ = FAMILIES[name]
    assert (pipe.adapter.facts.vision.has_cls, pipe.adapter.facts.vision.prefix_tokens) == (
        has_cls,
        prefix,
    )
    image = _image(40, 70)
    pixels = pipe.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
    full = _matrices(pipe, pixels, layer)
    wanted = {"received": full.mean((1, 2))[:, prefix:]}
    if has_cls:
        wanted["cls_attention"] = full[:, :, 0, prefix:].mean(1)
    signals = {Signal(which, layer) for which in wanted}  # type: ignore[arg-type]
    (tokens,) = pipe.encode([image], signals)
    layout = tokens.layout
    place = layout.row * layout.view_shape[1] + layout.col
    for which, values in wanted.items():
        got = tokens[Signal(which, layer)]  # type: ignore[arg-type]
        torch.testing.assert_close(got, values[layout.view, place], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_saliency_is_cls_logits_or_received(family: tuple[str, Pipeline]) -> None:
    name, pipe = family
    stands_for = Signal("cls_logits" if FAMILIES[name][2] else "received")
    tokens, *_ = pipe.encode([_image(40, 70)], {Signal("saliency"), stands_for})
    assert torch.equal(tokens.signals[Signal("saliency")], tokens[stands_for])
    assert tokens[stands_for].std() > 0


@torch.no_grad()
def test_head_attention_is_the_pooling_heads() -> None:
    pipe = _load("siglip")
    image, head = _image(40, 70), pipe.adapter.pooling_head
    (tokens,) = pipe.encode([image], {Signal("head_attention")})
    pixels = pipe.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
    states = pipe.model.vit.forward_features(pixels)
    query = head.q(head.latent)[0, 0].view(head.num_heads, -1)
    key = head.kv(states)[..., :32].unflatten(-1, (head.num_heads, -1))
    logits = torch.einsum("hd,vnhd->vhn", query, key) * head.scale
    wanted = logits.softmax(-1).mean(1)
    place = tokens.layout.row * 4 + tokens.layout.col
    got = tokens[Signal("head_attention")]
    torch.testing.assert_close(got, wanted[tokens.layout.view, place])


@torch.no_grad()
def test_the_unfused_path_gives_the_same_signals() -> None:
    pipe, image = _load("eva02"), _image(40, 70)
    signals = {Signal("received"), Signal("cls_logits")}
    (fused,) = pipe.encode([image], signals)
    for block in pipe.adapter.vision_layers:
        block.attn.fused_attn = False  # type: ignore[union-attr]
    (plain,) = pipe.encode([image], signals)
    for signal in signals:
        torch.testing.assert_close(plain[signal], fused[signal], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_features_are_the_final_patch_tokens(family: tuple[str, Pipeline]) -> None:
    name, pipe = family
    image = _image(64, 64)
    (tokens,) = pipe.encode([image])
    pixels = pipe.processor.image_processor([image], return_tensors="pt")["pixel_values"][0]
    states = pipe.model.vit.forward_features(pixels)[:, FAMILIES[name][3] :]
    assert tokens.features.shape == (16 + 64, 32)
    torch.testing.assert_close(tokens.features[:16], states[0])
    layout = tokens.layout
    crop = (layout.view == 4) & (layout.row == 1) & (layout.col == 2)
    torch.testing.assert_close(tokens.features[crop][0], states[4, 6])
    assert not layout.is_separator.any()


@settings(max_examples=40)
@given(st.tuples(st.integers(8, 200), st.integers(8, 200)))
def test_every_token_sees_its_place_in_the_image(size: tuple[int, int]) -> None:
    """Pixels with their own coordinates, averaged per patch instead of encoded."""
    for pipe in (_GEOMETRY, _OBLONG):
        _check_geometry(pipe, size)


def _check_geometry(pipe: Pipeline, size: tuple[int, int]) -> None:
    height, width = size
    patches = pipe.adapter.view_shape
    y, x = np.mgrid[:height, :width]
    ramps = np.stack([255 * y / max(height - 1, 1), 255 * x / max(width - 1, 1), 0 * y], -1)
    image = Image.fromarray(ramps.round().astype(np.uint8))
    batch = pipe.processor.image_processor([image], return_tensors="pt")
    layout = pipe.adapter.layout(size)
    views = batch["pixel_values"][0, : layout.views] * 0.5 + 0.5  # mean and std are 0.5
    patch = 32 // patches[0], 32 // patches[1]
    means = torch.nn.functional.avg_pool2d(views[:, :2], patch).flatten(2)
    seen = means[layout.view, :, layout.row * patches[1] + layout.col]
    thumbnail = layout.kind == Kind.THUMBNAIL
    where = torch.stack([layout.row, layout.col], -1)[thumbnail]
    centre = (where + 0.5) / torch.tensor(patches)
    torch.testing.assert_close(seen[thumbnail], centre, atol=0.08, rtol=0)
    rows, cols = layout.canvas_shape
    if rows >= 3 and cols >= 3:
        inner = (layout.kind == Kind.CROP) & (layout.canvas_row > 0) & (layout.canvas_col > 0)
        inner &= (layout.canvas_row < rows - 1) & (layout.canvas_col < cols - 1)
        place = torch.stack(
            [(layout.canvas_row + 0.5) / rows, (layout.canvas_col + 0.5) / cols], -1
        )
        torch.testing.assert_close(seen[inner], place[inner], atol=0.17, rtol=0)


_GEOMETRY = tp.load("timm/vit_tiny_patch16_224", **TINY)
_OBLONG = tp.load("timm/vit_tiny_patch16_224", **{**TINY, "patch_size": (8, 4)})


@torch.no_grad()
def test_a_batch_equals_single_images(family: tuple[str, Pipeline]) -> None:
    _, pipe = family
    images = [_image(40, 70), _image(64, 64, 1), _image(90, 30, 2)]
    signals = {Signal("saliency")}
    for image, together in zip(images, pipe.encode(images, signals), strict=True):
        (alone,) = pipe.encode([image], signals)
        torch.testing.assert_close(together.features, alone.features, atol=1e-4, rtol=1e-4)
        both = together[Signal("saliency")], alone[Signal("saliency")]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", tp.list_methods())
def test_every_method_selects_or_is_refused(family: tuple[str, Pipeline], name: str) -> None:
    _, pipe = family
    image = _image(64, 64)
    if name not in compatible_methods(pipe.adapter.facts):
        with pytest.raises(UserError, match=r"Methods that work here: \w+"):
            pipe.select(name, [image], retention=0.25)
        return
    first, second = pipe.select(name, [image, _image(40, 70)], retention=0.25)
    assert (first.row, second.row) == (0, 1)
    assert first.layout.view_sizes == (16,) * 5
    again = pipe.select(name, [image], retention=0.25)[0].keep
    assert torch.equal(again, first.keep)
    assert 1 <= len(first.keep) <= 25


def test_globalcom2_gives_the_salient_crop_more() -> None:
    pipe = _load("clip")
    (chosen,) = pipe.select("globalcom2", [_image(64, 64)], retention=0.25, tau=0.01)
    (tokens,) = pipe.encode([_image(64, 64)], {Signal("cls_logits")})
    grid = tokens[Signal("cls_logits")][:16].view(2, 2, 2, 2).sum((1, 3)).flatten()
    counts = chosen.layout.take(chosen.keep).view_sizes[1:]
    assert int(grid.argmax()) == counts.index(max(counts))


def test_methods_that_need_a_language_model_are_refused(tmp_path: Path) -> None:
    pipe = _load("plain")
    for action in (
        lambda: pipe.prepare([_image(32, 32)], ["w"]),
        lambda: pipe.assemble([[]], ["w"]),
        lambda: tp.compress(pipe.model, "uniform", retention=0.5).__enter__(),
        lambda: pipe.prompt("w", 1),
        lambda: pipe.adapter.facts.decoder,
        lambda: pipe.adapter.decoder_layers,
        lambda: compare(CompareRequest(model="timm/test_vit", methods=["uniform"], out=tmp_path)),
    ):
        with pytest.raises(UserError, match="have no language model"):
            action()
    with pytest.raises(UserError, match="fastv acts inside the language model"):
        pipe.select("fastv", [_image(32, 32)], retention=0.5)
    chain = tp.Chain.of(tp.create("uniform", retention=0.5))
    with pytest.raises(UserError, match="does not act in front of"):
        pipe.select(chain, [_image(32, 32)])


def test_bad_names_and_weights_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vit_tiny_patch16_224'") as caught:
        tp.load("timm/vit_tiny_patch16_225")
    assert len(str(caught.value)) < 300  # and not the three thousand names of timm
    with pytest.raises(UserError, match="not a plain vision transformer"):
        tp.load("timm/resnet18")
    with pytest.raises(UserError, match="not a plain vision transformer"):
        tp.load("timm/cait_xxs24_224")
    with pytest.raises(UserError, match="there is no checkpoint"):
        tp.load("timm/vit_tiny_patch16_224", pretrained=tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot load weights"):
        tp.load("timm/vit_tiny_patch16_224", pretrained=tmp_path / "bad.safetensors", **TINY)
    with pytest.raises(UserError, match=r"from the Hugging Face Hub: .* Give pretrained=<path"):
        tp.load("timm/vit_tiny_patch16_224", pretrained=True)  # the tests are offline
    with pytest.raises(UserError, match=r"pretrained= is for timm models .*'testbed-next'"):
        tp.load("testbed-next", pretrained=True)
    with pytest.raises(UserError, match="in_chans=1 cannot see them"):
        tp.load("timm/vit_tiny_patch16_224", in_chans=1)
    for grid in ([], [2], [(0, 1)]):
        with pytest.raises(UserError, match="must list the"):
            tp.load("timm/vit_tiny_patch16_224", grid=grid)
    with pytest.raises(UserError, match="timm cannot build"):
        tp.load("timm/vit_tiny_patch16_224", no_such_option=1)
    with pytest.raises(UserError, match="64x32 pixels; only square"):
        tp.load("timm/vit_tiny_patch16_224", **{**TINY, "img_size": (64, 32)})


def test_a_local_checkpoint_is_loaded(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", **TINY)
    save_file(source.state_dict(), tmp_path / "mine.safetensors")
    pipe = tp.load(
        "timm/vit_tiny_patch16_224",
        pretrained=tmp_path / "mine.safetensors",
        dtype="bfloat16",
        **TINY,
    )
    weight = source.blocks[0].attn.qkv.weight
    assert torch.equal(pipe.model.vit.blocks[0].attn.qkv.weight, weight.bfloat16())
    (tokens,) = pipe.encode([_image(32, 32)], {Signal("saliency")})
    assert tokens.features.dtype == torch.bfloat16


def test_a_checkpoint_fits_without_its_classifier_and_at_another_size(tmp_path: Path) -> None:
    """Published backbones come without one; position embeddings are resampled as timm does."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
    state, file = source.state_dict(), tmp_path / "mine.pth"
    weight = state["blocks.0.attn.qkv.weight"]
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    for saved in (state, {"state_dict": headless}):
        torch.save(saved, file)
        for side in (32, 64):
            options = {**TINY, "img_size": side}
            pipe = tp.load("timm/vit_tiny_patch16_224", pretrained=str(file), **options)
            assert torch.equal(pipe.model.vit.blocks[0].attn.qkv.weight, weight)
            assert pipe.model.vit.pos_embed.shape[1] == 1 + (side // 8) ** 2
    with pytest.raises(UserError, match=r"2 tensors missing \(head\.bias, head\.weight\)"):
        tp.load("timm/vit_tiny_patch16_224", pretrained=file, num_classes=7, **TINY)


def test_a_checkpoint_of_another_model_is_a_sentence(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", **TINY)
    file = tmp_path / "mine.safetensors"
    save_file(source.state_dict(), file)
    for changed, said in [
        ({"embed_dim": 64}, "size mismatch for cls_token"),
        ({"depth": 4}, r"12 tensors missing \(blocks\.3\.attn\.proj\.bias, .* and 2 more\)"),
        ({"depth": 2}, r"12 tensors not of this model \(blocks\.2\."),
    ]:
        with pytest.raises(UserError, match=said):
            tp.load("timm/vit_tiny_patch16_224", pretrained=file, **{**TINY, **changed})


def test_other_grids() -> None:
    name, options, *_ = FAMILIES["plain"]
    pipe = tp.load(f"timm/{name}", grid=[(1, 1)], **options)
    assert pipe.adapter.layout((100, 100)).grid == (1, 1)


def test_strategies_do_without_separators() -> None:
    layout = _GEOMETRY.adapter.layout((64, 64))
    for name in tp.list_methods():
        method = tp.create(name, retention=0.4)
        chosen = method(sample_tokens(method.needs, layout))
        assert 1 <= len(chosen.keep) <= 0.4 * len(layout) + layout.views


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "name",
    ["beit_base_patch16_224", "vit_relpos_small_patch16_224", "vit_dwee_patch16_reg1_gap_256"],
)
def test_attention_other_than_softmax_is_refused_before_it_runs(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative positions add a bias, differential attention subtracts a second map."""
    pipe = tp.load(f"timm/{name}", **TINY)
    for block in pipe.adapter.vision_layers:
        block.attn.fused_attn = fused  # type: ignore[assignment, union-attr]
    assert len(pipe.encode([_image(32, 32)])) == 1
    assert len(pipe.select("uniform", [_image(32, 32)], retention=0.5)) == 1
    monkeypatch.setattr(pipe.model.vit, "forward_features", None)
    with pytest.raises(UserError, match=r"globalcom2 needs .* plain blocks .* uniform"):
        pipe.select("globalcom2", [_image(32, 32)], retention=0.5)
    with pytest.raises(UserError, match="received needs the attention of plain blocks"):
        pipe.encode([_image(32, 32)], {Signal("received")})
    assert "globalcom2" not in compatible_methods(pipe.adapter.facts)


def test_missing_signals_are_refused_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = _load("registers")
    monkeypatch.setattr(pipe.model.vit, "forward_features", None)
    for signal, said in [
        (Signal("received", 3), "asks for layer 3 of the vision encoder, which has 3"),
        (Signal("cls_attention"), "needs the attention of a CLS token"),
        (Signal("head_attention"), "needs the attention of a pooling head"),
    ]:
        with pytest.raises(UserError, match=said):
            pipe.encode([_image(32, 32)], iter([signal]))
    ready = tp.create("uniform", retention=0.5)
    with pytest.raises(UserError, match=r"\['retention'\] need a method's name"):
        pipe.select(ready, [_image(32, 32)], retention=0.2)


def test_a_vit_of_another_number_of_tokens_is_a_sentence() -> None:
    pipe = tp.load("timm/convit_tiny", depth=2, embed_dim=16)  # its CLS token joins in block 10
    with pytest.raises(UserError, match="return one token per patch"):
        pipe.encode([_image(32, 32)])
