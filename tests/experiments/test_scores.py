"""Graded scores from the journal to tables, intervals, tests, figures and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from PIL import Image
from scipy.stats import permutation_test
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame, read_answers, rescored
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.formatting import arrows, measure
from tokenprune.experiments.common.intervals import (
    mcnemar,
    mean_score,
    paired_bootstrap,
    permutation,
    wilson,
)
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.summary import aggregated, compared, pairs, summarise
from tokenprune.experiments.metrics import choosing, with_metric

# --- intervals and tests --------------------------------------------------------------------------


def test_permutations_of_few_images_are_all_tried() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.integers(4, size=(2, 24)) / 3
    images = np.arange(24) % 8
    one, other = (np.bincount(images, scores) for scores in (first, second))
    wanted = permutation_test(
        (one, other),
        lambda x, y, axis=-1: np.sum(x - y, axis=axis),
        permutation_type="samples",
        n_resamples=np.inf,
    )
    assert permutation(first, second, images, seed=0) == pytest.approx(wanted.pvalue)
    # Rounding in sums of thirds must not decide: all signs of equal differences reach the sum.
    assert permutation([1 / 3, 2 / 3], [2 / 3, 1 / 3], [0, 1], seed=0) == 1


def test_permutations_of_many_images_are_drawn() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.random((2, 12))
    images = np.arange(12)
    exact = permutation(first, second, images, seed=0)
    drawn = permutation(first, second, images, seed=0, resamples=4000)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=0.03)
    assert drawn == permutation(first, second, images, seed=0, resamples=4000)
    certain = permutation(np.ones(200), np.zeros(200) + 0.5, np.arange(200), seed=0)
    assert certain == 1 / 10_000, "the observed signs are one of them"


def test_a_permutation_moves_whole_images() -> None:
    first, second = np.full(12, 0.75), np.full(12, 0.25)
    assert permutation(first, second, range(12), seed=0) == 2 / 2**12
    assert permutation(first, second, [0] * 6 + [1] * 6, seed=0) == 2 / 2**2
    assert permutation(first, first, range(12), seed=0) == 1


def test_the_interval_of_a_mean_score() -> None:
    graded = pd.Series(np.arange(40) % 4 / 3)
    alone, together = pd.Series(range(40)), pd.Series([index % 4 for index in range(40)])
    assert mean_score(graded, alone, seed=0) == paired_bootstrap(graded, alone, seed=0)
    narrow, wide = (mean_score(graded, images, seed=0) for images in (alone, together))
    assert wide.low < narrow.low < graded.mean() < narrow.high < wide.high
    binary = pd.Series([1.0] * 30 + [0.0] * 10)
    assert mean_score(binary, together, seed=0) == wilson(30, 40), "as before graded scores"


def test_a_mean_score_without_variation_is_not_certain() -> None:
    images = pd.Series(range(10))
    equal = mean_score(pd.Series([0.55] * 10), images, seed=0)
    assert equal == (wilson(5, 10).low, wilson(6, 10).high)
    one_image = mean_score(pd.Series([0.5, 0.6] * 5), pd.Series([0] * 10), seed=0)
    assert one_image == (wilson(5, 10).low, wilson(6, 10).high)


def rows(label: str, scores: Sequence[float], **columns: object) -> pd.DataFrame:
    count = len(scores)
    return pd.DataFrame(
        {
            "model": "m",
            "method": label,
            "label": label,
            "parameters": "",
            "retention": 1.0 if label == "uncompressed" else 0.5,
            "question_id": [f"q{index}" for index in range(count)],
            "image_id": [f"i{index // 2}" for index in range(count)],
            "kind": "a",
            "answer": "x",
            "truth": "x",
            "status": "ok",
            "score": scores,
            "correct": [score >= 0.5 for score in scores],
            "agrees": True,
            "metric": "vqa",
            **columns,
        }
    )


def test_graded_scores_are_compared_by_permutation_and_others_by_mcnemar() -> None:
    graded, binary = [0.9, 0.3, 1.0, 0.6, 1.0, 0.9], [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    found = compared(rows("a", graded), rows("b", binary), seed=0)
    assert found["difference"] == pytest.approx((4.7 - 2.0) / 6)
    # The sums of the three images are 1.2, 0.6 and 0.9: only both extremes of 8 signs reach 2.7.
    assert (found["p"], found["test"]) == (2 / 8, "permutation")
    assert (found["only_first"], found["only_second"]) == (4, 0)
    same = compared(rows("a", binary), rows("b", binary[::-1]), seed=0)
    assert (same["p"], same["test"]) == (mcnemar(binary, binary[::-1]), "McNemar")
    table = pairs(pd.concat([rows("a", graded), rows("b", binary)]), seed=0)
    assert list(table["test"]) == ["permutation"]


def test_older_answers_have_no_score() -> None:
    table = pd.concat([rows("uncompressed", [1, 0, 1]), rows("a", [1, 0, 0])])
    older = table.drop(columns=["score", "metric"])
    new, old = (summarise(one, seed=0).drop(columns="metric") for one in (table, older))
    pd.testing.assert_frame_equal(new, old)
    assert new["accuracy"].tolist() == pytest.approx([2 / 3, 1 / 3])


# --- figures of a set -----------------------------------------------------------------------------


def test_the_figures_of_pope() -> None:
    said = ["yes", "Yes.", "yes", "no", "no", "no", "perhaps", "no"]
    true = ["yes", "yes", "no", "no", "no", "yes", "yes", "no"]
    scores = [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    cell = rows("a", scores, answer=said, truth=true, metric="yes-no", image_id=list("ababbcbc"))
    row = summarise(cell, seed=0).iloc[0]
    # Two hits, one false alarm, and two misses, of which one says neither yes nor no.
    assert row["precision"] == pytest.approx(2 / 3)
    assert row["recall"] == pytest.approx(2 / 4)
    assert row["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert row["yes_ratio"] == pytest.approx(3 / 8)
    assert row["f1_low"] <= row["f1"] <= row["f1_high"]
    assert row["accuracy"] == 5 / 8


def test_the_paired_accuracy_of_mme() -> None:
    scores = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    images = ["a", "a", "b", "b", "c", "c", "d"]  # d has a single question
    kinds = ["k"] * 4 + ["k", "other", "k"]  # and c has one of each kind
    cell = rows("x", scores, answer="yes", truth="yes", metric="yes-no")
    table = summarise(cell.assign(image_id=images, kind=kinds), seed=0).set_index("kind")
    assert table.loc["overall", "paired_accuracy"] == 1 / 2, "one of the images a and b"
    assert table.loc["k", "paired_accuracy"] == 1 / 2
    assert np.isnan(table.loc["other", "paired_accuracy"])
    certain = table.loc["overall", ["recall_low", "recall", "recall_high"]]
    assert tuple(certain) == (wilson(7, 7).low, 1, 1), "equal answers are no certainty"
    assert aggregated(table.reset_index())[-1] == "paired_accuracy"


def test_other_metrics_have_no_such_columns() -> None:
    table = summarise(rows("a", [0.3, 1.0]), seed=0)
    assert aggregated(table) == []
    assert measure(table) == "accuracy by vqa"
    assert "paired test" in arrows(table)
    assert measure(summarise(rows("a", [0.0, 1.0], metric="exact"), seed=0)) == "accuracy"
    with pytest.warns(UserWarning, match="'gone' is not known here"):
        assert len(summarise(rows("a", [0.3, 1.0], metric="gone"), seed=0)) == 1


# --- the chain ------------------------------------------------------------------------------------


def test_answers_are_scored_by_the_metric_of_their_question(tmp_path: Path) -> None:
    picture = Picture("p", Image.new("RGB", (2, 2)))
    questions = [
        Question("ten", (picture,), "?", "cat", answers=("cat",) * 2 + ("dog",) * 8, metric="vqa"),
        Question("option", (picture,), "?", "B", choices=("red", "blue")),
        Question("plain", (picture,), "?", "two"),
    ]
    cells = [Cell(), *references({"image"}), Cell(tp.create("uniform", retention=0.5))]
    with Journal(tmp_path / "answers.jsonl") as journal:
        said = {"ten": "The cat", "option": "Blue.", "plain": "2"}
        for cell in cells:
            named = {
                name: {"answer": answer, "kept_patches": 5, "patch_tokens": 10}
                for name, answer in said.items()
            }
            journal.add(cell.key, named)
    frame = answers_frame("m", cells, questions, journal)
    first = frame[frame["label"] == "uncompressed"].set_index("question_id")
    assert first["metric"].to_dict() == {"ten": "vqa", "option": "choice", "plain": "exact"}
    assert first["score"].to_dict() == pytest.approx({"ten": 0.6, "option": 1.0, "plain": 1.0})
    assert first["correct"].all(), "a score of 0.5 or more"
    assert first["easy"].all()
    other = with_metric(questions, "anls")
    wanted = answers_frame("m", cells, other, journal)
    pd.testing.assert_frame_equal(rescored(frame, "anls"), wanted, check_dtype=False)
    assert list(wanted["score"][:3]) == [0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="'option' cannot be scored"):
        rescored(frame, "vqa")


def invoke(*words: str) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_a_run_is_scored_again_without_new_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    asked = ("compare", "--questions", "6", "--methods", "uniform", "first", "--retention", "0.1")
    asked += ("--device", "cpu", "--format", "png", "--out", run)
    invoke(*asked)
    plain = read_answers(Path(run))
    assert set(plain["metric"]) == {"exact"}
    assert plain["score"].eq(plain["correct"].astype(float)).all()

    monkeypatch.setattr(tp, "load", None)  # a model would be loaded by it
    (tmp_path / "near.py").write_text(
        "def near(prediction, question):\n    return 0.25 + 0.5 * (prediction == question.answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    again = invoke(*asked, "--metric", "near:near")
    assert "nothing was computed again" in again.output
    assert "Accuracy by near:near" in " ".join(again.output.split())
    graded = read_answers(Path(run))
    assert graded["answer"].equals(plain["answer"])
    assert graded["score"].eq(0.25 + 0.5 * (plain["answer"] == plain["truth"])).all()
    summary = pd.read_csv(Path(run) / "summary.csv")
    assert set(summary["metric"]) == {"near:near"}
    assert summary["accuracy"].between(0.25, 0.75).all()

    table = " ".join(invoke("pairs", run).output.split())
    assert "permutation test" in table
    assert "McNemar" in " ".join(invoke("pairs", run, "--metric", "exact").output.split())
    assert "by near:near" in invoke("table", run).output
    assert "by contains" in invoke("table", run, "--metric", "contains").output
    monkeypatch.setattr(choosing, "_OWN", {})  # as in another process
    assert "which only --metric imports" in " ".join(invoke("report", run).output.split())
    page = (Path(run) / "report.html").read_text(encoding="utf-8")
    assert "<th>accuracy by near:near %</th>" in page
    assert '"partial":[0.' in page
