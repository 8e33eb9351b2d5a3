"""Runs for tests of the report, and a parser of its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run as compare

HOSTILE = "</script><img src=x onerror=noteError('broken')><b>&amp;"


VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """The elements of a page.  Raises if the page is not well-formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.silent: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in {self.open}"

    def handle_data(self, text: str) -> None:
        silent = self.open and self.open[-1] in ("script", "style")
        (self.silent if silent else self.texts).append(text)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(outcome: Outcome) -> Path:
    return outcome.folder / outcome.files[0]


def data_of(path: Path) -> dict[str, Any]:
    """The data that the script of the page receives."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    parsed: dict[str, Any] = json.loads(found[1])
    return parsed


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def rewrite(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "answers.jsonl").write_text(text, encoding="utf-8")


def change(folder: Path, **fields: Any) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def finished_run(folder: Path) -> Path:
    """A finished run of the testbed in ``folder``, with small figures."""
    compare(
        CompareRequest(methods=("uniform", "fastv"), retention=(0.5, 0.1), questions=20, out=folder)
    )
    for file in (folder / "plots").glob("*.png"):  # so that copies are quick
        with Image.open(file) as image:
            image.resize((60, 40)).save(file)
    return folder


def own_run(root: Path) -> Path:
    """A run in ``root`` on data of a user: images of several shapes, several images, a video."""
    for index, size in enumerate([(90, 60), (30, 90), (60, 60)]):
        pixels = np.random.default_rng(index).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    rows: list[dict[str, Any]] = [
        {"image": "0.png", "question": f"{HOSTILE} one?", "answer": HOSTILE, "kind": HOSTILE},
        {"image": "1.png", "question": "two?", "answer": "2", "id": "second"},
        {"images": ["0.png", "1.png"], "question": "three?", "answer": "3"},
        {"video": ["2.png", "2.png", "2.png"], "question": "four?", "answer": "4"},
    ]
    (root / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    request = CompareRequest(
        model="testbed-onevision",
        methods=("globalcom2",),
        retention=(0.3,),
        data=root / "my.jsonl",
        out=root / "run",
    )
    compare(request)
    lines = lines_of(root / "run")
    for line in lines:
        line["answer"] = HOSTILE if line["question"] == "line-1" else line["answer"]
    rewrite(root / "run", lines)
    return root
