"""Shared functions against slow loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops import ranking
from tokenprune.ops.clustering import density_peaks
from tokenprune.ops.diversity import dpp_greedy_map
from tokenprune.ops.ranking import normalise, top_per_view
from tokenprune.ops.spatial import dithered, evenly_spaced, project_thumbnail, region_sums
from tokenprune.signals import Signal
from tokenprune.spec import create
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS

CLS = Signal("cls_logits")
NAMES = st.sampled_from(sorted(LAYOUTS))


def _scores(layout: TokenLayout, seed: int, ties: bool = False) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 4, (len(layout),), generator=draw).float()
    return torch.randn(len(layout), generator=draw)


def _counts(layout: TokenLayout, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return [int(torch.randint(0, size + 1, (), generator=draw)) for size in layout.view_sizes]


@given(NAMES, st.integers(0, 1000), st.booleans())
def test_top_per_view(name: str, seed: int, ties: bool) -> None:
    layout = LAYOUTS[name]
    scores, counts = _scores(layout, seed, ties), _counts(layout, seed)
    wanted = []
    for view, count in enumerate(counts):
        mine = [i for i in range(len(layout)) if int(layout.view[i]) == view]
        wanted += sorted(mine, key=lambda i: (-float(scores[i]), i))[:count]
    got = top_per_view(layout, scores, torch.tensor(counts))
    assert got.tolist() == sorted(wanted)


def test_top_per_view_breaks_bfloat16_ties_by_position() -> None:
    layout = TokenLayout.single((4, 4))
    scores = torch.tensor([1.0, 1.001] * 8 + [0.0]).bfloat16()  # 1.001 is 1 in bfloat16
    assert top_per_view(layout, scores, torch.tensor([5])).tolist() == [0, 1, 2, 3, 4]


def test_top_per_view_ignores_values_at_separators() -> None:
    layout = LAYOUTS["1x3"]
    scores = _scores(layout, 1).masked_fill(layout.is_separator, torch.nan)
    other = scores.masked_fill(layout.is_separator, 1e9)
    counts = torch.tensor(_counts(layout, 1))
    assert torch.equal(top_per_view(layout, scores, counts), top_per_view(layout, other, counts))


@given(NAMES, st.integers(0, 1000))
def test_evenly_spaced(name: str, seed: int) -> None:
    layout, counts = LAYOUTS[name], _counts(LAYOUTS[name], seed)
    wanted = []
    for view, count in enumerate(counts):
        mine = [i for i in range(len(layout)) if int(layout.view[i]) == view]
        wanted += [mine[math.floor((i + 0.5) * len(mine) / count)] for i in range(count)]
    assert evenly_spaced(layout, torch.tensor(counts)).tolist() == sorted(wanted)


def _bayer(side: int) -> Tensor:
    """The dither matrix, block by block."""
    if side == 1:
        return torch.zeros(1, 1, dtype=torch.long)
    quarter = 4 * _bayer(side // 2)
    upper, lower = torch.cat([quarter, quarter + 2], 1), torch.cat([quarter + 3, quarter + 1], 1)
    return torch.cat([upper, lower])


@pytest.mark.parametrize("shape", [(8, 8), (4, 4), (7, 5), (3, 8)])
def test_dispersed(shape: tuple[int, int]) -> None:
    layout, matrix = TokenLayout.single(shape), _bayer(8)[: shape[0], : shape[1]].flatten()
    for count in (1, 4, shape[0] * shape[1] // 3, shape[0] * shape[1]):
        wanted = sorted(sorted(range(len(matrix)), key=lambda i: int(matrix[i]))[:count])
        assert dithered(layout, torch.tensor([count])).tolist() == wanted


def test_dispersed_leaves_no_column_out_where_the_stride_does() -> None:
    layout = TokenLayout.video(1, (8, 8))
    kept = {
        spread: layout.col[spread(layout, torch.tensor([16]))]
        for spread in (evenly_spaced, dithered)
    }
    assert kept[evenly_spaced].unique().tolist() == [2, 6]
    assert kept[dithered].unique().tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (3, 1), (5, 5), (2, 5), (7, 3)])
@pytest.mark.parametrize("shape", [(24, 24), (7, 5), (4, 6)])
def test_region_sums(grid: tuple[int, int], shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    wanted = torch.zeros(grid[0] * grid[1]).double()
    high, wide = max(shape[0] // grid[0], 1), max(shape[1] // grid[1], 1)
    for i in range(shape[0]):
        for j in range(shape[1]):
            cell = min(i // high, grid[0] - 1) * grid[1] + min(j // wide, grid[1] - 1)
            wanted[cell] += scores[i, j]
    torch.testing.assert_close(region_sums(scores, grid), wanted)


def test_region_sums_of_a_grid_that_does_not_divide() -> None:
    """24 / 5: cells of 4x4 = 16, and the last row and column of cells are 8 wide."""
    sums = region_sums(torch.ones(24, 24), (5, 5)).reshape(5, 5)
    assert sums[0].tolist() == [16, 16, 16, 16, 32]
    assert sums[4].tolist() == [32, 32, 32, 32, 64]


def _bilinear(image: list[list[float]], y: float, x: float) -> float:
    """Value between pixel centres, edges repeated."""
    height, width = len(image), len(image[0])
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[top][left] * (1 - dx) + image[top][right] * dx
    lower = image[bottom][left] * (1 - dx) + image[bottom][right] * dx
    return upper * (1 - dy) + lower * dy


@pytest.mark.parametrize("name", ["2x2", "2x2 padded", "1x3", "3x1"])
def test_project_thumbnail(name: str) -> None:
    layout = LAYOUTS[name]
    scores = _scores(layout, 7)
    high, wide = layout.view_shape
    image = scores[layout.kind == Kind.THUMBNAIL].reshape(high, wide).tolist()
    got = project_thumbnail(layout, scores)
    rows, cols = layout.canvas_shape
    for index in range(len(layout)):
        if layout.kind[index] != Kind.CROP:
            assert got[index].isnan()
            continue
        y = (int(layout.canvas_row[index]) + 0.5) * high / rows - 0.5
        x = (int(layout.canvas_col[index]) + 0.5) * wide / cols - 0.5
        assert float(got[index]) == pytest.approx(_bilinear(image, y, x), abs=1e-5)


@pytest.mark.parametrize("how", ["l2", "minmax", "none"])
def test_normalise(how: str) -> None:
    values = torch.tensor([3.0, -4.0, 5.0, 0.0, 0.0, 2.0])
    view = torch.tensor([1, 1, 0, 3, 3, 0])
    wanted = {
        "l2": [0.6, -0.8, 5 / math.sqrt(29), 0.0, 0.0, 2 / math.sqrt(29)],
        "minmax": [1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
        "none": values.tolist(),
    }[how]
    got = normalise(values, view, 4, how)  # type: ignore[arg-type]
    assert got.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["2x2", "2x2 padded", "1x3", "3x1"])
def test_holistic_score_of_globalcom2(name: str, alpha: float) -> None:
    """alpha * s^G + (1 - alpha) * s^L, both L2-normalised over the crop, with loops."""
    layout = LAYOUTS[name]
    tokens = sample_tokens(frozenset({CLS}), layout, seed=2)
    local = tokens[CLS].tolist()
    high, wide = layout.view_shape
    image = tokens[CLS][: high * wide].reshape(high, wide).tolist()
    rows, cols = layout.canvas_shape
    method = create("globalcom2", retention=0.5, alpha=alpha)
    got = method.ranking(tokens)
    for view in range(1, layout.views):
        mine = [i for i in range(len(layout)) if int(layout.view[i]) == view]
        guide = [
            _bilinear(
                image,
                (int(layout.canvas_row[i]) + 0.5) * high / rows - 0.5,
                (int(layout.canvas_col[i]) + 0.5) * wide / cols - 0.5,
            )
            for i in mine
        ]
        norm_g = math.sqrt(sum(value**2 for value in guide))
        norm_l = math.sqrt(sum(local[i] ** 2 for i in mine))
        for index, value in zip(mine, guide, strict=True):
            wanted = alpha * value / norm_g + (1 - alpha) * local[index] / norm_l
            assert float(got[index]) == pytest.approx(wanted, abs=1e-5)
    assert got[: high * wide].tolist() == local[: high * wide]


def _peaks_slowly(points: list[list[float]], count: int) -> tuple[list[int], list[int]]:
    size, root = len(points), len(points[0]) ** 0.5
    d = [[math.dist(a, b) / root for b in points] for a in points]
    density = [math.exp(-sum(x * x for x in sorted(row)[:count]) / count) for row in d]
    order = sorted(range(size), key=lambda i: (-density[i], i))
    score = {}
    for rank, i in enumerate(order):
        score[i] = density[i] * (min(d[i][j] for j in order[:rank]) if rank else max(map(max, d)))
    centres = sorted(range(size), key=lambda i: (-score[i], i))[:count]
    nearest = [min(range(count), key=lambda c: d[i][centres[c]]) for i in range(size)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(size)]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_density_peaks(size: int, count: int, seed: int) -> None:
    points = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    count = min(size, count)
    # Of two clusters the two nearest points are exactly as dense: rounding decides in the loops.
    if count != 2:
        centres, cluster = density_peaks(points, count)
        assert (centres.tolist(), cluster.tolist()) == _peaks_slowly(points.tolist(), count)


def test_density_peaks_prefers_the_earlier_of_equally_dense_points() -> None:
    points = torch.tensor([[5.0], [1], [0], [6]])  # two pairs, all four as dense
    centres, cluster = density_peaks(points, 2)
    assert centres.tolist() == [0, 1]
    assert cluster.tolist() == [0, 1, 1, 0]


# -- determinantal point processes ---------------------------------------------------------------


def _features(size: int, rank: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, rank, generator=draw)


@settings(max_examples=40)
@given(size=st.integers(1, 24), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_dpp_greedy_map_maximises_the_determinant(size: int, seed: int, share: float) -> None:
    """Slowly: whichever row makes the determinant of the chosen rows the largest."""
    rows = _features(size, size + 4, seed)
    kernel = rows @ rows.T
    count = int(share * min(size, 10))
    chosen: list[int] = []
    for _ in range(count):
        rest = [row for row in range(size) if row not in chosen]
        volumes = [kernel.double()[[*chosen, row]][:, [*chosen, row]].logdet() for row in rest]
        chosen.append(rest[int(torch.stack(volumes).argmax())])
    assert dpp_greedy_map(kernel, count).tolist() == chosen


@pytest.mark.parametrize(("size", "rank"), [(30, 4), (30, 1), (7, 7), (50, 12)])
def test_dpp_greedy_map_goes_on_beyond_the_rank(size: int, rank: int) -> None:
    """The first tokens span all; of the others, the largest diagonal comes first."""
    rows = _features(size, rank, 0)
    kernel = rows @ rows.T
    chosen = dpp_greedy_map(kernel, size)
    assert sorted(chosen.tolist()) == list(range(size))
    assert int(torch.linalg.matrix_rank(rows[chosen[:rank]])) == min(rank, size)
    rest = kernel.diagonal()[chosen[rank:]]
    assert torch.equal(rest, rest.sort(descending=True).values)


def test_dpp_greedy_map_of_no_and_of_equal_tokens() -> None:
    assert dpp_greedy_map(torch.eye(3), 0).tolist() == []
    assert sorted(dpp_greedy_map(torch.zeros(4, 4), 3).tolist()) == [0, 1, 2]
    twins = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    assert sorted(dpp_greedy_map(twins @ twins.T, 2).tolist()) == [0, 2]


def test_dpp_greedy_map_breaks_ties_by_similarity_and_not_by_index() -> None:
    """With unit lengths, the token least similar to the others comes first, at any index."""
    rows = torch.nn.functional.normalize(_features(9, 20, 1) + 1, dim=-1)
    kernel = (rows @ rows.T).fill_diagonal_(1)
    lonely = int(kernel.sum(1).argmin())
    assert int(dpp_greedy_map(kernel, 1)) == lonely
    assert int(dpp_greedy_map(kernel.flip(0, 1), 1)) == 8 - lonely


def test_top_is_that_of_a_sort() -> None:
    """Many ties; the reference sorts by score and index."""
    draw = random.Random(0)
    for _ in range(300):
        scores = [draw.randint(-3, 3) for _ in range(draw.randint(1, 40))]
        count = draw.randint(0, len(scores))
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        for dtype in (torch.float32, torch.bfloat16):
            found = ranking.top(torch.tensor(scores, dtype=dtype), count)
            assert found.tolist() == sorted(ranked[:count])


def test_top_counts_a_nan_as_the_highest() -> None:
    scores = torch.tensor([1.0, torch.nan, 2.0, torch.nan])
    assert [ranking.top(scores, count).tolist() for count in (1, 2, 3)] == [[1], [1, 3], [1, 2, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 7, 39])
def test_one_bad_score_is_found(dtype: torch.dtype, value: float, place: int) -> None:
    scores = torch.linspace(-9, 9, 40, dtype=dtype)
    assert ranking.all_finite(scores)
    assert ranking.all_finite(scores[:0])
    scores[place] = value
    assert not ranking.all_finite(scores)
    assert not ranking.all_finite(scores[place:][:1])
