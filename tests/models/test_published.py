"""Published shapes: their weights, tokens and FLOPs, counted by hand and by PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.engine.session import compress
from tokenprune.experiments.common.conversion import solve
from tokenprune.experiments.common.prompt import prompt_of
from tokenprune.models.loading import adapter_without_weights, published_config
from tokenprune.models.published import KNOWN
from tokenprune.spec import create
from tokenprune.testing.host import Host, every_host

# Billions of weights, as the model pages on the Hub state them.
WEIGHTS = {
    "llava-1.5-7b": 7.06,
    "llava-1.5-13b": 13.35,
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen3-VL-4B": 4.44,
    "Qwen3-VL-8B": 8.77,
    "InternVL3-2B": 2.09,
    "InternVL3-8B": 7.94,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_shapes_have_as_many_weights_as_the_checkpoints(name: str) -> None:
    weights = sum(one.numel() for one in adapter_without_weights(name).model.parameters())
    assert weights / 1e9 == pytest.approx(WEIGHTS[name], abs=0.0051)


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava-onevision-qwen2-7b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-7B"),
        ("Qwen/Qwen3-VL-4B-Instruct", "Qwen3-VL-4B"),
        ("OpenGVLab/InternVL3-8B-hf", "InternVL3-8B"),
    ],
)
def test_the_names_of_the_hub_are_known(hub: str, name: str) -> None:
    assert published_config(hub).to_dict() == published_config(name).to_dict()
    assert name in KNOWN


@pytest.mark.parametrize(("tokens", "cut"), [(192, 192 / 576), (128, 128 / 576), (64, 64 / 576)])
def test_the_fields_token_counts_on_llava(tokens: int, cut: float) -> None:
    """Papers write "192 / 128 / 64 of 576 tokens"; in the decoder, FastV averages to them too."""
    prompt = prompt_of("llava-1.5-7b")
    assert (prompt.patches, prompt.visual) == (576, 576)
    found = solve(prompt, create("uniform", retention=0.5), tokens).method
    ledger = prompt.forecast(found).ledger
    assert ledger.kept_patches == tokens
    assert ledger.layer_average == tokens
    assert found.retention == pytest.approx(cut, abs=0.002)
    fastv = solve(prompt, create("fastv", retention=0.5), tokens).method
    left = prompt.forecast(fastv).ledger
    # Two of 32 layers run on all 576 tokens.
    assert (2 * 576 + 30 * left.kept_patches) / 32 == left.layer_average
    assert left.layer_average == pytest.approx(tokens, abs=1)


def _matmul(rows: int, inner: int, cols: int) -> int:
    return 2 * rows * inner * cols


def _decoder(n: int, d: int, m: int, queries: int, keys: int, head: int) -> int:
    """Every product of a gated decoder layer with grouped queries."""
    return (
        2 * _matmul(n, d, queries * head)  # queries, output
        + 2 * _matmul(n, d, keys * head)  # keys, values
        + 2 * queries * _matmul(n, head, n)  # products with keys and values
        + 3 * _matmul(n, d, m)
    )


def _encoder(n: int, d: int, m: int, pairs: int, matrices: int = 2) -> int:
    """Every product of an encoder layer whose queries and keys form ``pairs``."""
    return 4 * _matmul(n, d, d) + 4 * pairs * d + matrices * _matmul(n, d, m)


def test_flops_of_internvl3_8b_by_hand() -> None:
    """A thumbnail and 2x2 crops: five views of 32 x 32 patches and a CLS token, 256 tokens each."""
    ledger = prompt_of("InternVL3-8B").forecast(None).ledger
    assert ledger.visual_per_layer == (1280,) * 28
    assert ledger.uncompressed_flops == 28 * _decoder(1280, 3584, 18944, 28, 4, 128)
    assert ledger.vision_flops == 5 * 24 * _encoder(1025, 1024, 4096, 1025**2)


def test_flops_of_qwen25_vl_7b_by_hand() -> None:
    """1008 x 1008 pixels: 72 x 72 patches, 28 of 32 layers in windows of 8 x 8, one merger."""
    ledger = prompt_of("Qwen2.5-VL-7B").forecast(None).ledger
    assert ledger.visual_per_layer == (1296,) * 28
    assert ledger.uncompressed_flops == 28 * _decoder(1296, 3584, 18944, 28, 4, 128)
    layers = 4 * _encoder(5184, 1280, 3420, 5184**2, matrices=3)
    layers += 28 * _encoder(5184, 1280, 3420, 81 * 64**2, matrices=3)
    merger = _matmul(1296, 5120, 5120) + _matmul(1296, 5120, 3584)
    assert ledger.vision_flops == layers + merger


def test_flops_of_qwen3_vl_8b_by_hand() -> None:
    """1024 x 1024 pixels: 64 x 64 patches; a merger for the output and each of three layers."""
    ledger = prompt_of("Qwen3-VL-8B").forecast(None).ledger
    assert ledger.uncompressed_flops == 36 * _decoder(1024, 4096, 12288, 32, 8, 128)
    mergers = 4 * (_matmul(1024, 4608, 4608) + _matmul(1024, 4608, 4096))
    assert ledger.vision_flops == 27 * _encoder(4096, 1152, 4304, 4096**2) + mergers


@pytest.mark.parametrize("host", every_host(), ids=lambda host: host.name)
def test_flops_that_pytorch_counts(host: Host) -> None:
    """In the layers of the real modules, under eager attention, for which it counts all pairs."""
    eager = host.like(attention="eager")
    with compress(eager.model, None) as trace, torch.no_grad():
        eager.model(**eager.inputs([0]), use_cache=True)
    with FlopCounterMode(display=False, depth=12) as counter, torch.no_grad():
        eager.model(**eager.inputs([0]))
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    names = {module: name for name, module in eager.model.named_modules()}

    def counted(modules: list[torch.nn.Module]) -> int:
        return sum(counts[f"{type(eager.model).__name__}.{names[module]}"] for module in modules)

    tokens = eager.inputs([0])["input_ids"].shape[1]
    shape = DecoderShape.of(eager.adapter.language_model.config)
    decoder = counted([*eager.adapter.decoder_layers])
    assert decoder == prefill_flops([tokens] * shape.layers, shape)
    assert decoder == trace.ledger.uncompressed_flops
    layers = [*eager.adapter.vision_layers]
    if eager.adapter.facts.vision.native:
        tower = eager.adapter.vision_tower
        layers += [tower.merger, *getattr(tower, "deepstack_merger_list", [])]
    assert counted(layers) == trace.ledger.vision_flops
