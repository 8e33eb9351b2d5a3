"""The plain model can continue with the KV cache of a prompt that was not compressed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tokenprune.compressor import Compressor
from tokenprune.engine.cache import is_pruned
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.spec import create, parse
from tokenprune.testing.host import Host

NOTHING = [
    create("uniform", retention=1.0),
    create("fastv", retention=1.0),
    create("pact", retention=1.0),
    create("pyramiddrop", retention=1.0),
    create("tome", retention=1.0),
    parse("globalcom2@1 + fastv@1"),
]
each = pytest.mark.parametrize("method", NOTHING, ids=lambda method: method.label)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def host(request: pytest.FixtureRequest) -> Host:
    """Mistral's layers have a sliding window, longer than the prompts here."""
    host = Host.tiny("LLaVA-NeXT", request.param)
    if request.param == "mistral":
        host.model.config.text_config.sliding_window = 256
    return host


def _turns(host: Host, inputs: Any, prefill: Any) -> tuple[DynamicCache, list[Tensor]]:
    """The prompts under ``prefill``, then two tokens and one by the plain model."""
    with torch.no_grad():
        with prefill:
            first = host.model(**inputs, use_cache=True)
        cache, mask = first.past_key_values, inputs["attention_mask"]
        logits = [first.logits]
        for ids in ([9, 11], [13]):
            mask = torch.cat([mask, mask.new_ones(len(mask), len(ids))], 1)
            ids = torch.tensor([ids] * len(mask))
            step = host.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            logits.append(step.logits)
    return cache, logits


@each
def test_a_cache_of_a_whole_prompt_is_plain(method: Compressor, host: Host) -> None:
    inputs = host.inputs()  # of unequal length, padded on the left
    plain, wanted = _turns(host, inputs, torch.no_grad())
    cache, got = _turns(host, inputs, compress(host.model, method))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        assert type(mine) is type(theirs)
        assert torch.equal(mine.keys, theirs.keys)
        assert mine.get_seq_length() == theirs.get_seq_length()


def test_a_second_image_after_an_uncompressed_one(host: Host) -> None:
    """A whole first turn outside or inside a context, then a turn that is cut: the same."""
    found = []
    for inside in (False, True):
        inputs, rest = host.inputs([0]), host.inputs([2])
        mask = torch.cat([inputs["attention_mask"], rest["attention_mask"]], 1)
        whole = compress(host.model, create("uniform", retention=1.0))
        with torch.no_grad(), whole if inside else torch.no_grad():
            cache = host.model(**inputs, use_cache=True).past_key_values
        with torch.no_grad(), compress(host.model, "fastv", retention=0.4) as trace:
            step = {**rest, "attention_mask": mask, "past_key_values": cache}
            found.append((host.model(**step).logits, trace.ledger))
        assert is_pruned(cache)
        with pytest.raises(UserError, match="holds a compressed prompt"):
            host.model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
