"""Sweeps: parsing, comparisons, and a run on the testbed."""

import math
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.ablation.figures import figure
from tokenprune.experiments.ablation.run import PAPER, differences, parse_sweep
from tokenprune.experiments.common.intervals import mcnemar
from tokenprune.experiments.common.summary import OVERALL


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("globalcom2:alpha=0,0.5,1", {"alpha": ("0", "0.5", "1")}),
        ("globalcom2:alpha=0,1;tau=1,10", {"alpha": ("0", "1"), "tau": ("1", "10")}),
        ("globalcom2:alpha=0,1,tau=1,10", {"alpha": ("0", "1"), "tau": ("1", "10")}),
        ("globalcom2: alpha = 0 , 1 ; tau = 5", {"alpha": ("0", "1"), "tau": ("5",)}),
        ("fastv:layer=3,allocator=topk,max", {"layer": ("3",), "allocator": ("topk", "max")}),
    ],
)
def test_sweeps_are_read(text: str, options: dict[str, tuple[str, ...]]) -> None:
    assert parse_sweep(text).options == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("globalcom2", "give several values to one or two options"),
        ("globalcom2:alpha=0.5", "it does so to 0"),
        ("globalcom2:alpha=0,1;tau=1,2;layer=-1,-2", "it does so to 3"),
        ("globalcom2:alpha", "cannot read 'alpha'"),
        ("globalcom2:alpha=0,,1", "cannot read"),
        ("globalcom2:alpha=0;1", "cannot read"),
        ("globalcom2:alpha=0,0", "twice"),
        ("globalcom2:alpha=0,1;alpha=2,3", "twice"),
        ("globalcom2:alpha=0,1@0.5", "is not a sweep"),
        ("uniform@0.5 + fastv@0.5", "is not a sweep"),
        (f"dart:layer={','.join(map(str, range(100_000)))};text_pivots=1,2", "has 200000 settings"),
    ],
)
def test_bad_sweeps_are_sentences(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_sweep(text)


def test_points_are_all_combinations() -> None:
    sweep = parse_sweep("globalcom2:score=received;alpha=0,1;allocator=default,topk")
    assert sweep.title == "globalcom2:score=received"
    assert [(point.values, point.spec) for point in sweep.points] == [
        (
            (("alpha", alpha), ("allocator", allocator)),
            f"globalcom2:score=received,alpha={alpha}"
            + (f",allocator={allocator}" if allocator != "default" else ""),
        )
        for alpha in ("0", "1")
        for allocator in ("default", "topk")
    ]
    (first, _) = parse_sweep("divprune:allocator=default,topk").points
    assert first.spec == "divprune"


def test_the_papers_sweeps_begin_with_the_methods_own_values() -> None:
    for text in PAPER:
        sweep = parse_sweep(text)
        own = tp.create(sweep.method, retention=0.25)
        assert tp.parse(sweep.points[0].spec, retention=0.25) == own, text
        for point in sweep.points:
            tp.parse(point.spec, retention=0.25)


def answers(label: str, right: list[bool], status: str = "ok") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "label": label,
            "parameters": "",
            "retention": 0.25,
            "question_id": [f"q{i}" for i in range(len(right))],
            "image_id": [f"i{i}" for i in range(len(right))],
            "correct": pd.array(right, dtype="boolean"),
            "status": status,
            "kl": 0.5,
            "layer_average": 10.0,
            "flops": 1e9,
        }
    )


def test_differences_are_to_the_first_value_that_ran() -> None:
    first, other = [True] * 8 + [False] * 2, [True] * 3 + [False] * 7
    table = differences(
        pd.concat(
            [
                answers("globalcom2:tau=1.0", [], "failed"),
                answers("globalcom2", first),  # tau=10 is the default
                answers("globalcom2:tau=100.0", other),
                answers("globalcom2:tau=5.0", first[:5] + [False] * 5, "failed"),
            ]
        ),
        [parse_sweep("globalcom2:tau=1,10,5,100")],
        [0.25],
        seed=0,
    )
    assert list(table["first_value"]) == ["10", "100"]
    assert math.isnan(table["p"][0])
    row = table.iloc[1]
    assert row["difference"] == pytest.approx(-0.5)
    assert (
        row["p"] == row["p_holm"] == pytest.approx(mcnemar(other, first)) == pytest.approx(0.0625)
    )
    assert row["low"] <= -0.5 <= row["high"]


def test_figure_has_a_panel_for_every_sweep_and_a_heat_map_for_every_retention() -> None:
    rows = [
        {"sweep": text, "method": "m", "first": "a", "second": second, "first_value": one}
        | {"second_value": two, "label": f"{one}{two}", "retention": ratio, "n": 5}
        | {"accuracy": 0.1 * place}
        for text, second in (("s", ""), ("g", "b"))
        for ratio in (0.5, 0.1)
        for place, one in enumerate(("10", "2"))
        for two in (("x", "y") if second else ("",))
    ]
    table = pd.DataFrame(rows)
    summary = table.drop_duplicates(["label", "retention"]).assign(
        kind=OVERALL, method="m", accuracy_low=0.0, accuracy_high=0.2
    )
    drawn = figure(table, summary, "m")
    line, half, tenth = [axes for axes in drawn.axes if axes.axison]
    assert [tick.get_text() for tick in line.get_xticklabels()] == ["2", "10"], "in order"
    heights = line.containers[0].lines[0].get_ydata()  # type: ignore[attr-defined]
    assert list(heights) == pytest.approx([0.1, 0.0])
    assert [text.get_text() for text in half.texts] == ["10.0", "10.0", "0.0", "0.0"]
    assert "10 %" in tenth.get_title(loc="left")


def test_panels_share_an_axis_on_which_every_interval_fits() -> None:
    rows = [
        {"sweep": sweep, "method": "m", "first": "a", "second": "", "first_value": value}
        | {"second_value": "", "label": sweep + value, "retention": 0.5, "n": 5, "accuracy": level}
        for sweep, levels in (("s", (0.9, 0.92)), ("t", (0.3, 0.99)))
        for value, level in zip("xy", levels, strict=True)
    ]
    table = pd.DataFrame(rows)
    summary = table[["label", "retention", "accuracy"]].assign(
        kind=OVERALL, method="m", accuracy_low=table["accuracy"] - 0.2, accuracy_high=1.0
    )
    panels = [axes for axes in figure(table, summary, "m").axes if axes.axison]
    assert len({axes.get_ylim() for axes in panels}) == 1
    assert panels[0].get_ylim()[0] < 0.1


def test_ablation_on_the_testbed(tmp_path: Path) -> None:
    words = ["ablation", "globalcom2:alpha=0,1;tau=0.1,10", "fastv:allocator=default,globalcom2"]
    words += ["-r", "0.25", "--questions", "5", "--out", str(tmp_path / "run")]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert max(map(len, first.stdout.splitlines()[:-2])) <= 80
    table = pd.read_csv(tmp_path / "run" / "ablation.csv")
    assert len(table) == 4 + 2
    frame = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    right = frame.groupby("label")["correct"].mean()
    assert f"Without the image {100 * right['image-free']:.1f} %" in first.stdout
    assert list(table["accuracy"]) == pytest.approx([right[label] for label in table["label"]])
    assert (tmp_path / "run" / "plots" / "ablation.png").stat().st_size > 10_000
    again = CliRunner().invoke(app, words)
    assert "0 answers in" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give at least one sweep"),
        (["globalcom2:alpha=0,2"], "alpha='2' is not valid"),
        (["globalcom2:alpah=0,1"], "Did you mean 'alpha'"),
        (["globalcom3:alpha=0,1"], "Did you mean 'globalcom2'"),
        (["globalcom2:allocator=topk,maximum"], "maximum"),
        (["globalcom2:score=received,cls_logits", "--model", "testbed-onevision"], "CLS token"),
        (["globalcom2:alpha=0,1", "-r", "0"], "larger than 0"),
    ],
)
def test_bad_input(words: list[str], said: str, tmp_path: Path) -> None:
    given = ["ablation", *words, "--questions", "5", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, given)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert not list(tmp_path.rglob("answers.jsonl")), "nothing was computed"
