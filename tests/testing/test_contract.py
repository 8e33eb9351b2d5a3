"""Every registered method, in every registered model family, against the whole contract.

Methods and model families are discovered, so a new file needs no change here.
"""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from families import full_hosts
from samples import drawn

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Chain, Compressor
from tokenprune.errors import UserError
from tokenprune.registry import adapters
from tokenprune.spec import create, parse
from tokenprune.testing.asserting import Check
from tokenprune.testing.host import DECODERS, RETENTION, every_host, example, refusal
from tokenprune.testing.runner import CHECKS, MODEL_CHECKS, check_compressor, run
from tokenprune.testing.strategy_checks import STRATEGY_CHECKS

# Views of 16 tokens at 40 % may keep no token of a view, which gives a warning.
pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


def _chain(*specs: str) -> Compressor:
    return Chain.of(*(parse(spec, retention=0.6) for spec in specs))


# Besides the defaults of every method: options of the core, and chains.
VARIANTS = {
    spec: parse(spec, retention=RETENTION)
    for spec in (
        "uniform:separators=none",
        "globalcom2:separators=rows",
        "globalcom2:position_ids=original",
        "globalcom2:score=received",
        "globalcom2:allocator=topk,normalisation=minmax",
        "fastv:position_ids=compact,separators=none",
        "fastv:layer=1,allocator=globalcom2",
        "random:seed=3,allocator=topk",
        "sparsevlm:recycle=0,position_ids=original",
        "prumerge+:adaptive=true",
        "uniform:pattern=dispersed",
        "sparsevlm:version=2.0,heads=2",
        "cdpruner:relevance=saliency",
        "cdpruner:relevance=none",
        "pact:cutoff=0.6,position_ids=compact",
        "fitprune:steps=1,position_ids=compact",
    )
} | {
    "divprune:allocator=globalcom2": parse("divprune:allocator=globalcom2", retention=RETENTION),
    "globalcom2 + fastv": _chain("globalcom2", "fastv"),
    "cdpruner by text + fastv": _chain("cdpruner:relevance=text", "fastv"),
    "tome + globalcom2": _chain("tome", "globalcom2"),
    "uniform + sparsevlm": _chain("uniform:separators=none", "sparsevlm:recycle=1"),
    # Attention rows that are read after proportional attention.
    "fastv + pact + fastv": _chain("fastv:layer=1", "pact:depth=0.5", "fastv:layer=3"),
    "pact + fitprune": _chain("pact", "fitprune:steps=1,separators=none"),
    "pact + pyramiddrop": Chain.of(
        parse("pact", retention=0.6), create("pyramiddrop", retention=0.6, depths=(0.75,))
    ),
    "holitom + holitom-inner": _chain("holitom", "holitom-inner"),
    "uniform original + two cuts": _chain(
        "uniform:position_ids=original,separators=none", "fastv:layer=1", "fastv:layer=3"
    ),
}


STAGES = ("uniform", "globalcom2", "fastv", "tome")
"""Without signals, with signals of the vision encoder, inside the decoder, inside the encoder."""


def _name(check: Check) -> str:
    return check.__name__


@pytest.mark.parametrize("check", STRATEGY_CHECKS, ids=_name)
@pytest.mark.parametrize("name", tp.list_methods())
def test_strategy(name: str, check: Check) -> None:
    run(check, create(name, retention=RETENTION))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        *drawn(1, STAGES, MODEL_CHECKS),
        *drawn(0.5, [name for name in tp.list_methods() if name not in STAGES], MODEL_CHECKS),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_strategy_in_models(name: str, check: Check) -> None:
    """One method of every stage in both models; the others half of the checks, each in one."""
    compressor = example(name)
    able = [host for host in full_hosts(["llama"]) if not refusal(host, compressor)]
    if name not in STAGES:
        able = [random.Random(name + _name(check)).choice(able)]
    run(check, compressor, able)


# Decoders differ for the engine, not for a method: one method per stage, one with signals.
@pytest.mark.parametrize(
    ("check", "name", "decoder"),
    drawn(0.5, MODEL_CHECKS, STAGES[:3], [other for other in DECODERS if other != "llama"]),
    ids=lambda one: getattr(one, "__name__", one),
)
def test_other_decoders(name: str, decoder: str, check: Check) -> None:
    run(check, create(name, retention=RETENTION), full_hosts([decoder]))


@pytest.mark.parametrize(
    ("variant", "check"),
    drawn(0.33, VARIANTS, CHECKS),
    ids=lambda one: getattr(one, "__name__", one),
)
def test_variant(variant: str, check: Check) -> None:
    """A third of the checks, each in one of the models that can run it, with fixed seeds."""
    compressor = VARIANTS[variant]
    able = [host for host in full_hosts(["llama"]) if not refusal(host, compressor)]
    run(check, compressor, [random.Random(variant + _name(check)).choice(able)])


@pytest.mark.parametrize("retention", [0.03, 0.95])
@pytest.mark.parametrize("name", tp.list_methods())
def test_extreme_retention_ratios(name: str, retention: float) -> None:
    """At 3 % two images of a prompt keep a token or two; at 95 % single ones go."""
    for check in MODEL_CHECKS:
        if check.__name__ in {"check_equals_reference", "check_batch_equals_single"}:
            run(check, example(name, retention), full_hosts(["mistral"]))


def test_one_call_for_other_packages() -> None:
    check_compressor("uniform", full_hosts(["llama"]))


def test_a_method_no_model_can_run_is_an_error_not_a_pass() -> None:
    too_deep = create("fastv", retention=0.5, layer=99)
    with pytest.raises(AssertionError, match="no tiny model can run"):
        run(MODEL_CHECKS[0], too_deep)


def test_only_what_needs_a_text_tower_runs_with_other_options_than_its_defaults() -> None:
    changed = {name for name in tp.list_methods() if example(name) != create(name, retention=0.4)}
    assert changed == {"cdpruner"}
    assert example("cdpruner").label == "cdpruner:relevance=text"
    for host in full_hosts(["llama"]):
        with pytest.raises(UserError, match=r"a CLIP text encoder.*cdpruner:relevance=text, cdpru"):
            check_compatible(host.adapter.facts, create("cdpruner", retention=0.4))


def test_adapters_are_discovered() -> None:
    assert "LLaVA-NeXT" in adapters.names()
    speaking = {name for name in adapters.names() if adapters.get(name).has_language_model}
    assert {host.name for host in every_host()} == speaking


def test_chain_refuses_the_wrong_order() -> None:
    early, late = create("uniform", retention=0.5), create("fastv", retention=0.5)
    for parts in ((late, early), (early, early), ()):
        with pytest.raises(UserError, match="a chain takes"):
            Chain.of(*parts)
    assert Chain.of(early, late).retention == 0.25


def test_chain_refuses_two_cuts_in_one_place() -> None:
    (host,) = full_hosts(["llama"])[:1]
    both = parse("fastv:layer=2@0.5 + pyramiddrop@0.5")
    with pytest.raises(UserError, match=r"fastv and pyramiddrop both cut .* layer 2"):
        check_compatible(host.adapter.facts, both)
    check_compatible(host.adapter.facts, parse("fastv:layer=1@0.5 + fastv:layer=2@0.5"))


def test_a_class_of_a_notebook_is_checked_like_any_other() -> None:
    """Defined in ``__main__`` with a unique name, by a cell that runs twice."""
    cell = (
        "from dataclasses import dataclass\n"
        "from tokenprune.compressor import ScoringCompressor\n"
        "from tokenprune.registry import Card, register\n"
        "@register('mine')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(ScoringCompressor):\n"
        "    'The longest.'\n"
        "    card = Card(paper='Norm (baseline)')\n"
        "    def score(self, tokens):\n"
        "        return tokens.features.float().norm(dim=-1)\n"
    )
    code = (
        f"for _ in range(2): exec({cell!r})\n"
        "from tokenprune.testing import Host, check_compressor\n"
        "check_compressor('mine', [Host.tiny('LLaVA-NeXT')])\n"
        "check_compressor(Mine, [Host.tiny('LLaVA-NeXT')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
