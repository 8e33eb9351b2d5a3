"""The number of synchronisations with the device, on a simulated second device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import full_hosts
from torch import Tensor
from torch.utils._pytree import tree_map

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.benchmarks.second_device import OTHER, SecondDevice, put
from tokenprune.experiments.benchmarks.watching import _elsewhere, host_waits
from tokenprune.layout import TokenLayout
from tokenprune.ops import clustering, diversity, similarity
from tokenprune.spec import parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

# Per selection 1, except for methods that need numbers that only the device has.
MORE = {"holitom": 2, "pact": 2}  # segments of frames; number of rounds
SPECS = [
    *tp.list_methods(),
    *("fastv:allocator=globalcom2", "sparsevlm:version=2.0", "dart:layer=1"),
    "globalcom2:richness=mean,total=exact",
]


def _steps(spec: str, retention: float = 0.4) -> list[Compressor]:
    method = parse(spec, retention=retention)
    return [method.at(cut) for cut in method.cuts] or [method]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("modality", ["image", "video"])
def test_one_synchronisation_per_selection(spec: str, modality: str) -> None:
    layout = TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8))
    if modality == "video":
        layout = TokenLayout.video(4, (4, 4))
    for part in _steps(spec):
        tokens = replace(sample_tokens(part.needs, layout), projector=torch.nn.Linear(6, 8))
        waits = host_waits(part, tokens)
        assert waits.total() <= MORE.get(spec, 1), dict(waits)


@pytest.mark.parametrize("spec", SPECS)
def test_one_synchronisation_per_selection_from_many_tokens(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a table of all pairs exceeds a block; the selection is that of the CPU."""
    monkeypatch.setattr(similarity, "BLOCK", 600)
    monkeypatch.setattr(diversity, "POOL", 20)
    monkeypatch.setattr(diversity, "TABLE", 25)
    for part in _steps(spec):
        tokens = sample_tokens(part.needs, TokenLayout.single((8, 9)))
        tokens = replace(tokens, projector=torch.nn.Linear(6, 8))
        waits = host_waits(part, tokens)
        assert waits.total() <= MORE.get(spec, 1), dict(waits)
        with SecondDevice():
            elsewhere = part(_elsewhere(tokens)).keep.cpu()
        assert torch.equal(elsewhere, part(tokens).keep)


@pytest.mark.parametrize("spec", ["pact", "scope"])
def test_the_table_of_a_device_is_bounded(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table exceeds that bound too, the selection is that of the CPU."""
    monkeypatch.setattr(similarity, "BLOCK", 600)
    monkeypatch.setattr(similarity, "ELSEWHERE", 600)
    monkeypatch.setattr(clustering, "WALK", 16)
    for part in _steps(spec):
        tokens = sample_tokens(part.needs, TokenLayout.single((8, 9)))
        tokens = replace(tokens, projector=torch.nn.Linear(6, 8))
        with SecondDevice():
            elsewhere = part(_elsewhere(tokens)).keep.cpu()
        assert torch.equal(elsewhere, part(tokens).keep)


@pytest.mark.parametrize("name", [host.name for host in full_hosts(["qwen2"])])
@pytest.mark.parametrize("spec", SPECS)
def test_one_synchronisation_per_image_and_stage_of_a_prefill(name: str, spec: str) -> None:
    """Besides, three per forward: sizes, numbers of images, and the content of the prompts.

    Every signal of the vision encoder adds one, because Hugging Face's packing sends lengths.
    """
    host = Host.tiny(name, "qwen2")
    method = parse(spec, retention=0.4)
    try:
        check_compatible(host.adapter.facts, method)
    except UserError as error:
        pytest.skip(str(error))
    for weight in [*host.model.parameters(), *host.model.buffers()]:
        put(weight, OTHER)

    def inputs() -> dict[str, Tensor]:
        found: dict[str, Tensor] = tree_map(lambda one: put(one, OTHER), host.inputs())
        return found

    with SecondDevice() as device, torch.no_grad():
        host.model(**inputs())
    plain = device.waits.total()
    with tp.compress(host.model, method) as trace, SecondDevice() as device, torch.no_grad():
        host.model(**inputs())
    assert trace.selections
    calls = len(host.adapter.encoders)
    signals = sum(not one.in_llm for one in method.needs) * calls
    padded = len(method.cuts)  # with padding, the mask is made again after a cut, and read
    stages = len(trace.selections) * MORE.get(spec, 1)
    waits = device.waits.total() - plain
    assert waits <= stages + signals + 1 + 3 * calls + padded, dict(device.waits)
