"""The script for checkpoints that users have, on a testbed and on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processors import PROCESSORS, tiny_pipeline
from qwen_checkpoints import FAMILIES, write
from torch import nn

import tokenprune as tp
from tokenprune.experiments.checks.real_checkpoint import check, main


def test_a_testbed_passes(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert main(["testbed-next", "--images", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["R = 1", *tp.list_methods()]
    states = {row["method"]: row["status"] for row in rows}
    assert states.pop("cdpruner") == "needs a CLIP text encoder"
    assert set(states.values()) == {"ok"}


@pytest.mark.parametrize("family", PROCESSORS)
def test_tiny_models_pass(family: str) -> None:
    rows = check(tiny_pipeline(family), images=1)
    assert {row["status"] for row in rows if "needs" not in row["status"]} == {"ok"}
    assert len(rows) == 1 + len(tp.list_methods())


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_checkpoints_pass(family: str, tmp_path: Path) -> None:
    folder, out = write(tmp_path / "model", family), tmp_path / "found.json"
    assert main([str(folder), "--images", "1", "--out", str(out)]) == 0


def test_a_model_of_nan_fails() -> None:
    pipe = tiny_pipeline("LLaVA-1.5")
    nn.init.constant_(pipe.model.lm_head.weight, float("nan"))
    states = {row["method"]: row["status"] for row in check(pipe, images=1)}
    assert states["uniform"] == "logits that are not finite"
    assert states["R = 1"].startswith("differs from the plain model")
