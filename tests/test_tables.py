"""Runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tokenprune.cli import app


def _run(
    folder: Path, model: str, modality: str, rows: list[tuple[str, float, float, float]]
) -> Path:
    """A finished run with ``rows`` of label, retention, accuracy and share of the FLOPs."""
    folder.mkdir()
    manifest = {"experiment": {"model": model, "modality": [modality]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    summary = pd.DataFrame(rows, columns=["label", "retention", "accuracy", "flops"])
    both = [summary.assign(kind="overall"), summary.assign(kind="digit", accuracy=0.0)]
    table = pd.concat(both).assign(uncompressed_flops=1.0, status="ok")
    table.loc[table["accuracy"].isna(), "status"] = "failed"
    table.to_csv(folder / "summary.csv", index=False)
    return folder


def test_runs_side_by_side(tmp_path: Path) -> None:
    images = [
        ("uncompressed", 1.0, 0.98, 1.0),
        ("fastv", 0.5, 0.968, 0.65),
        ("fastv", 0.25, 0.928, 0.512),
        ("a@0.5 + b@0.5", 0.25, 0.9, 0.3),
        ("broken", 0.5, float("nan"), float("nan")),
    ]
    first = _run(tmp_path / "a", "testbed-next", "image", images)
    second = _run(tmp_path / "b", "/x/other", "video", [("uncompressed", 1.0, 0.5, 1.0)])
    result = CliRunner().invoke(app, ["table", str(first), str(second)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "| method | testbed-next, image: 50 / 25 % | other, video: 100 % |",
        "| --- | --- | --- |",
        "| uncompressed | 98.0 (100) | 50.0 (100) |",
        "| a@0.5 + b@0.5 | – / 90.0 (– / 30) | – |",
        "| fastv | 96.8 / 92.8 (65 / 51) | – |",
    ]


def test_matched_methods_stand_below_the_retention_whose_cost_they_have(tmp_path: Path) -> None:
    rows = [
        ("uncompressed", 1.0, 0.98, 1.0),
        ("uniform", 0.5, 0.9, 0.48),
        ("fastv", 0.19, 0.8, 0.47),
        ("image-free", float("nan"), 0.3, 0.1),
    ]
    folder = _run(tmp_path / "a", "testbed-next", "image", rows)
    summary = pd.read_csv(folder / "summary.csv")
    summary.assign(asked_retention=2 * [1.0, 0.5, 0.5, float("nan")]).to_csv(
        folder / "summary.csv", index=False
    )
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "| method | testbed-next, image: 50 % |",
        "| --- | --- |",
        "| uncompressed | 98.0 (100) |",
        "| fastv | 80.0 (47) |",
        "| uniform | 90.0 (48) |",
    ]


@pytest.mark.parametrize("what", ["nothing there", "not a manifest", "nothing finished"])
def test_what_is_no_run_is_a_sentence(tmp_path: Path, what: str) -> None:
    folder = _run(tmp_path / "a", "m", "image", [("x", 0.5, float("nan"), 1.0)])
    if what != "nothing finished":
        (folder / "manifest.json").write_text("{}")
    if what == "nothing there":
        folder = tmp_path / "b"
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert str(folder) in result.stderr
