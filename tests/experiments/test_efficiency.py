"""Costs without weights, and conversions between the budgets of papers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModel
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.compressor import Compressor
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.errors import UserError
from tokenprune.experiments.common.conversion import solve, translate
from tokenprune.experiments.common.grid import chosen
from tokenprune.experiments.common.prompt import Prompt, prompt_of, read_size
from tokenprune.experiments.common.timing import peak_memory
from tokenprune.experiments.efficiency import figures
from tokenprune.experiments.efficiency.costs import (
    activation_bytes,
    analytic_break_even,
    break_even,
    costs,
    layers,
    pays_from,
)
from tokenprune.strategies._golden.dart import Official
from tokenprune.strategies._golden.sparsevlm import Scheduled
from tokenprune.strategies.dart import DART

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


@pytest.fixture(scope="module")
def vicuna() -> Prompt:
    """2880 visual tokens on LLaVA-NeXT 7B."""
    return prompt_of("llava-v1.6-vicuna-7b")


@pytest.fixture(scope="module")
def square(vicuna: Prompt) -> Prompt:
    """One view of 576 patches and 40 words, as the field's LLaVA-1.5 tables have it."""
    return Prompt(vicuna.adapter, vicuna.square(24).layouts, text=40)


# --- costs ----------------------------------------------------------------------------------------


def test_the_published_column(vicuna: Prompt) -> None:
    """GlobalCom2's table for LLaVA-NeXT-7B: no text, no separators."""
    table = costs(vicuna, chosen(["uniform"], [1, 0.75, 0.5, 0.25, 0.1]))
    tera = [round(flops / 1e12, 1) for flops in table["flops"]]
    assert tera == [41.7, 41.7, 30.4, 19.7, 9.6, 3.8]
    assert list(table["layer_average"]) == [2880, 2880, 2160, 1440, 720, 288]


def test_text_is_not_free(vicuna: Prompt) -> None:
    """With 60 text tokens the published figure is not met, so it includes none."""
    with_text = Prompt(vicuna.adapter, vicuna.layouts, text=60)
    assert round(costs(with_text, [])["flops"][0] / 1e12, 1) == 42.6


def test_kv_cache_and_weights_by_hand() -> None:
    """Mistral: 8 heads of 128, keys and values, 2 bytes, 32 layers; 7.57 billion weights."""
    prompt = prompt_of("llava-v1.6-mistral-7b", (672, 672), text=10)
    row = costs(prompt, [tp.create("uniform", retention=0.25)]).iloc[1]
    assert row["kv_entries"] == 32 * (720 + 48 + 10)
    assert row["kv_bytes"] == 32 * 778 * 2 * 8 * 128 * 2
    assert row["weight_bytes"] / 2e9 == pytest.approx(7.57, abs=0.01)
    working = 778 * 2 * (3 * 4096 + 3 * 14336)
    assert row["activation_bytes"] == working
    assert row["memory_bytes"] == row["weight_bytes"] + row["kv_bytes"] + working


def test_dtype_scales_bytes_not_flops() -> None:
    half, full = (prompt_of("testbed-next", dtype=each) for each in ("bfloat16", "float32"))
    small, large = (costs(prompt, []).iloc[0] for prompt in (half, full))
    assert large["kv_bytes"] == 2 * small["kv_bytes"]
    assert large["weight_bytes"] == 2 * small["weight_bytes"]
    assert large["flops"] == small["flops"]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_activations_are_about_what_a_decoder_really_holds(kind: str) -> None:
    """Measured over a forward of four layers without KV cache."""
    config = AutoConfig.for_model(
        kind, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    states = torch.randn(1, 600, 128)
    with torch.no_grad():
        real = peak_memory(lambda: model(inputs_embeds=states, use_cache=False))
    told = activation_bytes(DecoderShape.of(config), 600, 4)
    assert 0.7 * real <= told <= 1.3 * real, f"{told:,} told, {real:,} taken"


def test_layer_by_layer(square: Prompt) -> None:
    """PyramidDrop at R = 1/8: 576, 288, 144 and 72 tokens, eight layers each."""
    table = layers(square, [tp.create("pyramiddrop", retention=0.125)])
    mine = table[table["label"] == "pyramiddrop"]
    assert list(mine["visual_tokens"]) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert list(mine["tokens"]) == [count + 40 for count in mine["visual_tokens"]]
    assert set(table[table["label"] == "uncompressed"]["visual_tokens"]) == {576}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("672x1008", (672, 1008)),
        ("336 x 672", (336, 672)),
        ("1008wx672h", (672, 1008)),
        ("672hx1008w", (672, 1008)),
        ("h672xw1008", (672, 1008)),
        ("480×640", (480, 640)),
    ],
)
def test_sizes_are_height_first_unless_spelled_out(text: str, size: tuple[int, int]) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["672", "0x5", "672wx100w", "axb", "-3x4", "672hx100", "1x2x3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="HEIGHTxWIDTH"):
        read_size(text)


def test_height_and_width_are_not_swapped() -> None:
    """1080 high, 1920 wide: a padded 2x2 canvas of 28 rows.  The other way round, 28 columns."""
    wide = prompt_of("llava-v1.6-vicuna-7b", read_size("1080x1920"))
    assert wide.visual == 576 + 28 * 49
    assert prompt_of("llava-v1.6-vicuna-7b", read_size("1920x1080")).visual == 576 + 48 * 29


def test_any_config_is_accepted(tmp_path: Path) -> None:
    config = prompt_of("llava-v1.6-vicuna-7b").adapter.base.config
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["architectures"] = ["LlavaNextForConditionalGeneration"]
    saved["text_config"]["num_hidden_layers"] = 10
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = costs(prompt_of(str(tmp_path), (672, 672)), [])
    assert found["kv_entries"][0] == 10 * 2928


def test_methods_with_a_fixed_retention_appear_once() -> None:
    specs = ["uniform", "fastv@0.3", "fastv:layer=3,retention=0.2", "first@0.5 + fastv@0.5"]
    kept = [(one.name, one.retention) for one in chosen(specs, [0.5, 0.25])]
    assert kept == [
        ("uniform", 0.5), ("uniform", 0.25), ("fastv", 0.3), ("fastv", 0.2), ("chain", 0.25),
    ]  # fmt: skip


# --- break-even -----------------------------------------------------------------------------------


def test_break_even_is_the_shortest_length_that_pays_off() -> None:
    assert pays_from([1, 4, 9, 16], [False, True, False, True]) == 16
    assert pays_from([1, 4, 9, 16], [True] * 4) == 1
    assert pays_from([1, 4, 9, 16], [True, True, True, False]) is None


def test_break_even_of_a_known_price(square: Prompt) -> None:
    """Half of the tokens saves n * n / 2; a fixed price of 50 pays where n * n / 2 > 50."""
    method = tp.create("uniform", retention=0.5)
    found = break_even(
        square,
        method,
        lambda ledger: ledger.entered_patches * ledger.patch_tokens + 50,
        lambda ledger: ledger.patch_tokens**2,
    )
    assert found == 16  # 9 * 9 - 4 * 9 = 45 does not, 16 * 16 - 8 * 16 = 128 does


def test_expensive_selectors_pay_off_later(square: Prompt) -> None:
    """Cosines of all pairs at R = 0.9, where little is saved, against evenly spaced tokens."""
    cheap = analytic_break_even(square, tp.create("uniform", retention=0.9))
    dear = analytic_break_even(square, tp.create("divprune", retention=0.9))
    assert cheap is not None
    assert dear is None or dear >= cheap


# --- translation ----------------------------------------------------------------------------------


def test_fastv_averages_more_than_its_r_says(square: Prompt) -> None:
    """K = 2, R = 0.25 of 576: (2 * 576 + 30 * 144) / 32 = 171 tokens, as much as 29.7 %."""
    found = translate(square, tp.parse("fastv:layer=2,retention=0.25"))
    assert found["tokens"] == (2 * 576 + 30 * 144) / 32 == 171
    assert found["equivalent"] == 171 / 576 == 0.296875
    assert found["kept_patches"] == 144


def test_sparsevlm_by_its_own_count(square: Prompt) -> None:
    """Its "128" counts the cutting layers as cut already, and nothing that is recycled."""
    method = Scheduled(schedule="128", recycle=0, depths=(2 / 32, 6 / 32, 16 / 32), retention=0.999)
    wanted = (2 * 576 + 4 * 303 + 10 * 110 + 16 * 36) / 32
    assert translate(square, method)["tokens"] == wanted == 126.25


@pytest.mark.parametrize(
    ("name", "stages", "average"),
    [
        ("192", (309, 204, 113), 206.5),
        ("128", None, 145.4),
        ("96", None, 114.1),
        ("64", None, 82.3),
    ],
)
def test_sparsevlm_as_it_is_processed(
    square: Prompt, name: str, stages: tuple[int, ...] | None, average: float
) -> None:
    """Three layers run in full, recycled tokens count: what its code really processes."""
    method = Scheduled(schedule=name, retention=0.999)
    assert translate(square, method)["tokens"] == pytest.approx(average, abs=0.051)
    if stages:
        table = layers(square, [method])
        mine = table[table["label"] == method.label]["visual_tokens"]
        assert list(mine) == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16


def test_dart_keeps_its_pivots_on_top(square: Prompt) -> None:
    """Its "128" is 132: eight pivots pick 16 each, four image pivots stay besides."""
    share = 0.222223  # 128.0004 of 576
    for kind, count in ((Official, 132), (DART, 128)):
        method = kind(retention=share)
        assert translate(square, method)["kept_patches"] == count


def test_visionzip_counts_its_cls_token(square: Prompt) -> None:
    """Its "64" are 53 patches, the CLS token and 10 merged ones: 63 of 576 here, 54 + 10 at 64."""
    for count in (63, 64):
        method = tp.create("visionzip", retention=round(count / 576, 6) + 1e-6)
        assert translate(square, method)["kept_patches"] == count


@pytest.mark.parametrize("measure", ["tokens", "flops", "equivalent"])
@pytest.mark.parametrize(
    "spec",
    ["uniform", "fastv:layer=3", "pyramiddrop", "dart", "globalcom2", "sparsevlm", "first"],
)
@pytest.mark.parametrize("retention", [0.93, 0.4, 0.111, 0.07])
def test_there_and_back_within_one_token(spec: str, measure: str, retention: float) -> None:
    prompt = prompt_of("testbed-next", (100, 150), text=20)
    method = tp.parse(spec, retention=retention)
    there = translate(prompt, method)
    back = solve(prompt, method, there[measure], measure).method  # type: ignore[arg-type]
    assert abs(translate(prompt, back)["kept_patches"] - there["kept_patches"]) <= 1


@pytest.mark.parametrize(
    ("model", "size", "spec", "retention"),
    [
        ("testbed-next", (100, 150), "downsample", 0.72),  # keeps more than at 0.857
        ("testbed-next", (100, 150), "hired", 0.796),  # views divide the budget by content
        ("testbed-next", (100, 150), "spatial-pool", 0.2),
        ("testbed-onevision", (130, 60), "vidcom2", 0.49),
    ],
)
def test_there_and_back_if_more_tokens_may_cost_less(
    model: str, size: tuple[int, int], spec: str, retention: float
) -> None:
    prompt = prompt_of(model, size, text=20)
    there = translate(prompt, tp.parse(spec, retention=retention))
    back = solve(prompt, tp.parse(spec, retention=0.5), there["tokens"])
    found = translate(prompt, back.method)
    assert found["tokens"] == back.cost, "what was solved for is what is told"
    assert abs(found["kept_patches"] - there["kept_patches"]) <= 1


@pytest.mark.parametrize("target", [float("nan"), float("inf")])
def test_a_target_must_be_a_number(square: Prompt, target: float) -> None:
    with pytest.raises(UserError, match="must be a number, got"):
        solve(square, tp.parse("fastv", retention=0.5), target, "flops")


@pytest.mark.parametrize("retention", [0.9, 0.25, 0.1])
def test_the_equivalent_is_as_long(vicuna: Prompt, retention: float) -> None:
    """A method in front of the language model at the equivalent retention has that average."""
    for spec in ("fastv", "pyramiddrop"):
        found = translate(vicuna, tp.parse(spec, retention=retention))
        same = tp.create("uniform", retention=round(found["equivalent"], 6))
        assert abs(translate(vicuna, same)["tokens"] - found["tokens"]) <= 1


def test_the_solution_is_the_nearest_step(square: Prompt) -> None:
    """FastV at 128 tokens a layer: (128 * 32 - 2 * 576) / 30 = 98.1, so 98 of 576."""
    found = solve(square, tp.create("fastv", retention=0.9), 128, "tokens")
    assert translate(square, found.method)["kept_patches"] == 98
    assert found.cost == (2 * 576 + 30 * 98) / 32
    assert found.target == 128
    assert len(str(found.method.retention)) <= len("0.1702")


def test_targets_out_of_reach_are_refused(square: Prompt) -> None:
    """Two full layers of six: 576 * 2 / 6 alone."""
    prompt = Prompt(prompt_of("testbed-next").adapter, square.layouts, text=5)
    with pytest.raises(UserError, match=r"cannot go down to 100 .* because 2 of 6 layers"):
        solve(prompt, tp.create("fastv", retention=0.5), 100, "tokens")
    with pytest.raises(UserError, match=r"cannot go up to 700 .* costs 576"):
        solve(prompt, tp.create("uniform", retention=0.5), 700, "tokens")
    with pytest.raises(UserError, match="only the retention of single methods"):
        solve(prompt, tp.parse("first@0.5 + fastv@0.5"), 100, "tokens")


def test_any_price_can_be_solved_for(square: Prompt) -> None:
    def price(method: Compressor) -> float:
        return 100 * method.retention

    found = solve(square, tp.create("uniform", retention=0.5), 37.5, price, what="coins")
    assert found.method.retention == 0.375


# --- command line ---------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, list(arguments))
        return result.exit_code, result.output

    return call


def test_efficiency_on_the_command_line(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    status, said = run("efficiency", "--retention", "1", ".75", ".5", ".25", ".1", "--out", "there")
    assert status == 0, said
    for tera in ("41.7", "30.4", "19.7", "9.6", "3.8"):
        assert f" {tera} " in said
    assert max(map(len, said.splitlines())) <= 80
    names = {path.name for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert {"costs.csv", "layers.csv", "efficiency.json", "cost.png", "layers.pdf"} <= names
    table = pd.read_csv(tmp_path / "there" / "costs.csv")
    assert list(table["retention"]) == [1, 1, 0.75, 0.5, 0.25, 0.1]
    asked = json.loads((tmp_path / "there" / "efficiency.json").read_text())
    assert asked["retention"] == [1, 0.75, 0.5, 0.25, 0.1]


def test_measured_on_the_command_line(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, said = run(
        "efficiency", "--config", "testbed-next", "-m", "fastv", "-r", "0.5", "--out", "there",
        "--image-size", "56x56", "--measure", "--repeats", "1", "--layers", "3", "--device", "cpu",
    )  # fmt: skip
    assert status == 0, said
    assert "3 of 6 decoder layers were built" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80
    table = pd.read_csv(tmp_path / "there" / "measured.csv")
    assert list(table["label"]) == ["uncompressed", "fastv"]
    assert (table[["vision", "prefill", "decode", "peak_bytes"]] > 0).all(axis=None)


def test_convert_on_the_command_line(run: Callable[..., tuple[int, str]]) -> None:
    status, said = run("convert", "fastv:layer=2,retention=0.25", "--image-size", "672x672")
    assert status == 0, said
    assert "image 672 high x 672 wide, 2880 patch tokens, 48 separators" in said
    assert f"{(2 * 2928 + 30 * 768) / 32:.2f}" in said
    status, said = run("convert", "fastv", "--tokens", "855")
    assert status == 0, said
    assert "0.25" in said


def test_the_fields_square_view_and_its_question(run: Callable[..., tuple[int, str]]) -> None:
    """128 of 576 for DART, of whose 8 pivots 4 are words."""
    dart = ("convert", "dart:retention=0.222223", "--patches", "24x24")
    status, said = run(*dart)
    assert status == 0, said
    assert "576 patch tokens, no separators, no text" in said
    assert re.search(r"patch tokens at the end +128\b", said)
    assert "32 tokens stand in for it" in said
    status, said = run(*dart, "--text-tokens", "1")
    assert "stand in" not in said
    _, said = run("convert", "uniform@0.5")
    assert "stand in" not in said, "it asks nothing"


def test_large_steps_give_a_warning(run: Callable[..., tuple[int, str]]) -> None:
    """24x24 is pooled to nearly square grids: 23x23 = 529 is one, nothing is near 540."""
    status, said = run("convert", "spatial-pool", "--tokens", "540", "--patches", "24x24")
    assert status == 0, said
    assert "No retention gives 540 visual tokens per layer on average" in said
    _, said = run("convert", "spatial-pool", "--tokens", "529", "--patches", "24x24")
    assert "No retention" not in said


def test_encoders_that_compute_less_are_reported(run: Callable[..., tuple[int, str]]) -> None:
    """12x12 of 24x24 patches and the CLS token: 145 of 577, by the ledger's formula."""
    _, said = run("convert", "downsample@0.25")
    wide, deep = 1024, 4096
    small, full = (n * 8 * wide**2 + 4 * n * n * wide + 4 * n * wide * deep for n in (145, 577))
    assert f"{100 * small / full:.2f} %" in said
    _, said = run("convert", "uniform@0.25")
    assert "vision encoder" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "fastv"), "needs a retention"),
        (("convert", "fastv@25"), "for 25 % write 0.25"),
        (("convert", "fastv@0.5", "--patches", "24x24", "--image-size", "9x9"), "not both"),
        (("efficiency", "-r", "25"), "for 25 % write 0.25"),
        (("efficiency", "-r", "25%"), "write 0.25"),
        (("positional-bias", "-r", "25"), "for 25 % write 0.25"),
        (("masks", "-r", "25"), "for 25 % write 0.25"),
        (("ablation", "globalcom2:alpha=0,1", "-r", "25"), "for 25 % write 0.25"),
        (("audit", "fastv", "-r", "25"), "for 25 % write 0.25"),
        (("convert", "fastv@0.5", "--tokens", "100"), "and not both"),
        (("convert", "fastv", "--tokens", "100", "--flops", "0.5"), "give one target"),
        (("convert", "fastv", "--tokens", "10"), "2 of 32 layers run at full length"),
        (("convert", "fastv@0.5", "--image-size", "big"), "HEIGHTxWIDTH"),
        (("efficiency", "--config", "llava-v9"), "Sizes known without a download"),
        (("efficiency", "--retention", "2"), "larger than 0 and at most 1"),
        (("efficiency", "-m", "scope", "--config", "llava-onevision-qwen2-7b"), "CLS"),
        (("efficiency", "--dtype", "int8"), "dtype must be one of"),
        (("compare", "--match", "watts"), "cost to match"),
        (("compare", "--match", "tokens", "-m", "fastv", "-r", "0.1"), "Leave the method out"),
    ],
)
def test_bad_input_is_a_sentence(
    run: Callable[..., tuple[int, str]], arguments: tuple[str, ...], words: str
) -> None:
    status, said = run(*arguments)
    assert status == 2, said
    assert words in said


def test_figures_show_every_method(vicuna: Prompt) -> None:
    methods = chosen(["fastv", "uniform"], [0.5, 0.25])
    figure = figures.cost_by_retention(costs(vicuna, methods), "t")
    line = next(line for line in figure.axes[0].lines if line.get_label() == "uniform")
    assert list(line.get_xdata()) == [0.25, 0.5, 1.0]
    assert [round(float(y), 3) for y in line.get_ydata()] == [0.23, 0.474, 1.0]
    figure = figures.tokens_by_layer(layers(vicuna, methods), "t")
    line = next(line for line in figure.axes[1].lines if line.get_label() == "fastv")
    assert list(line.get_ydata()) == [2880] * 2 + [720] * 30 + [720]
