"""The method for a budget, from planted accuracies, latencies and memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.choose.deciding import Limits, decide, frontier
from tokenprune.experiments.choose.run import ChooseRequest, accuracy_limit, byte_limit, run
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.times import medians, read_times, with_times
from tokenprune.experiments.common.timing import Timing
from tokenprune.experiments.compare import measuring

# label, retention: right of 20 answers, milliseconds, gigabytes, share of FLOPs
PLANTED = {
    ("uncompressed", 1.0): (20, 100.0, 16.0, 1.0),
    ("fastv:layer=3", 0.5): (19, 60.0, 15.0, 0.6),
    ("fastv:layer=3", 0.25): (17, 39.0, 13.0, 0.5),
    ("uniform", 0.5): (16, 45.0, 11.5, 0.5),
    ("uniform", 0.25): (12, 30.0, 11.0, 0.25),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with these answers, one image each, and times of nine runs around these."""
    rows, times = [], []
    for (label, retention), (right, ms, gigabytes, share) in PLANTED.items():
        method = label.partition(":")[0]
        about = {"method": method, "label": label, "parameters": "", "retention": retention}
        for index in range(20):
            name = f"q{index}"
            rows.append(
                {
                    **about, "model": "m", "question_id": name, "image_id": name, "kind": "k",
                    "question": "?", "truth": "a", "answer": "a", "correct": index < right,
                    "agrees": index < right, "status": "ok", "flops": 1e9 * share,
                    "uncompressed_flops": 1e9,
                }
            )  # fmt: skip
        for index in range(9):
            spent = {
                name: ms + 0.1 * (index - 4) for name in ("prefill_ms", "total_ms", "token_ms")
            }
            spent["total_ms"] += 10
            times.append({**about, "status": "ok", "run": index, **spent, "device": "a GPU"})
            times[-1]["peak_bytes"] = 1e9 * gigabytes
    experiment = {
        "model": "testbed-next", "modality": ["image"], "methods": [], "retention": [],
        "questions": 20, "data": "", "seed": 0, "device": "cpu", "dtype": "float32",
        "max_new_tokens": 8,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"experiment": experiment}))
    pd.DataFrame(rows).to_parquet(tmp_path / "answers.parquet")
    pd.DataFrame(times).to_csv(tmp_path / "times.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    ("budget", "pick"),
    [
        ({"max_ms": 40.0}, ("fastv:layer=3", 0.25)),
        ({"max_ms": 46.0}, ("fastv:layer=3", 0.25)),  # uniform at 0.5 is worse and slower
        ({"max_ms": 38.0}, ("uniform", 0.25)),
        ({"max_ms": 1000.0}, ("uncompressed", 1.0)),
        ({"max_ms": 48.0, "time": "total"}, ("uniform", 0.25)),
        ({"max_memory": 12e9}, ("uniform", 0.5)),
        ({"max_ms": 40.0, "max_memory": 12e9}, ("uniform", 0.25)),
        ({"max_flops": 0.3}, ("uniform", 0.25)),
        ({"max_flops": 0.5}, ("fastv:layer=3", 0.25)),
        ({"min_accuracy": 0.95, "relative": True}, ("fastv:layer=3", 0.5)),
        ({"min_accuracy": 0.8}, ("fastv:layer=3", 0.25)),
        ({"min_accuracy": 0.0}, ("uniform", 0.25)),
        ({"max_ms": 10.0}, None),
    ],
)
def test_planted_budgets(
    folder: Path, budget: dict[str, Any], pick: tuple[str, float] | None
) -> None:
    choice = run(ChooseRequest(folder=folder, **budget))
    if pick is None:
        assert (choice.pick, choice.lines, choice.none) == (None, "", 1.0)
    else:
        cell = choice.cells.loc[choice.pick]
        assert (cell["label"], cell["retention"]) == pick
        assert cell["wins"] == choice.cells["wins"].max()
        assert cell["frontier"]


def test_the_frontier_is_what_no_cell_beats(folder: Path) -> None:
    cells = run(ChooseRequest(folder=folder, max_ms=40)).cells
    beaten = [
        any(
            ms >= other_ms and right <= other and (ms, right) != (other_ms, other)
            for other, other_ms, *_ in PLANTED.values()
        )
        for right, ms, *_ in PLANTED.values()
    ]
    assert list(cells["frontier"]) == [not one for one in beaten]
    assert beaten.count(True) == 1
    same = frontier(np.array([0.5, 0.5]), {"ms": np.array([1.0, 1.0])})
    assert list(same) == [True, True]


def exact_wins(answers: Sequence[Sequence[float]], ms: Sequence[float], most: float) -> list[float]:
    """By enumeration of all resamples of the questions, one image each."""
    wins = [0.0] * len(ms)
    resamples = list(product(range(len(answers)), repeat=len(answers)))
    for drawn in resamples:
        right = [sum(answers[row][cell] for row in drawn) for cell in range(len(ms))]
        allowed = [cell for cell in range(len(ms)) if ms[cell] <= most]
        wins[min(allowed, key=lambda cell: (-right[cell], ms[cell]))] += 1 / len(resamples)
    return wins


def test_how_often_a_cell_wins() -> None:
    """Against all 256 resamples of four images; the last cell is too slow."""
    answers = [[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 1, 1]]
    costs = {"ms": np.array([10.0, 20.0, 90.0])}
    found = decide(np.array(answers, float), list("abcd"), costs, Limits({"ms": 40}), full=2)
    expected = exact_wins(answers, [10.0, 20.0, 90.0], 40)
    assert found.wins == pytest.approx(expected, abs=0.04)
    assert expected[0] == pytest.approx(0.5 + 0.375 / 2)  # a tie goes to the cheaper one
    assert found.pick == 0
    clustered = decide(np.array(answers, float), list("aaaa"), costs, Limits({"ms": 40}), full=2)
    assert list(clustered.wins) == [1, 0, 0]  # one image: nothing is left to resample


def test_timed_runs_are_resampled() -> None:
    """The median of three draws from 10, 10, 50 is 50 in 7 of 27 cases; then it is too slow."""
    answers = np.array([[1.0, 0.0]] * 4)
    costs = {"ms": np.array([10.0, 5.0])}
    runs = {"ms": [np.array([10.0, 10.0, 50.0]), np.array([5.0, 5.0, 5.0])]}
    found = decide(answers, list("abcd"), costs, Limits({"ms": 40}), full=0, runs=runs)
    assert found.wins == pytest.approx([20 / 27, 7 / 27], abs=0.04)


def test_a_cell_without_times_is_left_out_with_the_reason(folder: Path) -> None:
    times = pd.read_csv(folder / "times.csv")
    half = (times["label"] == "uniform") & (times["retention"] == 0.5)
    broken = (times["label"] == "fastv:layer=3") & (times["retention"] == 0.5)
    times.loc[broken, "status"] = "RuntimeError: no rows"
    times[~half].to_csv(folder / "times.csv", index=False)
    choice = run(ChooseRequest(folder=folder, max_ms=70))
    assert set(choice.left_out) == {"uniform at 0.5", "fastv:layer=3 at 0.5"}
    assert "was not measured" in choice.left_out["uniform at 0.5"]
    assert "no rows" in choice.left_out["fastv:layer=3 at 0.5"]
    assert choice.pick is not None
    (folder / "times.csv").unlink()
    assert run(ChooseRequest(folder=folder, max_flops=0.5)).pick is not None
    with pytest.raises(UserError, match=r"no measured times.*--measure"):
        run(ChooseRequest(folder=folder, max_memory=1e9))


@pytest.mark.parametrize(
    "budget",
    [{}, {"max_ms": -1.0}, {"max_ms": float("nan")}, {"max_flops": 30.0}, {"min_accuracy": 95.0}],
)
def test_bad_budgets_are_refused(folder: Path, budget: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        run(ChooseRequest(folder=folder, **budget))


def test_limits_as_text() -> None:
    assert byte_limit("12GB") == 12e9
    assert byte_limit("1.5 GiB") == 1.5 * 2**30
    assert accuracy_limit("0.95x") == (0.95, True)
    assert accuracy_limit("0.9") == (0.9, False)
    for parse, text in ((byte_limit, "12"), (byte_limit, "GB"), (accuracy_limit, "95 %")):
        with pytest.raises(UserError, match=text):
            parse(text)


def test_the_printed_lines_run_and_use_the_pick(folder: Path) -> None:
    result = CliRunner().invoke(app, ["choose", str(folder), "--max-ms", "40"])
    assert result.exit_code == 0, result.output
    assert "Pick: fastv:layer=3 at 0.25." in result.output
    space: dict[str, Any] = {}
    exec(result.output[result.output.index("import tokenprune") :], space)
    assert space["method"] == tp.create("fastv", layer=3, retention=0.25)
    item = held_out(1, 0)[0]
    image = item.images[0].open()
    inputs = space["pipe"].prepare([image], [item.question])
    with tp.compress(space["pipe"].model, space["method"]):
        ids = space["pipe"].model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert [space["answer"](image, item.question)] == space["pipe"].decode(ids, inputs)
    assert CliRunner().invoke(app, ["choose", str(folder), "--max-ms", "1"]).exit_code == 1


# --- measuring ------------------------------------------------------------------------------------


def test_medians_and_their_place_in_the_summary(folder: Path) -> None:
    times = read_times(folder)
    assert times is not None
    found = medians(times).set_index(["label", "retention"])
    assert found.loc[("uniform", 0.5), "prefill_ms"] == pytest.approx(45)
    assert found.loc[("uniform", 0.5), "prefill_ms_iqr"] == pytest.approx(0.4)
    summary = pd.DataFrame(
        {"label": ["uniform"] * 2, "retention": [0.5] * 2, "kind": ["overall", "k"]}
    )
    joined = with_times(summary, times)
    assert joined["prefill_ms"].isna().tolist() == [False, True]
    assert with_times(summary, None) is summary
    (folder / "times.csv").write_text("label\nuniform\n")
    with pytest.raises(UserError, match=r"times.csv is damaged"):
        read_times(folder)


def test_planted_times_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which a prefill takes 1 ms with uniform and 2 ms without, a token half of it."""
    pipe = tp.load("testbed-next")
    cells = [
        Cell(),
        Cell(tp.create("uniform", retention=0.25)),
        Cell(tp.create("fastv", retention=0.5)),
    ]
    taking: list[float] = []

    def run(self: Any, method: Compressor | None) -> dict[str, float]:
        if method is not None and method.name == "fastv":
            raise RuntimeError("no rows")
        taking.append(2.0 if method is None else 1.0)
        return original(self, method)

    def timed(work: Any, **_: Any) -> Timing:
        work()
        whole = 1 + (work.__name__ == "_answer") * 0.5 * (measuring.NEW_TOKENS - 1)
        return Timing(1e-3 * taking[-1] * whole, 0.0)

    original = measuring._Timer.run
    monkeypatch.setattr(measuring._Timer, "run", run)
    monkeypatch.setattr(measuring, "timed", timed)
    monkeypatch.setattr(measuring, "REPEATS", 2)
    measuring.measure(pipe, cells, held_out(3, 0), tmp_path)
    times = read_times(tmp_path)
    assert times is not None
    assert taking == 4 * [2.0, 1.0]  # in turn, the first two rounds to warm up
    found = medians(times).set_index("label")
    assert found["prefill_ms"].to_dict() == pytest.approx({"uncompressed": 2, "uniform": 1})
    assert found["token_ms"].to_dict() == pytest.approx({"uncompressed": 1, "uniform": 0.5})
    assert found.loc["uniform", "peak_bytes"] < found.loc["uncompressed", "peak_bytes"]
    weights = sum(one.numel() * one.element_size() for one in pipe.model.parameters())
    assert found["peak_bytes"].min() > weights
    assert times.set_index("label").loc["fastv", "status"] == "RuntimeError: no rows"
    assert set(times["attention"]) == {"sdpa"}
