"""Positional bias: rearranged images and packed sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from planted import FULL, PADDED, VIDEO

import tokenprune as tp
from tokenprune.experiments.positional_bias.rearrange import (
    CONDITIONS,
    CROPS,
    NotPossible,
    move_pixels,
    move_tokens,
    origins,
    paired,
)
from tokenprune.layout import Kind, TokenLayout
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS
from tokenprune.tokens import VisualTokens


@st.composite
def layouts(draw: st.DrawFn) -> TokenLayout:
    grid = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (1, 3), (3, 2)]))
    shape = draw(st.tuples(st.integers(2, 4), st.integers(2, 4)))
    rows, cols = grid[0] * shape[0], grid[1] * shape[1]
    pad = draw(st.integers(0, (shape[0] - 1) // 2))
    if draw(st.booleans()):
        return TokenLayout.anyres(grid, shape, (pad, rows - pad, 0, cols))
    return TokenLayout.anyres(grid, shape, (0, rows, 0, cols))


@given(layouts(), st.sampled_from([one for one in CONDITIONS if one != "reversed-frames"]))
def test_origins_equal_a_slow_loop(layout: TokenLayout, condition: Any) -> None:
    found = origins(layout, condition).tolist()
    by_view: dict[int, list[int]] = {}
    for i, view in enumerate(layout.view.tolist()):
        by_view.setdefault(view, []).append(i)
    height, width = layout.view_shape
    for i, source in enumerate(found):
        kind, view = int(layout.kind[i]), int(layout.view[i])
        if kind == Kind.SEPARATOR and condition == "reversed-crops":
            # It still ends the row of what comes in front of it.
            assert layout.kind[source] == Kind.SEPARATOR
            assert layout.canvas_row[source] == layout.canvas_row[found[i - 1]]
        elif kind == Kind.SEPARATOR or (kind == Kind.THUMBNAIL and condition in CROPS):
            assert source == i
        elif condition in CROPS:
            partner = layout.views - view
            assert source == by_view[partner][by_view[view].index(i)]
        else:
            names = ("canvas_row", "canvas_col") if kind == Kind.CROP else ("row", "col")
            sizes = layout.canvas_shape if kind == Kind.CROP else (height, width)
            here = [int(getattr(layout, name)[i]) for name in names]
            there = [int(getattr(layout, name)[source]) for name in names]
            axis = int(condition == "flip-lr")
            here[axis] = sizes[axis] - 1 - here[axis]
            assert there == here
            assert layout.kind[source] == kind
    assert [found[i] for i in found] == list(range(len(layout)))


def test_the_thumbnail_has_no_counterpart_where_crops_move() -> None:
    aside = FULL.kind != Kind.CROP
    for condition in CROPS:
        assert ((paired(FULL, condition) == -1) == aside).all()
    assert ((paired(FULL, "flip-lr") == -1) == FULL.is_separator).all()


def test_reversed_frames() -> None:
    found = origins(VIDEO, "reversed-frames")
    assert found.tolist() == [12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3, 16]
    assert paired(VIDEO, "reversed-frames").tolist() == [*found.tolist()[:-1], -1]


@pytest.mark.parametrize(
    ("name", "condition", "why"),
    [
        ("one view", "reversed-crops", "fewer than two crops"),
        ("no rows", "reversed-crops", "no crop left"),
        ("2x2", "reversed-frames", "fewer than two frames"),
    ],
)
def test_impossible_conditions_are_refused(name: str, condition: Any, why: str) -> None:
    with pytest.raises(NotPossible, match=why):
        origins(LAYOUTS[name], condition)


def test_crops_of_unlike_shapes_are_not_exchanged() -> None:
    lopsided = TokenLayout.anyres((1, 2), (4, 4), (0, 4, 1, 8))
    with pytest.raises(NotPossible, match="unlike shapes"):
        origins(lopsided, "reversed-crops")
    assert len(origins(lopsided, "flip-lr")) == len(lopsided)


@pytest.mark.parametrize("condition", ["flip-lr", "flip-tb", "exchanged-crops"])
def test_signals_move_with_their_features(condition: Any) -> None:
    signal = tp.create("globalcom2", retention=0.5).needs
    tokens = sample_tokens(signal, PADDED)
    moved = move_tokens(tokens, condition)
    source = origins(PADDED, condition)
    assert torch.equal(moved.features, tokens.features[source])
    for name in signal:
        assert torch.equal(
            moved.signals[name].nan_to_num(), tokens.signals[name][source].nan_to_num()
        )
    assert moved.seed != tokens.seed
    assert moved.layout is tokens.layout


@pytest.mark.parametrize("layout", [FULL, PADDED, LAYOUTS["1x3"], VIDEO])
def test_reversed_order_moves_whole_tokens(layout: TokenLayout) -> None:
    """All values move with their token; crops or frames come in reverse order, row by row."""
    signal = next(iter(tp.create("globalcom2", retention=0.5).needs))
    tokens = sample_tokens(frozenset({signal}), layout)
    video = layout.modality == "video"
    moved = move_tokens(tokens, "reversed-frames" if video else "reversed-crops")

    def entries(some: VisualTokens) -> list[tuple[float, ...]]:
        names = ("kind", "view", "row", "col", "canvas_row", "canvas_col")
        places = torch.stack([getattr(some.layout, name) for name in names], 1)
        values = [some.features, some.signals[signal].nan_to_num()[:, None]]
        return [tuple(one) for one in torch.cat([places.to(values[0]), *values], 1).tolist()]

    assert sorted(entries(moved)) == sorted(entries(tokens))
    assert moved.layout.view_sizes == layout.view_sizes
    last = layout.views - 1
    for before, after in zip(layout.view.tolist(), moved.layout.view.tolist(), strict=True):
        thumbnail, separator = before == 0 and not video, before < 0
        kept = thumbnail or separator
        assert after == (before if kept else last - before + int(not video))
    for view in range(layout.views):
        mine = moved.layout.view == view
        rows, cols = moved.layout.row[mine], moved.layout.col[mine]
        raster = rows * layout.view_shape[1] + cols
        assert raster.tolist() == sorted(raster.tolist())


def test_crops_of_an_image_change_places() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    for slot, (y, x) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels[y : y + 4, x : x + 4] = 10 * slot
    pixels[0, 0] = 99  # the corner of the first crop becomes the corner of the last
    turned = np.asarray(move_pixels(Image.fromarray(pixels), "reversed-crops", FULL, 4))
    assert turned[::4, ::4, 0].tolist() == [[30, 20], [10, 99]]
    with pytest.raises(NotPossible, match="padded"):
        move_pixels(Image.new("RGB", (8, 6)), "reversed-crops", PADDED, 4)
    with pytest.raises(NotPossible, match="thumbnail"):
        move_pixels(Image.fromarray(pixels), "exchanged-crops", FULL, 4)
