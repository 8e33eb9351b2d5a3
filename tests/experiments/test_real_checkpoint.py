"""The script for checkpoints that users have, on a testbed and on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processors import PROCESSORS, tiny_pipeline
from qwen_checkpoints import FAMILIES, write
from torch import nn

import tokenprune as tp
from tokenprune.cost.ledger import Ledger
from tokenprune.experiments.checks import real_checkpoint
from tokenprune.experiments.checks.real_checkpoint import check, main
from tokenprune.strategies.uniform import Uniform


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
    assert states["uniform"] == "FAILED: logits are not finite"
    assert states["R = 1"].startswith("FAILED: differs from the plain model")


def test_a_method_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(*_: object) -> None:
        raise ZeroDivisionError("of planted kind")

    monkeypatch.setattr(Uniform, "select", select)
    states = {row["method"]: row["status"] for row in check(tiny_pipeline("LLaVA-1.5"), images=1)}
    assert states.pop("uniform") == "FAILED: ZeroDivisionError: of planted kind"
    assert not [status for status in states.values() if "FAILED" in status]


def test_a_ledger_of_other_tokens_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "tokens_per_layer", property(lambda _: (1,)))
    states = {row["method"]: row["status"] for row in check(tiny_pipeline("LLaVA-1.5"), images=1)}
    assert states["uniform"].startswith("FAILED: layers process")


def test_a_kv_cache_of_another_size_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(pipe: tp.Pipeline, inputs: dict[str, Any]) -> Any:
        out = pipe.model(**inputs, use_cache=True)
        out.past_key_values.layers.pop()
        return out

    monkeypatch.setattr(real_checkpoint, "_forward", forward)
    states = {row["method"]: row["status"] for row in check(tiny_pipeline("LLaVA-1.5"), images=1)}
    assert states["uniform"].startswith("FAILED: the KV cache has")
