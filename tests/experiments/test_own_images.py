"""Images of a user's own: files, folders, patterns and data files, in every command."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame, measured
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.own_images import (
    PROMPT,
    image_files,
    own_questions,
    with_answers,
)
from tokenprune.experiments.common.questions import Question, held_out
from tokenprune.experiments.common.reading import manifest_of, questions_of
from tokenprune.experiments.complementarity.run import relative
from tokenprune.experiments.crop_importance.run import DropCrop, drops
from tokenprune.experiments.masks.prompts import prompts
from tokenprune.experiments.masks.run import MasksRequest
from tokenprune.experiments.positional_bias.run import PositionalBiasRequest, _questions


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the folder ``photos`` of three images and other files."""
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for index, name in enumerate(("b.png", "a.JPG", "trip/c.png")):
        Image.new("RGB", (40, 30), (9 * index, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "questions.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["photos/b.png"], ["photos/b.png"]),
        (["photos"], ["photos/a.JPG", "photos/b.png"]),
        (["photos/*"], ["photos/a.JPG", "photos/b.png"]),
        (["photos/*.png"], ["photos/b.png"]),
        (["photos/**/*.png"], ["photos/b.png", "photos/trip/c.png"]),
        (["photos/[bc].png", "photos"], ["photos/b.png", "photos/a.JPG"]),
        (["photos/trip", "photos/b.png"], ["photos/trip/c.png", "photos/b.png"]),
        (["~/photos/*.png"], ["photos/b.png"]),
        (["nowhere.png"], ["nowhere.png"]),  # opened and refused like any other image
    ],
)
def test_what_words_name(
    photos: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], names: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(photos.parent))
    assert [os.path.relpath(file) for file in image_files(words)] == names


def test_a_file_with_the_signs_of_a_pattern_is_itself(photos: Path) -> None:
    (photos / "b.png").rename(photos / "b[1].png")
    (photos / "b1.png").write_bytes((photos / "b[1].png").read_bytes())
    assert image_files(["photos/b[1].png"]) == [Path("photos/b[1].png")]


WRONG = [
    ("photos/*.webp", "there is no image that matches 'photos/*.webp'"),
    ("empty", "there is no image in the folder 'empty'"),
    ("photos/questions.jsonl", "is a data file; give it with --data"),
    ("https://example.org/a.png", "is a remote address; download it"),
    ("nowhere.png", "there is no image 'nowhere.png'"),
    ("photos/notes.txt", "cannot decode the image 'photos/notes.txt'"),
    ("photos --data photos/questions.jsonl", "give either images or --data, not both"),
    ("photos --images 9", "fewer than the 9 asked for"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_every_command_says_the_same(photos: Path, words: str, said: str) -> None:
    (photos.parent / "empty").mkdir()
    for command in ("positional-bias", "masks", "complementarity", "crop-importance"):
        if command in ("complementarity", "crop-importance"):
            words = words.replace("--images", "--questions")
        given = [command, *words.split(), "--prompt", "What?", "--out", "out"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 2, (command, result.output)
        assert said in " ".join(result.stderr.split()), command


@pytest.mark.parametrize(
    "command", ["positional-bias", "masks", "complementarity", "crop-importance"]
)
def test_a_prompt_needs_images(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--prompt", "What?"])
    assert result.exit_code == 2
    assert "--prompt asks about images of your own" in result.stderr
    empty = CliRunner().invoke(app, [command, "a.png", "--prompt", " "])
    assert "--prompt is empty" in empty.stderr


def test_names_do_not_depend_on_the_place(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = own_questions(["photos", "photos/trip"], None)
    assert [item.id for item in found] == ["a.JPG", "b.png", "trip/c.png"]
    assert {item.question for item in found} == {PROMPT}
    assert not with_answers(found)
    monkeypatch.chdir(photos / "trip")
    again = own_questions(["..", "."], None)
    assert [item.id for item in again] == [item.id for item in found]


def test_a_data_file_without_questions_and_answers(photos: Path) -> None:
    file = photos / "my.jsonl"
    line = {"image": "b.png"}
    file.write_text("\n".join(map(json.dumps, [line, line | {"question": "Which?"}])))
    found = own_questions((), file, "What?")
    assert [(item.question, item.answer) for item in found] == [("What?", ""), ("Which?", "")]
    assert not with_answers(found)
    with pytest.raises(UserError, match=r"line 1: the field 'question' is missing"):
        own_questions((), file)
    with pytest.raises(UserError, match=r"line 1: the field 'answer' is missing"):
        own_questions((), file, "What?", needs_answers=True)
    file.write_text(json.dumps(line | {"answer": "1"}) + "\n" + json.dumps(line))
    with pytest.raises(UserError, match="1 of 2 questions have no answer, the first is 'line-2'"):
        with_answers(own_questions((), file, "What?"))
    (photos / "b.png").unlink()
    file.write_text(json.dumps(line | {"image": "a.JPG"}))
    asked = PositionalBiasRequest(data=file, prompt="What?")
    assert [item.question for item in _questions(asked)[0]] == ["What?"]


def test_positional_bias_of_a_folder(photos: Path) -> None:
    asked = PositionalBiasRequest(paths=[Path("photos/**/*.png")], prompt="Which?", images=1)
    (item,), left_out = _questions(asked)
    assert (item.id, item.question, left_out) == ("b.png", "Which?", 0)


# --- masks ----------------------------------------------------------------------------------------


def test_which_images_share_a_prompt(photos: Path) -> None:
    """Files are one prompt; every image of a folder or a pattern is its own."""

    def shapes(*words: str, **fields: Any) -> list[tuple[int, str | None]]:
        return [
            (len(one.pictures), one.question)
            for one in prompts(MasksRequest(words=words, **fields))
        ]

    files = ("photos/b.png", "photos/a.JPG")
    assert shapes(*files, "Which?") == [(2, "Which?")]
    assert shapes(*files, prompt="Which?") == [(2, "Which?")]
    assert shapes(files[0], files[0], "Same?") == [(2, "Same?")]
    assert shapes("photos", "Which?") == [(1, "Which?")] * 2
    assert shapes("photos/**/*.png") == [(1, None)] * 2
    assert shapes("photos/*.png", "What [colour] is *it*?") == [(1, "What [colour] is *it*?")]
    assert shapes("photos/**/*.png", "Which?", video=True) == [(2, "Which?")]
    assert shapes("photos", images=1) == [(1, None)]
    file = photos / "my.jsonl"
    file.write_text(
        "\n".join(
            map(json.dumps, [{"image": "b.png", "question": "1?", "answer": "1"},
                            {"video": ["a.JPG", "b.png"], "question": "2?"}])
        )
    )  # fmt: skip
    found = prompts(MasksRequest(data=file))
    assert [(one.truth, one.video) for one in found] == [("1", False), (None, True)]


def test_one_figure_for_every_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        "tokenprune.experiments.masks.run.save",
        lambda _, path, *rest: drawn.append(path.name) or [],
    )
    (photos / "a b.png").write_bytes((photos / "b.png").read_bytes())
    (photos / "a-b.png").write_bytes((photos / "b.png").read_bytes())
    words = ["masks", "photos/*.png", "--out", "out", "-m", "uniform", "-r", "0.5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [name for name in drawn if "masks" in name] == ["masks-a-b", "masks-a-b-1", "masks-b"]
    kept = pd.read_csv(tmp_path / "out" / "kept.csv")
    assert list(kept["prompt"].unique()) == ["a b.png", "a-b.png", "b.png"]
    per_prompt = kept[kept["method"] == "uniform"].groupby("prompt")["kept"].sum()
    assert f" {per_prompt.mean():.1f} " in result.stdout
    assert "Kept of 3 prompts" in result.stdout


# --- agreement in place of accuracy ---------------------------------------------------------------


def test_unknown_answers_are_neither_right_nor_easy(tmp_path: Path) -> None:
    item = Question("a", held_out(1, 0)[0].images, "What?", "")
    columns = [Cell(), Cell(name="image-free", without_images=True)]
    with Journal(tmp_path / "answers.jsonl") as journal:
        for column, said in zip(columns, ("a cat", "a dog"), strict=True):
            journal.answers[column.key, item.id] = {"answer": said}
    table = answers_frame("m", columns, [item], journal)
    assert table["correct"].isna().all()
    assert table["easy"].isna().all()
    assert table["agrees"].tolist() == [True, False]
    scored, measure = measured(table)
    assert measure == "agreement"
    assert scored["correct"].tolist() == [True, False]
    known, measure = measured(table.assign(truth="a cat"))
    assert measure == "accuracy"
    assert known["correct"].isna().all()


def cell(label: str, right: list[bool], **more: Any) -> pd.DataFrame:
    frame = {
        "label": label,
        "parameters": more.pop("parameters", ""),
        "question_id": [f"q{i}" for i in range(len(right))],
        "image_id": [f"i{i}" for i in range(len(right))],
        "kind": "other",
        "correct": pd.array(right, dtype="boolean"),
        "kl": [0.5 * (not one) for one in right],
        "status": "ok",
        "kept_patches": 49.0,
        "kept_separators": 1.0,
    }
    return pd.DataFrame(frame | more)


def test_relative_agreement_by_hand() -> None:
    whole, crops = cell("uncompressed", [True] * 4), cell("crops-only", [True, False, False, False])
    table = relative(pd.concat([whole, crops]), seed=0, measure="agreement").set_index("shown")
    assert "accuracy" not in table
    row = table.loc["crops only"]
    assert (row["agreement"], row["relative"], row["whole_agreement"]) == (0.25, 0.25, 1)
    assert row["kl"] == pytest.approx(0.375)
    assert math.isnan(row["p"])
    assert list(table["kind"].unique()) == ["overall"], "one kind needs no rows of its own"


def test_changed_answers_by_hand() -> None:
    dropper = DropCrop(which="highest")
    parameters = Cell(dropper).parameters
    answers = pd.concat(
        [
            cell("uncompressed", [True] * 4),
            cell("without the highest crop", [True, True, False, False], parameters=parameters),
        ]
    )
    crops = pd.DataFrame({"image_id": [f"i{i}" for i in range(4)], "crop": 0})
    crops["dropped highest"] = True
    objects = pd.DataFrame({"question_id": [], "crop": []})
    (row,) = drops(answers, crops, objects, [dropper], seed=0, measure="agreement").to_dict(
        "records"
    )
    assert (row["drop"], row["agreement"], row["kl"]) == (0.5, 0.5, 0.25)
    assert math.isnan(row["p"])


def test_a_run_on_own_images_is_read_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    shown = {item.image_id: item.images[0] for item in held_out(6, seed=0)}
    for name, picture in shown.items():
        picture.open().save(tmp_path / "photos" / f"{name}.png")
    words = ["complementarity", "photos/*.png", "--prompt", "What digit is there?", "--out", "run"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Agreement with the whole image" in " ".join(result.stdout.split())
    assert "true answers are unknown" in result.stdout
    assert "nan" not in result.stdout
    table = pd.read_csv(tmp_path / "run" / "complementarity.csv").set_index("shown")
    answers = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    said = answers.pivot(index="question_id", columns="label", values="answer")
    for label, name in (("crops-only", "crops only"), ("image-free", "no image")):
        same = (said[label].str.casefold() == said["uncompressed"].str.casefold()).mean()
        assert table.loc[name, "agreement"] == pytest.approx(same)
    monkeypatch.chdir("/")
    notes: list[str] = []
    journal = Journal(tmp_path / "run" / "answers.jsonl")
    manifest = manifest_of(tmp_path / "run")
    found = questions_of(tmp_path / "run", manifest, journal, notes)
    assert found is not None
    assert [item.id for item in found] == list(said.index)
    assert not notes
