"""Methods that merge dropped tokens into kept ones, before and inside the language model."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import full_hosts

import tokenprune as tp
from tokenprune.compressor import Chain, Compressor, Selection, Stage
from tokenprune.registry import Card
from tokenprune.testing.asserting import Check
from tokenprune.testing.generation_checks import (
    check_beams_agree,
    check_cache_agrees,
    check_generate_batch_equals_single,
)
from tokenprune.testing.host import Host
from tokenprune.testing.model_checks import (
    check_batch_equals_single,
    check_equals_reference,
    check_ledger_is_true,
)
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class MergePairs(Compressor):
    """Every second patch token, averaged with the one after it."""

    card: ClassVar[Card] = Card(paper="Pairwise average (baseline)")

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        keep, gone = patches[::2], patches[1::2]
        features = tokens.features[keep].clone()
        features[: len(gone)] = (features[: len(gone)] + tokens.features[gone]) / 2
        return Selection(keep, features)


@dataclass(frozen=True, kw_only=True)
class MergePairsInside(MergePairs):
    """The same on hidden states, in front of decoder layer 2."""

    stage: ClassVar[Stage] = Stage.LLM

    @property
    def cuts(self) -> tuple[int, ...]:
        return (2,)


@dataclass(frozen=True, kw_only=True)
class Average(MergePairs):
    """Keeps every token and replaces it by the mean: no token is dropped, features change."""

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens.layout.patches)

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        mean = tokens.features[patches].mean(0, keepdim=True)
        return Selection(patches, mean.expand(len(patches), -1))


METHODS = [
    MergePairs(retention=0.5),
    MergePairs(retention=0.5, separators="rows", position_ids="original"),
    MergePairsInside(retention=0.5),
    MergePairsInside(retention=0.5, position_ids="compact"),
    Chain.of(MergePairs(retention=0.5), MergePairsInside(retention=0.5)),
    Average(retention=0.9),
]
CHECKS = [
    check_equals_reference,
    check_batch_equals_single,
    check_generate_batch_equals_single,
    check_cache_agrees,
    check_beams_agree,
    check_ledger_is_true,
]


@pytest.mark.parametrize("host", full_hosts(["llama"]), ids=lambda host: host.name)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_merging_is_exact(method: Compressor, check: Check, host: Host) -> None:
    check(method, host)


def test_merged_features_reach_the_language_model() -> None:
    host = full_hosts(["llama"])[0]
    inputs = host.inputs([0])
    with tp.compress(host.model, Average(retention=0.9)):
        merged = host.logits(inputs)
    assert not torch.allclose(merged, host.logits(inputs), atol=1e-3)
