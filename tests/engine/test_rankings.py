"""The recorded ranking of a method."""

from __future__ import annotations

import pytest
import torch
from families import full_hosts

import tokenprune as tp
from tokenprune.engine.rankings import noting
from tokenprune.ops.ranking import top_per_view
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import example
from tokenprune.testing.strategy_checks import LAYOUTS


@pytest.mark.parametrize("name", tp.list_methods())
def test_recording_has_no_effect_and_the_ranking_decides(name: str) -> None:
    method = example(name, retention=0.4)
    tokens = sample_tokens(method.needs, LAYOUTS["2x2"])
    heedful, notes = noting(method)
    keep = heedful(tokens).keep
    assert torch.equal(keep, method(tokens).keep)
    assert heedful == method
    assert repr(heedful) == repr(method)
    if isinstance(method, tp.ScoringCompressor) or name in ("globalcom2", "pyramiddrop"):
        ((_, scores),) = notes
        patches = keep[~tokens.layout.is_separator[keep]]
        counts = torch.bincount(tokens.layout.view[patches], minlength=tokens.layout.views)
        if name != "pyramiddrop":  # which knows no views
            assert torch.equal(top_per_view(tokens.layout, scores, counts), patches)
    else:
        assert notes == []


def test_every_cut_of_a_chain_is_noted() -> None:
    (host, *_) = full_hosts(["llama"])
    heedful, notes = noting(tp.parse("globalcom2@0.8 + pyramiddrop@0.5"))
    with tp.compress(host.model, heedful) as trace, torch.no_grad():
        host.model(**host.inputs(rows=(0,)))
    assert len(notes) == len(trace.selections) >= 3
    for (tokens, scores), chosen in zip(notes, trace.selections, strict=True):
        assert len(scores) == len(tokens)
        assert len(chosen.keep) < len(tokens)
