"""`tokenprune import-lmms`, on logs recorded from runs of lmms-eval 0.7.3 on testbed-next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from places import TESTS
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.lmms.run import ImportRequest, run
from tokenprune.experiments.lmms.samples import read_logs
from tokenprune.experiments.report.pairs import PairsRequest, pairs
from tokenprune.experiments.report.run import ReportRequest
from tokenprune.experiments.report.run import run as report

LOGS = TESTS / "data" / "lmms"
Change = Callable[[dict[str, Any]], object]


def lines() -> dict[str, list[dict[str, Any]]]:
    """The recorded samples of every method."""
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(LOGS.rglob("*.jsonl"))
    }


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of the time; the run that the tests share has them."""
    monkeypatch.setattr("tokenprune.experiments.lmms.run.draw", lambda *_: None)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(ImportRequest(logs=[LOGS], out=tmp_path_factory.mktemp("imported") / "run"))


def changed(folder: Path, method: str, change: Change, document: int = 0) -> Path:
    """A copy of the logs in which ``change`` was applied to one sample of ``method``."""
    shutil.copytree(LOGS, folder)
    path = next((folder / method).rglob("*.jsonl"))
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    change(samples[document])
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def test_answers_scores_and_ledgers_are_those_of_the_logs(imported: Outcome) -> None:
    table = read_answers(imported.folder)
    recorded = lines()
    assert sorted(table["label"].unique()) == ["fastv", "globalcom2", "uncompressed"]
    for label, folder in zip(
        ("fastv", "globalcom2", "uncompressed"),
        ("fastv-layer-2", "globalcom2", "none"),
        strict=True,
    ):
        rows = table[table["label"] == label].set_index("question_id")
        for sample in recorded[folder]:
            row = rows.loc[f"scenes/{sample['doc_id']}"]
            record = sample["token_counts"][0]["tokenprune"]
            assert (row["answer"], row["truth"]) == (sample["filtered_resps"], sample["target"])
            assert (row["score"], row["correct"]) == (sample["right"], sample["right"] == 1)
            assert (row["kept_patches"], row["flops"]) == (record["kept_patches"], record["flops"])
            assert list(row["visual_per_layer"]) == record["visual_per_layer"]


def test_the_summary_is_counted_by_hand(imported: Outcome) -> None:
    recorded = lines()
    summary = imported.summary.set_index("label")
    right = [sample["right"] for sample in recorded["globalcom2"]]
    same = [
        one["filtered_resps"] == other["filtered_resps"]
        for one, other in zip(recorded["globalcom2"], recorded["none"], strict=True)
    ]
    assert summary.loc["globalcom2", "accuracy"] == pytest.approx(sum(right) / len(right))
    assert summary.loc["globalcom2", "agreement"] == pytest.approx(sum(same) / len(same))
    assert summary.loc["uncompressed", "retention"] == 1
    assert summary.loc["globalcom2", "metric"] == "lmms-eval:right"
    assert not imported.notes
    assert list((imported.folder / "plots").glob("*.png"))


def test_pairs_and_report_read_the_folder(imported: Outcome) -> None:
    found = pairs(PairsRequest(folder=imported.folder)).tables["pairs"]
    assert set(found.loc[0, ["first", "second"]]) == {"fastv", "globalcom2"}
    assert found.loc[0, "n"] == 12
    shown = report(ReportRequest(folder=imported.folder, questions=2))
    page = (shown.folder / shown.files[0]).read_text()
    assert 2 <= sum(line["input"] in page for line in lines()["none"]) < 12


def test_with_the_images_the_report_has_nothing_to_say(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    asked = {item.question: item.images[0].open() for item in held_out(12, 0)}
    for sample in lines()["none"]:
        [name] = sample["token_counts"][0]["tokenprune"]["media"]
        asked[sample["input"]].save(images / f"{name}.png")
    outcome = run(ImportRequest(logs=[LOGS], images=images, out=tmp_path / "run"))
    shown = report(ReportRequest(folder=outcome.folder, questions=2))
    assert not shown.notes
    assert "data:image" in (shown.folder / shown.files[0]).read_text()


def test_a_second_import_adds_nothing(imported: Outcome) -> None:
    assert run(ImportRequest(logs=[LOGS], out=imported.folder)).new == 0


def test_a_graded_score_is_kept_and_an_object_has_one(tmp_path: Path) -> None:
    logs = changed(tmp_path / "logs", "none", lambda one: one.update(right={"score": 0.3}))
    outcome = run(ImportRequest(logs=[logs], out=tmp_path / "run"))
    rows = read_answers(outcome.folder).set_index(["label", "question_id"])
    assert rows.loc[("uncompressed", "scenes/0"), "score"] == pytest.approx(0.3)


def test_without_a_score_texts_are_compared(tmp_path: Path) -> None:
    logs = changed(tmp_path / "logs", "none", lambda one: one.update(right="good"))
    outcome = run(ImportRequest(logs=[logs], out=tmp_path / "run"))
    assert any("1 of 36 answers to scenes have no score" in note for note in outcome.notes)
    rows = read_answers(outcome.folder).set_index(["label", "question_id"])
    row = rows.loc[("uncompressed", "scenes/0")]
    assert row["correct"] == (row["answer"] == row["truth"])


def test_the_latest_run_counts(tmp_path: Path) -> None:
    later = tmp_path / "later"
    changed(later, "none", lambda one: one.update(filtered_resps="purple"))
    path = next((later / "none").rglob("*.jsonl"))
    path.rename(path.with_name("20990101_000000_samples_scenes.jsonl"))
    for order in ([LOGS, later / "none"], [later / "none", LOGS]):
        outcome = run(ImportRequest(logs=order, out=tmp_path / f"run-{order[0].name}"))
        rows = read_answers(outcome.folder).set_index(["label", "question_id"])
        assert rows.loc[("uncompressed", "scenes/0"), "answer"] == "purple"
        assert any("later run" in note for note in outcome.notes)


def test_a_missing_baseline_and_missing_answers_are_said(tmp_path: Path) -> None:
    logs = shutil.copytree(LOGS, tmp_path / "logs")
    shutil.rmtree(logs / "none")
    path = next((logs / "globalcom2").rglob("*.jsonl"))
    path.write_text("\n".join(path.read_text().splitlines()[:5]))
    notes = run(ImportRequest(logs=[logs], out=tmp_path / "run")).notes
    assert any("method=none" in note for note in notes)
    assert any("7 answers are missing" in note for note in notes)


def test_several_choices_give_the_likeliest(tmp_path: Path) -> None:
    losses = [[0.9, False], [0.1, True], [2.0, False]]
    logs = changed(tmp_path / "logs", "none", lambda one: one.update(filtered_resps=losses))
    samples = {log.cell.label: log.samples for log in read_logs([logs], {})}
    assert samples["uncompressed"][0].answer == "1"


def _other_model(sample: dict[str, Any]) -> None:
    sample["token_counts"][0]["tokenprune"]["setting"]["dtype"] = "bfloat16"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_other_model, "dtype"),
        (lambda one: one.update(doc_hash="0"), "document 0 of scenes differs"),
        (lambda one: one.update(input="Why?"), "document 0 of scenes differs"),
        (lambda one: one.pop("target"), "line 1 is not a sample of lmms-eval"),
    ],
)
def test_logs_that_do_not_belong_together_are_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    logs = changed(tmp_path / "logs", "none", change)
    with pytest.raises(UserError, match=said):
        run(ImportRequest(logs=[logs], out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_logs_of_other_models_and_folders_without_logs_are_refused(tmp_path: Path) -> None:
    logs = shutil.copytree(LOGS, tmp_path / "logs")
    path = next((logs / "none").rglob("*.jsonl"))
    samples = [
        json.loads(line) | {"token_counts": [None]} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with pytest.raises(UserError, match="method=none"):
        read_logs([logs / "none"], {})
    with pytest.raises(UserError, match="--log_samples"):
        read_logs([tmp_path / "empty"], {})
    with pytest.raises(UserError, match="has no metric 'acc'; its metrics: right"):
        read_logs([LOGS], {"scenes": "acc"})
    with pytest.raises(UserError, match="the logs have scenes"):
        read_logs([LOGS], {"gqa": "acc"})


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    words = ["import-lmms", str(LOGS), "--out", str(tmp_path / "run"), "--format", "png"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "globalcom2" in result.output
    assert pd.read_csv(tmp_path / "run" / "summary.csv")["label"].nunique() == 3
    refused = CliRunner().invoke(app, ["import-lmms", str(LOGS), "--metric", "right"])
    assert refused.exit_code == 2
    assert "TASK=METRIC" in refused.output


def test_a_name_that_is_too_long_for_a_path_is_a_sentence() -> None:
    with pytest.raises(UserError, match="holds no log of samples"):
        read_logs([Path("é" * 1200)], {})
