"""A run that grows, and runs that are merged, equal the run made at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.provenance import _checksums, functions_in
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.reading import joined, manifest_of, questions_of
from tokenprune.experiments.common.request import CompareRequest, FigureOptions
from tokenprune.experiments.common.run_folder import BEFORE
from tokenprune.experiments.compare import figures
from tokenprune.experiments.compare.finished import as_in_run
from tokenprune.experiments.compare.growing import portions
from tokenprune.experiments.compare.run import run as compare
from tokenprune.experiments.merge.run import MergeRequest
from tokenprune.experiments.merge.run import run as merge

ALL = CompareRequest(
    methods=("uniform", "fastv:layer=3"),
    retention=(0.5, 0.25),
    questions=6,
    batch_size=6,
    device="cpu",
    figures=FigureOptions(formats=("png",)),
)
FASTV, CORE = "tokenprune/strategies/fastv.py", "tokenprune/engine/session.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made ``at-once``, one that was ``grown`` twice, and two ``parts`` of it."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw", lambda *_: None)
        compare(replace(ALL, out=home / "at-once"))
        first = replace(ALL, out=home / "grown", methods=("uniform",), questions=4)
        compare(replace(first, retention=(0.5,)))
        shutil.copytree(home / "grown", home / "small")
        compare(replace(first, methods=("fastv:layer=3",)))
        for name in ALL.methods:
            compare(replace(ALL, out=home / f"part-{name[:5]}", methods=(name,)))
    return home


def answers(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "answers.parquet")


def check_equal(mine: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Row by row; divergences differ by the rounding of other batches."""
    assert mine["kl"].to_numpy(float) == pytest.approx(theirs["kl"].to_numpy(float), abs=1e-5)
    pd.testing.assert_frame_equal(mine.drop(columns="kl"), theirs.drop(columns="kl"))


def test_a_run_grown_twice_equals_the_run_made_at_once(home: Path) -> None:
    """By a method, then by questions and the cells that are still lacking."""
    before = (home / "grown" / "answers.jsonl").read_bytes()
    assert len(answers(home / "grown")) == 4 * (3 + 1 + 2)
    outcome = compare(replace(ALL, out=home / "grown"))
    assert outcome.new == 6 * (3 + 4) - 4 * (3 + 3)
    assert (home / "grown" / "answers.jsonl").read_bytes().startswith(before)
    check_equal(answers(home / "grown"), answers(home / "at-once"))
    again = compare(replace(ALL, out=home / "grown"))
    assert (again.new, again.status) == (0, "complete")
    assert any((home / "grown" / "plots").glob("*.png"))


def test_a_smaller_request_adds_nothing_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "at-once", tmp_path / "run")
    outcome = compare(replace(ALL, out=folder, methods=("uniform",), questions=2))
    assert outcome.new == 0
    pd.testing.assert_frame_equal(answers(folder), answers(home / "at-once"))
    manifest = manifest_of(folder)
    assert len(manifest["requests"]) == 2
    found = questions_of(folder, manifest, Journal(folder / "answers.jsonl"), notes := [])
    assert found is not None
    assert (len(found), notes) == (6, [])


def edited(home: Path, folder: Path, change: Mapping[str, Any], file: str = "") -> Path:
    """A copy of the run made at once, with a ``change`` of the experiment and of a file."""
    shutil.copytree(home / "at-once", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["experiment"] |= change
    if file:
        manifest["files"]["code"][file] = "0" * 64
        manifest["functions"][file] = {
            name: "00000000" if name.endswith(("score", "compress")) else digest
            for name, digest in manifest["functions"][file].items()
        }
    for name in ("manifest.json", "manifest.backup.json"):
        (folder / name).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("change", "file", "said"),
    [
        ({"dtype": "bfloat16"}, "", "dtype: bfloat16 there, float32 here"),
        ({"data": "0" * 64}, "", "other data"),
        ({}, CORE, r"other code: tokenprune/engine/session.py \(compress"),
    ],
)
def test_what_differs_is_refused_by_name_and_nothing_is_lost(
    home: Path, tmp_path: Path, change: dict[str, Any], file: str, said: str
) -> None:
    folder = edited(home, tmp_path / "run", change, file)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        compare(replace(ALL, out=folder, methods=("random",)))
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before


def test_a_method_that_changed_is_recomputed_alone(home: Path, tmp_path: Path) -> None:
    folder = edited(home, tmp_path / "run", {}, FASTV)
    lines = (folder / "answers.jsonl").read_text().splitlines()
    theirs = [line for line in lines if '"cell": "FastV' in line]
    assert len(theirs) == 2 * 6
    outcome = compare(replace(ALL, out=folder))
    assert outcome.new == 2 * 6
    now = (folder / "answers.jsonl").read_text().splitlines()
    assert now[: len(lines) - 12] == [line for line in lines if line not in theirs]
    assert (folder / BEFORE).read_text().splitlines() == theirs
    check_equal(answers(folder), answers(home / "at-once"))


def test_options_that_are_not_given_are_those_of_the_run(home: Path) -> None:
    asked = replace(CompareRequest(out=home / "part-fastv"), retention=(0.1,))
    found = as_in_run(asked, {"out", "retention"})
    assert (found.methods, found.retention) == (("fastv:layer=3",), (0.1,))
    assert (found.questions, found.device, found.figures) == (6, "cpu", asked.figures)
    found = as_in_run(replace(asked, methods=("random",), retention=(1.0,)), {"out", "methods"})
    assert (found.methods, found.retention) == (("random",), (0.5, 0.25))
    assert as_in_run(replace(asked, out=home / "none"), {"out"}).questions is None


def test_complete_cells_and_questions_are_left_out_of_a_run_that_grew(tmp_path: Path) -> None:
    items = [Question(f"q{i}", (Picture("p", Image.new("RGB", (1, 1))),), "?", "a") for i in "012"]
    half, tenth = (Cell(tp.create("uniform", retention=ratio)) for ratio in (0.5, 0.1))
    with Journal(tmp_path / "answers.jsonl") as journal:
        for cell, count in ((Cell(), 3), (half, 2)):
            journal.add(cell.key, {item.id: {"answer": "a"} for item in items[:count]})
    columns = [Cell(), half, tenth]
    assert list(portions(columns, items, journal, grown=False)) == [(columns, items)]
    assert list(portions(columns, items, journal, grown=True)) == [
        ([Cell(), half], items[2:]),
        ([Cell(), tenth], items),
    ]


def test_questions_are_joined_once_each() -> None:
    one, two, three = (Question(name, (), "?", "a") for name in "abc")
    assert joined([two, one], [one, two, three]) == [one, two, three]
    assert joined([two, one], [three, one]) == [two, one, three]


def test_functions_that_differ_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "A = 1\nclass K:\n    @property\n    def f(self):\n        return 1\ndef g():\n    pass\n"
    )
    (tmp_path / "told_apart.py").write_text(text)
    __import__("told_apart")
    first = functions_in(["told_apart.py"])["told_apart.py"]
    assert set(first) == {"", "K.f", "g"}
    for old, new, name in (("A = 1", "A = 3", ""), ("return 1", "return 3", "K.f")):
        (tmp_path / "told_apart.py").write_text(text.replace(old, new))
        _checksums.cache_clear()  # the clock of the files may be coarse
        second = functions_in(["told_apart.py"])["told_apart.py"]
        assert [one for one in first if first[one] != second[one]] == [name]


# --- merging --------------------------------------------------------------------------------------


def test_merged_runs_equal_the_run_made_at_once(home: Path, tmp_path: Path) -> None:
    parts = tuple(home / f"part-{name}" for name in ("unifo", "fastv"))
    outcome = merge(MergeRequest(folders=parts, out=tmp_path / "merged", figures=ALL.figures))
    assert (outcome.status, outcome.notes) == ("complete", ())
    assert outcome.answered == outcome.wanted == len(answers(home / "at-once"))
    check_equal(answers(outcome.folder), answers(home / "at-once"))
    paired = outcome.tables["pairs"]
    assert set(zip(paired["first"], paired["second"], strict=True)) == {ALL.methods}
    assert (outcome.folder / "plots" / "accuracy.png").exists()
    manifest = manifest_of(outcome.folder)
    journal = Journal(outcome.folder / "answers.jsonl")
    assert len(journal.answers) == 7 * 6
    assert len(questions_of(outcome.folder, manifest, journal, []) or ()) == 6
    again = merge(MergeRequest(folders=parts, out=tmp_path / "merged", figures=ALL.figures))
    assert len(Journal(again.folder / "answers.jsonl").answers) == 7 * 6


def test_runs_that_differ_are_not_merged(home: Path, tmp_path: Path) -> None:
    def refused(other: Path, said: str) -> None:
        with pytest.raises(UserError, match=said):
            merge(MergeRequest(folders=(home / "at-once", other), out=tmp_path / "merged"))
        assert not (tmp_path / "merged").exists()

    refused(edited(home, tmp_path / "a", {"dtype": "bfloat16"}), "dtype: float32 there, bfloat16")
    refused(
        edited(home, tmp_path / "b", {}, FASTV),
        r"fastv:layer=3 ran with different code .*fastv.py \(FastV.score",
    )
    refused(edited(home, tmp_path / "c", {}, CORE), "other code: tokenprune/engine")
    refused(home / "small", "other questions")
    refused(home / "at-once", "at least two")
    parts = (home / "part-unifo", home / "part-fastv")
    with pytest.raises(UserError, match="one of the runs"):
        merge(MergeRequest(folders=parts, out=parts[0]))
