"""Models with layers on different devices, as with ``device_map="auto"`` on several GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import pytest
import torch
from families import full_hosts
from torch import Tensor
from two_devices import chosen_method, drawn, place

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.engine.session import compress
from tokenprune.experiments.benchmarks.second_device import CPU, OTHER, SecondDevice, where
from tokenprune.testing.host import Host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")


HOSTS = full_hosts(["qwen2"])


@pytest.fixture(params=[host.name for host in HOSTS])
def host(request: pytest.FixtureRequest) -> Host:
    return Host.tiny(request.param, "qwen2")


def _results(host: Host, method: Compressor) -> Iterator[Any]:
    """Logits, ids and selections of one method."""
    with compress(host.model, method) as trace:
        logits = host.logits(host.inputs())
        yield logits
        yield from [chosen.keep for chosen in trace.selections]
        yield host.generate(host.inputs())
        yield host.generate(host.inputs(), use_cache=False)
        yield host.generate(host.inputs(), num_beams=2)
        yield trace.ledgers


@pytest.mark.parametrize(("spec", "name", "split"), drawn(HOSTS, 1, 3))
def test_layers_on_two_devices(spec: str, name: str, split: int) -> None:
    """Vision encoder and last layers on one device, the rest on another: the same result."""
    host = Host.tiny(name, "qwen2")
    method = chosen_method(spec, host)
    wanted = list(_results(host, method))
    place(host.adapter.base.vision_tower, OTHER)
    for layer in host.adapter.decoder_layers[split:]:
        place(layer, OTHER)
    place(host.adapter.language_model.norm, OTHER)
    for module in (host.adapter.base.multi_modal_projector, host.model.lm_head):
        place(module, CPU)
    with SecondDevice():
        got = list(_results(host, method))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def test_the_simulation_refuses_mixed_devices() -> None:
    """The previous test relies on this."""
    with SecondDevice():
        here = torch.ones(3)
        there = torch.ones(3, device=OTHER)
        assert (where(here), where(there), there.device) == (CPU, OTHER, OTHER)
        assert where(there[1:] * 2) == OTHER
        assert where(here.to(there.device)) == OTHER
        assert where(here) == CPU
        assert torch.equal(here.to(there.device), there)
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        with pytest.raises(RuntimeError, match="two devices"):
            here[there.long()]
        assert where(there[here.long()]) == OTHER


@pytest.mark.parametrize("spec", ["globalcom2", "fastv", "fastv:position_ids=compact"])
def test_weights_that_exist_only_during_a_forward(host: Host, spec: str) -> None:
    """Offloaded weights: nothing may be read from a module that is not being called."""
    method = chosen_method(spec, host)
    wanted = list(_results(host, method))
    parts = [host.adapter.base.vision_tower, *host.adapter.decoder_layers]
    for module in parts:
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
        assert {weight.device.type for weight in module.parameters()} == {"meta"}
    for mine, theirs in zip(_results(host, method), wanted, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def test_device_map_is_passed_on() -> None:
    pipe = tp.load("testbed-next", device_map="auto")
    assert pipe.device.type in {"cpu", "cuda"}
