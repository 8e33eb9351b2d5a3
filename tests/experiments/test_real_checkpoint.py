"""The check of a checkpoint: it runs on every family, and it reports planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import qwen_checkpoints
import torch
from processors import PROCESSORS
from transformers import AutoProcessor
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cost.ledger import Ledger
from tokenprune.engine import session
from tokenprune.experiments.checks import real_checkpoint
from tokenprune.experiments.checks.real_checkpoint import QUESTION, app, check, pictures
from tokenprune.models import testbed
from tokenprune.pipeline import Pipeline
from tokenprune.registry import adapters
from tokenprune.spec import create
from tokenprune.testing.host import Host

METHODS = ("uniform", "fastv", "visionzip")  # of each stage, and one that needs a CLS token
CLS = {"LLaVA-1.5": True, "LLaVA-NeXT": True, "LLaVA-OneVision": False, "InternVL": True}
CLS |= {"Qwen2.5-VL": False, "Qwen3-VL": False}


def saved(family: str, folder: Path) -> Path:
    """A tiny random checkpoint of a family, with its processor."""
    if family in qwen_checkpoints.FAMILIES:
        return qwen_checkpoints.write(folder, family)
    if family in PROCESSORS:
        model = Host.tiny(family).model
        model.save_pretrained(folder)
        PROCESSORS[family](model).save_pretrained(folder)
        return folder
    bed, tower = {
        "LLaVA-NeXT": ("testbed-next", "clip"),
        "LLaVA-OneVision": ("testbed-onevision", "siglip"),
    }[family]
    return checkpoints.write(folder, bed, "qwen2", tower)


def run(*words: str, out: Path) -> tuple[Any, Any]:
    """The result of the command, and what it wrote."""
    result = CliRunner().invoke(app, [*words, "--device", "cpu", "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8")) if out.exists() else None
    return result, written


def test_every_family_is_covered() -> None:
    assert set(CLS) == {name for name in adapters.names() if adapters.get(name).has_language_model}


@pytest.mark.parametrize("family", CLS)
def test_every_family_passes(family: str, tmp_path: Path) -> None:
    folder, out = saved(family, tmp_path / "model"), tmp_path / "report.json"
    result, written = run(str(folder), "--images", "1", "--methods", *METHODS, out=out)
    assert result.exit_code == 0, result.output
    assert (written["family"], written["complete"]) == (family, True)
    status = {one["method"]: one["status"] for one in written["verdicts"]}
    last = "ok" if CLS[family] else "refused"
    assert status == {"uncompressed": "ok", "uniform": "ok", "fastv": "ok", "visionzip": last}
    full, uniform, fastv = (one["images"][0]["tokens_per_layer"] for one in written["verdicts"][:3])
    assert len({*full}) == len({*uniform}) == 1
    assert uniform[0] < full[0]
    assert fastv[:2] == full[:2]
    assert fastv[2] < full[2]


def test_the_report_states_the_prompts_of_the_processor(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result, written = run("testbed-next", "--images", "3", "--methods", "uniform", out=out)
    assert result.exit_code == 0, result.output
    assert "2 ok, 0 refused, 0 failed" in result.output
    processor = AutoProcessor.from_pretrained(testbed.path("testbed-next"))
    for number, image in enumerate(pictures()[:3]):
        message = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True
        )
        ids = processor(images=image, text=text, return_tensors="pt")["input_ids"]
        full, less = (one["images"][number] for one in written["verdicts"])
        assert {*full["tokens_per_layer"]} == {ids.numel()}
        dropped = less["patch_tokens"] - less["kept_patches"]
        assert {*less["tokens_per_layer"]} == {ids.numel() - dropped}
    # A square image has a thumbnail and four crops of 7 x 7 patches, of which a quarter stays.
    assert written["verdicts"][0]["images"][2]["patch_tokens"] == 5 * 49
    assert abs(written["verdicts"][1]["images"][2]["kept_patches"] - 5 * 49 / 4) < 5
    assert {"transformers", "torch", "tokenprune"} <= written["versions"].keys()


def test_bad_input_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tp, "load", None)
    out = tmp_path / "report.json"
    result, _ = run("testbed-next", "--methods", "unifrom", out=out)
    assert result.exit_code == 2
    assert "Did you mean 'uniform'" in result.output
    out.write_text("{}")
    result, written = run("testbed-next", out=out)
    assert result.exit_code == 2
    assert "--force" in result.output
    assert written == {}


# --- planted faults -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tp.load("testbed-next", device="cpu")


def _longer(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ledger states one token more than the layers process."""
    true = Ledger.tokens_per_layer.fget
    more = property(lambda self: tuple(count + 1 for count in true(self)))
    monkeypatch.setattr(Ledger, "tokens_per_layer", more)
    yield


def _cached(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ledger states other KV bytes."""
    true = session.Session.report

    def report(self: Any, state: Any, size: int) -> None:
        true(self, state, 2 * size)

    monkeypatch.setattr(session.Session, "report", report)
    yield


def _nan(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The last layer makes NaN where tokens were dropped."""

    def spoil(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        return hidden * torch.nan if 1 < hidden.shape[1] < 150 else hidden

    handle = pipe.adapter.decoder_layers[-1].register_forward_hook(spoil)
    yield
    handle.remove()


def _context(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logits differ in the last bit inside a context."""

    def spoil(module: Any, args: Any, output: Any) -> Any:
        return (
            torch.nextafter(output, output + 1) if pipe.adapter.base in session.active else output
        )

    handle = pipe.model.get_output_embeddings().register_forward_hook(spoil)
    yield
    handle.remove()


def _crash(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method raises."""
    kind = type(create("uniform", retention=0.5))
    monkeypatch.setattr(kind, "select", lambda self, tokens: 1 / 0)
    yield


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (_longer, "tokens in the decoder layers"),
        (_cached, "bytes of the KV cache"),
        (_nan, "logits are not finite"),
        (_context, "logits are not bit-identical"),
        (_crash, "ZeroDivisionError"),
    ],
)
def test_planted_faults_are_reported(
    plant: Callable[..., Iterator[None]],
    said: str,
    pipe: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planted = plant(pipe, monkeypatch)
    next(planted)
    try:
        _, verdict = check(pipe, [create("uniform", retention=0.25)], pictures()[:1])
    finally:
        next(planted, None)
    assert verdict.status == "FAILED"
    assert any(said in reason for reason in verdict.reasons), verdict.reasons


def test_a_fault_sets_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_checkpoint, "faults", lambda *_: iter(["a fault"]))
    out = tmp_path / "report.json"
    result, written = run("testbed-next", "--images", "1", "--methods", "uniform", out=out)
    assert result.exit_code == 1
    assert "uniform: FAILED: 427 x 640: a fault" in result.output
    assert [one["status"] for one in written["verdicts"]] == ["FAILED", "FAILED"]
