"""Code that comes with a checkpoint is executed only on request."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.report.gallery import planner
from tokenprune.models import testbed
from tokenprune.models.checkpoints import read_config
from tokenprune.models.llava_next import LlavaNext
from tokenprune.registry import adapters

ROOT = Path(tp.__file__).parent.parent
CODE = """
from pathlib import Path
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
Path(r"{mark}").touch()

class TheirConfig(LlavaNextConfig):
    model_type = "theirs"

class TheirModel(LlavaNextForConditionalGeneration):
    config_class = TheirConfig
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with its own config and model class.  A prompt on stdin fails the test."""
    folder = tmp_path / "theirs"
    shutil.copytree(testbed.path("testbed-next"), folder)
    (folder / "code.py").write_text(CODE.format(mark=tmp_path / "executed"))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "architectures": ["TheirModel"],
        "auto_map": {"AutoConfig": "code.TheirConfig", "AutoModel": "code.TheirModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def asked(*_: Any) -> str:
        raise AssertionError("it asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    return folder


@pytest.mark.parametrize(
    "words",
    ["compare --questions 1 --model", "masks --model", "positional-bias --images 1 --model"],
)
def test_commands_refuse_it(words: str, theirs: Path) -> None:
    result = CliRunner().invoke(app, [*words.split(), str(theirs), "--out", str(theirs / "run")])
    assert result.exit_code == 2, result.output
    assert "--trust-remote-code" in result.output
    assert not (theirs.parent / "executed").exists()


def test_configs_alone_are_refused_too(theirs: Path) -> None:
    with pytest.raises(UserError, match="trust_remote_code=True"):
        read_config(str(theirs))
    for words in ("efficiency --config", "convert fastv@0.5 --config"):
        assert CliRunner().invoke(app, [*words.split(), str(theirs)]).exit_code == 2
    assert not (theirs.parent / "executed").exists()


def test_report_does_not_execute_what_a_manifest_names(theirs: Path) -> None:
    notes: list[str] = []
    experiment = {"model": str(theirs), "trust_remote_code": True}
    asked = {"trust_remote_code": True}
    assert planner({"experiment": experiment, "request": asked}, notes, Path(".")) is None
    assert "No masks" in notes[0]
    assert not (theirs.parent / "executed").exists()


def test_a_class_brought_for_a_known_config_is_refused(theirs: Path) -> None:
    config = json.loads((theirs / "config.json").read_text()) | {"model_type": "llava_next"}
    (theirs / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no model class with an adapter is called 'TheirModel'"):
        tp.load(theirs)
    assert not (theirs.parent / "executed").exists()


def test_trusted_code_is_executed(theirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(LlavaNext):
        hosts = ("TheirModel",)

    monkeypatch.setattr(adapters, "_classes", dict(adapters._classes))
    adapters.names()
    adapters.add("Theirs", Theirs)
    with pytest.raises(UserError, match="trust"):
        tp.load(theirs)
    assert not (theirs.parent / "executed").exists()
    state = load_file(theirs / "model.safetensors")
    state["lm_head.weight"] = state.pop("language_model.lm_head.weight")  # an older name of it
    save_file(state, theirs / "model.safetensors", metadata={"format": "pt"})
    pipe = tp.load(theirs, trust_remote_code=True)
    assert type(pipe.model).__name__ == "TheirModel"
    assert (theirs.parent / "executed").exists()


def test_every_call_that_could_execute_code_sets_trust_remote_code() -> None:
    """Explicitly, because transformers may prompt on stdin by default."""
    files = [
        file
        for folder in ("tokenprune", "models", "strategies", "experiments")
        for file in (ROOT / folder).rglob("*.py")
    ]
    calls = [
        (file.name, node.lineno, {one.arg for one in node.keywords})
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 6
    for file, line, keywords in calls:
        assert "trust_remote_code" in keywords, f"{file}, line {line}"
