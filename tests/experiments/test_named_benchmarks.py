"""Benchmarks by name: tiny files in the layouts that their authors publish."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.own_images import own_questions
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.request import CompareRequest, questions_for
from tokenprune.experiments.datasets.benchmarks import BENCHMARKS
from tokenprune.experiments.datasets.wording import Wording

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def picture(root: Path, place: str, width: int = 8) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, 6), "red").save(root / place)


def store(root: Path, place: str, content: Any) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_text(json.dumps(content), encoding="utf-8")


def ten(*answers: str) -> list[str]:
    return [*answers, *[answers[-1]] * (10 - len(answers))]


def gqa(root: Path) -> None:
    questions = {
        "201307251": {
            "question": "Is it red?", "imageId": "n161313", "answer": "yes",
            "fullAnswer": "Yes, it is red.", "types": {"structural": "verify", "semantic": "attr"},
        }
    }  # fmt: skip
    store(root, "questions1.2/testdev_balanced_questions.json", questions)
    picture(root, "images/n161313.jpg")


def textvqa(root: Path) -> None:
    item = {"question_id": 34602, "question": "What brand?", "image_id": "003a8ae2ef43b901",
            "answers": ten("nous les gosses", "dakota"), "set_name": "val"}  # fmt: skip
    store(root, "TextVQA_0.5.1_val.json", {"data": [item], "dataset_type": "val"})
    picture(root, "train_images/003a8ae2ef43b901.jpg")


def vqav2(root: Path) -> None:
    asked = {"image_id": 262148, "question": "Where is he?", "question_id": 262148000}
    answers = [
        {"answer": text, "answer_confidence": "yes", "answer_id": index}
        for index, text in enumerate(ten("down", "at table", "table"), 1)
    ]
    known = {"question_id": 262148000, "image_id": 262148, "answer_type": "other",
             "question_type": "where is the", "multiple_choice_answer": "table",
             "answers": answers}  # fmt: skip
    store(root, "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [asked]})
    store(root, "v2_mscoco_val2014_annotations.json", {"annotations": [known]})
    picture(root, "val2014/COCO_val2014_000000262148.jpg")


def pope(root: Path) -> None:
    name = "COCO_val2014_000000016631.jpg"
    (root / "coco").mkdir()
    for part, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        line = {"question_id": 1, "image": name, "text": "Is there a person?", "label": label}
        (root / "coco" / f"coco_pope_{part}.json").write_text(json.dumps(line) + "\n")
    picture(root, f"val2014/{name}")


def scienceqa(root: Path) -> None:
    common = {"answer": 1, "choices": ["north", "south"], "split": "test", "task": "closed choice",
              "subject": "natural science", "grade": "grade5", "hint": "", "lecture": "",
              "solution": ""}  # fmt: skip
    problems = {
        "5": common | {"question": "Which way?", "image": "image.png", "hint": "See the map."},
        "6": common | {"question": "Without a picture?", "image": None},
    }
    store(root, "problems.json", problems)
    store(root, "pid_splits.json", {"test": ["5", "6"], "val": []})
    picture(root, "images/test/5/image.png")


def mmbench(root: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 6), "red").save(file, "JPEG")
    image = base64.b64encode(file.getvalue()).decode()
    names = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image")
    rows = [
        ("241", "Which is right?", "Look.", "left", "right", "up", "nan", "B", "relation", image),
        ("252", "And now?", "", "yes", "no", "", "", "A", "logic", "241"),
    ]
    lines = ["\t".join(row) for row in (names, *rows)]
    (root / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chartqa(root: Path) -> None:
    for kind, label in (("human", "14"), ("augmented", "0.03")):
        item = {"imgname": f"{kind}.png", "query": "How many bars?", "label": label}
        store(root, f"ChartQA Dataset/test/test_{kind}.json", [item])
        picture(root, f"ChartQA Dataset/test/png/{kind}.png")


def docvqa(root: Path) -> None:
    item = {"questionId": 49153, "question": "What is the value?", "docId": 14465,
            "image": "documents/pybv0228_81.png", "answers": ["0.28", ".28"],
            "question_types": ["figure/diagram"], "data_split": "val"}  # fmt: skip
    store(root, "spdocvqa_qas/val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [item]})
    picture(root, "spdocvqa_images/pybv0228_81.png")


MAKE = {
    "gqa": gqa, "textvqa": textvqa, "vqav2": vqav2, "pope": pope, "scienceqa": scienceqa,
    "mmbench": mmbench, "chartqa": chartqa, "docvqa": docvqa,
}  # fmt: skip


EXPECTED: dict[str, tuple[str, list[tuple[str, str, tuple[str, ...], str]]]] = {
    "gqa": ("exact", [("201307251", f"Is it red?\n{WORD}", ("yes",), "verify")]),
    "textvqa": (
        "vqa",
        [("34602", f"What brand?\n{WORD}", ("nous les gosses", *["dakota"] * 9), "other")],
    ),
    "vqav2": (
        "vqa",
        [("262148000", f"Where is he?\n{WORD}", ("down", "at table", *["table"] * 8), "other")],
    ),
    "pope": (
        "yes-no",
        [
            ("random-1", f"Is there a person?\n{WORD}", ("yes",), "random"),
            ("popular-1", f"Is there a person?\n{WORD}", ("no",), "popular"),
            ("adversarial-1", f"Is there a person?\n{WORD}", ("no",), "adversarial"),
        ],
    ),
    "scienceqa": (
        "choice",
        [
            (
                "5",
                f"Context: See the map.\nWhich way?\nA. north\nB. south\n{LETTER}",
                ("B",),
                "natural science",
            )
        ],
    ),
    "mmbench": (
        "choice",
        [
            ("241", f"Look.\nWhich is right?\nA. left\nB. right\nC. up\n{LETTER}", ("B",),
             "relation"),
            ("252", f"And now?\nA. yes\nB. no\n{LETTER}", ("A",), "logic"),
        ],
    ),
    "chartqa": (
        "relaxed",
        [
            ("human-1", f"How many bars?\n{WORD}", ("14",), "human"),
            ("augmented-1", f"How many bars?\n{WORD}", ("0.03",), "augmented"),
        ],
    ),
    "docvqa": (
        "anls",
        [("49153", f"What is the value?\n{WORD}", ("0.28", ".28"), "figure/diagram")],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:1 of 2 questions of ScienceQA")
@pytest.mark.parametrize("name", MAKE)
def test_the_files_of_the_authors(name: str, tmp_path: Path) -> None:
    MAKE[name](tmp_path)
    request = CompareRequest(benchmark=name, root=tmp_path)
    found: list[Question] = questions_for(request)
    metric, expected = EXPECTED[name]
    assert [(item.id, item.question, item.answers, item.kind) for item in found] == expected
    assert {item.metric for item in found} == {metric}
    assert {item.max_new_tokens for item in found} == {128 if name == "docvqa" else 16}
    assert all(picture.open().height == 6 for item in found for picture in item.images)


def test_every_benchmark_has_a_case() -> None:
    assert MAKE.keys() == EXPECTED.keys() == BENCHMARKS.keys()


def test_an_image_is_encoded_once_for_all_its_questions(tmp_path: Path) -> None:
    mmbench(tmp_path)
    one, two = questions_for(CompareRequest(benchmark="mmbench", root=tmp_path))
    assert one.image_id == two.image_id


def test_questions_without_images_are_named(tmp_path: Path) -> None:
    scienceqa(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 questions of ScienceQA have no image"):
        questions_for(CompareRequest(benchmark="scienceqa", root=tmp_path))


def test_a_split_and_other_wording(tmp_path: Path) -> None:
    pope(tmp_path)
    (item,) = own_questions(
        (), None, benchmark="pope", root=tmp_path, split="popular", wording=Wording(suffix="")
    )
    assert (item.id, item.question) == ("popular-1", "Is there a person?")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"benchmark": "popee"}, "Did you mean 'pope'"),
        ({"split": "hard"}, "no split of POPE is called 'hard'"),
        ({"root": None}, "--benchmark and --root belong together"),
        ({"benchmark": None}, "--benchmark and --root belong together"),
        ({"root": Path("nowhere")}, "the folder --root 'nowhere' does not exist"),
        ({"benchmark": "gqa"}, "testdev_balanced_questions.json is not in"),
        ({"benchmark": "mmbench"}, r"expected one file mmbench_dev\*\.tsv"),
        ({"data": Path("my.jsonl")}, "give --benchmark without images and --data"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    pope(tmp_path)
    given = {"benchmark": "pope", "root": tmp_path} | changes
    with pytest.raises(UserError, match=said):
        questions_for(CompareRequest(**given))


def test_another_layout_is_refused(tmp_path: Path) -> None:
    gqa(tmp_path)
    store(tmp_path, "questions1.2/testdev_balanced_questions.json", {"1": {"question": "?"}})
    with pytest.raises(UserError, match=r"not as its authors publish it \(KeyError: 'imageId'\)"):
        questions_for(CompareRequest(benchmark="gqa", root=tmp_path))
