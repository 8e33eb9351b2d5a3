"""Failures in a comparison: of questions, of methods, and of methods that write to their input."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Picture, Question, held_out
from tokenprune.experiments.common.summary import compared, summarise
from tokenprune.experiments.compare.loop import run
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.experiments.compare.sharing import together
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

CELLS = cells(["uniform", "fastv", "globalcom2"], [0.5])
UNIFORM, FASTV = CELLS[1].key, CELLS[2].key


def questions(count: int = 12) -> list[Question]:
    pictures = [Picture(f"p{i}", Image.new("RGB", (1, 1), (i, 0, 0))) for i in range(count)]
    return [Question(f"q{i}", (pictures[i],), f"question {i}?", "yes") for i in range(count)]


@dataclass
class Stand:
    """Answers, and raises the given errors for some cells and questions ("*" means any)."""

    raises: dict[tuple[str, str], BaseException | Callable[[], None]] = field(default_factory=dict)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: list[tuple[str, int]] = field(default_factory=list)
    encoded: Counter[int] = field(default_factory=Counter)
    torn: frozenset[int] = frozenset()

    def encode(self, items: Sequence[Question], *_: Any) -> list[list[int]]:
        codes = [item.images[0].open().getpixel((0, 0))[0] for item in items]  # type: ignore[index]
        if self.torn.intersection(codes):
            raise OSError("image file is truncated")
        self.encoded.update(codes)
        return [[code] for code in codes]

    def answer(
        self, compressor: Compressor | None, images: Any, prompts: Sequence[str]
    ) -> list[dict[str, Any]]:
        label = "uncompressed" if compressor is None else compressor.name
        self.calls.append((label, len(prompts)))
        self.asked.update((label, prompt) for prompt in prompts)
        for prompt in prompts:
            for which in ((label, prompt), (label, "*"), ("*", prompt), ("*", "*")):
                what = self.raises.get(which)
                if isinstance(what, BaseException):
                    raise what
                if what is not None:
                    what()
        return [{"answer": f"{label} {prompt}"} for prompt in prompts]


def go(
    stand: Any, path: Path, asked: Sequence[Question], *, batch_size: int = 4, **options: Any
) -> Journal:
    with Journal(path) as journal:
        run(stand, CELLS, asked, journal, batch_size=batch_size, **options)
    again = Journal(path)
    assert (again.answers, again.failures, again.missing) == (
        journal.answers,
        journal.failures,
        journal.missing,
    ), "what is in the file is what happened"
    return journal


def test_a_truncated_image_fails_only_its_question_in_every_cell(tmp_path: Path) -> None:
    asked = questions()
    stand = Stand(torn=frozenset({5}))
    journal = go(stand, tmp_path / "j", asked)
    assert not journal.failures
    assert set(journal.missing) == {(cell.key, "q5") for cell in CELLS}
    assert len(journal.answers) == 4 * 11
    assert {why.error for why in journal.missing.values()} == {
        "OSError: image file is truncated (question 'q5', image 'p5')"
    }
    assert set(stand.encoded.values()) == {1}
    whole = Stand()
    mended = go(whole, tmp_path / "j", asked)
    assert not mended.missing
    assert mended.answers == go(Stand(), tmp_path / "whole", asked).answers
    assert sum(whole.asked.values()) < 4 * 5, "the other batches are not asked again"


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_one_cell_fails_on_one_question(tmp_path: Path, batch_size: int) -> None:
    stand = Stand({("fastv", "question 6?"): ValueError("no such row")})
    journal = go(stand, tmp_path / "j", questions(), batch_size=batch_size)
    assert not journal.failures
    assert list(journal.missing) == [(FASTV, "q6")]
    why = journal.missing[FASTV, "q6"]
    assert why.error == "ValueError: no such row (question 'q6', image 'p6')"
    assert "in answer" in why.traceback
    assert len(journal.answers) == 4 * 12 - 1


def test_successive_bad_questions_do_not_end_a_cell(tmp_path: Path) -> None:
    bad = {("*", f"question {i}?"): RuntimeError("too long") for i in range(5)}
    stand = Stand(dict(bad))
    journal = go(stand, tmp_path / "j", questions())
    assert not journal.failures
    assert len(journal.missing) == 4 * 5
    assert len(journal.answers) == 4 * 7
    # Bad questions are then asked alone: one batch of the others, for every cell.
    assert Counter(stand.calls)["globalcom2", 3] == 1


def test_a_cell_without_answers_ends(tmp_path: Path) -> None:
    stand = Stand({("uniform", "*"): RuntimeError("always")})
    journal = go(stand, tmp_path / "j", questions(40), batch_size=10)
    assert journal.failures == {UNIFORM: journal.failures[UNIFORM]}
    assert journal.failures[UNIFORM].error == "RuntimeError: always"
    assert not journal.missing, "it failed as a whole"
    assert len(journal.answers) == 3 * 40
    tries = [call for call in stand.calls if call[0] == "uniform"]
    assert tries == [("uniform", 10)] + [("uniform", 1)] * 3
    assert (tmp_path / "j").read_text().count("Traceback") == 1


def test_a_run_in_which_every_cell_fails_ends(tmp_path: Path) -> None:
    stand = Stand({("*", "*"): RuntimeError("out of memory")})
    journal = go(stand, tmp_path / "j", questions(100), batch_size=50)
    assert set(journal.failures) == {cell.key for cell in CELLS}
    assert len(stand.calls) == 4 * (1 + 20)


def test_a_cell_that_fails_on_all_of_few_questions_has_failed(tmp_path: Path) -> None:
    stand = Stand({("fastv", "*"): RuntimeError("always")})
    journal = go(stand, tmp_path / "j", questions(2))
    assert list(journal.failures) == [FASTV]
    assert not journal.missing


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")

    __repr__ = __str__


class Own(BaseException):
    """Of a method that does not derive its exceptions from Exception."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (Unprintable(), "Unprintable: (its message cannot be printed)"),
        (Own("stop"), "Own: stop"),
        (MemoryError(), "MemoryError"),
        (ValueError("one\ntwo"), "ValueError: one"),
    ],
)
def test_any_exception_is_an_ordinary_failure(
    tmp_path: Path, error: BaseException, said: str
) -> None:
    journal = go(Stand({("fastv", "*"): error}), tmp_path / "j", questions())
    assert journal.failures[FASTV].error == said
    assert "in answer" in journal.failures[FASTV].traceback
    assert len(journal.answers) == 3 * 12


def test_the_user_interrupts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(Stand({("fastv", "*"): KeyboardInterrupt()}), tmp_path / "j", questions())


def test_a_method_that_hangs_is_stopped(tmp_path: Path) -> None:
    def hang() -> None:
        time.sleep(60)

    stand = Stand({("fastv", "question 2?"): hang})
    journal = go(stand, tmp_path / "j", questions(4), timeout=0.1)
    assert list(journal.missing) == [(FASTV, "q2")]
    why = journal.missing[FASTV, "q2"]
    assert why.error.startswith("TimeLimit: took longer than 0.1 s")
    assert "in hang" in why.traceback


def test_tables_say_what_is_missing_and_pairs_use_what_both_have(tmp_path: Path) -> None:
    asked = questions()
    stand = Stand(
        {("fastv", "question 0?"): ValueError("a"), ("uniform", "question 1?"): ValueError("b")}
    )
    journal = go(stand, tmp_path / "j", asked)
    rows = answers_frame("m", CELLS, asked, journal)
    assert Counter(rows["status"]) == {"ok": 4 * 12 - 2, "missing": 2}
    gone = rows[rows["status"] == "missing"].set_index("label")
    assert list(gone["question_id"]) == ["q1", "q0"]
    assert gone["correct"].isna().all()
    # fastv is right on q1 .. q5, uniform on q0, q2 and q11.
    right = {"fastv": {1, 2, 3, 4, 5}, "uniform": {0, 2, 11}}
    index = rows["question_id"].str[1:].astype(int)
    for label, ids in right.items():
        here = (rows["label"] == label) & (rows["status"] == "ok")
        rows.loc[here, "correct"] = index[here].isin(ids)
        rows.loc[here, "score"] = index[here].isin(ids).astype(float)
    table = summarise(rows, seed=0).set_index("label")
    assert list(table.loc["fastv", ["status", "n", "missing"]]) == ["ok", 11, 1]
    assert list(table.loc["uncompressed", ["status", "n", "missing"]]) == ["ok", 12, 0]
    assert table.loc["fastv", "accuracy"] == pytest.approx(5 / 11)
    assert table.loc["fastv", "vs_uniform"] == pytest.approx((4 - 2) / 10)  # without q0 and q1
    found = compared(rows[rows["label"] == "fastv"], rows[rows["label"] == "uniform"], seed=0)
    assert (found["n"], found["only_first"], found["only_second"]) == (10, 3, 1)


# --- methods that write to what they are shown, on the testbed ------------------------------------


@dataclass(frozen=True, kw_only=True)
class Writer(Compressor):
    """Uniform, after it has normalised its input in place."""

    how: str
    name = "writer"

    def select(self, tokens: VisualTokens) -> Selection:
        features = tokens.features
        if self.how == "in place":
            features.div_(features.norm(dim=-1, keepdim=True))
        elif self.how == "data":
            features.data.div_(features.norm(dim=-1, keepdim=True))
        elif self.how == "numpy":
            features.numpy()[:] /= 2
        elif self.how == "and raises":
            features.data.mul_(2)
            raise SystemExit(1)
        elif self.how == "layout":
            tokens.layout.canvas_row.data.add_(1)
        return tp.create("uniform", retention=self.retention).select(tokens)


@dataclass(frozen=True, kw_only=True)
class LateWriter(Writer):
    """The same inside the language model, with signals of the vision encoder."""

    stage = Stage.LLM
    name = "late-writer"

    @property
    def cuts(self) -> tuple[int, ...]:
        return (2,)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("saliency")})

    def select(self, tokens: VisualTokens) -> Selection:
        values = tokens[Signal("saliency")]
        (values.data if self.how == "data" else values).mul_(-1)
        return tp.create("uniform", retention=self.retention).select(tokens)


OTHERS = cells(["uniform", "globalcom2", "fastv"], [0.25])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def alone(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    with Journal(tmp_path_factory.mktemp("alone") / "j") as journal:
        ask(pipe, OTHERS, journal)
    return journal.answers


def ask(pipe: Pipeline, columns: Sequence[Cell], journal: Journal) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the shared work of cells")
        runner = ModelRunner(pipe, max_new_tokens=3)
        run(runner, columns, held_out(5, 0), journal, batch_size=5, plan=together)


@pytest.mark.parametrize(
    "writer",
    [
        *(
            Writer(retention=0.25, how=how)
            for how in ("in place", "data", "numpy", "and raises", "layout")
        ),
        LateWriter(retention=0.25, how="in place"),
        LateWriter(retention=0.25, how="data"),
    ],
    ids=lambda writer: f"{writer.name} {writer.how}",
)
def test_a_method_that_writes_fails_and_others_are_unaffected(
    pipe: Pipeline, alone: dict[Any, Any], tmp_path: Path, writer: Compressor
) -> None:
    bad = Cell(writer)
    with Journal(tmp_path / "j") as journal:
        ask(pipe, [OTHERS[0], bad, *OTHERS[1:]], journal)
    assert list(journal.failures) == [bad.key]
    assert not journal.missing
    why = journal.failures[bad.key]
    if writer.how == "and raises":  # type: ignore[attr-defined]
        assert why.error == "SystemExit: 1"
    else:
        assert "wrote to" in why.error
        assert "(question '" in why.error
        assert "', image '" in why.error
    assert journal.answers.keys() == alone.keys()
    for row, record in alone.items():
        got = journal.answers[row]
        assert got["answer"] == record["answer"], row
        assert got["kept_patches"] == record["kept_patches"]
        assert got["kl"] == pytest.approx(record["kl"], abs=1e-5)


def test_what_is_missing_is_in_the_manifest_and_on_the_screen(
    pipe: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tokenprune.experiments.common.request import CompareRequest
    from tokenprune.experiments.compare import command

    image = held_out(12, 0)[-1].images[0]
    bad = [item.id for item in held_out(12, 0) if item.image_id == image.id]
    uniform = type(tp.create("uniform", retention=0.5))
    original, seed = uniform.select, pipe.encode([image.open()])[0].seed

    def picky(self: Any, tokens: VisualTokens) -> Selection:
        if tokens.seed == seed:
            raise RuntimeError("no way")
        return original(self, tokens)

    monkeypatch.setattr(uniform, "select", picky)
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    request = CompareRequest(
        methods=("uniform",), retention=(0.5,), questions=12, batch_size=4, out=tmp_path / "run"
    )
    assert command._compare(request) == 1
    said = capsys.readouterr().out
    assert 0 < len(bad) < 12
    assert f"Answers missing: {len(bad)}; questions: {len(bad)}." in said
    assert f"MISSING {bad[0]!r} in uniform at 0.5: RuntimeError: no way" in said
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert list(manifest["missing"]) == bad
    assert "no way" in manifest["missing"][bad[0]]["uniform at 0.5"]
    table = pd.read_csv(tmp_path / "run" / "summary.csv").set_index(["label", "kind"])
    assert list(table.loc[("uniform", "overall"), ["n", "missing"]]) == [12 - len(bad), len(bad)]
    monkeypatch.undo()
    assert command._compare(request) == 0
    assert "MISSING" not in capsys.readouterr().out
