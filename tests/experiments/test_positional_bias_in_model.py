"""Positional bias: measurements inside a model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from PIL import Image
from planted import row

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.positional_bias import figures
from tokenprune.experiments.positional_bias.analysis import Analysis, positional_bias
from tokenprune.experiments.positional_bias.rearrange import (
    move_pixels,
    move_tokens,
)
from tokenprune.layout import Kind
from tokenprune.pipeline import Pipeline


@pytest.fixture(scope="module")
def testbed() -> Pipeline:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Six images of the testbed, one of them on a padded canvas."""
    questions = held_out(200, seed=0)[::5]
    images = [item.images[0].open() for item in questions]
    padded = [image for image in images if image.size == (120, 90)]
    return [image for image in images if image.size == (120, 120)][:5] + padded[:1]


@pytest.fixture(scope="module")
def result(testbed: Pipeline, pictures: list[Image.Image]) -> Analysis:
    methods = ["feature-norm", "globalcom2", "fastv", "pyramiddrop", "uniform@0.5 + fastv@0.5"]
    return positional_bias(testbed, methods, pictures, batch_size=4)


def test_exchanged_crops_have_no_pipeline(testbed: Pipeline, pictures: list[Image.Image]) -> None:
    asked: dict[str, Any] = {"conditions": ["exchanged-crops"]}
    with pytest.raises(UserError, match="add the level 'selector'"):
        positional_bias(testbed, ["last"], pictures[:1], levels=["pipeline"], **asked)
    found = positional_bias(testbed, ["globalcom2:tau=1"], pictures[:2], **asked)
    assert not found.skipped
    assert set(found.statistics["level"]) == {"normal", "selector"}


def test_exchanged_crops_have_the_same_pixels(
    testbed: Pipeline, pictures: list[Image.Image]
) -> None:
    """Encoding exchanged pixels gives exchanged features; only the thumbnail differs."""
    (tokens,) = testbed.encode(pictures[:1])
    turned = move_pixels(pictures[0], "reversed-crops", tokens.layout, 60)
    assert isinstance(turned, Image.Image)
    (again,) = testbed.encode([turned])
    moved = move_tokens(tokens, "reversed-crops")
    crops = tokens.layout.kind == Kind.CROP
    torch.testing.assert_close(again.features[crops], moved.features[crops])
    assert not torch.allclose(again.features[~crops], moved.features[~crops], atol=1e-2)


def test_levels_and_skipped_images(result: Analysis) -> None:
    assert result.skipped == {("reversed-crops", "pipeline", "a padded canvas"): 1}
    table = result.statistics
    for condition in ("reversed-crops", "flip-lr", "flip-tb", "all"):
        assert row(table, condition, method="feature-norm")["equivariance"] == 1
    exact = row(table, "reversed-crops", "pipeline", method="feature-norm")
    assert exact["images"] == 5
    assert exact["equivariance"] == 1
    # A vision transformer does not encode a mirrored image as the mirrored encoding.
    assert row(table, "flip-lr", "pipeline", method="feature-norm")["equivariance"] < 0.9


def kept(result: Analysis, method: str, image: int, condition: str) -> list[int]:
    table = result.tokens
    chosen = table[
        (table["method"] == method)
        & (table["image"] == image)
        & (table["condition"] == condition)
        & table["level"].isin(["normal", "selector"])
        & table["kept"]
    ]
    return [int(token) for token in chosen["token"]]


@pytest.mark.parametrize("condition", ["normal", "reversed-crops", "flip-lr"])
@pytest.mark.parametrize("spec", ["globalcom2", "fastv", "pyramiddrop", "uniform@0.5 + fastv@0.5"])
def test_selections_equal_those_of_the_engine(
    testbed: Pipeline, pictures: list[Image.Image], result: Analysis, spec: str, condition: Any
) -> None:
    """Also where several images run in one batch, against one prompt at a time."""
    method = tp.parse(spec) if "@" in spec else tp.parse(spec, retention=0.25)
    outside = [signal for signal in method.needs if not signal.in_llm]
    for image in (0, 5):
        (tokens,) = testbed.encode([pictures[image]], outside)
        if condition != "normal":
            tokens = move_tokens(tokens, condition)
        inputs = testbed.assemble([[tokens]], ["What is in the image?"])
        with tp.compress(testbed.model, method) as trace, torch.no_grad():
            testbed.model(**inputs)
        keep = trace.selections[-1].keep
        patches = keep[~tokens.layout.is_separator[keep]].tolist()
        assert kept(result, method.label, image, condition) == patches


def test_reversed_crops_are_a_permuted_prompt_of_the_plain_model(
    testbed: Pipeline, pictures: list[Image.Image], result: Analysis
) -> None:
    """FastV's choice from the attention that the model pays to a sequence permuted by hand."""
    (tokens,) = testbed.encode(pictures[:1])
    assert tokens.layout.grid == (2, 2)
    order = list(range(144))
    for line, column in itertools.product(range(24), range(25)):
        top, left = 1 - line // 12, 1 - column // 12  # of the other crop
        other = (12 * top + line % 12, 12 * left + column % 12)
        y, x = other if column < 24 else (other[0], 24)
        order.append(144 + 25 * y + x)
    eager = tp.load("testbed-next", attn_implementation="eager").model
    inputs = testbed.assemble([[tokens]], ["What is in the image?"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = eager.get_input_embeddings()(ids).detach()
    visual = ids[0] == testbed.adapter.facts.placeholders["image"]
    embeds[0, visual] = tokens.features[order]
    with torch.no_grad():
        seen = eager(inputs_embeds=embeds, attention_mask=mask, output_attentions=True)
    scores = seen.attentions[1][0].mean(0)[-1, visual]
    patches = [place for place in range(len(order)) if not tokens.layout.is_separator[place]]
    best = sorted(patches, key=lambda place: -float(scores[place]))[: round(0.25 * len(patches))]
    assert kept(result, "fastv", 0, "reversed-crops") == sorted(best)


def test_scores_inside_the_model_are_those_that_rank(result: Analysis) -> None:
    table = result.tokens[(result.tokens["method"] == "fastv") & (result.tokens["image"] == 1)]
    for _, rows in table.groupby(["condition", "level"], observed=True):
        assert rows["score"][rows["kept"]].min() >= rows["score"][~rows["kept"]].max()
        assert rows["score"].between(0, 1).all()


def test_first_cut_keeps_more_than_the_last(result: Analysis) -> None:
    table = result.tokens[result.tokens["method"] == "pyramiddrop"]
    assert (table["kept_first"] | ~table["kept"]).all()
    assert table["kept_first"].sum() > table["kept"].sum()


def test_the_model_is_unchanged(testbed: Pipeline, pictures: list[Image.Image]) -> None:
    hooks = sum(len(module._forward_pre_hooks) for module in testbed.model.modules())
    method = tp.parse("fastv", retention=0.25)
    positional_bias(testbed, [method], pictures[:1], conditions=["flip-lr"], levels=["selector"])
    assert sum(len(module._forward_pre_hooks) for module in testbed.model.modules()) == hooks
    assert "score" not in vars(method)


def test_figures_show_the_table(result: Analysis) -> None:
    made = dict(figures.figures(result.tokens, result.statistics, "testbed-next"))
    assert set(made) == {
        f"{name}-image-25" for name in ("slots", "sequence", "map", "equivariance")
    }
    (canvas,) = made["map-image-25"].axes[0].images
    norms = result.tokens[
        (result.tokens["method"] == "feature-norm")
        & (result.tokens["condition"] == "normal")
        & (result.tokens["kind"] == "crop")
        & (result.tokens["image"] < 5)
    ]
    rows = norms["row"] + 7 * (norms["slot"] // 2)
    cols = norms["col"] + 7 * (norms["slot"] % 2)
    cell = norms["kept"][(rows == 3) & (cols == 9)]
    assert canvas.get_array()[3, 9] == pytest.approx(cell.mean())
    assert canvas.get_array().shape == (24, 24)
    axes = made["slots-image-25"].axes[1]
    assert axes.get_title(loc="left") == "globalcom2"
    heights = [patch.get_height() for patch in axes.patches]  # type: ignore[attr-defined]
    shares = result.tokens[
        (result.tokens["method"] == "globalcom2")
        & (result.tokens["condition"] == "normal")
        & (result.tokens["slot"] >= 0)
        & (result.tokens["image"] < 5)
    ]
    expected = shares.groupby("slot")["kept"].mean().tolist()
    assert heights[:4] == pytest.approx(expected)
