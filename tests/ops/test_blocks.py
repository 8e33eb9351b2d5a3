"""Comparisons of all pairs in blocks and pools, against slow loops and without large tensors."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

import tokenprune as tp
from tokenprune.experiments.benchmarks.shapes import tokens_at
from tokenprune.layout import TokenLayout
from tokenprune.ops import clustering, diversity, similarity
from tokenprune.ops.clustering import density_peaks, least_cosine_cutoff
from tokenprune.ops.diversity import cover_by_cosine, dpp_greedy, max_min_diversity
from tokenprune.ops.merging import bipartite_matching, nearest_others
from tokenprune.ops.similarity import Nearest, most_similar, parts, products, unit
from tokenprune.strategies.vispruner import thinned

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and pools of a few rows, as if the tokens were many."""
    monkeypatch.setattr(similarity, "BLOCK", 600)
    monkeypatch.setattr(similarity, "LISTED", 4)
    monkeypatch.setattr(similarity, "TABLE", 25)
    monkeypatch.setattr(diversity, "POOL", 20)
    monkeypatch.setattr(diversity, "TABLE", 25)
    monkeypatch.setattr(diversity, "CANDIDATES", 7)
    monkeypatch.setattr(clustering, "WALK", 20)


def _drawn(kind: str, size: int, seed: int, width: int = 12) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, width, generator=draw)
    if kind == "clusters":
        return rows[torch.randint(size // 8, (size,), generator=draw)] + 0.2 * rows
    if kind == "twins":  # most rows occur several times, far from each other
        return rows[torch.randint(size // 3, (size,), generator=draw)]
    if kind == "static":  # a video in which nothing moves
        return rows[: size // 4].repeat(4, 1)
    if kind == "axes":  # cosines of exactly 0, 1 and -1
        return torch.eye(width)[torch.randint(width, (size,), generator=draw)] * rows.sign()[:, :1]
    return rows


KINDS = pytest.mark.parametrize("kind", ["random", "clusters", "twins", "static", "axes"])


def _cosines(rows: Tensor) -> Tensor:
    rows = rows.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return (rows @ rows.T).mul(1e9).round() / 1e9  # equal rows tie


def _farthest_first(rows: Tensor, count: int) -> list[int]:
    far = (1 - _cosines(rows)).tolist()
    everyone = range(len(far))
    nearest = [min(far[i][j] for j in everyone if j != i) for i in everyone]
    chosen = [max(everyone, key=lambda i: (nearest[i], -i))]
    while len(chosen) < count:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(far[i][j] for j in chosen), -i)))
    return chosen


@pytest.mark.usefixtures("small")
@DTYPES
@KINDS
@pytest.mark.parametrize("size", [44, 61, 80])
def test_max_min_diversity_of_many_rows(kind: str, size: int, dtype: torch.dtype) -> None:
    """In the order of selection, with ties of planted twins, and among a part of the rows."""
    rows = _drawn(kind, size, seed=size).to(dtype)
    count = size // 2
    wanted = _farthest_first(rows, count)
    assert max_min_diversity(rows, count).tolist() == wanted
    among = torch.arange(1, 2 * len(rows), 2)
    spaced = torch.zeros(2 * len(rows), rows.shape[1], dtype=dtype)
    spaced[among] = rows
    assert max_min_diversity(spaced, count, among).tolist() == [2 * row + 1 for row in wanted]


def test_the_bits_of_a_product_do_not_depend_on_its_block() -> None:
    """On a CPU: the ties of equal tokens are those of the table of all pairs."""
    for width in (64, 100, 1024):
        rows = unit(torch.randn(530, width, generator=torch.Generator().manual_seed(width)))
        rows[501] = rows[3]
        whole = rows @ rows.T
        for size in (1, 2, 3, 7, 15, 16, 17, 100, 333):
            some = rows[150 : 150 + size]
            assert torch.equal(products(some, rows), whole[150 : 150 + size])
            assert torch.equal(products(rows, some), whole[:, 150 : 150 + size])
        assert torch.equal(whole[3], whole[501])


def test_parts_are_even_and_complete() -> None:
    for rows, columns in ((1, 1), (5000, 5000), (2897, 2897), (50176, 5017), (0, 7), (40, 10**7)):
        some = parts(rows, columns)
        assert [i for part in some for i in range(part.start, part.stop)] == list(range(rows))
        sizes = [part.stop - part.start for part in some]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) * columns <= max(similarity.BLOCK, 32 * columns)


def _most_probable(rows: Tensor, quality: Tensor, count: int) -> list[int]:
    """By determinants in float64; on ties the row with the smallest sum, then the earlier one."""
    worth = quality.double()
    kernel = worth[:, None] * _cosines(rows) * worth
    sums = kernel.sum(1).mul(1e6).round().tolist()
    chosen: list[int] = []
    for _ in range(count):
        rest = [row for row in range(len(rows)) if row not in chosen]
        volume = {row: float(kernel[[*chosen, row]][:, [*chosen, row]].det()) for row in rest}
        scale = float(kernel[chosen][:, chosen].det()) if chosen else 1.0
        best = max(volume.values())
        tied = [row for row in rest if volume[row] > best - 1e-6 * scale]
        chosen.append(min(tied, key=lambda row: (sums[row], row)))
    return chosen


@pytest.mark.usefixtures("small")
@DTYPES
@pytest.mark.parametrize("kind", ["random", "clusters", "twins", "static"])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("table", [25, 60])
def test_dpp_greedy_of_many_rows(
    kind: str, plain: bool, table: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diversity, "TABLE", table)
    rows = _drawn(kind, 60, seed=2).to(dtype)
    quality = torch.ones(60)
    if not plain:  # equal rows have equal qualities
        quality += 0.5 * unit(rows)[:, 0]
    wanted = _most_probable(rows, quality, 10)
    everyone = torch.arange(60)
    assert dpp_greedy(rows, quality, 10, everyone).tolist() == wanted
    among = torch.arange(0, 120, 2)
    spaced, double = rows.repeat_interleave(2, 0), quality.repeat_interleave(2)
    assert dpp_greedy(spaced, double, 10, among).tolist() == [2 * row for row in wanted]
    assert sorted(dpp_greedy(rows, quality, 60, everyone).tolist()) == list(range(60))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("table", [25, 400])
@pytest.mark.parametrize("kind", ["random", "clusters"])
def test_dpp_greedy_selects_the_best_up_to_rounding(
    kind: str, table: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gains in float64: none exceeds that of the selected row by more than float32 rounds off."""
    monkeypatch.setattr(diversity, "TABLE", table)
    rows = _drawn(kind, 400, seed=9, width=48)
    gain, kernel = torch.ones(400, dtype=torch.float64), _cosines(rows)
    for row in dpp_greedy(rows, torch.ones(400), 40, torch.arange(400)).tolist():
        assert gain.max() - gain[row] < 2e-6
        kernel = kernel - kernel[:, row, None] * kernel[row] / kernel[row, row]
        gain = kernel.diagonal().clone()


@pytest.mark.usefixtures("small")
def test_dpp_greedy_of_many_rows_goes_on_by_quality_beyond_the_rank() -> None:
    rows = _drawn("random", 60, seed=4, width=5)
    quality = torch.rand(60, generator=torch.Generator().manual_seed(1)) + 0.5
    chosen = dpp_greedy(rows, quality, 40, torch.arange(60))
    assert int(torch.linalg.matrix_rank(rows[chosen[:5]])) == 5
    rest = quality[[row for row in range(60) if row not in chosen[:5].tolist()]]
    assert torch.equal(quality[chosen[5:]], rest.sort(descending=True).values[:35])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(3))
def test_cover_of_many_rows(seed: int) -> None:
    rows = unit(_drawn("clusters", 60, seed))
    worth = torch.rand(60, generator=torch.Generator().manual_seed(seed))
    alike, weight = _cosines(rows), worth.double()
    chosen: list[int] = []
    covered = torch.zeros(60, dtype=torch.float64)
    for _ in range(20):
        gain = (alike - covered[:, None]).clamp(min=0).sum(0) * weight
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        covered = torch.maximum(covered, alike[:, chosen[-1]])
    assert cover_by_cosine(rows, worth, 20).tolist() == sorted(chosen)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("neighbours", [None, 4])
def test_density_peaks_of_many_points(neighbours: int | None) -> None:
    points, count = _drawn("random", 60, seed=3), 9
    apart = [[math.dist(a, b) / 12**0.5 for b in points.tolist()] for a in points.tolist()]
    few = neighbours or count
    density = [math.exp(-sum(x * x for x in sorted(row)[:few]) / few) for row in apart]
    order = sorted(range(60), key=lambda i: -density[i])
    score = {order[0]: density[order[0]] * max(map(max, apart))}
    for rank, i in enumerate(order[1:], 1):
        score[i] = density[i] * min(apart[i][j] for j in order[:rank])
    wanted = sorted(score, key=lambda i: -score[i])[:count]
    centres, cluster = density_peaks(points, count, neighbours)
    assert centres.tolist() == wanted
    nearest = [min(range(count), key=lambda c: apart[i][wanted[c]]) for i in range(60)]
    assert cluster.tolist() == nearest


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["random", "clusters", "twins"])
@pytest.mark.parametrize("least", [0.0, 0.4])
def test_centres_of_many_points(kind: str, least: float) -> None:
    """The cutoff by bisection, and a walk from point to point, the densest first."""
    rows = unit(_drawn(kind, 61, seed=5))
    far = (1 - _cosines(rows)).clamp(min=0).tolist()
    density = [sum(math.exp(-((x / 2) ** 2)) for x in row) for row in far]
    order = sorted(range(61), key=lambda i: (-round(density[i], 6), i))

    def walk(cutoff: float) -> list[int]:
        chosen: list[int] = []
        for i in order:
            if all(far[i][j] > cutoff + 1e-6 for j in chosen):
                chosen.append(i)
        return sorted(chosen)

    low, high = least, max(map(max, far))
    if len(walk(low)) <= 12:
        high = low
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if len(walk(middle)) <= 12 else (middle, high)
    cutoff, found = least_cosine_cutoff(rows, 12, least)
    assert float(cutoff) == pytest.approx(high, abs=1e-4)
    assert found.nonzero().squeeze(1).tolist() == walk(float(cutoff))


@pytest.mark.usefixtures("small")
def test_nearest_of_many() -> None:
    rows = unit(_drawn("twins", 60, seed=6))
    alike = (rows.double() @ rows.double().T).mul(1e9).round()
    wanted = [max(range(30), key=lambda t: (float(alike[i, t]), -t)) for i in range(60)]
    assert most_similar(rows, rows[:30]).tolist() == wanted
    own = torch.arange(5, 50)
    found = nearest_others(rows[own], rows, own, 3).tolist()
    for place, others in zip(own.tolist(), found, strict=True):
        ranked = sorted((-float(alike[place, i]), i) for i in range(60) if i != place)
        assert others == [i for _, i in ranked[:3]]
    rows = unit(_drawn("random", 60, seed=6))
    alike = rows.double() @ rows.double().T
    matching = bipartite_matching(rows[None], 8)
    best = [max(range(30), key=lambda o: (float(alike[2 * e, 2 * o + 1]), -o)) for e in range(30)]
    order = sorted(range(30), key=lambda e: (-float(alike[2 * e, 2 * best[e] + 1]), e))
    assert matching.source[0].tolist() == order[:8]
    assert matching.target[0].tolist() == [best[e] for e in order[:8]]


@pytest.mark.usefixtures("small")
@KINDS
def test_nearest_of_sets_that_shrink(kind: str) -> None:
    rows, alike = unit(_drawn(kind, 60, seed=8)), _cosines(_drawn(kind, 60, seed=8))
    nearest, left = Nearest(rows), torch.arange(60)
    draw = torch.Generator().manual_seed(8)
    for size in (60, 60, 41, 40, 18, 9, 4, 2):
        left = left[torch.randperm(len(left), generator=draw)[:size]]
        some, members = left[::2], left[1::2]
        wanted = alike[some][:, members].amax(1)
        got = nearest.largest(some, members)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["random", "twins", "axes"])
@pytest.mark.parametrize("count", [1, 6, 31, 59])
def test_thinning_of_many(kind: str, count: int) -> None:
    """By the loop of the official code, on the table of all pairs."""
    rows = unit(_drawn(kind, 60, seed=4))
    alike, order = (rows @ rows.T).tolist(), list(range(59, -1, -1))
    got = thinned(torch.tensor(order), count, rows).tolist()
    while len(order) > count:
        first, second = order[::2], order[1::2]
        first.sort(key=lambda i: -max(alike[i][j] for j in second))
        order = first[min(8, len(order) - count, len(second)) :] + second
    assert got == order


@pytest.mark.parametrize("held", [0, 2, 99])
def test_graph_of_many_tokens(held: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenprune.strategies import gprune

    monkeypatch.setattr(gprune, "HELD", held)
    rows = _drawn("clusters", 60, seed=7)
    cosine = _cosines(rows)
    edge = cosine >= 0.5
    flow = (cosine / 0.03).masked_fill(~edge, -torch.inf).softmax(1)
    wanted = rows.double().norm(dim=1) @ torch.linalg.matrix_power(flow, 5) / edge.sum(1)
    got = gprune.GPrune(retention=0.5).score(rows)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-6)


MANY = TokenLayout.single((60, 100))
QUADRATIC = 4 * 6000 * 6000
PEAKS = {"divprune": 24e6, "cdpruner:relevance=none": 24e6 + 4 * 600 * 6000}
"""Bytes in all: little besides the features, and 600 rows of a Cholesky decomposition."""


@pytest.mark.parametrize(
    "spec",
    [
        *PEAKS,
        *("scope", "gprune", "prumerge", "vispruner", "visionzip", "dart", "holitom"),
        *("holitom-inner", "pact", "sparsevlm", "vidcom2"),
    ],
)
def test_no_table_of_all_pairs_of_6000_tokens(spec: str) -> None:
    """By the allocations that PyTorch's profiler sees."""
    method = tp.parse(spec, retention=0.1)
    part = method.at(method.cuts[0]) if method.cuts else method
    tokens = tokens_at(MANY, part.needs, 16, vision=16)
    with profile(use_device=None, profile_memory=True) as seen:
        part.select(tokens)
    events = [event for event in seen.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda one: one.start_ns())]
    assert max(changes) < QUADRATIC / 2
    assert max(accumulate(changes)) < PEAKS.get(spec, math.inf)
