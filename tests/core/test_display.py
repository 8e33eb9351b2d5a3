"""Traces, ledgers, selections and cards in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import full_hosts
from PIL import Image

import tokenprune as tp
from tokenprune.display import html_table
from tokenprune.drawing import draw_kept
from tokenprune.engine.trace import SelectionRecord, Trace
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.registry import strategies


@pytest.fixture(scope="module")
def trace() -> Iterator[Trace]:
    """Of two prompts in a tiny model, cut twice."""
    host = full_hosts(["llama"])[0]
    chain = tp.parse("uniform@0.5 + fastv@0.5")
    with torch.no_grad(), tp.compress(host.adapter.model, chain) as made:
        host.adapter.model(**host.inputs())
        yield made


def test_a_trace_is_a_table_of_its_selections(trace: Trace) -> None:
    frame = trace.to_frame()
    assert len(frame) == len(trace.selections)
    for (_, row), record in zip(frame.iterrows(), trace.selections, strict=True):
        patches = record.layout.patches
        kept = np.intersect1d(record.keep.numpy(), patches.numpy())
        assert row["row"] == record.row
        assert row["stage"] == record.stage
        assert row["patch_tokens"] == len(patches)
        assert row["kept_patches"] == len(kept)
        assert row["realised"] == len(kept) / len(patches)
    assert frame.query("stage == 'pre_llm'")["layer"].isna().all()
    assert (frame.query("stage == 'llm'")["layer"] == 2).all()


def test_a_record_is_a_table_of_its_entries(trace: Trace) -> None:
    record = trace.selections[0]
    frame = record.to_frame()
    assert len(frame) == len(record.layout)
    assert frame.index[frame["kept"]].tolist() == record.keep.tolist()
    assert frame["view"].tolist() == record.layout.view.tolist()
    assert (frame["kind"] == "separator").tolist() == record.layout.is_separator.tolist()


def test_a_ledger_is_a_row_of_its_figures(trace: Trace) -> None:
    ledger = trace.ledgers[0]
    (row,) = ledger.to_frame().to_dict("records")
    assert row == {"requested": 0.25, "realised": ledger.realised, **ledger.figures}


def test_a_ledger_names_a_retention_that_differs_from_the_requested_one(trace: Trace) -> None:
    """By more than one token: at R = 0.25 of 245 tokens, 61.25, these are 60 and 63."""
    ledger = replace(trace.ledgers[0], requested=0.25, patch_tokens=245, kept_patches=72)
    assert "patch tokens: 72 of 245 (29.4 %, 25 % requested), " in repr(ledger)
    for kept in (61, 62):
        assert f"patch tokens: {kept} of 245, " in repr(replace(ledger, kept_patches=kept))
    for kept in (60, 63):
        assert "25 % requested" in repr(replace(ledger, kept_patches=kept))


def test_reprs_are_one_short_line(trace: Trace) -> None:
    record, ledger = trace.selections[0], trace.ledgers[0]
    selection = tp.Selection(torch.arange(1000), torch.ones(1000, 8))
    assert repr(selection) == "Selection(1000 kept, merged)"
    assert repr(tp.Selection(torch.arange(3))) == "Selection(3 kept)"
    assert repr(trace) == f"Trace({len(trace.selections)} selections)"
    assert f"{record.kept_patches} of {len(record.layout.patches)} patch tokens" in repr(record)
    assert f"patch tokens: {ledger.kept_patches} of {ledger.patch_tokens}" in repr(ledger)
    for thing in (selection, trace, record, ledger, Trace()):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 160


def test_notebooks_show_tables(trace: Trace) -> None:
    card = strategies.get("globalcom2").card
    shown: list[Any] = [trace, trace.selections[0], trace.ledgers[0], card, Trace()]
    for thing in shown:
        html = thing._repr_html_()
        assert html.count("<table") == html.count("</table>") >= 1
    assert trace._repr_html_().count("<table") == 1 + len(trace.ledgers)
    assert "https://arxiv.org/abs/2501.05179" in card._repr_html_()


def test_a_table_escapes_what_it_shows() -> None:
    html = html_table("<b>", {"<i>": "<script>", "empty": "", "lines": "a\nb"})
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "empty" not in html
    assert "a<br>b" in html


def test_a_selection_is_a_table_of_what_is_kept() -> None:
    sizes = torch.tensor([2.0, 1.0])
    frame = tp.Selection(torch.tensor([1, 4]), sizes=sizes).to_frame()
    assert frame.to_dict("list") == {"index": [1, 4], "size": [2.0, 1.0]}


def _black(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
    """Whether the middle of ``box`` of a drawing of a black image is not pale."""
    left, top, right, bottom = box
    pixel: Any = picture.getpixel(((left + right) // 2, (top + bottom) // 2))
    return max(pixel) < 10


def test_kept_patches_are_drawn() -> None:
    """A black image of 2 x 2 crops: kept patches are black, dropped ones are pale."""
    layout = TokenLayout.anyres((2, 2), (2, 2), (0, 4, 0, 4))
    rng = np.random.default_rng(0)
    keep = torch.tensor(np.sort(rng.choice(layout.patches.numpy(), 9, replace=False)))
    record = SelectionRecord(0, 0, tp.Stage.PRE_LLM, None, layout, keep)
    drawn = record.show(Image.new("RGB", (100, 100)))
    side = drawn.height
    for index in layout.patches.tolist():
        crop = layout.canvas_row[index] >= 0
        row, col, cells = (
            (int(layout.canvas_row[index]), int(layout.canvas_col[index]), 4)
            if crop
            else (int(layout.row[index]), int(layout.col[index]), 2)
        )
        left, step = (drawn.width - side if crop else 0), side / cells
        box = left + col * step, row * step, left + (col + 1) * step, (row + 1) * step
        assert _black(drawn, tuple(map(int, box))) == (index in keep), (index, crop)  # type: ignore[arg-type]


def test_frames_of_a_video_are_drawn_side_by_side() -> None:
    layout = TokenLayout.video(3, (1, 1))
    drawn = draw_kept(layout, torch.tensor([1, 3]), [Image.new("RGB", (60, 60))] * 3)
    side = drawn.height
    gap = (drawn.width - 3 * side) // 2
    shown = [_black(drawn, (n * (side + gap), 0, n * (side + gap) + side, side)) for n in range(3)]
    assert shown == [False, True, False]
    record = SelectionRecord(0, 0, tp.Stage.PRE_LLM, None, layout, torch.tensor([1, 3]))
    with pytest.raises(UserError, match="the model saw 3 frames of this video, got 2"):
        record.show([Image.new("RGB", (60, 60))] * 2)


def test_a_padded_view_is_drawn_with_its_padding() -> None:
    """An image twice as wide as high: the upper and the lower half of the padded view are empty."""
    layout = TokenLayout.single((4, 4), newline=False)
    wide = Image.new("RGB", (80, 40), "white")
    drawn = draw_kept(layout, layout.patches, [wide], "pad")
    assert drawn.width == drawn.height
    colours = [drawn.getpixel((drawn.width // 2, round(drawn.height * y))) for y in (0.1, 0.5, 0.9)]
    assert colours == [(0, 0, 0), (255, 255, 255), (0, 0, 0)]


def test_the_trace_draws_the_last_selection(trace: Trace) -> None:
    record = [one for one in trace.selections if (one.row, one.image) == (0, 0)][-1]
    height_width = (40, 60)
    image = np.zeros((*height_width, 3), dtype=np.uint8)
    assert trace.show(image).tobytes() == record.show(image, trace.fit).tobytes()
    with pytest.raises(UserError, match="no selection of image 9 in row 0"):
        trace.show(image, index=9)
