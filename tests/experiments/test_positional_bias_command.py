"""Positional bias: the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from planted import FULL, row
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.positional_bias import analysis, figures
from tokenprune.experiments.positional_bias.rearrange import (
    move_pixels,
)
from tokenprune.experiments.positional_bias.run import PositionalBiasRequest, run
from tokenprune.registry import strategies


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["positional-bias", *words])


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = "--methods last random --images 24 -r 0.25 --conditions reversed-crops"
    found = invoke(*words.split(), "--out", str(out))
    assert found.exit_code == 0, found.output
    assert max(map(len, found.output.split("SKIPPED")[0].splitlines())) <= 80
    assert {path.name for path in out.iterdir()} == {
        *(
            "manifest.json",
            "manifest.backup.json",
            "tokens.parquet",
            "statistics.csv",
            "profiles.csv",
            "plots",
            "parts",
        )
    }
    assert (out / "plots" / "slots-image-25.png").stat().st_size > 10_000
    table = pd.read_csv(out / "statistics.csv")
    assert row(table, "reversed-crops", method="last")["p"] < 1e-5
    assert row(table, "reversed-crops", method="random")["p"] > 0.01
    tokens = pd.read_parquet(out / "tokens.parquet")
    assert tokens["image_id"].nunique() == 24
    assert "last" in found.output
    assert "with a padded canvas" in found.output


def _stopped(request: PositionalBiasRequest, calls: int) -> None:
    """Begin a run and interrupt it at its ``calls``-th progress report."""
    seen: list[str] = []

    def report(done: int, total: int, doing: str) -> None:
        seen.append(doing)
        if total and len([one for one in seen if " at " in one]) == calls:
            raise KeyboardInterrupt

    outcome = run(request, report)
    assert outcome.status == "interrupted"
    assert 0 < outcome.answered < outcome.wanted
    assert not outcome.tables


@pytest.mark.parametrize("batch_size", [4, 3])
def test_an_interrupted_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """No result is lost, repeated or computed again, with any batch size."""
    monkeypatch.setattr(figures, "figures", lambda *_: [])
    asked: dict[str, Any] = {
        "methods": ("globalcom2", "fastv"), "retention": (0.5, 0.25), "images": 10,
    }  # fmt: skip
    whole = run(PositionalBiasRequest(**asked, batch_size=4, out=tmp_path / "whole"))
    out = tmp_path / "run"
    _stopped(
        PositionalBiasRequest(**asked, batch_size=4, out=out), 7
    )  # amid the second batch of four
    assert not (out / "tokens.parquet").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    there = pd.concat(map(pd.read_parquet, (out / "parts").glob("*.parquet")))
    assert there.groupby(["method", "retention"])["image"].nunique().sum() == 4 * 4 + 2 * 4

    counted: list[int] = []
    real = analysis._selections

    def counting(adapter: Any, compressor: Any, cases: Any, prompts: Any) -> Any:
        counted.extend(case.image for case in cases if case.condition == "normal")
        return real(adapter, compressor, cases, prompts)

    monkeypatch.setattr(analysis, "_selections", counting)
    again = run(PositionalBiasRequest(**asked, batch_size=batch_size, out=out))
    assert sorted(counted) == sorted([*range(4, 8)] * 2 + [*range(8, 10)] * 4)
    if batch_size == 4:
        pd.testing.assert_frame_equal(again.tables["tokens"], whole.tables["tokens"])
        pd.testing.assert_frame_equal(again.tables["statistics"], whole.tables["statistics"])
    keys = ["method", "retention", "image", "condition", "level", "token"]
    assert not again.tables["tokens"].duplicated(keys).any()
    assert again.tables["tokens"][keys].astype(str).equals(whole.tables["tokens"][keys].astype(str))
    assert again.notes == whole.notes
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"

    counted.clear()
    run(PositionalBiasRequest(**asked, out=out))
    assert not counted, "all of it was there"


def test_failures_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "figures", lambda *_: [])
    request = PositionalBiasRequest(methods=("last", "first"), images=3, out=tmp_path / "run")
    real = type(tp.create("last", retention=0.5)).select
    with monkeypatch.context() as broken:
        broken.setattr(type(tp.create("last", retention=0.5)), "select", lambda *_: 1 / 0)
        found = run(request)
    assert set(found.tables["tokens"]["method"]) == {"first"}
    assert list(found.failures) == ["last at 0.25"]
    assert type(tp.create("last", retention=0.5)).select is real
    found = run(request)
    assert not found.failures
    assert found.tables["tokens"].groupby("method", observed=True)["image"].nunique().to_dict() == {
        "last": 3, "first": 3,
    }  # fmt: skip


def test_runs_of_other_methods_do_not_mix(tmp_path: Path) -> None:
    """The same names and retention ratios in other combinations."""
    out = tmp_path / "run"
    run(PositionalBiasRequest(methods=("last@0.5", "first@0.25"), images=2, out=out))
    with pytest.raises(UserError, match="holds another experiment"):
        run(PositionalBiasRequest(methods=("last@0.25", "first@0.5"), images=2, out=out))


def test_all_are_those_that_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["last", "tome", "cdpruner"]
    monkeypatch.setattr(strategies, "names", lambda: names)
    found = invoke("--methods", "all", "--images", "1", "--out", str(tmp_path / "run"))
    assert found.exit_code == 0, found.output
    assert "SKIPPED tome: tome acts inside the vision encoder" in found.output
    assert "SKIPPED cdpruner: cdpruner needs a CLIP text encoder" in found.output
    assert set(pd.read_csv(tmp_path / "run" / "statistics.csv")["method"]) == {"last"}


def test_own_images_and_videos(tmp_path: Path) -> None:
    frames = [picture.open() for picture in held_out(1, 0, "video")[0].images]
    for index, frame in enumerate(frames):
        frame.save(tmp_path / f"{index}.png")
    names = ", ".join(f'"{index}.png"' for index in range(len(frames)))
    lines = [
        '{"image": "0.png", "question": "what digit", "answer": "1"}',
        '{"image": "0.png", "question": "another", "answer": "1"}',
        '{"images": ["0.png", "1.png"], "question": "what", "answer": "1"}',
        f'{{"video": [{names}], "question": "what digit", "answer": "1"}}',
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(lines))
    asked = PositionalBiasRequest(
        model="testbed-onevision", methods=("last",), data=file, out=tmp_path / "run"
    )
    found = run(asked)
    assert found.tables["tokens"].groupby("modality")["image"].nunique().to_dict() == {
        "image": 1,
        "video": 1,
    }
    assert "SKIPPED: 1 image with several images in one prompt." in found.notes
    video = row(found.tables["statistics"], "reversed-frames", modality="video")
    assert video["equivariance"] == 0
    assert not (found.tables["statistics"]["condition"] == "reversed-crops")[
        found.tables["statistics"]["modality"] == "video"
    ].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods unifrom", "uniform"),
        ("--methods tome", "inside the vision encoder"),
        ("--conditions sideways", "condition"),
        ("--images 0", "at least 1"),
        ("-r 25", "at most 1"),
        ("--modality sound", "modality"),
        ("--modality video", "takes images only"),
        ("no-such.png", "no image"),
        ("a.png --data b.jsonl", "not both"),
    ],
)
def test_bad_input(words: str, message: str, tmp_path: Path) -> None:
    found = invoke(*words.split(), "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert message in found.output
    assert "Traceback" not in found.output


@pytest.mark.parametrize("condition", ["flip-lr", "flip-tb", "reversed-crops"])
def test_photos_are_upright_before_they_are_flipped(condition: Any) -> None:
    upright = Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
    photo = upright.rotate(90)
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees the other way
    moved, expected = (move_pixels(one, condition, FULL, 4) for one in (photo, upright))
    assert np.array_equal(np.asarray(moved), np.asarray(expected))
