"""Whole views kept or dropped, and the two experiments that do so."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.intervals import wilson
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.references import KeepViews, region_sizes
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.common.setting import prepare, with_crops
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.complementarity import run as complementary
from tokenprune.experiments.complementarity.figures import figure as complementary_figure
from tokenprune.experiments.crop_importance import run as importance
from tokenprune.experiments.crop_importance.figures import DROPPED, holding, uneven
from tokenprune.experiments.crop_importance.run import (
    CropImportanceRequest,
    DropCrop,
    crop_of,
)
from tokenprune.experiments.datasets.files import read_data
from tokenprune.layout import Kind, TokenLayout
from tokenprune.models.testbed import scenes
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

CLS = Signal("cls_logits")
GRID = TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8))  # one row of padding above and below


def tokens(layout: TokenLayout = GRID, seed: int = 0) -> VisualTokens:
    return sample_tokens(frozenset({CLS}), layout, seed=seed)


# --- the views ------------------------------------------------------------------------------------


def test_views_kept() -> None:
    for views, kind in (("thumbnail", Kind.THUMBNAIL), ("crops", Kind.CROP)):
        keep = KeepViews(views=views)(tokens()).keep  # type: ignore[arg-type]
        kinds = GRID.kind[keep]
        assert (kinds[kinds != Kind.SEPARATOR] == kind).all()
        assert (kinds == kind).sum() == (GRID.kind == kind).sum(), "all of them"
        assert (kinds == Kind.SEPARATOR).sum() == (0 if views == "thumbnail" else 6)


@pytest.mark.parametrize("layout", [TokenLayout.single((4, 4)), TokenLayout.video(3, (2, 2))])
def test_images_without_crops_stay_whole(layout: TokenLayout) -> None:
    for compressor in (KeepViews(views="thumbnail"), DropCrop(which="lowest", signal=CLS)):
        assert compressor(tokens(layout)).keep.tolist() == list(range(len(layout)))


@pytest.mark.parametrize("crop", range(4))
def test_the_crop_of_the_highest_and_of_the_lowest_score(crop: int) -> None:
    for which, sign in (("highest", 1.0), ("lowest", -1.0)):
        thumbnail = torch.zeros(4, 4)
        thumbnail[2 * (crop // 2) + 1, 2 * (crop % 2)] = sign  # somewhere in its quarter
        shown = tokens()
        shown.signals[CLS][GRID.kind == Kind.THUMBNAIL] = thumbnail.flatten()
        dropper = DropCrop(which=which, signal=CLS)  # type: ignore[arg-type]
        assert dropper.crop(shown) == crop
        gone = set(range(len(GRID))) - set(dropper(shown).keep.tolist())
        assert gone == set((GRID.view == 1 + crop).nonzero().squeeze(1).tolist())


def test_a_crop_is_as_rich_as_the_mean_over_its_region() -> None:
    """Of 5 x 5 patches the first crop covers 4 and the last 9, of which the sum is the largest."""
    layout = TokenLayout.anyres((2, 2), (5, 5), (0, 10, 0, 10))
    shown = tokens(layout)
    thumbnail = torch.full((5, 5), 0.1)
    thumbnail[0, 1] = 0.5
    shown.signals[CLS][layout.kind == Kind.THUMBNAIL] = thumbnail.flatten()
    dropper = DropCrop(which="highest", signal=CLS)
    assert dropper.scores(shown).tolist() == pytest.approx([0.8 / 4, 0.1, 0.1, 0.1])
    assert dropper.crop(shown) == 0
    assert region_sizes(layout).tolist() == [4, 6, 6, 9]
    even = TokenLayout.anyres((1, 3), (6, 6), (0, 6, 0, 18))
    assert region_sizes(even).tolist() == [12, 12, 12]


def test_a_random_crop_depends_on_seed_and_image_alone() -> None:
    images = [tokens(seed=seed) for seed in range(12)]
    found = [
        [DropCrop(which="random", signal=CLS, seed=seed).crop(image) for image in images]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    assert set(found[0]) == {0, 1, 2, 3}


@given(st.data())
def test_crop_of_is_the_view_of_the_token_at_a_location(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    top, left = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    layout = TokenLayout.anyres(grid, (4, 4), (top, 4 * grid[0] - top, left, 4 * grid[1] - left))
    rows, cols = layout.canvas_shape
    row = data.draw(st.integers(0, rows - 1))
    col = data.draw(st.integers(0, cols - 1))
    view = (row + top) // 4 * grid[1] + (col + left) // 4
    assert crop_of(layout, ((col + 0.5) / cols, (row + 0.5) / rows)) == view
    assert crop_of(TokenLayout.single((4, 4)), (0.5, 0.5)) is None
    assert crop_of(layout, (1.0, 1.0)) == grid[0] * grid[1] - 1


def test_only_images_with_enough_crops() -> None:
    setting = prepare(CompareRequest(questions=60))
    left, out = with_crops(setting, least=4)
    assert 0 < out < 60
    assert len(left.questions) == 60 - out
    for item in left.questions:
        width, height = item.images[0].open().size
        assert (width, height) in ((120, 120), (120, 90)), "the others are cut into two or three"
    with pytest.raises(UserError, match="none of the images into 5 or more crops"):
        with_crops(setting, least=5)
    clips = replace(setting, questions=held_out(5, 0, "video"))
    with pytest.raises(UserError, match="none of the images"):
        with_crops(clips)


# --- where things are -----------------------------------------------------------------------------


def test_the_place_of_an_object_is_on_the_object() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = scenes.render(rng, split="test")
        for index, item in enumerate(scene.items):
            place = scenes._place(scene, f"Which digit is on the {item.name}?")
            assert place is not None
            x, y = place[0] * scene.size[1], place[1] * scene.size[0]
            assert scene.owner[int(y), int(x)] == index
        assert scenes._place(scene, "How many objects are there?") is None
    asked = held_out(10, seed=0)
    assert [item.place is None for item in asked if item.kind in ("colour", "count")] == [True] * 3
    assert all(item.place for item in asked if item.kind in ("digit", "position"))


def test_places_of_own_questions(tmp_path: Path) -> None:
    held_out(1, 0)[0].images[0].open().save(tmp_path / "a.png")
    path = tmp_path / "my.jsonl"
    line = {"image": "a.png", "question": "Which digit?", "answer": "1"}
    path.write_text(json.dumps(line | {"place": [0.25, 1]}) + "\n" + json.dumps(line))
    assert [item.place for item in read_data(path)] == [(0.25, 1.0), None]
    for wrong in ([0.5], [0.5, 1.5], "middle", [True, "x"], 3):
        path.write_text(json.dumps(line | {"place": wrong}))
        with pytest.raises(UserError, match=r"line 1: 'place' must be \[x, y\]"):
            read_data(path)


# --- complementarity ------------------------------------------------------------------------------


def answers(label: str, right: list[bool], **changes: Any) -> pd.DataFrame:
    """Questions of two kinds, each about a different image."""
    frame = {
        "label": label,
        "parameters": "",
        "retention": math.nan,
        "question_id": [f"q{i}" for i in range(len(right))],
        "image_id": [f"i{i}" for i in range(len(right))],
        "kind": ["digit" if i % 2 else "count" for i in range(len(right))],
        "correct": pd.array(right, dtype="boolean"),
        "status": "ok",
        "kept_patches": 49.0,
        "kept_separators": 1.0,
    }
    return pd.DataFrame(frame | changes)


def test_relative_accuracy_by_hand() -> None:
    table = complementary.relative(
        pd.concat(
            [
                answers("uncompressed", [True] * 8 + [False] * 2),
                answers("crops-only", [True] * 4 + [False] * 6),
                answers("thumbnail-only", [True] * 8 + [False] * 2),
                answers("image-free", [False] * 10, status="failed"),
            ]
        ),
        seed=0,
    )
    assert set(table["shown"]) == {"both", "crops only", "thumbnail only"}, "no image failed"
    found = table.set_index(["kind", "shown"])
    crops = found.loc[(OVERALL, "crops only")]
    assert (crops["accuracy"], crops["whole_accuracy"], crops["relative"]) == (0.4, 0.8, 0.5)
    assert crops["difference"] == pytest.approx(-0.4)
    assert crops["p"] == pytest.approx(0.125)
    assert crops["relative_low"] < 0.5 < crops["relative_high"]
    assert crops["visual_tokens"] == 50
    same = found.loc[(OVERALL, "thumbnail only")]
    assert same["relative"] == 1
    assert (same["relative_low"], same["relative_high"]) == pytest.approx(
        [end / 0.8 for end in wilson(8, 10)]
    )
    assert found.loc[("digit", "crops only"), "n"] == 5


def bars(figure: Figure) -> dict[str, list[float]]:
    return {
        str(box.get_label()): [bar.get_height() for bar in box]
        for box in figure.axes[-1].containers
        if hasattr(box, "patches")
    }


def test_complementarity_on_the_testbed(tmp_path: Path) -> None:
    words = ["complementarity", "--questions", "10", "--batch-size", "10", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.output
    assert max(map(len, first.stdout.splitlines()[:-2])) <= 80
    table = pd.read_csv(tmp_path / "complementarity.csv")
    assert len(table) == 9 * 4
    frame = pd.read_parquet(tmp_path / "answers.parquet").set_index(["label", "question_id"])
    for item in held_out(10, seed=0):
        whole, crops, thumbnail = (
            frame.loc[(label, item.id), "kept_patches"]
            for label in ("uncompressed", "crops-only", "thumbnail-only")
        )
        assert thumbnail == 144
        assert crops == whole - 144
    drawn = bars(complementary_figure(table, "m"))
    assert list(drawn) == ["crops only", "thumbnail only", "no image"]
    chosen = table[table["shown"] == "crops only"]["relative"]
    assert drawn["crops only"] == pytest.approx(list(chosen))
    assert (tmp_path / "plots" / "complementarity.pdf").stat().st_size > 5_000
    again = CliRunner().invoke(app, words)
    assert "0 answers" in again.stdout


# --- crop importance ------------------------------------------------------------------------------


def test_crop_importance_on_the_testbed(tmp_path: Path) -> None:
    outcome = importance.run(
        CropImportanceRequest(
            questions=15, batch_size=15, seeds=2, out=tmp_path, score="cls_attention"
        )
    )
    assert outcome.status == "complete"
    pipe = tp.load("testbed-next")
    signal = Signal("cls_attention")
    crops = outcome.tables["crops"].set_index(["image_id", "crop"])
    frame = pd.read_parquet(tmp_path / "answers.parquet").set_index(["label", "question_id"])
    for item in held_out(15, seed=0):
        (seen,) = pipe.encode([item.images[0].open()], {signal})
        layout = seen.layout
        sums, sizes = [0.0] * (layout.views - 1), [0] * (layout.views - 1)
        for index in range(144):  # a slow loop over the thumbnail
            row, col = index // 12, index % 12
            rows, cols = layout.grid
            cell = row // (12 // rows) * cols + col // (12 // cols)
            sums[cell] += float(seen[signal][index])
            sizes[cell] += 1
        scores = [total / size for total, size in zip(sums, sizes, strict=True)]
        assert crops.loc[item.image_id, "region"].tolist() == sizes
        assert crops.loc[item.image_id, "score"].tolist() == pytest.approx(scores, rel=1e-4)
        for label, crop in (
            ("without the highest crop", int(np.argmax(scores))),
            ("without the lowest crop", int(np.argmin(scores))),
        ):
            kept = frame.loc[(label, item.id), "kept_patches"]
            assert kept == sum(layout.view_sizes) - layout.view_sizes[1 + crop]
        ranks = crops.loc[item.image_id, "rank"].tolist()
        assert ranks == [1 + sum(other > score for other in scores) for score in scores]
    assert uneven(outcome.tables["crops"]) == 0, "twelves have equal halves and thirds"
    assert uneven(pd.DataFrame({"image_id": [*"aabb"], "region": [9, 12, 6, 6]})) == 1
    assert len(frame.loc["without a random crop"]) == 2 * 15
    assert math.isnan(outcome.to_frame().query("dropped == 'random'")["p"].iloc[0]), "two seeds"
    for name in ("crops", "objects", "crop_importance"):
        assert (tmp_path / f"{name}.csv").exists()
    assert (tmp_path / "plots" / "crop-importance.png").stat().st_size > 10_000


def test_losses_by_hand() -> None:
    droppers = [DropCrop(which=which, signal=CLS) for which in DROPPED]  # type: ignore[arg-type]
    names = [Cell(dropper).parameters for dropper in droppers]
    table = pd.concat(
        [
            answers("uncompressed", [True] * 10),
            answers("without the highest crop", [True] * 3 + [False] * 7, parameters=names[0]),
            answers("without a random crop", [True] * 6 + [False] * 4, parameters=names[1]),
            answers("without the lowest crop", [True] * 9 + [False], parameters=names[2]),
        ]
    )
    crops = pd.DataFrame(
        {
            "image_id": [f"i{i}" for i in range(10) for _ in range(2)],
            "crop": [0, 1] * 10,
            "dropped highest": [True, False] * 10,
            "dropped random 0": [True, False] * 5 + [False, True] * 5,
            "dropped lowest": [False, True] * 10,
        }
    )
    # The object of the last six questions is in crop 0, which has rank 1.
    objects = pd.DataFrame({"question_id": [f"q{i}" for i in range(4, 10)]}).assign(
        image_id=[f"i{i}" for i in range(4, 10)], crop=0, rank=[1] * 5 + [2], crops=2
    )
    found = importance.drops(table, crops, objects, droppers, seed=0).set_index(
        ["group", "dropped"]
    )
    row = found.loc[(OVERALL, "highest")]
    assert row["drop"] == pytest.approx(0.7)
    assert row["p"] == pytest.approx(2 / 2**7)
    assert row["vs_random"] == pytest.approx(-0.3)
    assert row["vs_random_p"] == pytest.approx(2 / 2**3)
    assert found.loc[(OVERALL, "lowest"), "vs_random"] == pytest.approx(0.3)
    held = found.loc[importance.HELD]
    assert list(held["n"]) == [6, 1], "q4 of the random crops, none of the lowest"
    assert held.loc["highest", "drop"] == 1
    spared = found.loc[importance.SPARED]
    assert list(spared["n"]) == [5, 6]
    assert spared.loc["lowest", "drop"] == pytest.approx(1 / 6)
    assert found.loc[("digit", "highest"), "n"] == 5

    shares = holding(objects)
    assert shares["share"].tolist() == pytest.approx([5 / 6, 1 / 6])
    assert shares["low"].tolist()[0] == pytest.approx(wilson(5, 6).low)
    assert set(shares["chance"]) == {0.5}
    assert holding(objects.iloc[:0]).empty


def test_bad_scores_are_sentences(tmp_path: Path) -> None:
    for words, said in (
        (["--score", "cls_attenton"], "Did you mean 'cls_attention'"),
        (["--score", "cls_logits", "--model", "testbed-onevision"], "CLS token"),
        (["--score", "received", "--layer", "9"], "layer 9"),
    ):
        given = ["crop-importance", *words, "--questions", "5", "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, given)
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert not list(tmp_path.rglob("answers.jsonl"))
