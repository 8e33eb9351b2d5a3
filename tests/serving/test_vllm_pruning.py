"""Compression inside a server, with a stand-in for vLLM's model, against `tokenprune.compress`.

The stand-in is the model of transformers whose attention projects queries, keys and values with one
module, as in vLLM.  `.ci/vllm` runs vLLM itself.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.adapter import adapter_of
from tokenprune.errors import UserError
from tokenprune.serving import vllm_plugin
from tokenprune.serving.vllm_pruning import Plan, ServerPruner, planned
from tokenprune.testing.host import Host, tiny_host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

SIZES = ((20, 9), (12, 12), (30, 24))  # of two, one and four crops


class _Fused(nn.Module):
    """Attention with one projection, which returns a pair, as vLLM's does."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.num_heads, self.scale = original.num_heads, original.scale
        self.qkv_proj = _Joined([original.q_proj, original.k_proj, original.v_proj])
        self.out_proj = original.out_proj

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        joined, _ = self.qkv_proj(hidden_states)
        parts = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in joined.chunk(3, -1)
        ]
        out = F.scaled_dot_product_attention(*parts, scale=self.scale)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class _Joined(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, states: Tensor) -> tuple[Tensor, None]:
        return torch.cat([part(states) for part in self.parts], -1), None


def _server(host: Host) -> Any:
    model = copy.deepcopy(host.model).model
    tower = model.vision_tower
    for layer in getattr(tower, "vision_model", tower).encoder.layers:
        layer.self_attn = _Fused(layer.self_attn)
    return model


def _encoded(model: Any, call: dict[str, Tensor]) -> list[Tensor]:
    """Features of every image as vLLM computes them: views that only pad are encoded too."""
    config, pixels = model.config, call["pixel_values"]
    if pixels.ndim == 4:
        pixels = pixels[:, None]
    with torch.no_grad():
        states = model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
        chosen = states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        features = model.multi_modal_projector(chosen).unflatten(0, pixels.shape[:2])
        if "image_sizes" not in call:
            return [*features[:, 0]]
        adapter = adapter_of(model)
        views = [adapter.layout(size).views for size in SIZES]
        options = {"vision_feature_select_strategy": "default"}
        if "batch_num_images" in call:
            options = {"vision_aspect_ratio": config.vision_aspect_ratio}
        packed, _ = model.pack_image_features(
            [one[:count] for one, count in zip(features, views, strict=False)],
            call["image_sizes"],
            image_newline=model.image_newline,
            **options,
        )
    return [*packed]


def _selected(host: Host, spec: str, call: dict[str, Tensor]) -> list[Tensor]:
    """The entries of every image that stay in Hugging Face, each image in a prompt of its own."""
    found = []
    for index, size in enumerate(SIZES):
        layout = host.adapter.layout(size)
        ids = torch.tensor([[1, *[63] * len(layout), 7, 8]])
        mine = {name: value[index : index + 1] for name, value in call.items()}
        with tp.compress(host.model, spec) as trace, torch.no_grad():
            host.model(input_ids=ids, attention_mask=torch.ones_like(ids), **mine)
        found.append(trace.selections[-1].keep)
    return found


def _hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("LLaVA-NeXT", "fastervlm@0.4"),
        ("LLaVA-NeXT", "divprune@0.3"),
        ("LLaVA-NeXT", "vispruner@0.4"),
        ("LLaVA-NeXT", "random@0.5"),
        ("LLaVA-OneVision", "globalcom2:layer=-2,total=exact@0.4"),
        ("LLaVA-OneVision", "uniform@0.25"),
        ("LLaVA-1.5", "fastervlm@0.4"),
    ],
)
def test_a_server_keeps_what_hugging_face_keeps(family: str, spec: str) -> None:
    host = tiny_host(family, "llama")
    call = dict(host.adapter.dummy_images(SIZES, seed=3))
    model, config = _server(host), copy.deepcopy(host.model.config)
    config.tokenprune = spec
    plan = planned(config)
    assert plan is not None
    pruner = ServerPruner(plan, model)
    arguments = {**call, "pixel_values": [*call["pixel_values"]]}  # as vLLM gives it if ragged
    _encoded(model, call)  # transformers adds hooks of its own at the first call
    before = _hooks(model)
    with pruner.watching() as seen:
        packed = _encoded(model, call)
    assert _hooks(model) == before
    found = pruner.pruned(packed, arguments, seen)
    kept = _selected(host, spec, call)
    for size, mine, features, keep in zip(SIZES, found, packed, kept, strict=True):
        assert len(mine) == len(keep) == plan.kept(size, len(features))
        torch.testing.assert_close(mine, features[keep])


def test_merged_features_are_served() -> None:
    host = tiny_host("LLaVA-NeXT", "llama")
    call = dict(host.adapter.dummy_images(SIZES[:1], seed=3))
    model = _server(host)
    pruner = ServerPruner(Plan(host.model.config, "visionzip@0.4"), model)
    with pruner.watching() as seen:
        packed = _encoded(model, call)
    (mine,) = pruner.pruned(packed, call, seen)
    entered: list[Tensor] = []
    ids = torch.tensor([[1, *[63] * len(packed[0]), 7, 8]])
    layer = host.adapter.decoder_layers[0]
    with tp.compress(host.model, "visionzip@0.4"), torch.no_grad():
        handle = layer.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append((*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
        host.model(input_ids=ids, attention_mask=torch.ones_like(ids), **call)
        handle.remove()
    torch.testing.assert_close(mine, entered[0][0, 1:-2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "spec", "said"),
    [
        ("LLaVA-NeXT", "fastv@0.25", "between decoder layers"),
        ("LLaVA-NeXT", "globalcom2@0.25", "globalcom2"),
        ("LLaVA-NeXT", "hired@0.25", "hired"),
        ("LLaVA-NeXT", "tome@0.25", "inside the vision encoder"),
        ("LLaVA-NeXT", "prumerge@0.25", "loads only layers 0 to 1"),
        ("LLaVA-NeXT", "os:path@0.25", "class of a module"),
        ("LLaVA-NeXT", "fastervlm", "retention"),
        ("LLaVA-OneVision", "fastervlm@0.25", "CLS token"),
        ("Qwen2.5-VL", "divprune@0.25", "position ids"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_server_starts(
    family: str, spec: str, said: str
) -> None:
    host = tiny_host(family, "llama" if family.startswith("LLaVA") else "qwen2_5_vl_text")
    with pytest.raises(UserError, match=said) as caught:
        Plan(host.model.config, spec)
    assert "os.path" not in sys.modules or "module" in str(caught.value) or spec[:2] != "os"


def test_a_config_without_a_spec_compresses_nothing() -> None:
    assert planned(SimpleNamespace()) is None
    with pytest.raises(UserError, match=r"must be a spec such as 'fastervlm@0\.25', got 3"):
        planned(SimpleNamespace(tokenprune=3))


def test_an_image_that_the_server_divides_differently_is_refused() -> None:
    plan = Plan(tiny_host("LLaVA-NeXT", "llama").model.config, "uniform@0.5")
    with pytest.raises(UserError, match="of an image of 9x20 pixels"):
        plan.kept((20, 9), 17)


def test_heads_on_several_devices_are_refused() -> None:
    host = tiny_host("LLaVA-NeXT", "llama")
    model = _server(host)
    for layer in host.adapter.__class__(model).vision_layers:
        layer.get_submodule("self_attn").tp_size = 2  # type: ignore[assignment]
    plan = Plan(host.model.config, "fastervlm@0.25")
    with pytest.raises(UserError, match="--mm-encoder-tp-mode data"):
        ServerPruner(plan, model)


def test_the_plugin_registers_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=known.__setitem__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    vllm_plugin.register()
    assert known["LlavaNextForConditionalGeneration"].endswith("vllm_models:LlavaNext")
    assert len(known) == 4
