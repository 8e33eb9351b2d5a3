"""The ledger: published figures, and a small decoder counted by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from tokenprune.compressor import Chain
from tokenprune.cost.arithmetic import (
    DecoderShape,
    VisionShape,
    copied_bytes,
    encoder_flops,
    prefill_flops,
)
from tokenprune.cost.ledger import Ledger
from tokenprune.engine.cache import CACHE
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.spec import create, parse
from tokenprune.testing.host import Host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

VICUNA_7B = DecoderShape(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128
)


@pytest.mark.parametrize(
    ("tokens", "tera"), [(2880, 41.7), (2160, 30.4), (1440, 19.7), (720, 9.6), (288, 3.8)]
)
def test_published_figures_of_llava_next_7b(tokens: int, tera: float) -> None:
    """The efficiency tables of the GlobalCom2 repository."""
    assert round(prefill_flops([tokens] * 32, VICUNA_7B) / 1e12, 1) == tera


def test_without_grouped_queries_it_is_the_formula() -> None:
    n, d, m, layers = 1000, 4096, 11008, 32
    wanted = layers * (2 * n * (4 * d**2 + 3 * d * m) + 4 * n**2 * d)
    assert prefill_flops([n] * layers, VICUNA_7B) == wanted


def _matmul(*sizes: int) -> int:
    """FLOPs of (a, b) @ (b, c): one multiplication and one addition per term."""
    a, b, c = sizes
    return 2 * a * b * c


def test_grouped_queries_counted_matmul_by_matmul() -> None:
    """Mistral's shape, 3 tokens, one layer: every product of a decoder layer, written out."""
    shape = DecoderShape(
        layers=1, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128
    )
    n = 3
    products = [
        _matmul(n, 4096, 4096),  # q
        _matmul(n, 4096, 1024),  # k
        _matmul(n, 4096, 1024),  # v
        _matmul(n, 4096, 4096),  # o
        32 * _matmul(n, 128, n),  # q k^T, all heads
        32 * _matmul(n, n, 128),  # times v
        _matmul(n, 4096, 14336),  # gate
        _matmul(n, 4096, 14336),  # up
        _matmul(n, 14336, 4096),  # down
    ]
    assert prefill_flops([n], shape) == sum(products)


def test_vision_tower_counted_matmul_by_matmul() -> None:
    """CLIP-L on 5 tokens of which the MLP sees 3: every product of one layer, written out."""
    d, m, heads, n, left = 1024, 4096, 16, 5, 3
    products = [
        *[_matmul(n, d, d)] * 4,  # q, k, v, out
        heads * _matmul(n, d // heads, n),  # q k^T
        heads * _matmul(n, n, d // heads),  # times v
        _matmul(left, d, m),
        _matmul(left, m, d),
    ]
    shape = VisionShape(layers=24, hidden=d, intermediate=m)
    assert encoder_flops([n], shape, [left]) == sum(products)
    assert encoder_flops([n, 2], shape) == encoder_flops([n], shape) + encoder_flops([2], shape)


def test_the_plain_tower_runs_all_views_through_all_layers(host: Host) -> None:
    """Every view has 16 patches and a CLS token; the vision encoder is 16 wide, its MLP 24."""
    vision = host.adapter.base.config.vision_config
    layer = 17 * (8 * 16**2 + 4 * 17 * 16 + 4 * 16 * 24)
    with compress(host.model, create("uniform", retention=0.5)) as trace:
        host.logits(host.inputs([0]))
    views = host.layouts(0)[0].views
    assert trace.ledger.vision_flops == views * vision.num_hidden_layers * layer
    assert trace.ledger.uncompressed_vision_flops == trace.ledger.vision_flops
    with compress(host.model, None) as trace:
        host.logits(host.inputs([1]))
    assert trace.ledger.vision_flops == 0


def test_layers_are_summed_one_by_one() -> None:
    one = DecoderShape(1, 4096, 11008, 32, 32, 128)
    wanted = sum(prefill_flops([n], one) for n in (100, 100, 30))
    assert prefill_flops([100, 100, 30], VICUNA_7B) == wanted


@pytest.mark.parametrize(
    ("kind", "kv_heads", "head_dim"), [("llama", 4, 8), ("mistral", 2, 8), ("qwen3", 2, 16)]
)
def test_shape_of_a_config(kind: str, kv_heads: int, head_dim: int) -> None:
    config = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    assert DecoderShape.of(config) == DecoderShape(3, 32, 48, 4, kv_heads, head_dim)


# The tiny host: d = 32, m = 48, 4 heads of 8, 2 of keys and values, 4 layers.
LINEAR = 2 * 32 * (2 * 32 + 2 * 16 + 3 * 48)


def _layer(tokens: int) -> int:
    return tokens * LINEAR + 4 * tokens**2 * 32


def _ledgers(host: Host, method: object, rows: tuple[int, ...] = (0, 1, 2)) -> list[Ledger]:
    with compress(host.model, method) as trace:  # type: ignore[arg-type]
        host.logits(host.inputs(rows))
    return trace.ledgers


def test_a_pre_llm_account_by_hand(host: Host) -> None:
    """Row 0: one image of 64 patches and 6 separators, 6 ids of text; 25 patches stay."""
    ledger = _ledgers(host, create("uniform", retention=0.4))[0]
    assert (ledger.requested, ledger.patch_tokens, ledger.kept_patches) == (0.4, 64, 25)
    assert (ledger.separators, ledger.kept_separators, ledger.text_tokens) == (6, 6, 6)
    assert ledger.realised == 25 / 64
    assert ledger.visual_per_layer == (31, 31, 31, 31)
    assert ledger.layer_average == 31
    assert sum(ledger.kept_per_view[0]) == 25
    assert ledger.uncompressed_flops == 4 * _layer(76)
    assert ledger.selector_flops == 0
    assert ledger.flops == 4 * _layer(37)
    assert ledger.kv_bytes == 4 * 37 * 2 * (2 * 8) * 4  # layers, tokens, k and v, width, float32


def test_an_llm_account_by_hand(host: Host) -> None:
    """FastV's row costs the query's projection and its products with 76 cached keys."""
    ledger = _ledgers(host, create("fastv", retention=0.25, separators="none"), (0,))[0]
    assert ledger.visual_per_layer == (70, 70, 16, 16)
    assert ledger.layer_average == 43
    assert (ledger.kept_separators, ledger.kept_patches) == (0, 16)
    row = 2 * 32 * 32 + 2 * 76 * 32
    assert ledger.selector_flops == row
    assert ledger.flops == 2 * _layer(76) + 2 * _layer(22) + row
    with compress(host.model, "fastv", retention=0.25) as trace:
        host.logits(host.inputs((0,)), use_cache=False)
    assert trace.ledger.selector_flops == row + 2 * 76 * 32 * 16  # keys projected once more


def test_attention_rows_of_the_text_are_charged(host: Host) -> None:
    """SparseVLM: three words ask in layers 0 and 1, with all tokens and with 25 patches of 64.

    Besides, 64 patches are compared with three words at both cuts, and dropped ones with each
    other: 13 of 41 at the first cut, 4 of 10 at the second.
    """
    method = create("sparsevlm", retention=0.25, separators="none")
    ledger = _ledgers(host, method, (0,))[0]
    assert ledger.visual_per_layer == (70, 25, 16, 16)
    rows = sum(3 * (2 * 32 * 32 + 2 * tokens * 32) for tokens in (76, 31))
    own = sum(2 * 32 * (64 * 3 + recycled**2) for recycled in (13, 4))
    assert ledger.selector_flops == pytest.approx(rows + own)
    assert ledger.flops == pytest.approx(
        _layer(76) + _layer(31) + 2 * _layer(22) + ledger.selector_flops
    )


def test_fitprune_and_pact_are_charged(host: Host) -> None:
    """Row 0: 64 patches, 6 separators, 3 words after the image, 3 tokens before it."""
    method = create("fitprune", retention=0.25, steps=1, separators="none")
    ledger = _ledgers(host, method, (0,))[0]
    assert ledger.visual_per_layer == (70, 70, 16, 16)
    # All patches and all words ask in layer 1, which projected keys and the patches' queries.
    assert ledger.selector_flops == (64 + 3) * 2 * 76 * 32 + 3 * 2 * 32 * 32
    method = create("pact", retention=0.25, separators="none")
    ledger = _ledgers(host, method, (0,))[0]
    assert ledger.visual_per_layer[0] == 70
    again = 2 * 76 * 32 * 16  # keys of layer 1, once rotated and once not
    # Cosines of the 55 % that EUTI keeps with each other, and of all patches with 16 centres.
    own = 2 * 16 * (35 * 35 + 64 * 16)
    assert ledger.selector_flops == 2 * again + 2 * 32 * 32 + 2 * 76 * 32 + own


def test_a_signal_of_the_tower_is_charged(host: Host) -> None:
    """Five views, a CLS row over 17 keys of width 16 each."""
    ledger = _ledgers(host, create("globalcom2", retention=0.4))[0]
    assert ledger.selector_flops == 5 * 2 * 17 * 16
    kept = 2 * 5 * 17 * 16 * 4  # queries and keys of one layer
    assert ledger.selector_bytes == kept + 2 * 5 * 2 * 17 * 4  # two heads' logits and softmax


@pytest.mark.parametrize("spec", [None, "uniform@0.4", "fastv@0.4", "uniform@0.6 + fastv@0.5"])
def test_a_second_turn_reports_the_cache_of_the_first(host: Host, spec: str | None) -> None:
    """The same image again after the first turn: the content of the cache, layer by layer."""
    method = None if spec is None else parse(spec)
    inputs = host.inputs((0,))
    ids = inputs["input_ids"]
    with compress(host.model, method) as trace, torch.no_grad():
        out = host.model(**inputs, use_cache=True)
        first = trace.ledger.kv_per_layer
        cache = getattr(out, CACHE)
        assert list(first) == [layer.keys.shape[-2] for layer in cache.layers]
        mask = torch.ones(1, 2 * ids.shape[1], dtype=torch.long)
        host.model(**{**inputs, "attention_mask": mask, CACHE: cache}, use_cache=True)
    ledger = trace.ledger
    assert ledger.kv_before == first
    assert ledger.text_tokens == 6
    assert list(ledger.kv_per_layer) == [layer.keys.shape[-2] for layer in cache.layers]
    size = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert ledger.kv_bytes == size


def test_entering_and_remaining_tokens_are_separate(host: Host) -> None:
    """Row 0: 64 patches, 6 separators, 6 words; 32 patches enter, 16 reach layers 2 and 3."""
    chain = Chain.of(create("uniform", retention=0.5), create("fastv", retention=0.5))
    ledger = _ledgers(host, chain)[0]
    assert (ledger.entered_patches, ledger.entered_separators) == (32, 6)
    assert (ledger.kept_patches, ledger.kept_separators) == (16, 6)
    assert ledger.tokens_per_layer == ledger.kv_per_layer == (44, 44, 28, 28)
    assert ledger.kv_entries == 144
    assert (ledger.layer_average, ledger.layer_average_with_text) == (30, 36)
    # FastV's row is made of 44 states of width 32, which are kept meanwhile.  The selection copies
    # 38 rows besides one score each, and ranks them with a few index vectors, ten at most.
    own = ledger.selector_bytes - 44 * 32 * 4 - 38 * (32 + 1) * 4
    assert 8 * 38 <= own <= 10 * 8 * 38


def test_packing_by_hand(host: Host) -> None:
    """Of 76 tokens of width 32 in float32, 37 are kept, 31 of them of the image."""
    ledger = _ledgers(host, create("uniform", retention=0.4), (0,))[0]
    assert ledger.selector_bytes == (37 + 31) * 32 * 4
    # Merged vectors exist besides a copy of the whole prompt.
    shape = DecoderShape.of(host.adapter.language_model.config)
    assert copied_bytes(76, 25, shape, 4) == (76 + 25) * 32 * 4
    assert copied_bytes(76, 0, shape, 4) == 0


def test_a_prompt_without_images(host: Host) -> None:
    ledger = _ledgers(host, create("globalcom2", retention=0.4))[1]
    assert (ledger.realised, ledger.patch_tokens, ledger.text_tokens) == (1.0, 0, 6)
    assert ledger.flops == ledger.uncompressed_flops == 4 * _layer(6)
    assert ledger.visual_per_layer == (0, 0, 0, 0)
    assert ledger.selector_flops == 0


def test_a_chain_is_accounted_as_one(host: Host) -> None:
    chain = Chain.of(create("uniform", retention=0.5), create("fastv", retention=0.5))
    ledger = _ledgers(host, chain)[0]
    assert ledger.requested == 0.25
    assert ledger.visual_per_layer == (38, 38, 22, 22)
    assert ledger.kept_patches == 16


def test_without_a_compressor_there_is_an_account_all_the_same(host: Host) -> None:
    plain = host.logits(host.inputs())
    with compress(host.model, None) as trace:
        assert torch.equal(host.logits(host.inputs()), plain)
    assert [ledger.realised for ledger in trace.ledgers] == [1.0, 1.0, 1.0]
    assert trace.ledgers[0].visual_per_layer == (70, 70, 70, 70)
    assert trace.ledgers[0].flops == trace.ledgers[0].uncompressed_flops


def test_the_account_is_that_of_the_prefill_not_of_the_last_step(host: Host) -> None:
    with compress(host.model, "uniform", retention=0.4) as trace:
        host.logits(host.inputs())
        forward = trace.ledgers
        for use_cache in (True, False):
            host.generate(host.inputs(), use_cache=use_cache)
            assert [each.visual_per_layer for each in trace.ledgers] == [
                each.visual_per_layer for each in forward
            ]


def test_several_prompts_have_no_single_account(host: Host) -> None:
    with compress(host.model, "uniform", retention=0.4) as trace:
        host.logits(host.inputs())
    with pytest.raises(UserError, match=r"had 3 prompts; use trace\.ledgers"):
        assert trace.ledger
