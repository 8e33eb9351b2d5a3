"""Benchmarks by name, in the files that their authors publish.

Each comes with its metric, with the line that papers about LLaVA append to its questions, and with
the usual maximum length of an answer (the sources are docs/Evaluation.md of LLaVA and the task
files of lmms-eval).
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.datasets.packed import Bytes
from tokenprune.experiments.datasets.records import Records
from tokenprune.experiments.datasets.wording import Wording

__all__ = ["BENCHMARKS", "Benchmark", "benchmark_records"]


_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_CN = "请直接回答选项字母。"


Rows = Iterator[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark in the files of its authors.

    Attributes:
        title: Its name in papers.
        splits: The splits that have answers; the first one is the default.
        metric: The name of its metric.
        read: Makes the records of a split, from the folder and the name of the split.
        suffix: The last line of its prompts.
        max_new_tokens: Maximum length of an answer.
    """

    title: str
    splits: tuple[str, ...]
    metric: str
    read: Callable[[Path, str], Rows]
    suffix: str = _WORD
    max_new_tokens: int = 16


def benchmark_records(name: str, root: Path, split: str | None = None) -> Records:
    """The records of a benchmark.

    Args:
        name: One of `BENCHMARKS`.
        root: The folder with its files.
        split: One of its splits; None for the usual one.

    Raises:
        UserError: The name or split is unknown, or a file is missing or damaged.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    found = BENCHMARKS[name]
    split = found.splits[0] if split is None else split
    if split not in found.splits:
        raise unknown(f"split of {found.title}", split, found.splits)
    if not os.path.isdir(root):  # os.path: no error for a name that is too long
        raise UserError(f"the folder --root {str(root)!r} does not exist; give that of the files.")
    try:
        rows = list(found.read(root, split))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"a file of {found.title} in {str(root)!r} is not as its authors publish it "
            f"({type(error).__name__}: {error}); download it again."
        ) from error
    common = {"metric": found.metric, "max_new_tokens": found.max_new_tokens}
    entries = [(number, common | row) for number, row in enumerate(rows, 1)]
    suffix = _LETTER_CN if split.endswith("_cn") else found.suffix
    return Records(root, root, entries, "row", wording=Wording(suffix=suffix))


# --- files ----------------------------------------------------------------------------------------


def _file(root: Path, folders: Sequence[str], *names: str) -> Path:
    """The first of the files ``names`` that is in one of ``folders``.  Raises `UserError`."""
    for folder in folders:
        for name in names:
            if (root / folder / name).is_file():
                return root / folder / name
    raise UserError(
        f"{' or '.join(names)} is not in {str(root)!r}, nor in its folders "
        f"{', '.join(folder for folder in folders if folder != '.')}; give the folder with the "
        "files of the benchmark as --root."
    )


def _folder(root: Path, *names: str) -> str:
    """The first of the folders ``names`` that exists.  Raises `UserError`."""
    for name in names:
        if (root / name).is_dir():
            return name
    raise UserError(
        f"there is no folder of images in {str(root)!r}; it is called {' or '.join(names)}."
    )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r}: {error}; download it again.") from error


# --- the benchmarks -------------------------------------------------------------------------------


def _gqa(root: Path, split: str) -> Rows:
    folders = (".", "questions1.2", "questions", "data")
    file = _file(root, folders, f"{split}_balanced_questions.json")
    images = _folder(root, "images", "data/images")
    for name, item in _json(file).items():
        yield {
            "id": name,
            "image": f"{images}/{item['imageId']}.jpg",
            "question": item["question"],
            "answer": item["answer"],
            "kind": item.get("types", {}).get("structural") or "other",
        }


def _textvqa(root: Path, split: str) -> Rows:
    file = _file(root, (".", "annotations"), f"TextVQA_0.5.1_{split}.json")
    images = _folder(root, "train_images", "train_val_images/train_images", "images")
    for item in _json(file)["data"]:
        yield {
            "id": item["question_id"],
            "image": f"{images}/{item['image_id']}.jpg",
            "question": item["question"],
            "answers": item["answers"],
        }


def _vqav2(root: Path, split: str) -> Rows:
    folders = (".", "annotations", "questions")
    asked = _json(_file(root, folders, f"v2_OpenEnded_mscoco_{split}2014_questions.json"))
    known = _json(_file(root, folders, f"v2_mscoco_{split}2014_annotations.json"))
    images = _folder(root, f"{split}2014", f"images/{split}2014")
    answers = {item["question_id"]: item for item in known["annotations"]}
    for item in asked["questions"]:
        found = answers[item["question_id"]]
        yield {
            "id": item["question_id"],
            "image": f"{images}/COCO_{split}2014_{item['image_id']:012d}.jpg",
            "question": item["question"],
            "answers": [one["answer"] for one in found["answers"]],
            "kind": found["answer_type"],
        }


def _pope(root: Path, split: str) -> Rows:
    images = _folder(root, "val2014", "images/val2014", "images")
    for part in _POPE if split == "all" else (split,):
        file = _file(root, (".", "coco", "output/coco"), f"coco_pope_{part}.json")
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip():
                item = json.loads(line)
                yield {
                    "id": f"{part}-{item['question_id']}",
                    "image": f"{images}/{item['image']}",
                    "question": item["text"],
                    "answer": item["label"],
                    "kind": part,
                }


def _scienceqa(root: Path, split: str) -> Rows:
    folders = (".", "data/scienceqa", "data")
    file = _file(root, folders, "problems.json")
    problems = _json(file)
    names = _json(_file(root, folders, "pid_splits.json"))[split]
    shown = [name for name in names if problems[name].get("image")]
    if len(shown) < len(names):
        warnings.warn(
            f"{len(names) - len(shown)} of {len(names)} questions of ScienceQA have no image and "
            "are left out.",
            UserWarning,
            stacklevel=2,
        )
    inside = file.parent.relative_to(root).as_posix()
    for name in shown:
        item = problems[name]
        place = f"{item['split']}/{name}/{item['image']}"
        near = [f"{inside}/images/{place}", f"{inside}/{place}", f"images/{place}"]
        hint = item.get("hint")
        yield {
            "id": name,
            "image": next((path for path in near if (root / path).is_file()), near[0]),
            "question": f"Context: {hint}\n{item['question']}" if hint else item["question"],
            "choices": item["choices"],
            "answer": ascii_uppercase[item["answer"]],
            "kind": item["subject"],
        }


def _mmbench(root: Path, split: str) -> Rows:
    """The TSV file has the images as base64, or the index of the row that has the image."""
    import pandas as pd

    named = f"mmbench_{split}"
    there = {file: file.stem.lower() for file in sorted(root.glob("*.tsv"))}
    files = [file for file, name in there.items() if name.startswith(named)]
    if not split.endswith("_cn"):
        files = [file for file in files if "_cn" not in there[file]]
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"expected one file {named}*.tsv in {str(root)!r}, found {found}; choose one with "
            "--split (dev, dev_en or dev_cn), or move the others."
        )
    table = pd.read_csv(files[0], sep="\t", dtype=str, keep_default_na=False)
    rows: list[dict[str, str]] = table.to_dict("records")
    packed = {row["index"]: row["image"] for row in rows}
    for row in rows:
        choices = [row[letter] for letter in "ABCD" if _filled(row.get(letter))]
        hint = row.get("hint", "")
        yield {
            "id": row["index"],
            "image": _decoded(packed.get(row["image"], row["image"])),
            "question": f"{hint}\n{row['question']}" if _filled(hint) else row["question"],
            "choices": choices,
            "answer": row["answer"],
            "kind": row.get("category") or "other",
        }


def _filled(cell: str | None) -> bool:
    return cell is not None and cell.strip().lower() not in ("", "nan", "none")


def _decoded(text: str) -> Bytes:
    try:
        return Bytes(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise UserError(
            f"an image of MMBench is not base64 ({error}); download the file again."
        ) from error


def _chartqa(root: Path, split: str) -> Rows:
    inside = _folder(root, split, f"ChartQA Dataset/{split}")
    for kind in ("human", "augmented"):
        file = _file(root, (inside,), f"{split}_{kind}.json")
        for number, item in enumerate(_json(file), 1):
            yield {
                "id": f"{kind}-{number}",
                "image": f"{inside}/png/{item['imgname']}",
                "question": item["query"],
                "answer": item["label"],
                "kind": kind,
            }


def _docvqa(root: Path, split: str) -> Rows:
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    file = _file(root, (".", "spdocvqa_qas", "qas", split), *names)
    images = _folder(root, "spdocvqa_images", "documents", f"{split}/documents", "images")
    for item in _json(file)["data"]:
        yield {
            "id": item["questionId"],
            "image": f"{images}/{Path(item['image']).name}",
            "question": item["question"],
            "answers": item["answers"],
            "kind": next(iter(item.get("question_types") or ()), "other"),
        }


_POPE = ("random", "popular", "adversarial")


BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": Benchmark("GQA", ("testdev", "val", "train"), "exact", _gqa),
    "textvqa": Benchmark("TextVQA", ("val", "train"), "vqa", _textvqa),
    "vqav2": Benchmark("VQAv2", ("val", "train"), "vqa", _vqav2),
    "pope": Benchmark("POPE", ("all", *_POPE), "yes-no", _pope),
    "scienceqa": Benchmark(
        "ScienceQA",
        ("test", "val", "minitest", "minival", "train"),
        "choice",
        _scienceqa,
        _LETTER,
    ),
    "mmbench": Benchmark("MMBench", ("dev", "dev_en", "dev_cn"), "choice", _mmbench, _LETTER),
    "chartqa": Benchmark("ChartQA", ("test", "val", "train"), "relaxed", _chartqa),
    "docvqa": Benchmark("DocVQA", ("val", "train"), "anls", _docvqa, max_new_tokens=128),
}
"""Name to benchmark."""
