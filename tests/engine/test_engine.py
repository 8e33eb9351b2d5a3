"""The engine in cases that do not depend on the method: pitfalls seen in real use."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    DynamicCache,
    LlavaNextForConditionalGeneration,
)

from tokenprune.adapter import adapter_of
from tokenprune.compressor import Chain, Compressor
from tokenprune.engine.cache import is_pruned
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.models.llava_next import LlavaNext
from tokenprune.spec import create, parse
from tokenprune.testing import model_checks
from tokenprune.testing.host import Host, Row
from tokenprune.testing.reference import reference

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

METHODS = {
    "uniform": create("uniform", retention=0.4),
    "uniform, original": create("uniform", retention=0.4, position_ids="original"),
    "globalcom2": create("globalcom2", retention=0.4),
    "fastv": create("fastv", retention=0.4),
    "fastv, compact": create("fastv", retention=0.4, position_ids="compact"),
    "chain": Chain.of(create("globalcom2", retention=0.6), create("fastv", retention=0.6)),
    "two cuts, compact": Chain.of(
        create("uniform", retention=0.6, position_ids="original"),
        create("fastv", retention=0.6, position_ids="compact", layer=1),
        create("fastv", retention=0.6, position_ids="compact", layer=3),
    ),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _step(host: Host, inputs: dict[str, Any], cache: DynamicCache | None = None) -> Any:
    return host.model(**inputs, past_key_values=cache, use_cache=True)


# -- images of every kind ------------------------------------------------------------------------


@each_method
def test_odd_images(method: Compressor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extreme image shapes, several images, and an image without a question."""
    rows = (
        Row(((1, 300),), 2),
        Row(((300, 1), (12, 12), (24, 5)), 4),
        Row(((13, 17),), 0),
        Row((), 1),
    )
    for module in ("host", "reference_vision"):
        monkeypatch.setattr(f"tokenprune.testing.{module}.ROWS", rows)
    host = Host.tiny("LLaVA-NeXT", "mistral")
    inputs = host.inputs((0, 1, 2, 3))
    with compress(host.model, method) as trace:
        ids, logits = host.generate_with_logits(inputs)
        assert_close(host.generate_with_logits(inputs, use_cache=False)[1], logits)
        kept = [[c.keep.tolist() for c in trace.selections if c.row == row] for row in range(4)]
    for row in range(4):
        wanted = reference(host, method, row, ids[row, :-1].tolist())
        assert kept[row] == [keep.tolist() for keep in wanted.kept]
        assert_close(logits[row], wanted.logits[-4:])


# -- conversations -------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_an_image_in_a_later_turn(method: Compressor, decoder: str) -> None:
    """Row 2 fed in two turns, an image in each; every image is ranked by its own turn."""
    host = Host.tiny("LLaVA-NeXT", decoder)
    whole = host.inputs([2])
    ids, image = whole["input_ids"][0].tolist(), host.placeholders[0]
    # BOS, two ids, image, two ids | image, text
    split = max(i for i, pair in enumerate(pairwise(ids)) if pair[0] != image == pair[1]) + 1
    parts = [
        {"input_ids": whole["input_ids"][:, :split], "attention_mask": torch.ones(1, split).long()},
        {"input_ids": whole["input_ids"][:, split:], "attention_mask": whole["attention_mask"]},
    ]
    for index, part in enumerate(parts):
        for name in ("pixel_values", "image_sizes"):
            part[name] = whole[name][index : index + 1]
    wanted = reference(host, method, 2, [9], asking=[split - 1, len(ids) - 1])
    with compress(host.model, method):
        first = _step(host, parts[0])
        second = _step(host, parts[1], first.past_key_values)
        third = _decode(host, 9, first.past_key_values, len(ids) + 1)
    assert_close(second.logits[0, -1], wanted.logits[-2])
    assert_close(third[0], wanted.logits[-1])


@each_method
def test_an_image_after_a_padded_turn_of_text(method: Compressor, host: Host) -> None:
    """The padding of a turn that was not compressed stays invisible."""
    texts = [[1, 20, 21, 22], [1, 23]]
    image = host.inputs([0, 0])
    asked = image.pop("input_ids"), image.pop("attention_mask")

    def talk(rows: list[int]) -> Tensor:
        width = max(len(texts[row]) for row in rows)
        pads = [[0] * (width - len(texts[row])) for row in rows]
        ids = torch.tensor([pad + texts[row] for pad, row in zip(pads, rows, strict=True)])
        mask = (ids != 0).long()
        with compress(host.model, method):
            first = _step(host, {"input_ids": ids, "attention_mask": mask})
            turn = {name: values[rows] for name, values in image.items()}
            turn["input_ids"] = asked[0][rows]
            turn["attention_mask"] = torch.cat([mask, asked[1][rows]], dim=1)
            logits: Tensor = _step(host, turn, first.past_key_values).logits[:, -1]
        return logits

    together = talk([0, 1])
    for row in (0, 1):
        assert_close(together[row], talk([row])[0])


@each_method
def test_only_new_ids_with_a_compressed_cache(method: Compressor, host: Host) -> None:
    """Forwards by hand: only the new ids, with the mask of everything."""
    inputs = host.inputs()
    new = torch.tensor([[21, 22], [23, 24], [25, 26]])
    ones = torch.ones_like(new)
    with compress(host.model, method):
        first = _step(host, inputs)
        mask = torch.cat([inputs["attention_mask"], ones], dim=1)
        second = _step(host, {"input_ids": new, "attention_mask": mask}, first.past_key_values)
    for row in range(3):
        wanted = reference(host, method, row, new[row].tolist())
        assert_close(second.logits[row], wanted.logits[-2:])


def _prefill(host: Host, row: int) -> Any:
    return _step(host, host.inputs([row]))


def _decode(host: Host, token: int, cache: DynamicCache, length: int, rows: int = 1) -> Tensor:
    inputs = {
        "input_ids": torch.full((rows, 1), token),
        "attention_mask": torch.ones(rows, length).long(),
    }
    out: Tensor = _step(host, inputs, cache).logits[:, -1]
    return out


@each_method
def test_interleaved_conversations(method: Compressor, host: Host) -> None:
    """Two caches in one context: what belongs to a prompt lives on its cache."""
    lengths = [len(host.prompt(row)) for row in range(3)]
    with compress(host.model, method):
        caches = [_prefill(host, row).past_key_values for row in range(3)]
        got = [
            [_decode(host, 10 + step, caches[row], lengths[row] + step + 1) for row in range(3)]
            for step in range(2)
        ]
    for row in range(3):
        wanted = reference(host, method, row, [10, 11])
        assert_close(torch.cat([got[0][row], got[1][row]]), wanted.logits[-2:])


@each_method
def test_rows_of_a_cache_can_be_selected_and_repeated(method: Compressor, host: Host) -> None:
    inputs = host.inputs()
    with compress(host.model, method):
        cache = _step(host, inputs).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        mask = torch.cat([inputs["attention_mask"][rows], torch.ones(4, 1).long()], dim=1)
        turn = {"input_ids": torch.full((4, 1), 9), "attention_mask": mask}
        got = _step(host, turn, cache).logits[:, -1]
    for place, row in enumerate(rows):
        assert_close(got[place], reference(host, method, row, [9]).logits[-1])


@each_method
def test_a_cache_can_be_cropped_and_reset(method: Compressor, host: Host) -> None:
    """Cropping the last tokens, as assisted decoding does."""
    length = len(host.prompt(0))
    with compress(host.model, method):
        cache = _prefill(host, 0).past_key_values
        assert is_pruned(cache)
        assert cache.get_seq_length() == length
        _decode(host, 9, cache, length + 1)
        for layer in cache.layers:
            layer.crop(-1)
        assert cache.get_seq_length() == length
        other = _decode(host, 11, cache, length + 1)[0]
        cache.reset()
        assert cache.get_seq_length() == 0
        again = _step(host, host.inputs([0]), cache).logits[0, -1]
    assert_close(other, reference(host, method, 0, [11]).logits[-1])
    assert_close(again, reference(host, method, 0).logits[-1])


# -- how the model is called ---------------------------------------------------------------------


@each_method
def test_without_an_attention_mask(method: Compressor, host: Host) -> None:
    inputs = host.inputs([2])
    with compress(host.model, method):
        want = host.logits(inputs)
        del inputs["attention_mask"]
        assert_close(host.logits(inputs), want)


@each_method
def test_with_position_ids_of_the_caller(method: Compressor, host: Host) -> None:
    """As `generate` makes them: counted from the first real token."""
    inputs = host.inputs()
    mask = inputs["attention_mask"]
    with compress(host.model, method):
        want = host.logits(inputs)[mask.bool()]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = host.logits(inputs, position_ids=positions)[mask.bool()]
    assert_close(got, want)


@each_method
def test_tuple_outputs_and_hidden_states(method: Compressor, host: Host) -> None:
    inputs = host.inputs()
    with compress(host.model, method), torch.no_grad():
        want = host.logits(inputs)
        plain = host.model(**inputs, return_dict=False)
        assert torch.equal(plain[0], want)
        out = host.model(**inputs, output_hidden_states=True)
        assert torch.equal(out.logits, want)
        assert len(out.hidden_states) == 5


def test_the_base_model_can_be_compressed_alone(host: Host) -> None:
    inputs = host.inputs()
    with compress(host.model, "uniform", retention=0.4), torch.no_grad():
        want = host.model.model(**inputs).last_hidden_state
    with compress(host.model.model, "uniform", retention=0.4), torch.no_grad():
        assert torch.equal(host.model.model(**inputs).last_hidden_state, want)


def test_the_base_of_a_model_in_a_context_is_refused(host: Host) -> None:
    with (
        compress(host.model, "uniform", retention=0.4),
        pytest.raises(UserError, match="already runs inside"),
        compress(host.model.model, "uniform", retention=0.4),
    ):
        pass


def test_two_models_at_a_time(host: Host) -> None:
    other = Host.tiny("LLaVA-NeXT", seed=1)
    with compress(other.model, "fastv", retention=0.3):
        alone = other.generate(other.inputs())
    with compress(host.model, "uniform", retention=0.4):
        want = host.generate(host.inputs())
        with compress(other.model, "fastv", retention=0.3):
            assert torch.equal(other.generate(other.inputs()), alone)
            assert torch.equal(host.generate(host.inputs()), want)


@each_method
def test_features_encoded_before(method: Compressor, host: Host) -> None:
    """Encoder outputs made in the context serve several calls; beams expand them in place."""
    inputs = host.inputs()
    images = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes")}
    with compress(host.model, method), torch.no_grad():
        want = host.generate({**inputs, **images}), host.generate({**inputs, **images}, num_beams=3)
        for options, ids in (({}, want[0]), ({"num_beams": 3}, want[1])):
            encoded = {"image": host.model.model.get_image_features(**images)}
            got = host.generate({**inputs, "mm_encoder_outputs": encoded}, **options)
            assert torch.equal(got, ids)


def test_features_encoded_outside_are_refused(host: Host) -> None:
    inputs = host.inputs()
    images = {name: inputs.pop(name) for name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        encoded = {"image": host.model.model.get_image_features(**images)}
    with (
        compress(host.model, "uniform", retention=0.4),
        pytest.raises(UserError, match="were not encoded inside this context"),
    ):
        host.generate({**inputs, "mm_encoder_outputs": encoded})


@each_method
def test_several_samples_of_a_prompt(method: Compressor, host: Host) -> None:
    drawn = []
    with compress(host.model, method):
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn.append(
                host.generate(
                    host.inputs(), do_sample=True, num_return_sequences=3, use_cache=use_cache
                )
            )
    assert drawn[0].shape == (9, 4)
    assert torch.equal(*drawn)


@each_method
def test_repetition_penalty_sees_the_whole_prompt(method: Compressor, host: Host) -> None:
    """Logits processors get the ids of the full prompt, and sequences start with it."""
    inputs = host.inputs()
    with compress(host.model, method):
        cached = host.generate(inputs, repetition_penalty=1.5)
        assert torch.equal(host.generate(inputs, repetition_penalty=1.5, use_cache=False), cached)
        out = host._generate(inputs)
        assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@each_method
def test_max_length_means_the_uncompressed_length(method: Compressor, host: Host) -> None:
    inputs = host.inputs()
    longest = inputs["input_ids"].shape[1] + 3
    options = {"suppress_tokens": [host.placeholders[0], 2], "do_sample": False}
    with compress(host.model, method):
        got = host.model.generate(**inputs, max_length=longest, **options)
    assert got.shape[1] == longest


@each_method
def test_training_mode_and_gradient_checkpointing(method: Compressor, host: Host) -> None:
    """Gradients with and without recomputation are the same."""
    inputs = host.inputs([0], answer=[7, 9])
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    weight = host.model.get_input_embeddings().weight
    slopes = []
    for checkpointing in (False, True):
        if checkpointing:
            host.model.train()
            host.model.gradient_checkpointing_enable({"use_reentrant": False})
        with compress(host.model, method):
            loss = host.model(**inputs, labels=labels, use_cache=False).loss
            slopes.append(torch.autograd.grad(loss, weight)[0])
    assert_close(slopes[1], slopes[0])


# -- refusals ------------------------------------------------------------------------------------


def _windowed(window: int) -> Host:
    torch.manual_seed(0)
    config = LlavaNext.tiny("mistral").config
    text = config.text_config.to_dict() | {"sliding_window": window}
    config.text_config = AutoConfig.for_model(**text)
    return Host(adapter_of(LlavaNextForConditionalGeneration(config).eval()))


@pytest.mark.parametrize("name", ["uniform", "fastv"])
def test_a_window_shorter_than_the_prompt_is_refused(name: str) -> None:
    host = _windowed(40)
    with (
        compress(host.model, name, retention=0.4),
        pytest.raises(UserError, match="sliding window"),
    ):
        host.generate(host.inputs([0]))


@pytest.mark.parametrize("name", ["uniform", "fastv"])
def test_growing_beyond_the_window_is_refused(name: str) -> None:
    host = _windowed(78)  # the prompt has 76 tokens
    with (
        compress(host.model, name, retention=0.4),
        pytest.raises(UserError, match="sliding window"),
    ):
        host.generate(host.inputs([0]))


@pytest.mark.parametrize("name", ["uniform", "fastv"])
def test_a_window_that_is_long_enough_changes_nothing(name: str) -> None:
    host, plain = _windowed(200), _windowed(4096)
    method = create(name, retention=0.4)
    with compress(host.model, method), compress(plain.model, method):
        want = plain.generate_with_logits(plain.inputs())
        got = host.generate_with_logits(host.inputs())
    assert_close(got[1], want[1])
    for row in range(3):
        ids = got[0][row, :-1].tolist()
        assert_close(got[1][row], reference(plain, method, row, ids).logits[-4:])


def test_a_wrong_number_of_placeholders_is_refused(host: Host) -> None:
    inputs = host.inputs([0])
    inputs["input_ids"][0, 3] = 9
    with compress(host.model, "uniform", retention=0.4), pytest.raises(ValueError, match="image"):
        host.logits(inputs)


def test_a_strategy_that_fails_names_itself(host: Host) -> None:
    from broken_methods import Unsorted

    with (
        compress(host.model, Unsorted(retention=0.4)),
        pytest.raises(UserError, match="Unsorted must return sorted, unique indices"),
    ):
        host.logits(host.inputs())


# -- another vision encoder ----------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["uniform", "globalcom2:score=received,tau=0.1", "fastv"])
def test_an_encoder_without_cls(spec: str, siglip: Host) -> None:
    """SigLIP has no CLS token, so received attention ranks; nothing else changes."""
    method = parse(spec, retention=0.4)
    model_checks.check_equals_reference(method, siglip)
    model_checks.check_batch_equals_single(method, siglip)


def test_cls_attention_is_refused_without_cls(siglip: Host) -> None:
    with (
        pytest.raises(UserError, match=r"needs the attention of a CLS token, which the siglip"),
        compress(siglip.model, "globalcom2:score=cls_logits", retention=0.4),
    ):
        pass


def test_a_trace_does_not_keep_the_kv_cache_alive(host: Host) -> None:
    inputs = host.inputs()
    with compress(host.model, "globalcom2", retention=0.5) as trace:
        out = host.model(**inputs, use_cache=True)
    cache = weakref.ref(out.past_key_values)
    del out
    gc.collect()
    assert cache() is None
    assert len(trace.ledgers) == len(inputs["input_ids"])


def test_placeholders_without_images_are_refused(host: Host) -> None:
    inputs = host.inputs([0])
    with compress(host.model, "uniform", retention=0.5):
        with pytest.raises(UserError, match="no image reached this forward"):
            host.model(input_ids=inputs["input_ids"])
        host.model(**inputs)  # and the context is still good for a complete call
