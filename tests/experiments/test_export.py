"""The folder with which a method of a run is served, and the checks before a server starts."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.export.run import ExportRequest, run
from tokenprune.experiments.serving_check.run import CheckRequest
from tokenprune.experiments.serving_check.run import run as check


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of two methods, as `tokenprune compare` stores it."""
    folder = tmp_path / "run"
    folder.mkdir()
    experiment = {"model": "testbed-next", "questions": 40, "data": "d"}
    manifest = {"experiment": experiment, "versions": {"torch": "2"}, "command": ["tokenprune"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    figures = {"kind": "overall", "status": "ok", "n": 40, "accuracy_low": 0.7}
    figures |= {"accuracy_high": 0.9, "kept_separators": 12.0, "kv_bytes": 1.0}
    rows = [
        ("uncompressed", "uncompressed", 1.0, 0.98, 200.0, 100.0),
        ("fastervlm", "fastervlm", 0.5, 0.9, 100.0, 50.0),
        ("fastervlm", "fastervlm", 0.25, 0.8, 50.0, 25.0),
        ("globalcom2", "globalcom2", 0.25, 0.85, 50.0, 26.0),
        ("fastv", "fastv", 0.25, 0.95, 50.0, 51.0),
    ]
    names = ("method", "label", "retention", "accuracy", "kept_patches", "flops")
    table = pd.DataFrame([{**dict(zip(names, row, strict=True)), **figures} for row in rows])
    table.to_csv(folder / "summary.csv", index=False)
    return folder


def test_a_method_that_the_server_runs(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = ["export", str(finished), "--method", "fastervlm", "-r", "0.25", "--out", str(out)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    about = json.loads((out / "serving.json").read_text())
    assert about["spec"] == "fastervlm@0.25"
    assert about["measured"]["accuracy"] == 0.8
    assert about["measured"]["visual_tokens"] == 62
    assert about["uncompressed"]["accuracy"] == 0.98
    install, start = about["commands"]
    assert install == "pip install 'tokenprune[vllm]'"
    assert start == (
        "vllm serve model --served-model-name model "
        """--hf-overrides '{"tokenprune": "fastervlm@0.25"}'"""
    )
    page = (out / "README.md").read_text()
    assert start in page
    assert "| FLOPs of the decoder in % | 100 | 25 % |" in page
    client = (out / "client.py").read_text()
    ast.parse(client)
    assert "image_url" in client
    assert (out / "model" / "model.safetensors").is_file()


def test_a_method_that_the_client_runs(finished: Path, tmp_path: Path) -> None:
    made = run(ExportRequest(finished, "globalcom2", None, tmp_path / "out"))
    assert "--enable-mm-embeds" in made.about["commands"][1]
    assert "globalcom2" in made.about["way"]
    client = (made.folder / "client.py").read_text()
    ast.parse(client)
    assert "SPEC = 'globalcom2@0.25'" in client


@pytest.mark.parametrize(
    ("method", "retention", "said"),
    [
        ("fastv", 0.25, "between decoder layers"),
        ("fastervlm", None, "at 0.5, 0.25; give --retention"),
        ("fastervlm", 0.3, "not at 0.3"),
        ("fastervlmm", 0.25, "Did you mean 'fastervlm'"),
    ],
)
def test_what_cannot_be_exported(
    finished: Path, tmp_path: Path, method: str, retention: float | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(ExportRequest(finished, method, retention, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        run(ExportRequest(tmp_path, "uniform", 0.5))


def test_a_check_refuses_before_it_loads_a_model() -> None:
    with pytest.raises(UserError, match="between decoder layers"):
        check(CheckRequest("testbed-next", "fastv@0.25"))
    with pytest.raises(UserError, match="class of a module"):
        check(CheckRequest("testbed-next", "os:path@0.25"))
    with pytest.raises(UserError, match="--clients"):
        check(CheckRequest("testbed-next", "uniform@0.25", clients=0))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_check_without_vllm_says_how_to_install_it() -> None:
    result = CliRunner().invoke(app, ["serving-check", "testbed-next", "uniform@0.25"])
    assert result.exit_code == 2
    assert "vLLM is not installed here" in result.output
