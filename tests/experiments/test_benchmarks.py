"""The benchmarks run, count correctly, and show regressions."""

import dataclasses
import functools
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.engine.tower import running
from tokenprune.errors import UserError
from tokenprune.experiments.benchmarks import selection, tower
from tokenprune.experiments.benchmarks.growth import _exponent
from tokenprune.experiments.benchmarks.outside import run_outside
from tokenprune.experiments.benchmarks.plain import LOOPS
from tokenprune.experiments.benchmarks.prefill import TOY
from tokenprune.experiments.benchmarks.record import Figure, changes, noise_of, save, table
from tokenprune.experiments.benchmarks.run import BENCHMARKS, BenchmarkRequest, run
from tokenprune.experiments.benchmarks.second_device import OTHER, SecondDevice
from tokenprune.experiments.benchmarks.shapes import (
    FIVE_VIEWS,
    LLAVA_NEXT_7B,
    larger_testbed,
    llava,
    prompt_of,
    tokens_at,
    vit_flops,
)
from tokenprune.experiments.benchmarks.sharing import METHODS, _bound, _bound_7b
from tokenprune.experiments.benchmarks.watching import watching
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.timing import median_of
from tokenprune.layout import TokenLayout


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    from tokenprune.cli import app

    out = tmp_path / "figures.csv"
    result = CliRunner().invoke(app, ["benchmark", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    frame = table(out)
    assert set(frame["benchmark"]) == {*BENCHMARKS}
    assert set(frame["case"]) >= {*tp.list_methods(), "testbed-next"}
    assert frame["value"].notna().all()
    for column in ("device", "machine", "torch", "transformers", "date"):
        assert frame[column].notna().all()
    shown, _, _ = result.output.partition("Written to")
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("name", tp.list_methods())
def test_every_signal_inside_the_language_model_is_timed(name: str) -> None:
    """Each needs attention rows, keys or a norm, which the plain forward does not compute."""
    layout, bench = TokenLayout.single((4, 4)), _bench()
    method = tp.create(name, retention=0.5)
    part = method.at(method.cuts[-1]) if method.cuts else method
    tokens = tokens_at(layout, part.needs, bench.shape.hidden)
    wanted = {one for one in part.needs if one.info.source == "decoder layer"}
    looks = [look() for look in bench._looks(part, (method.cuts or (0,))[-1], tokens)]
    outside = [one for one in part.needs if one.info.source == "vision layer"]
    assert len(looks) == bool(wanted) + len(outside)
    if wanted:
        signals = looks[-1].signals
        assert wanted <= {*signals}
        for one in wanted:
            assert signals[one].shape == tokens.signals[one].shape, one
            assert torch.isfinite(signals[one]).all()


@functools.cache
def _bench() -> selection._Bench:
    return selection._Bench(selection.TINY, TokenLayout.single((4, 4)), "cpu", torch.float32, True)


def test_a_batch_of_prompts_is_pruned_row_by_row() -> None:
    """36 patches per view: half of 180 in each of three rows, and one row alone."""
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12))
    adapter = llava(TOY, "cpu", torch.float32)
    width = adapter.base.config.vision_config.hidden_size
    tokens = tokens_at(layout, frozenset(), TOY.hidden, vision=width)
    logits = []
    for rows in (1, 3):
        with tp.compress(adapter.model, "uniform", retention=0.5) as trace, torch.no_grad():
            inputs = prompt_of(adapter, tokens, rows)
            logits.append(adapter.model(**inputs, use_cache=True, logits_to_keep=1).logits)
        assert [ledger.kept_patches for ledger in trace.ledgers] == [90] * rows
    torch.testing.assert_close(logits[1], logits[0].expand(3, -1, -1))


def test_names_and_devices_are_checked_before_anything_runs() -> None:
    with pytest.raises(UserError, match="Did you mean 'growth'"):
        run(BenchmarkRequest(only=["growht"]))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            run(BenchmarkRequest(device="cuda"))


def frame(**values: float) -> pd.DataFrame:
    better = {"fast": "high", "slow": "low", "zero": "low", "why": None}
    return pd.DataFrame(
        {"benchmark": "b", "case": "c", "figure": name, "value": value, "better": better[name]}
        for name, value in values.items()
    )


def test_regressions_come_first() -> None:
    before = frame(fast=2.0, slow=1.0, zero=0.0, why=1.0)
    moved = changes(frame(fast=1.5, slow=0.5, zero=1.0, why=9.0), before)
    assert list(moved["figure"]) == ["zero", "fast", "slow"]
    assert list(moved["worse"]) == [True, True, False]
    assert list(moved["ratio"]) == [float("inf"), 0.75, 0.5]
    assert changes(frame(fast=1.9, slow=1.05, zero=0.0), before).empty
    assert changes(frame(slow=1.0), frame(fast=2.0)).empty
    vanished = changes(frame(zero=0.0), frame(zero=2.0))
    assert list(vanished["ratio"]) == [0.0]
    assert not vanished["worse"].any()


def test_a_change_within_twice_the_noise_is_none() -> None:
    """The noise of a ratio of two values with 6 % and 8 % is 10 %."""
    now, before = frame(slow=1.25).assign(noise=0.06), frame(slow=1.0)
    assert len(changes(now, before)) == 1
    before = before.assign(noise=0.08)
    (found,) = changes(now.assign(value=1.19), frame(slow=1.0))["noise"]
    assert found == pytest.approx(0.06)
    assert changes(now.assign(value=1.19), before).empty
    (found,) = changes(now, before)["noise"]
    assert found == pytest.approx(0.1)


def test_the_noise_of_repeats_by_hand() -> None:
    """Quartiles 2 and 4 of 1 to 5: a spread of 2 around 3."""
    one = median_of([1.0, 2.0, 3.0, 4.0, 5.0])
    error = 1.25 * (2 / 1.35) / 5**0.5 / 3
    assert noise_of(one) == pytest.approx(error)
    assert noise_of(one, one) == pytest.approx(2**0.5 * error)
    assert noise_of(median_of([1.0])) == 0


@pytest.mark.parametrize("quick", [True, False])
def test_toy_sizes_are_not_compared_with_full_ones(tmp_path: Path, quick: bool) -> None:
    stored = tmp_path / "stored.csv"
    save(frame(slow=1.0).assign(quick=not quick), stored)
    advice = "leave out --quick" if quick else "give --quick too"
    with pytest.raises(UserError, match=advice):
        run(BenchmarkRequest(quick=quick, against=stored, out=tmp_path / "new.csv"))


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are done are not measured again, unless the setting is another one."""
    asked: list[str] = []
    broken = True

    def measure(name: str, request: BenchmarkRequest, tell: object) -> pd.DataFrame:
        asked.append(name)
        if name == "growth" and broken:
            raise KeyboardInterrupt
        made = frame(slow=float(len(asked))).assign(benchmark=name, goal=float("nan"), met=pd.NA)
        return made.astype({"met": "boolean"})

    monkeypatch.setattr("tokenprune.experiments.benchmarks.run._measured", measure)
    request = BenchmarkRequest(only=["loops", "growth"], quick=True, out=tmp_path / "figures.csv")
    with pytest.raises(KeyboardInterrupt):
        run(request)
    assert not request.out.exists()
    broken = False
    found = run(request).tables["figures"]
    assert asked == ["loops", "growth", "growth"]
    assert list(found["value"]) == [1.0, 3.0]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.csv"]
    broken, request = True, dataclasses.replace(request, force=True)
    with pytest.raises(KeyboardInterrupt):
        run(request)
    broken = False
    run(dataclasses.replace(request, quick=False))
    assert asked[3:] == ["loops", "growth", "loops", "growth"]


def test_memory_is_seen_from_outside() -> None:
    """256 MiB of new tensors count; 512 MiB that exist before do not.

    Linux counts pages per CPU and adds them up late: on a machine with 96 CPUs the figure can be
    72 MiB off.
    """
    given, size = torch.ones(2**27), 2**26
    taken = run_outside(lambda: given.sum() + torch.ones(size).sum(), warm=lambda: given[:9].sum())
    assert 128 <= taken.bytes / 2**20 <= 384
    assert taken.timing.median > 0


def test_a_failure_outside_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="process of its own"):
        run_outside(lambda: 1 / 0, warm=lambda: None)
    assert "ZeroDivisionError" in capfd.readouterr().err


PADDED = TokenLayout.anyres((2, 2), (6, 6), (2, 10, 0, 12))
SQUARE = TokenLayout.anyres((1, 2), (7, 5), (0, 7, 0, 10))


@pytest.mark.parametrize("retention", [0.1, 0.25, 0.6])
@pytest.mark.parametrize("layout", [PADDED, SQUARE], ids=["padded", "one row of crops"])
@pytest.mark.parametrize("name", LOOPS)
def test_methods_keep_the_tokens_of_their_plain_loops(
    name: str, layout: TokenLayout, retention: float
) -> None:
    method = tp.create(name, retention=retention, separators="none")
    tokens = tokens_at(layout, method.needs, 64, vision=32)
    assert method(tokens).keep.tolist() == LOOPS[name](tokens, retention)


@pytest.mark.parametrize("name", ["figures.csv", "figures.parquet"])
def test_files(tmp_path: Path, name: str) -> None:
    kept = frame(fast=2.0, why=1.0)
    save(kept, tmp_path / name)
    assert len(changes(table(tmp_path / name), kept)) == 0
    with pytest.raises(UserError, match="cannot read benchmark figures"):
        table(tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks benchmark, better, case"):
        table(tmp_path / "other.csv")


def test_goals() -> None:
    low = Figure(case="c", figure="f", value=1.0, better="low", goal=1.0)
    assert low.met
    assert not Figure(case="c", figure="f", value=0.9, better="high", goal=1.0).met
    assert Figure(case="c", figure="f", value=0.9).met is None


def test_synchronisations_are_counted_on_the_second_device() -> None:
    here = torch.tensor([3, 1, 2])
    with SecondDevice() as device:
        there = here.to(OTHER, non_blocking=True)
        here.tolist()
        here[here > 1].nonzero()
        int(here.max())
        there.index_select(0, there.argmax(0, keepdim=True))
        there[there > 1] = 2
        torch.arange(3, device=OTHER)
        assert not device.waits
        here.to(OTHER)
        torch.tensor([1], device=OTHER)
        assert there[there > 1].tolist() == [2, 2]
        int(there.max())
        torch.bincount(there)
        there[torch.argmax(there)]
        there[here - 1]
        there.cpu().tolist()
    assert device.waits == {
        "to the device": 2, "mask as index": 1, "tolist": 1, "__int__": 1, "bincount": 1,
        "number as index": 1, "index on the host": 1, "to the host": 1,
    }  # fmt: skip


def test_views_take_no_memory() -> None:
    one = torch.tensor([3, 1, 2])
    with watching() as seen:
        square = one[:, None] * one
        square.expand(100, 3, 3)
    assert seen.largest == 9


def test_attention_kernels_are_distinguished() -> None:
    one = torch.randn(1, 2, 5, 8)
    with watching() as seen:
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    assert (seen.attention, seen.fused) == (1, 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), watching() as seen:
        torch.nn.functional.scaled_dot_product_attention(one, one, one)
    assert (seen.attention, seen.fused) == (1, 0)


def test_exponents_are_slopes() -> None:
    sizes = [10, 100, 1000, 10000]
    assert _exponent(sizes, [1.0, 3.0, 300.0, 30000.0]) == pytest.approx(2)
    assert _exponent(sizes, [size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_the_shapes_are_those_of_the_real_model() -> None:
    assert (len(FIVE_VIEWS.patches), FIVE_VIEWS.views) == (2880, 5)
    assert prefill_flops([2880] * 32, LLAVA_NEXT_7B) == pytest.approx(41.7e12, rel=2e-3)
    # CLIP ViT-L/14 at 336 pixels is about 191 GMACs an image.
    assert vit_flops(1, 576, 1024, 4096, 24) == pytest.approx(2 * 191e9, rel=0.05)


def test_the_bound_by_hand() -> None:
    small = DecoderShape(layers=32, hidden=16, intermediate=16, heads=2, kv_heads=2, head_dim=8)
    adapter = larger_testbed(small)
    full = prefill_flops([2992] * 32, LLAVA_NEXT_7B)
    half = prefill_flops([1552] * 32, LLAVA_NEXT_7B)
    tower = vit_flops(5, 576, 1024, 4096, 24)
    bound = _bound_7b(adapter, cells(["uniform", "first"], [0.5])[1:])
    assert bound == pytest.approx((tower + full + 2 * half) / (2 * (tower + half)))
    late = prefill_flops([2992] * 2 + [1552] * 30, LLAVA_NEXT_7B)
    bound = _bound_7b(adapter, cells(["fastv", "dart"], [0.5])[1:])
    assert bound == pytest.approx(
        (tower + full + 2 * (late - 2 / 32 * full)) / (2 * (tower + late))
    )
    assert 0.5 < _bound_7b(adapter, cells(METHODS, [0.75, 0.5, 0.25, 0.1])[1:]) < 0.95


def test_the_bound_counts_full_length_once() -> None:
    """At R = 1 both methods are the uncompressed model, which runs anyway; FastV cuts at layer 2.

    Together: a vision encoder of 10, the uncompressed 320, 150, and 200 less 2 of 32 layers of 320.
    """
    small = DecoderShape(layers=32, hidden=16, intermediate=16, heads=2, kv_heads=2, head_dim=8)
    columns = cells(["uniform", "fastv"], [1.0, 0.5])[1:]
    cost = {("uniform", 0.5): 150.0, ("fastv", 0.5): 200.0}
    flops = {cell.key: cost.get((cell.method, cell.retention), 320.0) for cell in columns}
    found = _bound(larger_testbed(small), columns, flops, 320.0, 10.0)
    assert found == pytest.approx((10 + 320 + 150 + 180) / (330 + 330 + 160 + 210))


@pytest.mark.parametrize("name", ["tome", "downsample"])
def test_the_steps_inside_a_tower_are_those_of_the_real_run(name: str) -> None:
    """Entries in every layer equal those of the whole vision encoder with a selection after it."""
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12))
    adapter, method = (
        tower.clip(6, "cpu", torch.float32, **tower.SMALL),
        tp.create(name, retention=0.25),
    )
    steps = tower.Steps(adapter, method, layout, 8)
    made = steps()
    call = {"pixel_values": steps.pixels[None], "image_sizes": torch.tensor([[168, 168]])}
    with running(adapter, method, call, "image") as real, torch.no_grad():
        adapter.vision_tower(steps.pixels, output_hidden_states=True)
    assert made.encoding == real.encoding
    assert len(made.encoding.attended) == 4
    assert len(method(steps.shown(made)).keep) <= 45 + len(layout.separators)
