"""Models whose weights accelerate keeps on disk or in memory and loads for each forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from families import full_hosts
from PIL import Image
from torch import Tensor, nn
from two_devices import chosen_method, drawn, place

import tokenprune as tp
from tokenprune.engine.session import compress
from tokenprune.experiments.benchmarks.second_device import OTHER, SecondDevice
from tokenprune.offload import applied, execution_device, resident
from tokenprune.testing.host import Host

pytestmark = [
    pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning"),
    pytest.mark.filterwarnings("ignore:The following device_map keys"),  # a weight, no module
]

HERE = torch.device("cpu")
HOSTS = full_hosts(["qwen2"])

Offload = Callable[[Host, Path], None]


def _on_disk(host: Host, folder: Path) -> None:
    """All but embeddings and the first decoder layer, as ``device_map`` does it."""
    layers = len(host.adapter.decoder_layers)
    decoder = "model.language_model"
    where = {"lm_head": "cpu", f"{decoder}.embed_tokens": "cpu", f"{decoder}.rotary_emb": "cpu"}
    where |= {f"{decoder}.layers.{i}": "disk" if i else "cpu" for i in range(layers)}
    for name in (f"{decoder}.norm", "model.vision_tower", "model.multi_modal_projector"):
        where[name] = "disk"
    accelerate.dispatch_model(
        host.model,
        device_map={**where, "model.image_newline": "cpu"},
        main_device="cpu",
        offload_dir=folder,
        skip_keys=host.model._skip_keys_device_placement,
        force_hooks=True,
    )


def _layer_by_layer(host: Host, folder: Path) -> None:
    """In memory, and one hook for all weights of a layer (``preload_module_classes``)."""
    for layer in [*host.adapter.vision_layers, *host.adapter.decoder_layers]:
        kinds = [type(layer).__name__]
        accelerate.cpu_offload(layer, execution_device=HERE, preload_module_classes=kinds)


Both = tuple[Host, Host]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Offload], Both]:
    """Two copies of a model, the second one offloaded."""

    @functools.cache
    def made(name: str, offload: Offload) -> Both:
        plain, offloaded = (Host.tiny(name, "qwen2") for _ in range(2))
        offload(offloaded, tmp_path_factory.mktemp("weights"))
        weights = list(offloaded.model.parameters())
        assert sum(weight.is_meta for weight in weights) > 0.7 * len(weights)
        return plain, offloaded

    return made


@pytest.fixture(scope="module", params=[host.name for host in HOSTS])
def host_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _results(host: Host, spec: str) -> list[Any]:
    with compress(host.model, chosen_method(spec, host)) as trace:
        logits = host.logits(host.inputs())
        kept = [chosen.keep for chosen in trace.selections]
        return [logits, *kept, host.generate(host.inputs()), trace.ledgers]


@pytest.mark.parametrize(("spec", "name", "offload"), drawn(HOSTS, _on_disk, _layer_by_layer))
def test_every_method_on_offloaded_weights_is_as_without(
    both: Callable[[str, Offload], Both], spec: str, name: str, offload: Offload
) -> None:
    plain, offloaded = both(name, offload)
    wanted, got = (_results(host, spec) for host in (plain, offloaded))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
    weights = list(offloaded.model.parameters())
    here = [weight for weight in weights if not weight.is_meta]
    assert len(here) < 0.3 * len(weights), "weights were left in memory"


@pytest.mark.parametrize("spec", ["tome", "downsample", "tome@0.6 + fastv@0.6"])
def test_layers_of_the_vision_tower_on_two_devices(host_name: str, spec: str) -> None:
    """Hooks that move the inputs of a layer also run around a method in the vision encoder."""
    plain, split = (Host.tiny(host_name, "qwen2") for _ in range(2))
    wanted = _results(plain, spec)
    tower = split.adapter.vision_tower
    behind = getattr(tower, "vision_model", tower).post_layernorm
    for module in [*split.adapter.vision_layers[1:], behind]:
        place(module, OTHER)
    for module in (split.adapter.projector, split.adapter.language_model):
        place(module, HERE)
    with SecondDevice():
        got = _results(split, spec)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def test_inputs_go_where_an_offloaded_model_computes(tmp_path: Path) -> None:
    """With all of it on disk but the last layer, `device` of transformers is ``meta``."""
    image, question = [Image.new("RGB", (60, 40), (200, 0, 0))], ["What is it?"]
    plain = tp.load("testbed-next")
    where = {"model": "disk", "lm_head": "cpu"}
    away = tp.load("testbed-next", device_map=where, offload_folder=tmp_path)
    assert (away.model.device.type, away.device) == ("meta", HERE)
    wanted, got = (adapter.prepare(image, question) for adapter in (plain, away))
    assert all(torch.equal(got[name], values) for name, values in wanted.items())
    wanted, got = (adapter.encode(image, ()) for adapter in (plain, away))
    assert torch.equal(got[0].features, wanted[0].features)
    assert execution_device(nn.Linear(2, 2, device="meta")).type == "meta"  # nothing loads it


def test_resident_weights_are_present_only_inside() -> None:
    line = nn.Linear(3, 2)
    states, weight = torch.ones(1, 3), line.weight.detach().clone()
    expected = line(states)
    accelerate.cpu_offload(line, execution_device=HERE)
    assert line.weight.is_meta
    with resident(line):
        assert torch.equal(line.weight, weight)
        with resident(line):  # they belong to the outer one
            pass
        assert torch.equal(line.weight, weight)
    assert line.weight.is_meta
    assert torch.equal(applied(line, states), expected)
