"""Geometry of the packed sequence, against the model's own packing and processor."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from tokenprune.errors import UserError
from tokenprune.layout import Kind, TokenLayout, unpadded_box
from tokenprune.models import testbed
from tokenprune.models.llava_next import LlavaNext
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

SIDES = st.integers(1, 3000)
SIZES = st.tuples(SIDES, SIDES)


def _adapter(config: LlavaNextConfig) -> LlavaNext:
    """An adapter that has a config and nothing else."""
    return LlavaNext(SimpleNamespace(config=config))  # type: ignore[arg-type]


REAL = _adapter(LlavaNextConfig())  # 336 px, patches of 14, the pinpoints of the real checkpoints
TINY = _adapter(LlavaNext.tiny().config)


def _packed_codes(adapter: LlavaNext, size: tuple[int, int]) -> Tensor:
    """(N, 3) view, row and column of every entry as the model itself packs them, -1 at newlines."""
    config = adapter.base.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    views = adapter.layout(size).views
    view, row, col = torch.meshgrid(
        torch.arange(views), torch.arange(side), torch.arange(side), indexing="ij"
    )
    codes = torch.stack([view, row, col], -1).flatten(1, 2).float()
    model = SimpleNamespace(config=config)
    packed, _ = LlavaNextModel.pack_image_features(
        model, [codes], [list(size)], "full", image_newline=torch.full((3,), -1.0)
    )
    return packed[0].long()


def _check_layout(adapter: LlavaNext, size: tuple[int, int]) -> None:
    layout, codes = adapter.layout(size), _packed_codes(adapter, size)
    assert len(layout) == len(codes)
    assert torch.equal(torch.stack([layout.view, layout.row, layout.col], -1), codes)
    newline = codes[:, 0] < 0
    assert torch.equal(layout.is_separator, newline)
    assert torch.equal(layout.kind == Kind.THUMBNAIL, codes[:, 0] == 0)
    assert torch.equal(layout.kind == Kind.CROP, codes[:, 0] > 0)
    # The canvas, read from the sequence: a row is the patches between two separators.
    thumbnail = int((codes[:, 0] == 0).sum())
    ends = [thumbnail - 1, *newline.nonzero().squeeze(1).tolist()]
    assert layout.canvas_shape[0] == len(ends) - 1
    for row, (start, end) in enumerate(pairwise(ends)):
        inside = torch.arange(start + 1, end)
        assert (layout.canvas_row[start + 1 : end + 1] == row).all()
        assert torch.equal(layout.canvas_col[inside], torch.arange(len(inside)))
        assert len(inside) == layout.canvas_shape[1]
    assert (layout.canvas_col[newline] == -1).all()
    assert (layout.canvas_row[:thumbnail] == -1).all()
    sizes = [int((codes[:, 0] == view).sum()) for view in range(layout.views)]
    assert list(layout.view_sizes) == sizes


@settings(max_examples=2000)
@given(SIZES)
@example((1, 3000))
@example((3000, 1))
@example((205, 984))
def test_layout_is_the_models_packing_tiny(size: tuple[int, int]) -> None:
    _check_layout(TINY, size)


@settings(max_examples=1000)
@given(SIZES)
@example((205, 984))
@example((984, 205))
@example((1, 3000))
@example((3000, 1))
@example((336, 336))
@example((672, 671))
def test_layout_is_the_models_packing_real(size: tuple[int, int]) -> None:
    _check_layout(REAL, size)


@pytest.mark.parametrize("size", [(20, 30), (10, 30), (24, 24), (12, 12), (100, 7)])
def test_layout_has_as_many_entries_as_the_model_features(size: tuple[int, int]) -> None:
    model = LlavaNext.tiny()
    adapter = LlavaNext(model)
    with torch.no_grad():
        features = model.model.get_image_features(**adapter.dummy_images([size])).pooler_output
    assert len(features[0]) == len(adapter.layout(size))


@pytest.mark.parametrize(
    ("height", "width", "grid", "entries"),
    [
        (1080, 1920, (2, 2), 576 + 28 * 49),  # methods.md 1.2, counted by hand there
        (672, 672, (2, 2), 576 + 48 * 49),
        (480, 640, (2, 2), 576 + 36 * 49),
        (600, 1200, (1, 2), 576 + 24 * 49),
    ],
)
def test_known_counts(height: int, width: int, grid: tuple[int, int], entries: int) -> None:
    layout = REAL.layout((height, width))
    assert layout.grid == grid
    assert len(layout) == entries


def test_the_two_unpadding_rules_differ_at_float_edges() -> None:
    """205 * 72 / 984 is 15 up to float error: Hugging Face rounds first, LLaVA truncates."""
    canvas = (24, 72)
    assert unpadded_box((205, 984), canvas, "hf") == (4, 20, 0, 72)
    assert unpadded_box((205, 984), canvas, "llava") == (5, 19, 0, 72)
    assert REAL.layout((205, 984)).canvas_shape == (16, 72)


@settings(max_examples=500)
@given(SIZES, st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_unpadded_box_is_centred_and_as_wide_as_the_image(
    size: tuple[int, int], grid: tuple[int, int]
) -> None:
    rows, cols = 24 * grid[0], 24 * grid[1]
    for rule in ("hf", "llava"):
        top, bottom, left, right = unpadded_box(size, (rows, cols), rule)
        assert top == rows - bottom
        assert left == cols - right
        assert 0 <= top <= bottom <= rows
        assert 0 <= left <= right <= cols
        # One side is full, the other the image's share of it, to within two patches.
        height, width = size
        if (top, bottom) != (0, rows):
            assert abs((bottom - top) - cols * height / width) <= 2
        elif (left, right) != (0, cols):
            assert abs((right - left) - rows * width / height) <= 2


@settings(max_examples=40)
@given(st.tuples(st.integers(8, 300), st.integers(8, 300)))
@example((8, 300))
@example((300, 8))
def test_processor_counts_as_many_placeholders(size: tuple[int, int]) -> None:
    adapter = _processor_adapter()
    from PIL import Image

    image = Image.new("RGB", (size[1], size[0]))
    ids = adapter.processor(
        images=image, text=adapter.processor.image_token, return_tensors="pt"
    ).input_ids
    found = int((ids == adapter.facts.placeholders["image"]).sum())
    assert found == len(adapter.layout(size))


_loaded: list[LlavaNext] = []


def _processor_adapter() -> LlavaNext:
    """Config and real `LlavaNextProcessor` of the embedded testbed."""
    if not _loaded:
        if "testbed-next" not in testbed.names():
            pytest.skip("the testbed is not built")
        from transformers import AutoConfig, LlavaNextProcessor

        path = testbed.path("testbed-next")
        adapter = _adapter(AutoConfig.from_pretrained(path))
        adapter.processor = LlavaNextProcessor.from_pretrained(path)
        _loaded.append(adapter)
    return _loaded[0]


def test_single_view() -> None:
    layout = TokenLayout.single((2, 3))
    kinds = [Kind.THUMBNAIL] * 6 + [Kind.SEPARATOR]
    assert layout.kind.tolist() == kinds
    assert layout.view.tolist() == [0] * 6 + [-1]
    assert layout.row.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert layout.col.tolist() == [0, 1, 2, 0, 1, 2, -1]
    assert layout.canvas_row.tolist() == [-1] * 7
    assert (layout.views, layout.view_sizes) == (1, (6,))
    assert layout.grid == layout.canvas_shape == (0, 0)
    assert len(TokenLayout.single((2, 3), newline=False)) == 6


def test_anyres_by_hand() -> None:
    """Views of 2x2, a grid of 1x2, the outer columns padded: canvas of 2 rows and 2 columns."""
    layout = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 1, 3))
    assert layout.view.tolist() == [0, 0, 0, 0, 1, 2, -1, 1, 2, -1]
    assert layout.row.tolist() == [0, 0, 1, 1, 0, 0, -1, 1, 1, -1]
    assert layout.col.tolist() == [0, 1, 0, 1, 1, 0, -1, 1, 0, -1]
    assert layout.canvas_row.tolist() == [-1, -1, -1, -1, 0, 0, 0, 1, 1, 1]
    assert layout.canvas_col.tolist() == [-1, -1, -1, -1, 0, 1, -1, 0, 1, -1]
    assert layout.view_sizes == (4, 2, 2)
    assert layout.patches.tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    bare = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 1, 3), newlines=False)
    assert not bare.is_separator.any()
    assert bare.view.tolist() == [0, 0, 0, 0, 1, 2, 1, 2]


def test_take_keeps_views_that_lost_everything() -> None:
    layout = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 1, 3))
    left = layout.take(torch.tensor([1, 5, 6]))
    assert left.view.tolist() == [0, 2, -1]
    assert left.view_sizes == (1, 0, 1)
    assert left.views == 3


def test_take_and_to_keep_what_was_counted() -> None:
    layout = REAL.layout((480, 640))
    sizes = layout.view_sizes
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert (moved.view_sizes, moved.views) == (sizes, 5)
    assert moved.kind.device.type == "meta"


def test_visual_tokens_must_be_aligned() -> None:
    layout = TokenLayout.single((2, 2))
    signal = Signal("received")
    with pytest.raises(UserError, match="4 entries but the layout has 5"):
        VisualTokens(layout, torch.zeros(5, 3), {signal: torch.zeros(4)})
    with pytest.raises(UserError, match="features has 6 entries"):
        VisualTokens(layout, torch.zeros(6, 3))


def test_a_signal_that_was_not_declared_is_a_sentence() -> None:
    tokens = VisualTokens(TokenLayout.single((2, 2)), torch.zeros(5, 3))
    with pytest.raises(UserError, match="Name it in the method's `needs`"):
        tokens[Signal("received")]


def test_seed_depends_on_the_pixels_alone() -> None:
    layout = TokenLayout.single((2, 2))

    def tokens(fill: float) -> VisualTokens:
        return VisualTokens(layout, torch.randn(5, 3), fingerprint=torch.full((3, 2, 2), fill))

    assert tokens(0.5).seed == tokens(0.5).seed
    assert tokens(0.5).seed != tokens(0.25).seed
    assert VisualTokens(layout, torch.zeros(5, 3)).seed == 0


def test_taking_tokens_takes_everything_that_is_aligned() -> None:
    layout, signal = TokenLayout.single((2, 2)), Signal("received")
    tokens = VisualTokens(layout, torch.arange(15.0).view(5, 3), {signal: torch.arange(5.0)})
    taken = tokens.take(torch.tensor([1, 4]))
    assert taken.features.tolist() == [[3, 4, 5], [12, 13, 14]]
    assert taken[signal].tolist() == [1, 4]
    assert taken.layout.col.tolist() == [1, -1]
