"""Questions of users: forms of files and folders, wording, and samples."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.own_images import own_questions
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.datasets import packed
from tokenprune.experiments.datasets.files import read_data
from tokenprune.experiments.datasets.records import sampled
from tokenprune.experiments.datasets.wording import Wording

SIZES = {"red": (8, 6), "blue": (10, 6)}


def encoded(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", SIZES[colour], colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in SIZES:
        (tmp_path / f"{colour}.png").write_bytes(encoded(colour))
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "red.png", "question": "What colour?", "answers": ["red", "Red", "red"]},
    {"id": "b", "images": ["red.png", "blue.png"], "question": "Which?", "answer": "the first"},
    {"id": "c", "image": "blue.png", "question": "Warm?", "answer": "no", "choices": ["yes", "no"],
     "metric": "choice", "max_new_tokens": 3, "kind": "warmth", "place": [0.5, 1]},
]  # fmt: skip


def write(folder: Path, ending: str) -> Path:
    """`ROWS` in a file of that form."""
    path = folder / f"my{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    elif ending == ".parquet":
        pd.DataFrame(ROWS).to_parquet(path)
    else:
        names = list(dict.fromkeys(name for row in ROWS for name in row))
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.writer(file, delimiter="," if ending == ".csv" else "\t")
            table.writerow(names)
            for row in ROWS:
                cells = [row.get(name, "") for name in names]
                table.writerow([json.dumps(c) if isinstance(c, list) else c for c in cells])
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_form_of_a_file_gives_the_same_questions(folder: Path, ending: str) -> None:
    first, second, third = read_data(write(folder, ending))
    assert (first.answer, first.answers) == ("red", ("red", "Red", "red"))
    assert [picture.open().size for picture in second.images] == [(8, 6), (10, 6)]
    assert second.modality == "multi-image"
    assert third.question == "Warm?\nA. yes\nB. no"
    assert (third.choices, third.metric, third.max_new_tokens) == (("yes", "no"), "choice", 3)
    assert (third.kind, third.place) == ("warmth", (0.5, 1.0))


def stored(colour: str) -> dict[str, Any]:
    return {"bytes": encoded(colour), "path": None}


def test_images_inside_a_parquet_file_are_read_when_needed(folder: Path) -> None:
    rows = [
        {"image": stored("red"), "question": "One?", "answer": "1"},
        {"image": stored("blue"), "question": "Two?", "answer": "2"},
        {"image": stored("red"), "question": "Three?", "answer": "3"},
    ]
    path = folder / "my.parquet"
    pd.DataFrame(rows).to_parquet(path, row_group_size=2)
    found = read_data(path)
    assert [item.images[0].open().size for item in found] == [(8, 6), (10, 6), (8, 6)]
    assert found[0].image_id == found[2].image_id != found[1].image_id
    assert [item.id for item in found] == ["row-1", "row-2", "row-3"]
    several = pd.DataFrame([{"images": [stored("red"), stored("blue")], "question": "?"}])
    several.to_parquet(path)
    (item,) = read_data(path, needs_answers=False)
    assert [picture.open().size for picture in item.images] == [(8, 6), (10, 6)]


def test_a_broken_image_inside_a_file_is_a_fault_of_its_question(folder: Path) -> None:
    rows = [
        {"image": {"bytes": content, "path": None}, "question": "?", "answer": "a"}
        for content in (encoded("red"), b"no image", None)
    ]
    path = folder / "my.parquet"
    pd.DataFrame(rows).to_parquet(path)
    with pytest.raises(UserError, match=r"2 rows of .*my\.parquet cannot be used"):
        read_data(path)
    good, broken, empty = read_data(path, keep_faulty=True)
    assert not good.fault
    assert "row 2" in broken.fault
    assert "row 3" in empty.fault
    assert fingerprint([good, broken, empty])


def test_a_data_set_on_disk(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [encoded("red"), encoded("blue")],
        "question": ["One?", "Two?"],
        "answers": [["1", "one"], ["2"]],
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(folder / "single")
    one, two = read_data(folder / "single")
    assert (one.images[0].open().size, two.images[0].open().size) == ((8, 6), (10, 6))
    assert one.answers == ("1", "one")
    both = datasets.DatasetDict({"val": made, "test": made.select([1])})
    both.save_to_disk(folder / "both")
    with pytest.raises(UserError, match=r"splits val, test; choose one with --split"):
        read_data(folder / "both")
    (item,) = read_data(folder / "both", split="test")
    assert item.question == "Two?"
    assert item.images[0].open().size == (10, 6)


def test_without_the_package_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "set").mkdir()
    (folder / "set" / "state.json").write_text("{}")
    monkeypatch.setattr(packed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; run pip install"):
        read_data(folder / "set")


def test_folders(folder: Path) -> None:
    for name in ("cat/one", "dog/two"):
        (folder / "animals" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "animals" / f"{name}.png").write_bytes(encoded("red"))
    found = read_data(folder / "animals", prompt="Which animal?")
    assert [(item.id, item.answer) for item in found] == [
        ("cat/one.png", "cat"),
        ("dog/two.png", "dog"),
    ]
    with pytest.raises(UserError, match="--prompt"):
        read_data(folder / "animals")
    lines = [{"file_name": "cat/one.png", "question": "What?", "answer": "a cat"}]
    (folder / "animals" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (item,) = read_data(folder / "animals")
    assert (item.image_id, item.answer) == ("cat/one.png", "a cat")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds no data set"):
        read_data(folder / "empty")


def test_shards_of_a_split(folder: Path) -> None:
    for split, count in (("train", 1), ("test", 2)):
        for shard in range(count):
            rows = [{"image": stored("red"), "question": f"{split} {shard}", "answer": "1"}]
            name = f"{split}-{shard:05d}-of-{count:05d}.parquet"
            pd.DataFrame(rows).to_parquet(folder / name)
    with pytest.raises(UserError, match=r"splits test, train; choose one"):
        read_data(folder)
    assert [item.question for item in read_data(folder, split="test")] == ["test 0", "test 1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": "red"}, "'answers' must be a non-empty list"),
        ({"answers": []}, "'answers' must be a non-empty list"),
        ({"answers": ["red", None]}, "'answers' must be a non-empty text"),
        ({"answer": "green", "answers": ["red"]}, "'answer' is not among 'answers'"),
        ({"choices": {}}, "'choices' must be a non-empty list"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be a whole number"),
        ({"max_new_tokens": True}, "'max_new_tokens' must be a whole number"),
        ({"metric": 5.5, "answers": [""]}, "'answers' must be"),
    ],
)
def test_bad_fields_are_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    path = folder / "my.jsonl"
    path.write_text(json.dumps({"image": "red.png", "question": "?", **changes}))
    with pytest.raises(UserError, match=f"my.jsonl, line 1: {said}"):
        read_data(path, needs_answers=False)


def test_bad_tables(folder: Path) -> None:
    path = folder / "my.csv"
    path.write_text("image,question,answers\nred.png,?,red\n")
    with pytest.raises(UserError, match="row 1: 'answers' must be a list as in JSON"):
        read_data(path)
    path.write_bytes(b"image,question,answer\nred.png,\xff,red\n")
    with pytest.raises(UserError, match="Expected UTF-8 with a header line"):
        read_data(path)
    (folder / "my.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot read the data file"):
        read_data(folder / "my.parquet")


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_is_random_ordered_and_grows() -> None:
    names = [f"question {index}" for index in range(400)]
    small, large = (sampled(names, count, 7, str) for count in (20, 60))
    assert set(small) < set(large)
    assert small == sorted(small, key=names.index)
    assert sampled(names[::-1], 20, 7, str) == small[::-1]
    assert sampled(names, 20, 8, str) != small
    assert sampled(names, 2, None, str) == names[:2]
    # The mean place of 60 of 400 is 199.5 with a standard deviation of 13.7.
    mean = sum(map(names.index, large)) / 60
    assert abs(mean - 199.5) < 4 * 13.7


def test_your_own_questions_are_sampled_with_the_seed(folder: Path) -> None:
    path = folder / "my.jsonl"
    lines = [{"image": "red.png", "question": f"{i}?", "answer": "a"} for i in range(50)]
    path.write_text("\n".join(map(json.dumps, lines)))
    drawn = [
        [item.question for item in own_questions((), path, count=10, seed=seed)] for seed in (0, 1)
    ]
    assert drawn[0] != drawn[1]
    assert drawn[0] != [f"{index}?" for index in range(10)]
    assert drawn[0] == [item.question for item in own_questions((), path, count=10, seed=0)]


# --- wording --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wording", "expected"),
    [
        (Wording(), "Which?\nA. red\nB. blue"),
        (Wording(suffix="Say the letter."), "Which?\nA. red\nB. blue\nSay the letter."),
        (Wording(template="Question: {question} Short answer:"), "Question: Which? Short answer:"),
        (
            Wording("{choices}\n{question}", "Say it."),
            "A. red\nB. blue\nWhich?\nSay it.",
        ),
        (Wording(suffix="").over(Wording(suffix="Say it.")), "Which?\nA. red\nB. blue"),
        (Wording().over(Wording(suffix="Say it.")), "Which?\nA. red\nB. blue\nSay it."),
    ],
)
def test_wording(wording: Wording, expected: str) -> None:
    assert wording.applied("Which?", ("red", "blue")) == expected


def test_a_question_with_braces_stays_as_it_is() -> None:
    assert Wording("{question}!").applied("Is {choices} in {question}?") == (
        "Is {choices} in {question}?!"
    )


def test_a_template_marks_the_question() -> None:
    with pytest.raises(UserError, match=r"\{question\}"):
        Wording("What is it?")


def test_the_fingerprint_has_all_that_changes_an_answer(folder: Path) -> None:
    (item,) = read_data(write(folder, ".jsonl"), count=1)

    def changed(**fields: Any) -> str:
        return fingerprint([replace(item, **fields)])

    prints = {
        changed(),
        changed(question="Other?"),
        changed(answers=("red",)),
        changed(choices=("red",)),
        changed(max_new_tokens=3),
    }
    assert len(prints) == 5
    assert changed(metric="vqa") == changed(), "another metric scores the same answers"
    plain = Question("a", item.images, "?", "red")
    assert fingerprint([plain]) == fingerprint([Question("a", item.images, "?", "red")])
