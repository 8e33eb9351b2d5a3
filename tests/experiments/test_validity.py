"""Tau-b between measured and published rankings, on planted rankings and hand computations."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from scipy.stats import kendalltau
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import read_csv
from tokenprune.experiments.common.published import averages, figures
from tokenprune.experiments.validity.agreement import interval, signs, tau_b
from tokenprune.experiments.validity.run import pairs_of, strata, taus
from tokenprune.models import testbed

# --- tau-b ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),  # 5 concordant, 1 discordant
        ([1, 2, 3, 4], [1, 2, 2, 3], 5 / np.sqrt(6 * 5)),  # 5 concordant, 1 tied in the second
        ([1, 1, 2], [1, 1, 2], 2 / np.sqrt(2 * 2)),  # a pair that is tied in both
        ([1, 2, 3], [5, 5, 5], np.nan),
    ],
)
def test_tau_b_by_hand(first: list[int], second: list[int], tau: float) -> None:
    assert tau_b([signs(first)], [signs(second)]) == pytest.approx(tau, nan_ok=True)


def test_one_stratum_is_scipys_tau_b() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        first, second = draw.integers(5, size=(2, 8))
        expected = kendalltau(first, second, variant="b").statistic
        assert tau_b([signs(first)], [signs(second)]) == pytest.approx(expected, nan_ok=True)


def test_only_pairs_of_one_stratum_are_counted() -> None:
    """Pooled, 3 concordant and 1 discordant; joined, the strata would have 15 pairs."""
    first = [signs([1, 2, 3]), signs([10, 20])]
    second = [signs([1, 2, 3]), signs([2, 1])]
    assert tau_b(first, second) == pytest.approx(2 / 4)


def test_ties_of_all_methods_widen_the_interval() -> None:
    assert interval(np.array([1.0] * 90 + [np.nan] * 10)) == (0, 1)


# --- planted rankings -----------------------------------------------------------------------------


def answers(
    rights: Mapping[str, Sequence[float]], images: Sequence[int], retention: float = 0.25
) -> pd.DataFrame:
    """One row per method and question, correct where ``rights`` is 1."""
    return pd.DataFrame(
        {
            "label": label,
            "method": label.partition(":")[0],
            "retention": retention,
            "asked_retention": retention,
            "question_id": f"q{place}",
            "image_id": f"i{image}",
            "correct": right,
            "status": "ok",
        }
        for label, values in rights.items()
        for place, (right, image) in enumerate(zip(values, images, strict=True))
    )


def ranking(source: str, at: float, values: Mapping[str, float]) -> pd.DataFrame:
    same = {"source": source, "table": "table 1", "retention": at}
    return pd.DataFrame({**same, "method": name, "average": v} for name, v in values.items())


def first(count: int, of: int = 10) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


PLANTED = {"a": first(2), "b": first(4), "c": first(6), "d": first(8)}
EACH = list(range(10))


def test_planted_orders_are_found() -> None:
    run = pd.concat([answers(PLANTED, EACH), answers(PLANTED, EACH, 0.1)])
    published = pd.concat(
        [
            ranking("same", 0.2222, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}),
            ranking("same", 0.1111, {"a": 0.1, "b": 0.2, "d": 0.3, "c": 0.4}),
            ranking("opposite", 0.2222, {"a": 0.9, "d": 0.8, "other": 0.7}),
            ranking("far", 0.5, {"a": 0.9, "d": 0.8}),
            ranking("alone", 0.25, {"a": 0.9, "other": 0.8}),
        ]
    )
    found = taus(strata(run, published, seed=0))
    rows = {(row.source, row.at): row for row in found.fillna({"at": 0}).itertuples()}
    assert list(rows) == [
        ("opposite", 0.2222),
        ("same", 0.1111),
        ("same", 0.2222),
        ("same", 0),
        ("pooled", 0),
    ]
    assert rows["opposite", 0.2222].tau == -1
    assert rows["same", 0.2222].tau == 1
    assert rows["same", 0.1111].tau == pytest.approx(4 / 6)
    assert rows["same", 0.1111].retention == 0.1
    assert rows["same", 0].tau == pytest.approx((6 + 4) / 12)
    pooled = rows["pooled", 0]
    assert pooled.tau == pytest.approx((6 + 4 - 1) / 13)
    assert (pooled.methods, pooled.pairs) == (4, 13)
    assert (pooled.concordant, pooled.discordant, pooled.tied) == (11, 2, 0)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("c", "b", "a")])
def test_the_pairs_that_disagree_are_named(names: tuple[str, str, str]) -> None:
    best, middle, worst = names  # in the source, which the order of names does not follow
    rights = {best: first(2), middle: first(4), worst: first(4)}
    published = ranking("s", 0.25, {best: 0.9, middle: 0.6, worst: 0.5})
    found = pairs_of(strata(answers(rights, EACH), published, seed=0)).set_index(
        ["first", "second"]
    )
    assert found["order"].to_dict() == {
        (best, middle): "disagrees",
        (best, worst): "disagrees",
        (middle, worst): "tied",
    }
    found = found.loc[[(best, middle), (best, worst), (middle, worst)]]
    assert found["published_difference"].to_list() == pytest.approx([0.3, 0.4, 0.1])
    assert found["measured_difference"].to_list() == pytest.approx([-0.2, -0.2, 0])
    # The others lead unless ten draws miss the two images that only they answer: 0.8 ** 10 = 0.107.
    assert found["opposed"].to_list() == pytest.approx([0.893, 0.893, 0], abs=0.02)


def test_whole_images_are_resampled() -> None:
    """A is right on one image, B mostly on the other: a quarter of the resamples lacks A's."""
    images = [0] * 500 + [1] * 500
    rights = {"a": [1.0] * 500 + [0.0] * 500, "b": [0.0] * 500 + [1.0] * 300 + [0.0] * 200}
    published = ranking("s", 0.25, {"a": 0.9, "b": 0.8})
    (row,) = taus(strata(answers(rights, images), published, seed=0)).itertuples()
    assert (row.tau, row.low, row.high) == (1, -1, 1)
    alone = answers(rights, list(range(1000)))  # question by question, a leads by 6 deviations
    (row,) = taus(strata(alone, published, seed=0)).itertuples()
    assert (row.tau, row.low, row.high) == (1, 1, 1)


def test_options_failures_and_missing_answers_do_not_count() -> None:
    run = answers({**PLANTED, "b:layer=1": first(10)}, EACH)
    run.loc[(run["label"] == "c") & (run["question_id"] == "q0"), "status"] = "failed"
    run.loc[(run["label"] == "a") & (run["question_id"] == "q9"), "correct"] = None
    published = ranking("s", 0.25, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    (one,) = strata(run, published, seed=0)
    assert one.methods == ("a", "b", "d")
    assert one.measured.tolist() == pytest.approx([2 / 9, 4 / 9, 8 / 9])  # without question 9


def test_several_seeds_are_averaged() -> None:
    again = answers({"a": first(10)}, EACH)
    run = pd.concat([answers(PLANTED, EACH), again])
    published = ranking("s", 0.25, {"a": 0.1, "c": 0.3, "d": 0.4})
    (one,) = strata(run, published, seed=0)
    assert one.measured.tolist() == pytest.approx([0.6, 0.6, 0.8])


def test_a_graded_score_takes_the_place_of_correct() -> None:
    run = answers(PLANTED, EACH).assign(score=0.5)
    run.loc[run["label"] == "a", "score"] = 0.7
    published = ranking("s", 0.25, {"a": 0.9, "d": 0.8})
    (row,) = taus(strata(run, published, seed=0)).itertuples()
    assert row.tau == 1


def test_a_matched_method_stands_at_the_requested_retention() -> None:
    run = answers(PLANTED, EACH)
    run.loc[run["label"] == "a", "retention"] = 0.03
    published = ranking("s", 0.25, {"a": 0.1, "d": 0.8})
    (one,) = strata(run, published, seed=0)
    assert one.methods == ("a", "d")


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(UserError, match="no two methods of the run have published figures"):
        strata(answers(PLANTED, EACH), ranking("s", 0.25, {"a": 0.1, "x": 0.2}), seed=0)
    run = answers({"a": first(2), "b": first(4)}, EACH)
    run.loc[(run["label"] == "a"), "correct"] = [1.0] * 5 + [np.nan] * 5
    run.loc[(run["label"] == "b"), "correct"] = [np.nan] * 5 + [1.0] * 5
    with pytest.raises(UserError, match="no question was answered by all methods"):
        strata(run, ranking("s", 0.25, {"a": 0.1, "b": 0.2}), seed=0)


# --- the command ----------------------------------------------------------------------------------


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison on a model with a name that figures are published for, and what it printed."""
    folder = tmp_path_factory.mktemp("validity")
    model = shutil.copytree(testbed.path("testbed-next"), folder / "llava-v1.6-vicuna-7b-hf")
    words = ["--methods", "divprune", "visionzip", "fastervlm", "--questions", "12"]
    words += ["--retention", "0.1", "--format", "png", "--out", str(folder / "run")]
    result = invoke("compare", "--model", str(model), *words)
    assert result.exit_code == 0, result.output
    return folder / "run", result.output


def test_compare_shows_published_averages_on_such_a_model(run: tuple[Path, str]) -> None:
    shown = run[1].partition("Published averages")[2]
    assert re.search(r"10 % +divprune +[\d.]+ +95\.4 +11\.1 % +EADP, table 2", shown)
    assert "may differ" in shown


def test_the_command_compares_a_run(run: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = run
    hub = "llava-hf/llava-v1.6-vicuna-7b-hf"
    result = invoke("validity", str(folder), "--published", hub, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    table = read_csv(tmp_path / "validity-llava-next-7b.csv").set_index(["source", "at"])
    pairs = read_csv(tmp_path / "validity-pairs-llava-next-7b.csv")
    assert f"{table.loc['EADP', 'tau'].iloc[0]:.2f} (" in result.output
    # EADP and TOPS have DivPrune and VisionZip at 320 tokens, HoloV has FasterVLM alone.
    assert set(zip(pairs["source"], pairs["first"], pairs["second"], strict=True)) == {
        ("EADP", "divprune", "visionzip"),
        ("TOPS", "divprune", "visionzip"),
    }
    accuracy = pd.read_parquet(folder / "answers.parquet").groupby("label")["correct"].mean()
    difference = float(accuracy["divprune"] - accuracy["visionzip"])
    assert pairs["measured_difference"].to_list() == pytest.approx([difference] * 2)
    assert table.loc["pooled", "tau"].fillna(0).to_list() == [np.sign(difference)]
    assert "HoloV, table 3 at R = 0.1111 is left out" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--model", "testbed-next", "--questions", "3"], "--model, --questions belong to"),
        (["RUN", "--published", "llava-2"], "no model with published figures is called 'llava-2'"),
        (["--model", "testbed-qwen"], "testbed-qwen has no counterpart with published figures"),
        (["--modality", "multi-image"], "for the modality multi-image are published here"),
    ],
)
def test_bad_input_is_refused(run: tuple[Path, str], words: list[str], said: str) -> None:
    result = invoke("validity", *(str(run[0]) if word == "RUN" else word for word in words))
    assert result.exit_code == 2, result.output
    assert said in result.output


def test_published_rankings_agree_with_each_other() -> None:
    """A run with the accuracies of one source has its order in that source."""
    published = averages(figures("llava-next-7b"))
    mine = published[(published["source"] == "TOPS") & (published["retention"] == 0.1111)]
    rights = {row.method: first(round(1000 * row.average), 1000) for row in mine.itertuples()}
    run = answers(rights, list(range(1000)), 0.1)
    found = taus(strata(run, published, seed=0)).set_index(["source", "at"])
    assert found.loc[("TOPS", 0.1111), "tau"] == pytest.approx(1, abs=0.1)  # two nearly tie
    eadp = published[(published["source"] == "EADP") & (published["retention"] == 0.1111)]
    both = mine.merge(eadp, on="method")
    tau = kendalltau(both["average_x"].round(3), both["average_y"]).statistic
    assert found.loc[("EADP", 0.1111), "tau"] == pytest.approx(tau)
