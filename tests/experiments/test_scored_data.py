"""A data file with true answers, choices and metrics, from the file to the scores of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app


def test_metrics_of_a_data_file(tmp_path: Path) -> None:
    """The true answers are made from what the model says, so that every score is known."""
    Image.new("RGB", (112, 112), (180, 40, 40)).save(tmp_path / "red.png")
    question = "What colour is the background?"
    pipe = tp.load("testbed-next")
    said = pipe(images=str(tmp_path / "red.png"), text=question)
    other = "zebra"
    cases = [
        ({"answer": said.upper() + "."}, "exact", 1),
        ({"answers": [other, said]}, "exact", 1),
        ({"answers": [said] * 2 + [other] * 8, "metric": "vqa"}, "vqa", 0.6),
        ({"answer": said, "choices": [said, other]}, "choice", 1),
        ({"answer": other, "choices": [said, other]}, "choice", 0),
        ({"answer": other, "metric": "contains"}, "contains", 0),
        ({"answer": said + "xx", "metric": "anls"}, "anls", len(said) / (len(said) + 2)),
    ]
    lines = [{"image": "red.png", "question": question, **fields} for fields, _, _ in cases]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = tmp_path / "run"
    line = f"compare --data {tmp_path / 'my.jsonl'} --methods uniform -r 0.5 --out {run}"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output

    answers = pd.read_parquet(run / "answers.parquet")
    whole = answers[answers["method"] == "uncompressed"]
    assert list(whole["answer"]) == [said] * len(cases)
    assert list(whole["metric"]) == [metric for _, metric, _ in cases]
    assert list(whole["score"]) == pytest.approx([score for _, _, score in cases])
