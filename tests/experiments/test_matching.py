"""Methods at equal cost, and the times of their parts."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection, Stage
from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.errors import UserError
from tokenprune.experiments.common.bench import DECODED, Bench, Curve, Measurement
from tokenprune.experiments.common.cells import Cell, Matched
from tokenprune.experiments.common.prompt import Prompt, prompt_of
from tokenprune.experiments.common.questions import Question, held_out
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.common.summary import OVERALL, summarise
from tokenprune.experiments.common.timing import Timing
from tokenprune.experiments.compare.matching import matched_cells, realised, representative
from tokenprune.experiments.compare.run import run as compare
from tokenprune.experiments.compare.tables import matched_table, misses, tables
from tokenprune.experiments.efficiency.measured import measure
from tokenprune.models.loading import adapter_at_random
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def questions() -> Sequence[Question]:
    return held_out(20, 0, "image")


# --- matching -------------------------------------------------------------------------------------


def test_the_representative_prompt_is_as_the_engine_sees_it(
    pipe: Pipeline, questions: Sequence[Question]
) -> None:
    """Its tokens are those of the real batch; half of the questions have no more."""
    prompt = representative(pipe, questions)
    lengths = []
    for item in questions:
        image = item.images[0].open()
        ids = pipe.prepare([image], [item.question])["input_ids"]
        lengths.append((int((ids == pipe.adapter.facts.placeholders["image"]).sum()), ids.shape[1]))
    ordered = sorted(visual for visual, _ in lengths)
    assert prompt.visual == ordered[len(ordered) // 2]
    assert (prompt.visual, prompt.visual + prompt.text) in lengths
    assert prompt.asking is not None
    assert 0 < prompt.asking < prompt.text


@pytest.mark.parametrize("kind", ["tokens", "flops"])
def test_cells_cost_what_uniform_costs(
    pipe: Pipeline, questions: Sequence[Question], kind: str
) -> None:
    """Counted by hand from the layers the method would process."""
    methods = ["fastv", "uniform", "globalcom2", "sparsevlm"]
    found, left_out = matched_cells(pipe, questions, methods, [0.6, 1.0], kind)  # type: ignore[arg-type]
    prompt = representative(pipe, questions)
    shape = DecoderShape.of(pipe.adapter.language_model.config)
    assert not left_out
    assert found[0] == Cell()
    half = [cell for cell in found[1:] if cell.asked == 0.6]
    assert [cell.method for cell in half] == ["uniform", "fastv", "globalcom2", "sparsevlm"]
    assert half[0].retention == 0.6
    kept = int(0.6 * prompt.patches) + prompt.visual - prompt.patches
    full = prefill_flops([prompt.visual + prompt.text] * shape.layers, shape)
    target = kept if kind == "tokens" else prefill_flops([kept + prompt.text] * 6, shape) / full
    for cell in half:
        assert cell.matched is not None
        assert cell.matched.target == pytest.approx(target)
        assert cell.matched.cost == pytest.approx(target, abs=2 * target / kept)
    fastv = half[1].compressor
    assert fastv is not None
    layers = prompt.forecast(fastv).ledger.visual_per_layer
    if kind == "tokens":  # two full layers, four shorter ones
        assert abs(sum(layers) / 6 - kept) <= 1
        assert fastv.retention < 0.6
    assert {cell.retention for cell in found if cell.asked == 1} == {1.0}


def test_content_dependent_costs_are_measured() -> None:
    """ToMe merges by likeness, so that frames cost other than the random ones of a forecast."""
    onevision = tp.load("testbed-onevision")
    videos = held_out(1, 0, "video")
    found, _ = matched_cells(onevision, videos, ["tome"], [0.4], "tokens")
    cell = found[-1]
    assert cell.matched is not None
    frames = [picture.open() for picture in videos[0].images]
    encoded = onevision.encode_videos([frames], (), cell.compressor)  # type: ignore[arg-type]
    inputs = onevision.assemble([encoded], [videos[0].question])
    with tp.compress(onevision.model, cell.compressor) as trace:
        onevision.model.generate(**inputs, max_new_tokens=1)
    assert cell.matched.cost == trace.ledger.layer_average
    told = representative(onevision, videos).forecast(cell.compressor).ledger
    assert told.layer_average != cell.matched.cost, "else this test shows nothing"


def test_only_the_retention_is_solved_for(pipe: Pipeline, questions: Sequence[Question]) -> None:
    found, _ = matched_cells(pipe, questions, ["fastv:layer=1"], [0.5], "tokens")
    solved = found[-1].compressor
    assert solved is not None
    assert replace(solved, retention=0.5) == tp.parse("fastv:layer=1", retention=0.5)
    assert [cell.method for cell in found[1:]] == ["uniform", "fastv"]  # the reference is there


def test_unreachable_costs_are_refused_or_left_out(
    pipe: Pipeline, questions: Sequence[Question]
) -> None:
    with pytest.raises(UserError, match=r"fastv cannot go down .* 2 of 6 layers run at full"):
        matched_cells(pipe, questions, ["fastv"], [0.1], "tokens")
    found, left_out = matched_cells(
        pipe, questions, ["fastv"], [0.6, 0.1], "tokens", optional=["fastv"]
    )
    assert [(cell.method, cell.asked) for cell in found[1:]] == [
        ("uniform", 0.6), ("uniform", 0.1), ("fastv", 0.6),
    ]  # fmt: skip
    assert list(left_out) == ["fastv at the cost of uniform at 0.1"]


@pytest.mark.parametrize("spec", ["fastv@0.3", "first@0.5 + fastv@0.5", "uniform:retention=0.3"])
def test_methods_with_a_fixed_retention_are_refused(
    pipe: Pipeline, questions: Sequence[Question], spec: str
) -> None:
    with pytest.raises(UserError, match="has its own retention"):
        matched_cells(pipe, questions, [spec], [0.5], "tokens")


def test_options_named_like_retention_are_not_matched(
    pipe: Pipeline, questions: Sequence[Question]
) -> None:
    spec = "sparsevlm:position_ids=original"
    found, _ = matched_cells(pipe, questions, [spec], [0.7], "tokens")
    assert found[-1].label == spec


def test_times_can_be_matched(
    pipe: Pipeline, questions: Sequence[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer takes 1 ms a token, FastV's choice 60 ms: at equal time it processes 10 fewer."""
    monkeypatch.setattr(Bench, "layer", Curve(0.0, 1e-3, 0.0))
    monkeypatch.setattr(Bench, "outside", 0.0)
    monkeypatch.setattr(Bench, "signals", lambda self, method: 0.0)

    def run(self: Bench, method: Compressor) -> Measurement:
        chose = Timing(0.06 if method.name == "fastv" else 0.0, 0.0)
        ledger = self.prompt.forecast(method).ledger
        return Measurement(Timing(0.0, 0.0), chose, Timing(0.0, 0.0), 0, ledger)

    monkeypatch.setattr(Bench, "run", run)
    found, _ = matched_cells(pipe, questions, ["fastv"], [0.7], "prefill-ms")
    prompt = representative(pipe, questions)
    averages = [prompt.forecast(cell.compressor).ledger.layer_average for cell in found[1:]]
    assert averages[0] - averages[1] == pytest.approx(10, abs=0.7)


def test_times_that_cannot_be_matched_are_left_out_with_the_reason(
    pipe: Pipeline, questions: Sequence[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastV's choice takes longer than all of uniform; SparseVLM's raises; the others go on."""
    monkeypatch.setattr(Bench, "layer", Curve(0.0, 1e-3, 0.0))
    monkeypatch.setattr(Bench, "outside", 0.0)
    monkeypatch.setattr(Bench, "signals", lambda self, method: 0.0)

    def run(self: Bench, method: Compressor) -> Measurement:
        if method.name == "sparsevlm":
            raise RuntimeError("no rows")
        chose = Timing(60.0 if method.name == "fastv" else 0.0, 0.0)
        ledger = self.prompt.forecast(method).ledger
        return Measurement(Timing(0.0, 0.0), chose, Timing(0.0, 0.0), 0, ledger)

    monkeypatch.setattr(Bench, "run", run)
    methods = ["fastv", "sparsevlm", "globalcom2"]
    found, left_out = matched_cells(pipe, questions, methods, [0.7], "prefill-ms")
    assert [cell.method for cell in found] == ["uncompressed", "uniform", "globalcom2"]
    assert list(left_out) == ["fastv at the cost of uniform at 0.7", "sparsevlm"]
    assert "fastv cannot go down" in left_out["fastv at the cost of uniform at 0.7"]
    assert "no rows" in left_out["sparsevlm"]


def test_a_matched_run_says_what_was_matched(tmp_path: Path) -> None:
    request = CompareRequest(
        methods=("fastv",), retention=(0.7,), questions=4, match="tokens", out=tmp_path / "run"
    )
    outcome = compare(request)
    assert outcome.status == "complete"
    answers = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    mine = answers[answers["method"] == "fastv"].iloc[0]
    assert mine["asked_retention"] == 0.7
    assert mine["retention"] < 0.7
    assert mine["match"] == "tokens"
    assert mine["match_target"] > 0
    assert abs(mine["match_cost"] - mine["match_target"]) <= 1
    told = realised(answers).set_index("label")
    uniform = answers[answers["method"] == "uniform"].set_index("question_id")["layer_average"]
    fastv = answers[answers["method"] == "fastv"].set_index("question_id")["layer_average"]
    assert told.loc["fastv", "ratio"] == pytest.approx((fastv / uniform).mean())
    assert len(mine["visual_per_layer"]) == 6
    assert mine["kv_entries"] == sum(mine["visual_per_layer"]) + 6 * mine["text_tokens"]
    summary = outcome.summary[outcome.summary["kind"] == OVERALL].set_index("method")
    assert pd.notna(summary.loc["fastv", "vs_uniform_p"])  # compared with uniform at 0.7
    assert abs(summary.loc["fastv", "layer_average"] - summary.loc["uniform", "layer_average"]) < 2
    console = Console(width=80, record=True, file=io.StringIO())
    for table in list(tables(outcome.summary))[:2]:  # of all questions, and loyalty
        console.print(table)
    own = f"fastv@{summary.loc['fastv', 'retention']:.3g} "
    assert console.export_text().count(own) == 2, "beside uniform at 0.7 in both"
    again = compare(request)
    assert again.new == 0


def _matched_answers() -> pd.DataFrame:
    """Two questions: coarse keeps in steps, vague depends on the image, fine fits."""
    rows = [
        ("uniform", 0.5, 100.0, 100.0, [90.0, 110.0]),
        ("fine", 0.3, 100.0, 100.9, [90.9, 110.0]),
        ("coarse", 0.4, 100.0, 101.1, [91.0, 111.0]),
        ("vague", 0.6, 100.0, 100.0, [45.0, 110.0]),
    ]
    return pd.DataFrame(
        {
            "label": label, "retention": own, "asked_retention": 0.5, "status": "ok",
            "match": "tokens", "match_target": target, "match_cost": cost,
            "question_id": question, "layer_average": real,
        }
        for label, own, target, cost, both in rows
        for question, real in zip("ab", both, strict=True)
    )  # fmt: skip


def test_measured_costs_of_matched_methods() -> None:
    """(45 / 90 + 110 / 110) / 2 = 0.75 of uniform's; a token off is near, more is not."""
    found = realised(_matched_answers()).set_index("label")
    assert list(found["coarse"]) == [False, False, True, False]
    vague = found.loc["vague"]
    assert (vague["ratio"], vague["least"], vague["most"]) == (0.75, 0.5, 1.0)
    assert found.loc["fine", "ratio"] == pytest.approx((90.9 / 90 + 1) / 2)
    flops = _matched_answers().assign(match="flops", match_cost=100.9, flops=1.0)
    assert not realised(flops)["coarse"].any(), "1 % of FLOPs is near enough"
    assert realised(flops.assign(match_cost=101.1))["coarse"].all()
    older = _matched_answers().drop(columns="match_cost")
    assert realised(older).empty


def test_methods_that_miss_the_cost_are_named() -> None:
    found = realised(_matched_answers())
    coarse, vague = misses(found)
    assert coarse.startswith("coarse does not have the cost of uniform at 0.5: it goes in steps")
    assert "101.1 is the nearest to 100.0" in coarse
    assert vague.startswith("vague does not have the cost of uniform at 0.5 on these questions")
    assert "0.75 times" in vague
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(matched_table(found))
    assert "0.750 (0.50–1.00)" in console.export_text()


def test_unknown_costs_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="cost to match"):
        compare(CompareRequest(match="watts"))  # type: ignore[arg-type]


def test_answers_of_older_runs_are_still_summarised() -> None:
    """Without the columns that came later."""
    old = pd.DataFrame(
        {
            "model": "m", "method": "uniform", "label": "uniform", "parameters": "",
            "retention": 0.5, "question_id": ["a", "b"], "image_id": ["a", "b"], "kind": "k",
            "correct": [True, False], "agrees": [True, True], "status": "ok", "flops": [1.0, 3.0],
        }
    )  # fmt: skip
    row = summarise(old, seed=0).iloc[0]
    assert (row["flops"], row["accuracy"], row["asked_retention"]) == (2.0, 0.5, 0.5)
    assert pd.isna(row["selector_bytes"])


def test_a_cell_asks_for_what_it_keeps_unless_matched() -> None:
    method = tp.create("uniform", retention=0.3)
    assert Cell(method).asked == 0.3
    assert Cell(method, matched=Matched("tokens", 0.5, 1.0, 1.0)).asked == 0.5
    assert Cell().asked == 1


# --- speed ----------------------------------------------------------------------------------------


def test_a_question_that_cannot_be_encoded_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokenprune.experiments.compare import matching

    def half(pipe: Any, item: str) -> Any:
        if item.startswith("bad"):
            raise OSError("image file is truncated")
        return SimpleNamespace(visual=len(item))

    monkeypatch.setattr(matching, "_prompt", half)
    found = matching._median(None, ["bad", "a", "ccc", "bad too", "bb"])  # type: ignore[arg-type, list-item]
    assert found[0] == "bb"
    with pytest.raises(UserError, match=r"no question can be read.*truncated"):
        matching._median(None, ["bad"])  # type: ignore[arg-type, list-item]


@dataclass(frozen=True, kw_only=True)
class Sleepy(Compressor):
    """Keeps the first half, slowly."""

    nap: float = 0.05
    inside: bool = False

    @property
    def stage(self) -> Stage:  # type: ignore[override]
        return Stage.LLM if self.inside else Stage.PRE_LLM

    @property
    def cuts(self) -> tuple[int, ...]:
        return (2,) if self.inside else ()

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def select(self, tokens: VisualTokens) -> Selection:
        time.sleep(self.nap)
        patches = tokens.layout.patches
        return Selection(patches[: max(1, int(len(patches) * self.retention))])


@pytest.fixture(scope="module")
def bench() -> Bench:
    prompt = dataclasses.replace(prompt_of("testbed-next", (60, 60), text=8), size=4)
    return Bench(adapter_at_random("testbed-next"), prompt, repeats=2)


def test_a_curve_is_found_again() -> None:
    wanted = Curve(2e-3, 3e-5, 4e-8)
    lengths = [50, 200, 500, 900, 1500]
    found = Curve.through(lengths, [wanted(n) for n in lengths])
    for mine, theirs in zip(dataclasses.astuple(found), dataclasses.astuple(wanted), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert Curve.through([10, 20, 30], [3e-3, 2e-3, 1e-3]).b == 0  # never faster with more


@pytest.mark.parametrize("inside", [False, True])
def test_the_selector_is_timed_separately(bench: Bench, inside: bool) -> None:
    """A sleep of 50 ms in the selection counts for the selector, not for the prefill."""
    slow = bench.run(Sleepy(retention=0.5, inside=inside))
    assert slow.selector.median >= 0.05
    quick = bench.run(Sleepy(retention=0.5, inside=inside, nap=0.0))
    assert quick.selector.median < slow.selector.median - 0.03
    whole = slow.selector.runs[0] + slow.prefill.runs[0]
    assert slow.prefill.runs[0] > 0
    assert whole > 0.05


def test_a_run_is_that_of_the_forecast(bench: Bench) -> None:
    for spec in ("divprune", "visionzip", "sparsevlm", "dart"):
        method = tp.parse(spec, retention=0.4)
        run = bench.run(method)
        told = bench.prompt.forecast(method).ledger
        assert run.ledger.visual_per_layer == told.visual_per_layer
        assert run.ledger.text_tokens == 8
        assert run.peak > run.ledger.kv_bytes
        assert len(run.decode.runs) == DECODED


def test_signals_are_those_of_the_encoder(bench: Bench) -> None:
    assert bench.vision(tp.create("fastv", retention=0.5).needs) is bench.vision()
    wanted = tp.create("globalcom2", retention=0.5).needs
    assert bench.vision(wanted) is not bench.vision()
    assert bench.vision(wanted) is bench.vision(wanted)


def test_missing_layers_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of six layers, 1 s a token and layer: FastV's four short ones are not there."""
    monkeypatch.setattr(Bench, "layer", Curve(0.0, 1.0, 0.0))
    monkeypatch.setattr(Bench, "outside", 0.0)
    prompt = prompt_of("testbed-next", (60, 60), text=8)
    method = tp.create("uniform", retention=0.5)
    found = measure("testbed-next", prompt, [method], layers=2, repeats=1, device="cpu")
    row = found.table.iloc[1]
    left = method.retention * prompt.patches // 1 + prompt.visual - prompt.patches + 8
    assert row["prefill"] == pytest.approx(4 * left, abs=2)
    assert row["layers_measured"] == 2
    assert "EXTRAPOLATED" in found.words
    plain = found.table.iloc[0]
    assert plain["prefill"] == pytest.approx(4 * (prompt.visual + 8), abs=2)
    assert pd.isna(plain["pays_from"])


def test_methods_that_need_more_layers_are_refused() -> None:
    prompt = prompt_of("testbed-next", (60, 60))
    method = tp.create("fastv", layer=3, retention=0.5)
    found = measure("testbed-next", prompt, [method], layers=2, repeats=1, device="cpu")
    assert found.table["status"][0] == "ok"
    assert "decoder, which has 2" in found.table["status"][1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"layers": 9}, "layers must lie in 1 .. 6"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, int], words: str) -> None:
    prompt: Prompt = prompt_of("testbed-next")
    with pytest.raises(UserError, match=words):
        measure("testbed-next", prompt, [], device="cpu", **options)  # type: ignore[arg-type]
