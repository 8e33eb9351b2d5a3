"""Broken or incomplete checkpoints are refused by name of the fault, and no others are."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from checkpoints import (
    FAMILIES,
    KINDS,
    POINTER,
    TENSORS,
    Case,
    apply,
    broken,
    outcome_of,
    sample,
    spoilt,
    tensors,
    write,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.models import testbed
from tokenprune.models.testbed.scenes import questions

NAMES = ["-".join(kind) for kind in KINDS]


@pytest.fixture(scope="module", params=KINDS, ids=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint") / "plain", *request.param)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "plain", *KINDS[0])


# What the message must name for each fault of a tensor.
SAID = {
    "removed": "missing",
    "added": "not of this model",
    "renamed": "missing",
    "grown": "of another shape",
    "nan": "NaN or infinite",
    "infinite": "NaN or infinite",
    "integers": "of integers",
}


@pytest.mark.parametrize("fault", TENSORS)
def test_one_bad_tensor_is_refused_by_name(fault: str, checkpoint: Path, tmp_path: Path) -> None:
    state = tensors(checkpoint)
    parts = ("image_newline", "lm_head", "vision_tower", "projector", "language_model.model.layers")
    for part in random.Random(fault).sample(parts, 2):
        name = random.Random(fault).choice([name for name in state if part in name])
        bad = broken(checkpoint, tmp_path / "broken", spoilt(state, fault, name))
        with pytest.raises(UserError, match=f"1 tensor {SAID[fault]}") as caught:
            tp.load(bad)
        assert name.rpartition("layers")[2].rpartition("model.")[2] in str(caught.value)


def test_complete_checkpoints_load(checkpoint: Path) -> None:
    pipe = tp.load(checkpoint)
    inputs = pipe.prepare([questions(1, seed=5)[0].image], ["What is it?"])
    with tp.compress(pipe.model, "uniform", retention=0.5) as trace:
        pipe.model(**inputs)
    assert trace.ledger.kept_patches > 0


@pytest.mark.parametrize("bed", FAMILIES)
def test_tied_weights_and_buffers_are_no_faults(bed: str, tmp_path: Path) -> None:
    tied = write(tmp_path / "tied", bed, "qwen2", "siglip", tied=True)
    state = tensors(tied)
    assert not any("lm_head" in name for name in state)
    assert tp.load(tied).path == tied
    (embedding,) = (name for name in state if "embed_tokens" in name)
    del state[embedding]
    with pytest.raises(UserError, match=r"2 tensors missing \(lm_head\.weight, model\.lang"):
        tp.load(broken(tied, tmp_path / "broken", state))
    plain = write(tmp_path / "plain", bed, "llama", "clip")
    state = tensors(plain) | {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(50)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    assert tp.load(broken(plain, tmp_path / "buffers", state)).model is not None


def test_a_message_has_ten_names_and_the_count(sound: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in tensors(sound).items() if "layers.1" not in k or "vision" in k}
    with pytest.raises(UserError, match=r"9 tensors missing") as caught:
        tp.load(broken(sound, tmp_path / "nine", state))
    assert "more" not in str(caught.value)
    state = {k: v for k, v in state.items() if "layers.2" not in k}
    with pytest.raises(UserError, match=r"18 tensors missing \(([^,()]+, ){9}[^,()]+ and 8 more\)"):
        tp.load(broken(sound, tmp_path / "many", state))


def test_shards(tmp_path: Path) -> None:
    folder = write(tmp_path / "sharded", *KINDS[0], shards=3)
    assert tp.load(folder).path == folder
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    shards = sorted(set(document["weight_map"].values()))
    whole = (folder / shards[1]).read_bytes()
    (folder / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"1 of its {len(shards)} files .* \({shards[1]}\)"):
        tp.load(folder)
    (folder / shards[1]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot load .* its weights: .*not fully covered"):
        tp.load(folder)
    (folder / shards[1]).write_bytes(whole)
    for wrong in ([], {}, {"weight_map": 5}, {**document, "weight_map": {"a": 5}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=re.escape(index.name)):
            tp.load(folder)


def test_offloaded_weights_are_checked(sound: Path, tmp_path: Path) -> None:
    state = tensors(sound)
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    bad = broken(sound, tmp_path / "bad", spoilt(state, "nan", name))
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "offloaded")}
    pipe = tp.load(sound, **options)
    assert pipe.model.device.type == "meta"
    assert pipe.prepare(None, ["?"])["input_ids"].device.type == "cpu"
    with pytest.raises(UserError, match=r"1 tensor NaN or infinite \(model\.language_model"):
        tp.load(bad, **options)


def test_values_beyond_the_range_of_a_dtype_are_refused(sound: Path, tmp_path: Path) -> None:
    state = tensors(sound)
    state["image_newline"][0] = 1e6
    large = broken(sound, tmp_path / "large", state)
    assert tp.load(large, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"NaN or infinite \(model\.image_newline\)"):
        tp.load(large, dtype="float16")


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}])
def test_quantised_weights(options: dict[str, bool], sound: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(**options)
    pipe = tp.load(sound, quantization_config=config)
    stored = tmp_path / "stored"
    shutil.copytree(sound, stored, ignore=shutil.ignore_patterns("*.safetensors"))
    pipe.model.save_pretrained(stored)
    assert any(not value.is_floating_point() for value in tensors(stored).values())
    tp.load(stored)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    for fault in ("nan", "integers"):
        bad = broken(sound, tmp_path / "bad", spoilt(tensors(sound), fault, name))
        with pytest.raises(UserError, match=rf"1 tensor {SAID[fault]} \({name}"):
            tp.load(bad, quantization_config=config)


# --- timm -----------------------------------------------------------------------------------------

VITS = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_base_patch16_clip_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 32, "num_heads": 2},
}


@pytest.mark.parametrize("name", VITS)
def test_one_bad_tensor_of_a_timm_model(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=0, **VITS[name])
    state, file = dict(source.state_dict()), tmp_path / "vit.safetensors"
    save_file(state, file)
    assert tp.load(f"timm/{name}", pretrained=file, **VITS[name]).path == file
    for index, tensor in enumerate(state):
        fault = TENSORS[index % len(TENSORS)]
        save_file(spoilt(state, fault, tensor), file)
        with pytest.raises(UserError) as caught:
            tp.load(f"timm/{name}", pretrained=file, **VITS[name])
        # Failures of timm's conversion are reported in timm's words.
        assert SAID[fault] in str(caught.value) or "cannot load weights" in str(caught.value)


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of testbed-next to be broken."""
    copy = tmp_path / "mine"
    shutil.copytree(testbed.path("testbed-next"), copy)
    return copy


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_missing_or_invalid_files_are_refused(file: str, folder: Path) -> None:
    whole = (folder / file).read_bytes()
    contents = [b"", POINTER, whole[: len(whole) // 2], b"\xff\xfe\0", b"[1]", b"7"]
    for content in contents:
        (folder / file).write_bytes(content)
        with pytest.raises(UserError, match=r"^cannot load .*\.$") as caught:
            tp.load(folder)
        assert len(str(caught.value)) < 700
        if content == POINTER:
            assert f"{file} is a Git LFS pointer" in str(caught.value)
    (folder / file).unlink()
    if file != "generation_config.json":  # made from the config where there is none
        with pytest.raises(UserError, match=r"^cannot load"):
            tp.load(folder)


def test_weights_that_are_pickled_code_are_not_run(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "executed",))

    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot load .* its weights"):
        tp.load(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("bed", FAMILIES)
def test_any_fault_of_any_file_is_a_sentence_or_runs(bed: str, tmp_path: Path) -> None:
    """A seeded sample, other seeds of which make others."""
    for case in sample(testbed.path(bed), 20, seed=1):
        assert outcome_of(case, testbed.path(bed), tmp_path / "mine") in {"refused", "ran"}


def test_files_that_do_not_belong_together(folder: Path) -> None:
    other = testbed.path("testbed-onevision")
    shutil.copy(other / "config.json", folder)
    with pytest.raises(UserError, match="cannot load"):
        tp.load(folder)
    for file, path, value, said in [
        ("processor_config.json", ("image_processor", "image_std"), [0, 1, 1], "infinite pixels"),
        ("config.json", ("vision_feature_layer",), 99, "vision_feature_layer"),
        ("config.json", ("vision_feature_layer",), 0, "vision_feature_layer"),
        ("generation_config.json", ("eos_token_id",), "x", r"token id in its generation_config"),
        ("config.json", ("image_grid_pinpoints",), [[120, 120]], "placeholders"),
        ("config.json", ("architectures",), ["LlavaForEverything"], "no model class with an"),
        ("config.json", ("architectures",), {"a": 1}, "no model class with an"),
        ("config.json", ("architectures",), ["LlavaOnevisionModel"], "do not belong together"),
        ("config.json", ("model_type",), "none_such", "none_such"),
    ]:
        shutil.rmtree(folder)
        shutil.copytree(testbed.path("testbed-next"), folder)
        apply(Case(file, "value", path, value), folder)
        with pytest.raises(UserError, match=said):
            tp.load(folder)


def test_invalid_names_are_refused() -> None:
    for name in ("", "a/b/c", "./none", "a\0b/c", "/dev/null", "x" * 5000 + "/y"):
        with pytest.raises(UserError):
            tp.load(name)


# --- commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "compare --questions 1 -m uniform --model",
        "ablation fastv:layer=1,2 --questions 1 --model",
        "complementarity --questions 1 --model",
        "crop-importance --questions 1 --model",
        "positional-bias --images 1 -m uniform --model",
        "masks --model",
        "efficiency --config",
        "convert fastv@0.5 --config",
    ],
)
def test_every_command_refuses_it_with_status_2(
    words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    broken_file = "config.json" if "--config" in words else "model.safetensors"
    (folder / broken_file).write_bytes((folder / broken_file).read_bytes()[:500])
    result = CliRunner().invoke(app, [*words.split(), str(folder)])
    assert result.exit_code == 2, result.output
    assert re.fullmatch(r"error: cannot load [^\n]*\n", result.stderr)
    assert not list(folder.parent.rglob("manifest.json"))


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "meta", "cuda:99", "cpu:7"])
def test_missing_devices_are_refused(device: str) -> None:
    for words in ("compare", "efficiency --measure", "benchmark --quick"):
        result = CliRunner().invoke(app, [*words.split(), "--device", device])
        assert result.exit_code == 2
        assert re.match(rf"error: device '{device}' was asked for, but this", result.stderr)
    with pytest.raises(UserError, match="either device= or device_map="):
        tp.load("testbed-next", device="cpu", device_map="auto")
