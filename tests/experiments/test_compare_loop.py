"""The loop of a comparison, on a runner with synthetic answers."""

import errno
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stand import CELLS, Stand, questions

from tokenprune.encoder import encoder_part
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.experiments.common.files import WriteError, writing
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.compare.loop import run
from tokenprune.signals import Signal


def go(stand: Stand, path: Path, asked: list[Question], batch_size: int = 4) -> Journal:
    with Journal(path) as journal:
        run(stand, CELLS, asked, journal, batch_size=batch_size)
    return journal


def test_cells() -> None:
    assert [str(cell) for cell in CELLS] == [
        "uncompressed",
        *(
            f"{name} at {r}"
            for name in ("uniform", "fastv:layer=3", "globalcom2")
            for r in (1, 0.5, 0.1)
        ),
    ]
    assert len({cell.key for cell in CELLS}) == 7, "the cells at R = 1 are one"
    assert len(cells(["uniform", "uniform", "fastv", "fastv:layer=2"], [0.5, 0.5])) == 3
    assert [str(cell) for cell in cells(["uniform"], [0.1, 0.5])] == [
        "uncompressed",
        "uniform at 0.5",
        "uniform at 0.1",
    ]
    fixed = cells(["uniform", "uniform@0.3", "globalcom2@0.5 + fastv@0.5"], [0.5, 0.1])
    assert [str(cell) for cell in fixed[3:]] == [
        "uniform at 0.3",
        "globalcom2@0.5 + fastv@0.5 at 0.25",
    ]
    with pytest.raises(UserError, match="Did you mean 'fastv'"):
        cells(["fastw"], [0.5])
    with pytest.raises(UserError, match="'layer'"):
        cells(["fastv:layr=3"], [0.5])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_every_image_is_encoded_once_and_every_question_asked_once(
    tmp_path: Path, batch_size: int
) -> None:
    stand, asked = Stand(), questions()
    journal = go(stand, tmp_path / "j", asked, batch_size)
    assert set(stand.encoded.values()) == {1}
    assert len(stand.encoded) == 4
    assert set(stand.asked.values()) == {1}
    assert len(journal.answers) == len(stand.asked) == 7 * 12
    assert stand.signals == {
        frozenset().union(*(cell.compressor.needs for cell in CELLS if cell.compressor))
    }
    for item in asked:
        code = item.images[0].open().getpixel((0, 0))[0]  # type: ignore[index]
        answer = journal.answers["uncompressed", item.id]["answer"]
        assert answer == f"uncompressed {code} {item.question}", "the right image for each question"


def test_methods_inside_the_encoder_encode_separately(tmp_path: Path) -> None:
    """Cells with the same encoder method share one encoding, with the signals of its cells."""
    chain = "tome@0.5 + globalcom2@0.5"
    columns = cells(["uniform", "tome", chain, "downsample"], [1.0, 0.5, 0.1])
    stand, asked = Stand(), questions()
    with Journal(tmp_path / "j") as journal:
        run(stand, columns, asked, journal, batch_size=5)
    assert stand.towers == {
        ("tome", 0.5): 4,
        ("tome", 0.1): 4,
        ("downsample", 0.5): 4,
        ("downsample", 0.1): 4,
    }
    assert set(stand.encoded.values()) == {5}, "once plainly and once each"
    assert stand.signals == {frozenset(), frozenset({Signal("saliency")})}
    assert not journal.failures
    for cell in columns:
        tower = encoder_part(cell.compressor)
        for item in asked:
            code = item.images[0].open().getpixel((0, 0))[0]  # type: ignore[index]
            seen = code if tower is None else 1000 * tower.retention + code
            assert f" {seen} {item.question}" in journal.answers[cell.key, item.id]["answer"]


@pytest.mark.parametrize("stop_after", [0, 1, 6, 7, 8, 15, 20])
def test_interrupted_and_resumed_is_the_same(tmp_path: Path, stop_after: int) -> None:
    asked = questions()
    whole = go(Stand(), tmp_path / "whole", asked)
    with pytest.raises(KeyboardInterrupt):
        go(Stand(stop_after=stop_after), tmp_path / "parts", asked)
    assert len(Journal(tmp_path / "parts").answers) == 4 * stop_after
    rest = Stand()
    parts = go(rest, tmp_path / "parts", asked)
    assert parts.answers == whole.answers
    assert len((tmp_path / "parts").read_text().splitlines()) == 7 * 12, "nothing twice"
    assert sum(rest.asked.values()) == 7 * 12 - 4 * stop_after, "nothing computed again"
    again = Stand()
    go(again, tmp_path / "parts", asked)
    assert not again.encoded
    assert not again.asked


def test_after_a_partial_line_only_its_batch_is_asked_again(tmp_path: Path) -> None:
    asked, path = questions(), tmp_path / "j"
    whole = go(Stand(), path, asked).answers
    path.write_bytes(path.read_bytes()[:-20])
    stand = Stand()
    assert go(stand, path, asked).answers == whole
    assert stand.batches == [4]


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path) -> None:
    asked, path = questions(), tmp_path / "j"
    bad = "fastv:layer=3@0.5"
    journal = go(Stand(failing={bad: RuntimeError("no memory\nat all")}), path, asked)
    (key,) = journal.failures
    assert "layer=3" in key
    assert "retention=0.5" in key
    assert journal.failures[key].error == "RuntimeError: no memory"
    assert "in answer" in journal.failures[key].traceback
    assert len(journal.answers) == 6 * 12
    assert path.read_text().count("Traceback") == 1, "left alone after the first failure"

    rest = Stand()
    journal = go(rest, path, asked)
    assert {label for label, _ in rest.asked} == {bad}
    assert not journal.failures
    assert len(journal.answers) == 7 * 12


def test_an_image_that_cannot_be_encoded_costs_its_questions(tmp_path: Path) -> None:
    journal = go(Stand(fails_to_encode=2), tmp_path / "j", questions(), batch_size=3)
    assert not journal.failures
    assert len(journal.missing) == 7 * 3
    assert len(journal.answers) == 7 * 9, "everything else is answered"


def test_a_full_disk_is_no_failure_of_a_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    append = Journal._append

    def full(self: Journal, records: Any) -> None:
        nonlocal written
        written += 1
        if written > 3:
            with writing(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, records)

    monkeypatch.setattr(Journal, "_append", full)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(WriteError, match="No space left on device"):
        go(Stand(), path, questions())
    monkeypatch.undo()
    journal = Journal(path)
    assert journal.failures == {}
    assert journal.answers
    assert set(go(Stand(), path, questions()).answers) > set(journal.answers)


def test_one_warning_per_cell(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        go(Stand(warns="views"), tmp_path / "j", questions())
    assert len(caught) == 7
    assert all(warning.category is RetentionWarning for warning in caught)


def test_a_question_with_several_images(tmp_path: Path) -> None:
    a, b = (Picture(name, Image.new("RGB", (1, 1), (i, 0, 0))) for i, name in enumerate("ab"))
    asked = [
        Question("1", (a, b), "both?", "yes"),
        Question("2", (b,), "b?", "yes"),
        Question("3", (a,), "a?", "yes"),
        Question("4", (a, b), "both again?", "yes"),
    ]
    stand = Stand()
    go(stand, tmp_path / "j", asked, batch_size=1)
    # Once among others and once alone: a model may cut an image into crops only when it is alone.
    assert stand.encoded == {0: 2, 1: 1}
