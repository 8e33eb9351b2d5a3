"""Runs side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.experiments.checks.cases import command, small_run
from tokenprune.experiments.compare.tables import realised_shares


def _run(
    folder: Path, model: str, modality: str, rows: list[tuple[str, float, float, float]]
) -> Path:
    """A finished run with ``rows`` of label, retention, accuracy and share of the FLOPs.

    Every cell has answered the same thousand questions; a cell without accuracy has failed.
    """
    folder.mkdir()
    manifest = {"experiment": {"model": model, "modality": [modality]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    cells = [_answers(*row) for row in rows]
    pd.concat(cells, ignore_index=True).to_parquet(folder / "answers.parquet")
    return folder


def _answers(label: str, retention: float, accuracy: float, flops: float) -> pd.DataFrame:
    failed = math.isnan(accuracy)
    number = 1 if failed else 1000
    return pd.DataFrame(
        {
            **dict.fromkeys(("model", "method", "label", "parameters"), label),
            "retention": retention,
            "question_id": [f"q{index}" for index in range(number)],
            "image_id": [f"i{index}" for index in range(number)],
            **{"kind": "digit", "question": "?", "truth": "yes", "answer": "no"},
            "correct": pd.array([False] * number, "boolean")
            if failed
            else pd.array(range(number), "Int64") < 1000 * accuracy,
            "agrees": pd.array([True] * number, "boolean"),
            "flops": flops,
            "uncompressed_flops": 1.0,
            "status": "failed" if failed else "ok",
        }
    )


def test_a_comparison_names_a_retention_that_differs_from_the_requested_one() -> None:
    rows = [
        ("overall", "ok", "uniform", 0.25, 61.0),
        ("overall", "ok", "globalcom2", 0.5, 119.4),
        ("overall", "ok", "globalcom2", 0.25, 72.1),
        ("digit", "ok", "globalcom2", 0.1, 72.1),
        ("overall", "ok", "hired", 0.25, 60.3),
        ("overall", "failed", "vidcom2", 0.25, math.nan),
        ("overall", "ok", "thumbnail-only", math.nan, 49.0),
    ]
    names = ["kind", "status", "label", "retention", "kept_patches"]
    summary = pd.DataFrame(rows, columns=names).assign(patch_tokens=245.0)
    assert list(realised_shares(summary)) == [
        "globalcom2 keeps another share of the patch tokens: 48.7 % where 50 % was requested, "
        "29.4 % where 25 % was requested."
    ]


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
    answers = pd.read_parquet(folder / "answers.parquet")
    asked = answers["retention"].replace(0.19, 0.5)
    answers.assign(asked_retention=asked).to_parquet(folder / "answers.parquet")
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        "| method | testbed-next, image: 50 % |",
        "| --- | --- |",
        "| uncompressed | 98.0 (100) |",
        "| fastv | 80.0 (47) |",
        "| uniform | 90.0 (48) |",
    ]


def test_an_older_summary_is_never_read(tmp_path: Path) -> None:
    folder = _run(tmp_path / "a", "m", "image", [("uncompressed", 1.0, 0.9, 1.0)])
    (folder / "summary.csv").write_text("label,retention,accuracy\nuncompressed,1.0,0.1\n")
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.output.splitlines()[-1] == "| uncompressed | 90.0 (100) |"


def test_a_table_older_than_the_journal_is_reported(tmp_path: Path) -> None:
    folder = _run(tmp_path / "a", "m", "image", [("uncompressed", 1.0, 0.9, 1.0)])
    answers = pd.read_parquet(folder / "answers.parquet")
    answers.attrs["journal"] = 0
    answers.to_parquet(folder / "answers.parquet")
    (folder / "answers.jsonl").write_text("one more answer\n")
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.exit_code == 0, result.output
    assert "older than the journal" in result.stderr


def test_a_journal_that_lost_answers_takes_none_from_the_table(tmp_path: Path) -> None:
    folder = small_run(tmp_path / "run")
    whole = [command(name, str(folder)) for name in ("table", "pairs")]
    journal = folder / "answers.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    for end in (-1, -3, 1, 0):
        journal.write_bytes(b"".join(lines[:end]))
        assert [command(name, str(folder)) for name in ("table", "pairs")] == whole
    journal.unlink()
    assert [command(name, str(folder)) for name in ("table", "pairs")] == whole


@pytest.mark.parametrize("what", ["nothing there", "not a manifest", "nothing finished"])
def test_folders_without_a_run_are_refused(tmp_path: Path, what: str) -> None:
    folder = _run(tmp_path / "a", "m", "image", [("x", 0.5, float("nan"), 1.0)])
    if what != "nothing finished":
        (folder / "manifest.json").write_text("{}")
    if what == "nothing there":
        folder = tmp_path / "b"
    result = CliRunner().invoke(app, ["table", str(folder)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert str(folder) in result.stderr


def test_latex_has_intervals_ranks_and_bold_within_the_best_interval(tmp_path: Path) -> None:
    rows = [
        ("uncompressed", 1.0, 0.98, 1.0),
        ("best_one", 0.5, 0.9, 0.48),  # Wilson's interval of 900 of 1000: 87.99 to 91.71
        ("near", 0.5, 0.88, 0.65),
        ("as near", 0.5, 0.88, 0.65),
        ("far", 0.5, 0.87, 0.65),
    ]
    folder = _run(tmp_path / "a", "my_model", "image", rows)
    result = CliRunner().invoke(app, ["table", "--latex", str(folder)])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[4:] == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & \multicolumn{3}{c}{my\_model, image, $R = 50\,\%$} \\",
        r"\cmidrule(lr){2-4}",
        r"method & accuracy & rank & FLOPs \\",
        r"\midrule",
        r"uncompressed & $98.0_{96.9}^{98.7}$ & -- & 100 \\",
        r"\midrule",
        r"as near & $\mathbf{88.0}_{85.8}^{89.9}$ & 2 & 65 \\",
        r"best\_one & $\mathbf{90.0}_{88.0}^{91.7}$ & 1 & 48 \\",
        r"far & $87.0_{84.8}^{88.9}$ & 4 & 65 \\",
        r"near & $\mathbf{88.0}_{85.8}^{89.9}$ & 2 & 65 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
