"""Copies of checkpoints with the names that vLLM gives to weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenprune.errors import UserError
from tokenprune.serving.weights import copy_model, vllm_name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.vision_tower.encoder.x", "model.vision_tower.vision_model.encoder.x"),
        ("vision_tower.encoder.x", "vision_tower.vision_model.encoder.x"),
        ("model.vision_tower.vision_model.x", "model.vision_tower.vision_model.x"),
        ("vision_tower.transformer.x", "vision_tower.transformer.x"),  # Pixtral
        ("model.multi_modal_projector.x", "model.multi_modal_projector.x"),
    ],
)
def test_names(name: str, wanted: str) -> None:
    assert vllm_name(name) == wanted


def _checkpoint(folder: Path, tower: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vision_config": {"model_type": tower}}))
    weights = {
        "model.vision_tower.embeddings.x": torch.arange(3.0),
        "lm_head.weight": torch.ones(2),
    }
    save_file(weights, folder / "a.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_copy_has_the_same_weights_under_other_names(tmp_path: Path) -> None:
    source, target = _checkpoint(tmp_path / "one", "clip_vision_model"), tmp_path / "two"
    assert set(copy_model(source, target)) == {one.name for one in source.iterdir()}
    copied = load_file(target / "a.safetensors")
    assert copied.keys() == {"model.vision_tower.vision_model.embeddings.x", "lm_head.weight"}
    assert copied["model.vision_tower.vision_model.embeddings.x"].tolist() == [0, 1, 2]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == copied.keys()


def test_other_encoders_keep_their_names(tmp_path: Path) -> None:
    source = _checkpoint(tmp_path / "one", "internvl_vision")
    copy_model(source, tmp_path / "two")
    assert "model.vision_tower.embeddings.x" in load_file(tmp_path / "two" / "a.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_pretrained"):
        copy_model(tmp_path, tmp_path / "two")
