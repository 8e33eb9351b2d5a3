"""Pictures of kept tokens: the right tokens at the right locations, for every model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner, Result

import tokenprune as tp
from tokenprune import console
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.masks.figures import (
    _aligned,
    _paint,
    _percentiles,
    _show_heat,
    _show_kept,
    draw,
    heat,
    sheet,
)
from tokenprune.experiments.masks.look import look
from tokenprune.experiments.masks.run import masks
from tokenprune.layout import TokenLayout
from tokenprune.registry import strategies

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

ASKED = "Which digit is on the red circle?"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def following() -> Any:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def onevision() -> Any:
    return tp.load("testbed-onevision")


def test_masks_equal_the_selection_of_a_plain_run(following: Any) -> None:
    image = picture(120, 90)
    seen = look(following, [image], ASKED, ["globalcom2", "fastv"], [0.5, 0.25])
    assert [(one.label, one.retention) for one in seen.masks] == [
        ("uncompressed", 1.0),
        ("globalcom2", 0.5),
        ("globalcom2", 0.25),
        ("fastv", 0.5),
        ("fastv", 0.25),
    ]
    for one in seen.masks:
        method = (
            None if one.label == "uncompressed" else tp.parse(one.label, retention=one.retention)
        )
        inputs = following.prepare([image], [ASKED])
        with tp.compress(following.model, method) as trace:
            ids = following.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert [one.answer] == following.decode(ids, inputs)
        expected = trace.selections[-1].keep if method else torch.arange(len(seen.media[0].layout))
        assert torch.equal(one.keeps[0], expected)
        assert bool(one.scores) == (one.label in ("globalcom2", "fastv"))
    (chosen,) = following.select("globalcom2", [image], retention=0.25)
    assert torch.equal(seen.masks[2].keeps[0], chosen.keep)
    assert seen.masks[3].where == "before layer 2"


def test_the_table_counts_by_view(following: Any) -> None:
    seen = look(following, [picture(120, 120)], None, ["uniform"], 0.25)
    rows = seen.table()
    layout, keep = seen.media[0].layout, seen.masks[1].keeps[0]
    mine = rows[rows["method"] == "uniform"]
    for view in range(5):
        count = sum(int(layout.view[index]) == view for index in keep)
        row = mine[mine["view"] == view].iloc[0]
        assert (row["kept"], row["tokens"], row["share"]) == (count, 144, count / 144)
    assert mine["kind"].tolist() == ["thumbnail"] + ["crop"] * 4
    assert rows["answer"].isna().all()


def test_every_patch_is_painted_at_its_location(following: Any) -> None:
    """A wide image of one colour: thumbnail, then two crops of 12x12 patches, by hand."""
    colour = (0.8, 0.2, 0.4)
    image = Image.new("RGB", (120, 60), tuple(round(255 * part) for part in colour))
    seen = look(following, [image], None, ["random"], 0.3)
    layout, keep = seen.media[0].layout, set(seen.masks[1].keeps[0].tolist())
    bits = np.isin(np.arange(len(layout)), list(keep))
    laid = sheet(seen.media[0], seen.view)
    painted = _paint(laid, 240, lambda pixels, token: _show_kept(pixels, token, bits))
    assert {tile.view for tile in laid.tiles} == {0, 1, 2}
    checked = 0
    for tile in laid.tiles:
        x, y, wide, tall = tile.place
        assert (wide, tall) == (1, 1)
        for row in range(12):
            for col in range(12):
                if tile.view == 0:
                    token = row * 12 + col
                else:  # rows of 24 patches and a separator
                    token = 144 + row * 25 + 12 * (tile.view - 1) + col
                there = painted[round(240 * y) + 20 * row + 10, round(240 * x) + 20 * col + 10]
                kept = np.allclose(there, colour, atol=0.01)
                assert kept == (token in keep), (tile.view, row, col)
                checked += 1
    assert checked == 3 * 144


def test_an_edge_is_drawn_inside_what_is_kept() -> None:
    token = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 28, 0), 28, 1)
    pixels = np.full((56, 56, 3), 0.5)
    shown = _show_kept(pixels, token, np.array([True, False, False, False]))
    kept = (token == 0)[..., None] & np.ones(3, dtype=bool)
    inner = np.zeros_like(kept)
    inner[:26, :26] = True  # 28 pixels a patch: a line of two, none at the view's own edge
    assert (shown[inner] == 0.5).all()
    assert not np.isclose(shown[kept & ~inner].reshape(-1, 3), 0.5).all(1).any()
    assert (shown[~kept] > 0.7).all()
    whole = _show_kept(pixels, token, np.ones(4, dtype=bool))
    assert np.array_equal(whole, pixels)


@given(st.lists(st.one_of(st.integers(-3, 3), st.just(None)), min_size=1, max_size=30))
def test_percentiles_against_counting(values: list[int | None]) -> None:
    given = np.array([np.nan if value is None else float(value) for value in values])
    found = _percentiles(given)
    known = [value for value in values if value is not None]
    for value, rank in zip(values, found.tolist(), strict=True):
        if value is None:
            assert np.isnan(rank)
            continue
        below = sum(other < value for other in known)
        equal = sum(other == value for other in known)
        assert rank == pytest.approx((below + (equal - 1) / 2) / max(len(known) - 1, 1))


def test_scores_of_fewer_tokens_find_their_places() -> None:
    full = TokenLayout.anyres((1, 2), (3, 3), (0, 3, 1, 5))
    index = torch.tensor([0, 4, 8, 9, 10, 13, 20])
    found = _aligned(full, full.take(index), torch.arange(7.0))
    expected = np.full(len(full), np.nan)
    for place, value in zip(index.tolist(), range(7), strict=True):
        if not full.is_separator[place]:
            expected[place] = value
    np.testing.assert_array_equal(found, expected)


def test_heat_has_no_colour_where_there_is_no_score() -> None:
    token, pixels = np.array([[0, 1, -1]]), np.full((1, 3, 3), 0.5)
    shown = _show_heat(pixels, token, np.array([0.7, np.nan]))
    assert np.ptp(shown[0, 0]) > 0.2, "a colour"
    assert np.allclose(shown[0, 1], shown[0, 2])
    assert np.ptp(shown[0, 1]) < 0.05, "grey"


def test_cuts_are_shown_one_by_one(following: Any) -> None:
    shown = look(following, [picture(120, 60)], ASKED, ["pyramiddrop"], 0.25, cuts=True).masks[1:]
    final = look(following, [picture(120, 60)], ASKED, ["pyramiddrop"], 0.25).masks[1]
    assert len(shown) > 1
    for early, late in pairwise(shown):
        assert set(late.keeps[0].tolist()) < set(early.keeps[0].tolist())
    assert torch.equal(shown[-1].keeps[0], final.keeps[0])
    assert len({one.where for one in shown}) == len(shown)


def test_chains_and_merging_methods(following: Any) -> None:
    seen = look(
        following, [picture(120, 120)], ASKED, ["globalcom2@0.5 + fastv@0.5", "prumerge"], 0.2
    )
    chain = seen.masks[1]
    assert chain.where == "before layer 2"
    assert chain.scores, "FastV's, of what GlobalCom² left"
    assert len(chain.scores[0][0]) < len(seen.media[0].layout)
    assert 0 < len(seen.masks[2].keeps[0]) < len(seen.media[0].layout)
    assert len(heat(seen).axes) >= 2


@pytest.mark.parametrize(
    ("sizes", "video"),
    [
        ([(64, 90)], False),
        ([(300, 20)], False),
        ([(20, 300)], False),
        ([(64, 90), (30, 60), (56, 56)], False),
        ([(64, 90)] * 12, True),
    ],
)
def test_every_shape_can_be_drawn(
    sizes: list[tuple[int, int]], video: bool, onevision: Any, following: Any, tmp_path: Path
) -> None:
    images = [picture(*size, seed=index) for index, size in enumerate(sizes)]
    for pipe in (onevision,) if video else (onevision, following):
        seen = look(pipe, images, "$How^ many?", ["globalcom2", "fastv"], 0.25, video=video)
        for figure in (draw(seen), heat(seen)):
            figure.savefig(tmp_path / "figure.png", dpi=20)
        for medium in seen.media:
            laid = sheet(medium, seen.view)
            assert laid.width > 0
            assert all(tile.place[2] > 0 and tile.place[3] > 0 for tile in laid.tiles)
        rows = seen.table()
        whole = rows[rows["method"] == "uncompressed"]
        assert whole["tokens"].sum() == sum(len(m.layout.patches) for m in seen.media)


def test_without_a_language_model(tmp_path: Path) -> None:
    options = {"img_size": 32, "patch_size": 8, "depth": 2}
    pipe = tp.load("timm/vit_tiny_patch16_224", **options)
    figure = masks(pipe, [picture(60, 90)], ASKED, ["globalcom2", "hired"], [0.5, 0.2])
    figure.savefig(tmp_path / "figure.png", dpi=20)
    with pytest.raises(UserError, match="acts inside the language model"):
        masks(pipe, [picture(60, 90)], None, ["fastv"])
    biased = tp.load("timm/beit_base_patch16_224", **options)  # attention that cannot be read
    seen = look(biased, [picture(60, 90)], None, ["uniform"], 0.5)
    assert not seen.saliency
    draw(seen)
    with pytest.raises(UserError, match="there is no score to draw"):
        heat(seen)


def test_what_cannot_be_drawn_is_refused(following: Any) -> None:
    with pytest.raises(UserError, match="fastv acts inside the language model; ask a question"):
        look(following, [picture(60, 60)], None, ["fastv"], 0.5)
    with pytest.raises(UserError, match="at least one image"):
        look(following, [], ASKED)
    with pytest.raises(UserError, match="takes images only"):
        look(following, [picture(60, 60)], ASKED, video=True)


# --- the command ----------------------------------------------------------------------------------


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, ["masks", *words])


def test_all_are_those_that_run_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "names", lambda: ["fastv", "last"])
    picture(60, 90).save(tmp_path / "a.png")
    result = invoke(str(tmp_path / "a.png"), "-m", "all", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "SKIPPED fastv: fastv acts inside the language model; ask a question" in result.output
    assert set(pd.read_csv(tmp_path / "out" / "kept.csv")["method"]) == {"uncompressed", "last"}


def test_an_example_without_arguments(tmp_path: Path) -> None:
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for name in ("masks.png", "masks.pdf", "heat.png", "heat.pdf", "kept.csv", "manifest.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert "globalcom2" in result.stdout
    assert "True answer" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert set(pd.read_csv(tmp_path / "kept.csv")["method"]) == {
        "uncompressed",
        "globalcom2",
        "fastv",
    }


def test_ones_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenprune.experiments.masks.run.save", lambda *_: [])  # for speed
    for index in range(20):
        picture(40, 30, index).save(tmp_path / f"frame-{index:02}.png")
    still = [picture(40, 30, index) for index in range(5)]
    still[0].save(tmp_path / "moving.gif", save_all=True, append_images=still[1:])
    out = ("--force", "--out", str(tmp_path / "out"), "-m", "uniform", "-r", "0.5")
    for words, views in (
        ((str(tmp_path), "--video"), 8),
        ((str(tmp_path / "moving.gif"), "Is it?", "--video", "--frames", "3"), 3),
        ((*(str(tmp_path / f"frame-0{i}.png") for i in (1, 2)), "Which?"), 2),
        ((str(tmp_path / "frame-03.png"), "--model", "testbed-next"), 3),
    ):
        result = invoke(*words, *out)
        assert result.exit_code == 0, result.output
        rows = pd.read_csv(tmp_path / "out" / "kept.csv")
        assert len(rows) == 2 * views, words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nothing.jpg What?", "there is no image 'nothing.jpg'"),
        ("What?", "give images first, then the question"),
        ("one.png What? -m fastw", "Did you mean 'fastv'"),
        ("one.png What? -r 2", "retention"),
        ("one.png two.png What? --video", "must be of one size"),
        ("one.png --frames 0", "--frames must be at least 1"),
        ("one.png -m fastv", "ask a question"),
        ("empty --video", "there is no image in the folder"),
        ("broken.png What?", "cannot decode"),
        (f"one.png {'What?' * 99} --model testbed-nxt", "Did you mean 'testbed-next'"),
        ("one.png What? --max-image-pixels 1199", "40 x 30 pixels, more than the limit of 1,199"),
        ("one.png What\udcff?", "lone surrogate"),
    ],
)
def test_bad_input(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    picture(40, 30).save("one.png")
    picture(30, 30).save("two.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no")
    result = invoke(*words.split())
    assert result.exit_code == console.BAD_INPUT, result.output
    assert said in result.stderr
