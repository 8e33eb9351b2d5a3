"""Published figures: each with its source, consistent with the averages that the source states."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import read_csv
from tokenprune.experiments.common.published import (
    AVERAGE,
    averages,
    beside,
    figures,
    nearest,
)
from tokenprune.experiments.common.published_models import MODELS, published_model
from tokenprune.experiments.published.run import PublishedRequest, published
from tokenprune.registry import strategies

COLUMNS = [
    *("model", "modality", "method", "label", "tokens", "retention", "benchmark"),
    *("score", "uncompressed", "source", "table", "address", "first_reading", "second_reading"),
]
ALL_TOKENS = {"llava-next-7b": 2880, "llava-1.5-7b": 576, "llava-onevision-7b": 729}
MOST = {"MME": 2800}  # 100 for all other benchmarks
RENAMED = {"PDrop": "pyramiddrop", "LLaVA-PruMerge": "prumerge", "Pooling": "spatial-pool"}
OTHERS = {"eadp", "tops", "trim", "hiprune", "holov", "mustdrop", "gridprune", "s2prune"}
INCONSISTENT = {("HoloV", "DART")}
"""Its stated average, 93.9, is not that of the nine benchmarks, 95.6."""


@pytest.fixture(scope="module", params=MODELS)
def stored(request: pytest.FixtureRequest) -> pd.DataFrame:
    return figures(request.param)


def test_every_figure_has_a_source_an_address_and_two_readings(stored: pd.DataFrame) -> None:
    assert list(stored) == COLUMNS
    assert not stored.drop(columns="tokens").isna().any().any()
    assert stored["model"].nunique() == 1
    assert set(stored["modality"]) <= {"image", "video"}
    for row in stored.itertuples():
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", row.address)
        assert re.fullmatch(r"table \d+", row.table)
        assert len(row.first_reading) > 10
        assert len(row.second_reading) > 10
    assert (stored.groupby("source")["address"].nunique() == 1).all()
    assert not stored.duplicated(["source", "table", "retention", "label", "benchmark"]).any()


def test_every_figure_is_in_range(stored: pd.DataFrame) -> None:
    most = stored["benchmark"].map(MOST).fillna(100)
    assert ((stored["score"] > 0) & (stored["score"] <= most)).all()
    assert ((stored["uncompressed"] > 0) & (stored["uncompressed"] <= most)).all()
    assert ((stored["retention"] > 0) & (stored["retention"] < 1)).all()
    counted = stored.dropna(subset="tokens")
    total = counted["model"].map(ALL_TOKENS)
    assert ((counted["tokens"] / total - counted["retention"]).abs() < 1e-4).all()
    # No method is twice as good as the uncompressed model, nor a tenth of it.
    assert (stored["score"] / stored["uncompressed"]).between(0.1, 1.2).all()


def test_methods_have_their_registered_names(stored: pd.DataFrame) -> None:
    for label, method in set(zip(stored["label"], stored["method"], strict=True)):
        assert method == RENAMED.get(label, label.lower())
        assert (method in strategies.names()) != (method in OTHERS), method


def test_stated_averages_follow_from_the_scores(stored: pd.DataFrame) -> None:
    """A wrong digit in a score or an average breaks the arithmetic of its row."""
    for (source, _, _, label), rows in stored.groupby(["source", "table", "retention", "label"]):
        (stated,) = rows[rows["benchmark"] == AVERAGE].itertuples()
        scores = rows[rows["benchmark"] != AVERAGE].set_index("benchmark")
        unit = pd.Series(20, scores.index).where(scores.index == "MME", 1)
        if source in ("EADP", "TOPS"):  # the mean of scores, MME in twentieths
            used = [name for name in scores.index if not name.startswith("VizWiz")]
            mean, whole = ((scores[of] / unit)[used].mean() for of in ("score", "uncompressed"))
            close = 0.06
            if source == "TOPS":  # of rounded averages
                mean, close = 100 * mean / whole, 0.15
        else:  # the mean of ratios; VidCom2 adds the lengths of one benchmark
            mean = 100 * (scores["score"] / scores["uncompressed"]).mean()
            close = 0.4 if source == "VidCom2" else 0.08
        if (source, label) not in INCONSISTENT:
            assert mean == pytest.approx(stated.score, abs=close), (source, label)


def figure(label: str, benchmark: str, score: float, whole: float) -> dict[str, object]:
    same = dict.fromkeys(COLUMNS, "x") | {"retention": 0.25, "tokens": 4.0, "modality": "image"}
    named = {"method": label.lower(), "label": label, "benchmark": benchmark}
    return {**same, **named, "score": score, "uncompressed": whole}


def test_averages_use_the_benchmarks_that_all_methods_report() -> None:
    table = pd.DataFrame(
        [
            *(figure("A", *row) for row in (("P", 40, 50), ("Q", 900, 1000), (AVERAGE, 84, 100))),
            *(figure("B", *row) for row in (("P", 30, 50), ("Q", 500, 1000), (AVERAGE, 20, 40))),
            figure("B", "R", 10, 10),
        ]
    )
    found = averages(table).set_index("label")
    assert found["average"].round(6).to_dict() == {"A": 0.85, "B": 0.55}  # without R
    assert found["stated"].to_dict() == {"A": 0.84, "B": 0.5}
    assert set(found["benchmarks"]) == {2}


def test_the_nearest_retention_is_near() -> None:
    assert nearest(320 / 2880, [0.5, 0.25, 0.1]) == 0.1
    assert nearest(640 / 2880, [0.5, 0.25, 0.2]) == 0.2  # 1.11 against 1.125 times
    assert nearest(160 / 2880, [0.5, 0.25, 0.1]) is None  # 1.8 times
    assert nearest(0.2, [0.25]) == 0.25  # 1.25 times


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("llava-next-7b", "llava-next-7b"),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-next-7b"),
        ("/data/llava-v1.6-vicuna-7b-hf", "llava-next-7b"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision-7b"),
        ("llava-hf/llava-onevision-qwen2-7b-si-hf", None),  # another checkpoint
        ("llava-hf/llava-v1.6-mistral-7b-hf", None),
        ("testbed-next", None),
    ],
)
def test_checkpoints_are_recognised(name: str, model: str | None) -> None:
    assert published_model(name) == model


def test_figures_are_chosen_by_method_benchmark_and_retention(tmp_path: Path) -> None:
    out = tmp_path / "figures.csv"
    request = PublishedRequest(
        model="llava-next-7b",
        methods=("PDrop", "globalcom2"),
        benchmarks=("GQA",),
        retention=(0.1,),
        out=out,
    )
    rows, table = published(request)
    # GQA at 320 tokens in EADP table 2, TOPS table 12 and HoloV table 3.
    shown = {(row.source, row.label): row.GQA for row in table.itertuples()}
    assert shown == {
        ("EADP", "PDrop"): 53.3,
        ("TOPS", "PDrop"): 50.4,
        ("HoloV", "PDrop"): 56.4,
        ("HoloV", "GlobalCom2"): 57.1,
    }
    assert set(rows["benchmark"]) == {"GQA", AVERAGE}
    pd.testing.assert_frame_equal(read_csv(out), rows.reset_index(drop=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "llava-2"}, "no model with published figures is called 'llava-2'"),
        ({"methods": ["fastvv"]}, "no method with published figures is called 'fastvv'"),
        ({"benchmarks": ["GQ"]}, "no benchmark is called 'GQ'"),
        ({"retention": [0.9]}, "choose from: 0.0556, 0.1111, 0.2222"),
    ],
)
def test_what_is_not_published_is_refused(change: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=re.escape(said)):
        published(PublishedRequest(**{"model": "llava-next-7b", **change}))


def test_the_command_prints_figures_with_their_addresses() -> None:
    words = ["published", "-m", "globalcom2", "fastv", "-b", "GQA", "-r", "0.1"]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "HoloV, table 3: https://arxiv.org/abs/2510.02912" in result.output
    assert re.search(r"GlobalCom2 +92\.2 +92\.2 +57\.1", result.output)


def summary_row(label: str, asked: float, accuracy: float, **changes: object) -> dict[str, object]:
    method = label.partition(":")[0]
    row = {"label": label, "method": method, "retention": asked, "asked_retention": asked}
    return {**row, "accuracy": accuracy, "kind": "overall", "status": "ok", **changes}


def test_published_averages_stand_beside_measured_ones() -> None:
    summary = pd.DataFrame(
        [
            summary_row("uncompressed", 1.0, 0.8),
            summary_row("globalcom2", 0.1, 0.6),
            summary_row("globalcom2", 0.5, 0.7),  # no figure near it
            summary_row("globalcom2:alpha=0", 0.1, 0.7),  # another method
            summary_row("hired", 0.1, 0.5, status="failed"),
            summary_row("uniform", 0.1, 0.5),  # not published
        ]
    )
    found = beside(summary, "llava-hf/llava-v1.6-vicuna-7b-hf")
    assert found is not None
    (row,) = found.itertuples()
    assert (row.method, row.source, row.retention, row.at) == ("globalcom2", "HoloV", 0.1, 0.1111)
    assert row.measured == pytest.approx(0.75)
    ratios = [57.1 / 64.2, 61.8 / 67.4, 53.4 / 60.6, 1698 / 1851, 83.8 / 86.5, 67.4 / 70.1]
    ratios += [76.7 / 81.8, 57.2 / 64.9, 54.6 / 57.6]  # HoloV, table 3
    assert row.published == pytest.approx(sum(ratios) / 9)
    assert beside(summary, "testbed-next") is None
    assert beside(summary[summary["label"] == "uniform"], "llava-next-7b") is None
