"""Specs of a server's configuration, and names in its cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processors import tiny_pipeline

from tokenprune import serving
from tokenprune.errors import UserError
from tokenprune.pipeline import Pipeline
from tokenprune.spec import parse
from tokenprune.testing.host import Host


@pytest.mark.parametrize("spec", ["fastervlm@0.25", "globalcom2:total=exact,tau=2@0.5", "tome@0.5"])
def test_a_spec_is_that_of_the_grammar(spec: str) -> None:
    assert serving.served(spec) == parse(spec)
    assert serving.served(spec.partition("@")[0], retention=0.3).retention == 0.3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "fastv@0.25",
            "fastv drops tokens between decoder layers, .* Methods that can: divprune, ",
        ),
        ("uniform@0.5 + fastv@0.5", "fastv drops tokens"),
        ("cdpruner@0.25", r"signals of the prompt \(clip_text\)"),
        ("cdpruner:relevance=text@0.25", r"signals of the prompt \(llm_prompt\)"),
        ("uniform:position_ids=original@0.5", "keeps the position ids of the full prompt"),
        ("uniform", "uniform needs a retention"),
        ("unifrm@0.5", "Did you mean 'uniform'"),
        ("uniform@2", "retention"),
        (b"uniform@0.5", "a spec is a text"),
        ({"method": "uniform"}, "a spec is a text"),
        ("x" * 20_000, "is too long"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        serving.served(spec)


@pytest.mark.parametrize("spec", ["spy_of_mine:Norm@0.5", "uniform@0.5 + a.spy_of_mine:Norm@0.5"])
def test_a_class_is_refused_and_its_module_not_run(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spy_of_mine.py").write_text("raise SystemExit('was executed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="names a class of a module, which a server does not impo"):
        serving.served(spec)
    assert "spy_of_mine" not in sys.modules


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Qwen3-VL"])
def test_multimodal_positions_are_refused(name: str) -> None:
    adapter = Host.tiny(name, {"Qwen2.5-VL": "qwen2_5_vl_text", "Qwen3-VL": "qwen3_vl_text"}[name])
    with pytest.raises(UserError, match=f"{name} models keep the row and column of every token"):
        serving.check_served(adapter.adapter, parse("uniform@0.5"))


def test_a_signal_that_the_model_lacks_is_refused() -> None:
    adapter = Host.tiny("LLaVA-OneVision", "qwen2").adapter
    with pytest.raises(UserError, match="fastervlm needs the attention of a CLS token"):
        serving.check_served(adapter, parse("fastervlm@0.5"))


# -- names ---------------------------------------------------------------------------------------


def _image(value: int = 7) -> Image.Image:
    image = Image.new("RGB", (6, 4), (9, 9, 9))
    image.putpixel((2, 3), (9, value, 9))
    return image


def test_a_name_changes_with_all_that_changes_the_features(tmp_path: Path) -> None:
    _image().save(tmp_path / "one.png")
    plain = serving.uuid(_image(), "uniform@0.25", "w")
    assert plain == serving.uuid(tmp_path / "one.png", parse("uniform@0.25"), "w")
    assert plain.startswith("uniform@0.25:")
    turned = _image().transpose(Image.Transpose.ROTATE_90)
    others = {
        serving.uuid(_image(8), "uniform@0.25", "w"),
        serving.uuid(turned, "uniform@0.25", "w"),
        serving.uuid(_image().resize((4, 6)), "uniform@0.25", "w"),
        serving.uuid(_image(), "uniform@0.26", "w"),
        serving.uuid(_image(), "first@0.25", "w"),
        serving.uuid(_image(), "uniform:separators=none@0.25", "w"),
        serving.uuid(_image(), "random@0.25", "w"),
        serving.uuid(_image(), "random:seed=1@0.25", "w"),
        serving.uuid(_image(), "tome@0.5 + uniform@0.25", "w"),
        serving.uuid(_image(), "uniform@0.25", "v"),
        serving.uuid(_image(), "uniform@0.25", "w", same_prompt=True),
    }
    assert len(others - {plain}) == 11


@pytest.mark.parametrize("weights", ["", "  ", None])
def test_weights_must_be_named(weights: Any) -> None:
    with pytest.raises(UserError, match="weights must name the model"):
        serving.uuid(_image(), "uniform@0.25", weights)


def test_a_fingerprint_covers_what_features_depend_on() -> None:
    def made(pipe: Pipeline) -> str:
        return serving.fingerprint(pipe)

    pipe = tiny_pipeline("LLaVA-1.5")
    plain = made(pipe)
    assert plain == made(tiny_pipeline("LLaVA-1.5"))
    weights: Any = pipe.model.model
    with torch.no_grad():
        weights.language_model.layers[0].mlp.up_proj.weight.mul_(2)
    assert made(pipe) == plain  # no part of the features
    with torch.no_grad():
        weights.multi_modal_projector.linear_1.bias[3] += 1
    found = {plain, made(pipe)}
    pipe = tiny_pipeline("LLaVA-1.5")
    pipe.model.to(torch.bfloat16)
    found.add(made(pipe))
    pipe = tiny_pipeline("LLaVA-1.5")
    pipe.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    found.add(made(pipe))
    pipe = tiny_pipeline("LLaVA-1.5")
    pipe.model.config.vision_feature_layer = -1
    found.add(made(pipe))
    assert len(found) == 5
