"""The record of a selection in a journal."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenprune as tp
from tokenprune.compressor import Stage
from tokenprune.engine.trace import SelectionRecord
from tokenprune.experiments.common.kept_bits import final, pack, packed_rows, unpack
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run as compare
from tokenprune.layout import TokenLayout

LAYOUT = TokenLayout.single((3, 4))


def chosen(row: int, image: int, layer: int | None, *keep: int) -> SelectionRecord:
    return SelectionRecord(
        row, image, Stage.LLM, layer, LAYOUT, torch.tensor(keep, dtype=torch.long)
    )


def test_kept_bits_by_hand() -> None:
    """13 entries, the first highest: 1010 0000 0000 1 and three bits of nothing."""
    text = pack(chosen(0, 0, None, 0, 2, 12))
    assert base64.b64decode(text) == bytes([0b10100000, 0b00001000])


@given(st.sets(st.integers(0, 12)))
def test_there_and_back(keep: set[int]) -> None:
    found = unpack(pack(chosen(0, 0, None, *sorted(keep))), 13)
    assert found is not None
    assert np.flatnonzero(found).tolist() == sorted(keep)


@pytest.mark.parametrize("text", ["", "AAA", "%%%%", "AAAAAAAA", "ä"])
def test_invalid_records_are_ignored(text: str) -> None:
    assert unpack(text, 13) is None


def test_the_last_cut_counts() -> None:
    made = [chosen(0, 1, 2, 0, 1, 2), chosen(0, 0, 2, 4), chosen(2, 0, 2, 5), chosen(0, 1, 4, 1)]
    assert [(key, found.keep.tolist()) for key, found in final(made).items()] == [
        ((0, 0), [4]),
        ((0, 1), [1]),
        ((2, 0), [5]),
    ]
    rows = packed_rows(made, 3)
    assert [len(row) for row in rows] == [2, 0, 1]
    assert rows[0] == [pack(chosen(0, 0, None, 4)), pack(chosen(0, 0, None, 1))]


def test_a_comparison_records_the_kept_tokens(tmp_path: Path) -> None:
    methods = ("globalcom2", "pyramiddrop")
    request: dict[str, Any] = {"methods": methods, "retention": (1.0, 0.25), "questions": 3}
    compare(CompareRequest(out=tmp_path, **request))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    whole = ("uncompressed", "image-free")
    assert ["kept" in line for line in lines] == [line["cell"] not in whole for line in lines]
    pipe = tp.load("testbed-next")
    for item in held_out(3, 0):
        inputs = pipe.prepare([item.images[0].open()], [item.question])
        for method in methods:
            with tp.compress(pipe.model, method, retention=0.25) as trace:
                pipe.model.generate(**inputs, max_new_tokens=1)
            last = trace.selections[-1]
            (line,) = (
                line
                for line in lines
                if line.get("question") == item.id and method in line["cell"].lower()
            )
            found = unpack(line["kept"][0], len(last.layout))
            assert found is not None
            assert np.flatnonzero(found).tolist() == last.keep.tolist()
