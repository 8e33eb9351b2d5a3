"""Cells that run together have the same answers and ledgers as one by one."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import full_hosts
from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.engine import decoder
from tokenprune.engine.prefix import Prefix
from tokenprune.engine.session import compress
from tokenprune.engine.vision import observing
from tokenprune.errors import UserError
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.compare import sharing
from tokenprune.experiments.compare.loop import run
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.pipeline import encoder_outputs
from tokenprune.testing.host import Host

INSIDE = ("fastv:layer=1", "fastv", "dart:layer=2", "pyramiddrop", "sparsevlm")
IN_FRONT = ("uniform", "globalcom2", "spatial-pool", "divprune")
RATIOS = (0.7, 0.3)


def methods(names: tuple[str, ...]) -> list[Compressor]:
    return [tp.parse(name, retention=ratio) for name in names for ratio in RATIOS]


def encoded(host: Host, rows: tuple[int, ...], wanted: list[Compressor]) -> list[list[Any]]:
    """The images and videos of prompts, encoded once with all signals."""
    signals = frozenset().union(*(one.needs for one in wanted))
    found = []
    for row in rows:
        some: list[Any] = []
        for modality, call in host.media(row).items():
            with observing(host.adapter, signals), torch.no_grad():
                output = getattr(host.adapter.base, host.adapter.encoders[modality])(**call)
            some += [feature.visual for feature in output.pooler_output]
        found.append(some)
    return found


def outcome(host: Host, images: list[Any], rows: tuple[int, ...], *how: Any, **options: Any) -> Any:
    """Ids, logits of every step, ledgers and selections of one generate."""
    inputs = host.inputs(rows)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with compress(host.model, *how, **options) as trace:
        ids, logits = host.generate_with_logits(text | encoder_outputs(host.adapter, images))
    return ids, logits, trace.ledgers, trace.selections


def same(one: Any, other: Any, *, exactly: bool) -> None:
    assert torch.equal(one[0], other[0])
    if exactly:
        assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[1], other[1], rtol=1e-4, atol=1e-4)
    assert one[2] == other[2]
    assert len(one[3]) == len(other[3])
    for a, b in zip(one[3], other[3], strict=True):
        assert (a.row, a.image, a.stage, a.layer) == (b.row, b.image, b.stage, b.layer)
        assert torch.equal(a.keep, b.keep)


def layer_calls(host: Host) -> tuple[Counter[int], list[Any]]:
    """How often the attention of every decoder layer runs on more than one token."""
    calls: Counter[int] = Counter()

    def counts(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            calls[index] += (args[0] if args else kwargs["hidden_states"]).shape[1] > 1

        return hook

    handles = [
        layer.get_submodule("self_attn").register_forward_pre_hook(counts(index), with_kwargs=True)
        for index, layer in enumerate(host.adapter.decoder_layers)
    ]
    return calls, handles


@pytest.mark.parametrize(
    "host", full_hosts(("llama", "qwen2")), ids=lambda h: f"{h.name}-{h.decoder}"
)
@pytest.mark.parametrize("first", ["deepest first", "shallowest first"])
def test_layers_in_front_of_a_cut_run_once_and_nothing_else_changes(host: Host, first: str) -> None:
    wanted: list[Compressor | None] = [*methods(INSIDE), None]
    wanted.sort(key=lambda one: min(decoder.cuts_of(host.adapter, one), default=9))
    if first == "deepest first":
        wanted.reverse()
    images = encoded(host, (0, 1, 2), [one for one in wanted if one])
    alone = [outcome(host, images, (0, 1, 2), one) for one in wanted]
    before = {name: set(vars(module)) for name, module in host.model.named_modules()}
    prefix = Prefix(host.adapter, wanted)
    calls, handles = layer_calls(host)
    try:
        shared = [outcome(host, images, (0, 1, 2), one, prefix=prefix) for one in wanted]
    finally:
        for handle in handles:
            handle.remove()
    for one, other in zip(shared, alone, strict=True):
        same(one, other, exactly=True)
    # After a cut in front of layer 1 nothing is shared.
    assert calls[0] == 1
    cuts = [min(decoder.cuts_of(host.adapter, one), default=9) for one in wanted]
    assert calls[1] == 1 + cuts.count(1)
    assert {name: set(vars(module)) for name, module in host.model.named_modules()} == before


@pytest.mark.parametrize(
    "spec",
    [
        "fastv",
        "dart",
        "pact",
        "pyramiddrop:depths=0.5",
        "sparsevlm:depths=0.5",
        "fitprune:steps=1",
    ],
)
def test_signals_of_a_first_cut_are_computed_once(
    host: Host, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, keys and states do not depend on how much is kept."""
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        original = getattr(decoder, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in ("decoder_row", "decoder_rows", "decoder_mass", "decoder_keys", "moved_keys"):
        monkeypatch.setattr(decoder, name, counted(name))
    wanted = [tp.parse(spec, retention=ratio) for ratio in (0.7, 0.4, 0.2)]
    images = encoded(host, (0, 1, 2), wanted)
    alone = [outcome(host, images, (0, 1, 2), one) for one in wanted]
    each = {name: count // 3 for name, count in calls.items()}
    assert each
    calls.clear()
    prefix = Prefix(host.adapter, wanted)
    for one, other in zip(wanted, alone, strict=True):
        same(outcome(host, images, (0, 1, 2), one, prefix=prefix), other, exactly=True)
    assert calls == each


def test_a_repeated_layer_gives_the_queries_that_it_projected(host: Host) -> None:
    """FastV runs the layer; FitPrune, which ranks by its queries, does not run it again."""
    wanted = [tp.parse(spec, retention=0.5) for spec in ("fastv:layer=2", "fitprune:steps=1")]
    images = encoded(host, (0, 2), wanted)
    alone = [outcome(host, images, (0, 2), one) for one in wanted]
    prefix = Prefix(host.adapter, wanted)
    for one, other in zip(wanted, alone, strict=True):
        same(outcome(host, images, (0, 2), one, prefix=prefix), other, exactly=True)
    assert prefix.queried == {1}


@pytest.mark.parametrize("host", full_hosts(), ids=lambda host: f"{host.name}-{host.decoder}")
def test_signals_of_other_methods_are_not_charged(host: Host) -> None:
    mine, other = (tp.parse(name, retention=0.5) for name in ("uniform", "globalcom2"))
    alone, shared = (encoded(host, (0,), wanted) for wanted in ([mine], [mine, other]))
    assert shared[0][0].signals
    assert not alone[0][0].signals
    same(outcome(host, shared, (0,), mine), outcome(host, alone, (0,), mine), exactly=True)


def test_chains_with_the_same_first_part_share_its_result(host: Host) -> None:
    chains = [tp.parse(f"uniform@0.6 + {name}@0.5") for name in ("fastv", "fastv:layer=3")]
    images = encoded(host, (0, 2), chains)
    alone = [outcome(host, images, (0, 2), one) for one in chains]
    prefix = Prefix(host.adapter, chains)
    for one, other in zip(chains, alone, strict=True):
        same(outcome(host, images, (0, 2), one, prefix=prefix), other, exactly=True)
    with pytest.raises(ValueError, match="same tokens"):
        Prefix(host.adapter, [*chains, tp.parse("fastv", retention=0.5)])


def test_a_prefix_of_other_prompts_is_refused(host: Host) -> None:
    fastv = tp.parse("fastv", retention=0.5)
    images = encoded(host, (0, 2), [fastv])
    prefix = Prefix(host.adapter, [fastv])
    outcome(host, images, (0, 2), fastv, prefix=prefix)
    with pytest.raises(RuntimeError, match="one batch of prompts"):
        outcome(host, images[:1], (0,), fastv, prefix=prefix)
    again = encoded(host, (0, 2), [fastv])  # the same ids, other images
    with pytest.raises(RuntimeError, match="one batch of prompts"):
        outcome(host, again, (0, 2), fastv, prefix=prefix)


def test_without_a_kv_cache_nothing_is_shared(host: Host) -> None:
    wanted = methods(("fastv", "pyramiddrop"))
    images = encoded(host, (0, 2), wanted)
    prefix = Prefix(host.adapter, wanted)
    for one in wanted:
        inputs = host.inputs((0, 2))
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        made = []
        for how in ({}, {"prefix": prefix}):
            with compress(host.model, one, **how):
                outputs = encoder_outputs(host.adapter, images)
                made.append(host.generate(text | outputs, use_cache=False))
        assert torch.equal(*made)
    assert not prefix._ran


@pytest.mark.parametrize("host", full_hosts(("llama",)), ids=lambda host: host.name)
def test_a_batch_may_have_a_compressor_for_each_row(host: Host) -> None:
    chosen = methods(IN_FRONT)
    images = encoded(host, (0, 1, 2), chosen)
    rows, parts = [], []
    for index, one in enumerate(chosen):
        row = index % 3
        alone = outcome(host, [images[row]], (row,), one)
        rows.append(row)
        parts.append(alone)
    many = [images[row] for row in rows]
    ids, logits, ledgers, selections = outcome(host, many, tuple(rows), chosen)
    for index, alone in enumerate(parts):
        here = [dataclasses.replace(one, row=0) for one in selections if one.row == index]
        mine = ids[index : index + 1], logits[index : index + 1], [ledgers[index]], here
        same(mine, alone, exactly=False)
    assert [ledger.requested for ledger in ledgers] == [one.retention for one in chosen]


def test_rows_that_cannot_run_together_are_a_sentence(host: Host) -> None:
    uniform, fastv = (tp.parse(name, retention=0.5) for name in ("uniform", "fastv"))
    moved = tp.parse("uniform:position_ids=original", retention=0.5)
    with (
        pytest.raises(UserError, match="fastv does not act in front"),
        compress(host.model, [uniform, fastv]),
    ):
        pass
    with (
        pytest.raises(UserError, match="keep the positions"),
        compress(host.model, [uniform, moved]),
    ):
        pass
    with pytest.raises(UserError, match="2 compressors, one for each row"):
        outcome(host, encoded(host, (0, 1, 2), []), (0, 1, 2), [uniform, uniform])


# --- the comparison -------------------------------------------------------------------------------

MANY = ("uniform", "globalcom2", "spatial-pool", *INSIDE[1:], "uniform:position_ids=original")
CHAINS = ("globalcom2@0.5 + fastv@0.5", "globalcom2@0.5 + dart@0.5")


class NeverAlone(ModelRunner):
    """Fails if the cells run one after the other."""

    def answer(self, *arguments: Any) -> Any:
        raise AssertionError("something could not be computed together")


def answers(model: str, modality: Any, plan: sharing.JobPlan, path: Path, count: int) -> Any:
    kind = NeverAlone if plan is sharing.together else ModelRunner
    runner = kind(tp.load(model), 8)
    asked = cells([*MANY, *CHAINS], [1.0, 0.5, 0.1] if count > 10 else [1.0, 0.3])
    with Journal(path) as journal:
        run(
            runner,
            asked,
            held_out(count, 0, modality),
            journal,
            batch_size=count // 2 - 1,
            plan=plan,
        )
    assert not journal.failures
    return journal.answers


@pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")
@pytest.mark.parametrize(
    ("model", "modality", "count"),
    [
        ("testbed-next", "image", 6),
        ("testbed-onevision", "video", 4),
        ("testbed-onevision", "multi-image", 4),
        pytest.param("testbed-next", "image", 20, marks=pytest.mark.slow),
        pytest.param("testbed-onevision", "video", 20, marks=pytest.mark.slow),
    ],
)
def test_together_is_the_same_as_separately(
    tmp_path: Path, model: str, modality: Any, count: int
) -> None:
    one_by_one = answers(model, modality, sharing.separate, tmp_path / "separate", count)
    together = answers(model, modality, sharing.together, tmp_path / "together", count)
    for record in (*one_by_one.values(), *together.values()):
        assert record["kl"] >= 0
        record["kl"] = pytest.approx(record["kl"], abs=1e-4)  # other batches round differently
    assert together == one_by_one


def test_the_company_of_others_does_not_show_in_the_account(host: Host) -> None:
    """Images encoded for many methods hold more signals than any one of them asked for."""
    wanted = methods(("uniform", "visionzip", "fastv", "globalcom2"))
    images = encoded(host, (0, 2), wanted)
    for one in wanted:
        mine = encoded(host, (0, 2), [one])
        with_others, alone = (outcome(host, some, (0, 2), one)[2] for some in (images, mine))
        assert with_others == alone


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_put_together_by_length(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    drawn: Tensor = torch.randint(20, 200, (5, 12), generator=draw)
    lengths = {(c, q): int(drawn[c, q]) for c in range(5) for q in range(12)}
    batches = list(sharing._of_equal_length(lengths, 12 * 200, 200))
    assert sorted(row for batch in batches for row in batch) == sorted(lengths)
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) * longest <= 12 * 200, "no more room than the uncompressed batch takes"
        assert len(batch) <= sharing.ROWS * 12
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.2 * sum(lengths.values())
    assert len(batches) < 12
