"""Checks of generation: KV caches, beams, labels, drafts and turns."""

from __future__ import annotations

import functools

import torch
from torch import nn

from tokenprune.compressor import Compressor
from tokenprune.engine.cache import CACHE
from tokenprune.engine.session import compress
from tokenprune.testing.asserting import (
    assert_close,
    assert_refused,
    assert_same,
    assert_same_kept,
    columns_on,
    kept_in,
)
from tokenprune.testing.host import ROWS, Host, tiny_host
from tokenprune.testing.reference import reference

__all__ = [
    "check_beams_agree",
    "check_cache_agrees",
    "check_chunked_prefill_refused",
    "check_drafts_have_no_say",
    "check_generate_batch_equals_single",
    "check_labels",
    "check_labels_everywhere",
    "check_sampling_agrees",
    "check_second_turn",
    "check_sliding_window_refused",
    "check_static_cache_refused",
    "check_turns_with_labels",
]


def check_generate_batch_equals_single(compressor: Compressor, host: Host) -> None:
    """Invariant 3 for `generate`: greedy and beams, row by row."""
    for options in ({}, {"num_beams": 3}):
        with compress(host.model, compressor):
            together = host.generate(host.inputs(), **options)
            for row in range(len(ROWS)):
                alone = host.generate(host.inputs([row]), **options)[0]
                assert_same(together[row], alone, f"row {row} of the batch with {options}, ids")


def check_cache_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 4: greedy search agrees with and without KV cache, and twice in one context."""
    inputs = host.inputs()
    with compress(host.model, compressor):
        cached, with_cache = host.generate_with_logits(inputs)
        plain, without = host.generate_with_logits(inputs, use_cache=False)
        again = host.generate(inputs)
    assert_close(without, with_cache, "logits without KV cache")
    assert_same(plain, cached, "ids without KV cache")
    assert_same(again, cached, "ids of a second generate in the same context")
    for row in range(len(ROWS)):  # alone: without padding the model makes no mask
        alone = host.inputs([row])
        with compress(host.model, compressor), torch.no_grad():
            cached = host.model(**alone, use_cache=True).logits
            plain = host.model(**alone, use_cache=False).logits
        assert_close(plain, cached, f"row {row} alone, logits of the prompt without KV cache")


def check_sampling_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 4: sampling with a seed agrees with and without KV cache."""
    drawn = []
    with compress(host.model, compressor), torch.random.fork_rng(devices=[]):
        for use_cache in (True, True, False):
            torch.manual_seed(5)
            drawn.append(host.generate(host.inputs(), do_sample=True, use_cache=use_cache))
    assert_same(drawn[1], drawn[0], "ids sampled again with the same seed")
    assert_same(drawn[2], drawn[0], "ids sampled without KV cache")


def check_beams_agree(compressor: Compressor, host: Host) -> None:
    """Invariant 4: beam search with several sequences agrees with and without KV cache."""
    options = {"num_beams": 3, "num_return_sequences": 2}
    with compress(host.model, compressor):
        cached = host.generate(host.inputs(), **options)
        plain = host.generate(host.inputs(), use_cache=False, **options)
    if len(cached) != 2 * len(ROWS):
        raise AssertionError(f"{len(cached)} sequences, not {2 * len(ROWS)}")
    assert_same(plain, cached, "ids of the beams without KV cache")


def check_labels(compressor: Compressor, host: Host) -> None:
    """Teacher forcing: the answer does not affect the selection; the loss equals the reference.

    Gradients reach the embeddings.
    """
    answer = [7, 9, 11]
    for rows, side in (((0,), "left"), ((1,), "left"), ((0, 1, 2), "left"), ((2, 1, 0), "right")):
        inputs, what = host.inputs(rows, side, answer), f"prompts {rows}, {side} padding"
        labels = torch.full_like(inputs["input_ids"], -100)
        for place, row in enumerate(rows):
            columns = columns_on(side, len(host.prompt(row)) + len(answer), labels.shape[1])
            labels[place, columns][-len(answer) :] = torch.tensor(answer)
        with compress(host.model, compressor) as trace:
            host.logits(host.inputs(rows, side))
            alone = [record.keep for record in trace.selections]
            loss = host.model(**inputs, labels=labels).loss
            assert_same_kept(
                [record.keep for record in trace.selections], alone, f"{what}, with answer"
            )
        wanted = [
            reference(host, compressor, row, answer).logits[-len(answer) - 1 : -1] for row in rows
        ]
        targets = torch.tensor(answer).repeat(len(rows))
        want = nn.functional.cross_entropy(torch.cat(wanted), targets)
        assert_close(loss.detach()[None], want[None], f"{what}, loss")
        (slope,) = torch.autograd.grad(loss, host.model.get_input_embeddings().weight)
        if not slope.isfinite().all():
            raise AssertionError(f"{what}: some gradients are not finite")
        if not slope.any():
            raise AssertionError(f"{what}: no gradient at the embeddings")


def check_labels_everywhere(compressor: Compressor, host: Host) -> None:
    """Labels on the whole text, also in front of an image, do not change the selections."""
    for row in (0, 2):
        inputs = host.inputs([row])
        labels = inputs["input_ids"].clone()
        labels[torch.isin(labels, torch.tensor(host.placeholders))] = -100
        with compress(host.model, compressor) as trace:
            host.logits(inputs)
            want = kept_in(trace, 0)
            host.logits(inputs, labels=labels)
        assert_same_kept(kept_in(trace, 0), want, f"row {row} with labels on all text")


def check_turns_with_labels(compressor: Compressor, host: Host) -> None:
    """With several labelled turns, the question of an image's turn ranks its tokens."""
    row, answer = 2, [7, 9, 11]
    inputs = host.inputs([row], answer=answer)
    ids, prompt = inputs["input_ids"][0], len(host.prompt(row))
    places = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
    images = places.split([len(layout) for layout in host.layouts(row)])
    # Two ids are between two images: the question and the answer of the first image's turn.
    asking = [int(image[-1]) + 1 for image in images[:-1]] + [prompt - 1]
    labels = torch.full_like(inputs["input_ids"], -100)
    for column in [*(asked + 1 for asked in asking[:-1]), *range(prompt, len(ids))]:
        labels[0, column] = ids[column]
    with compress(host.model, compressor) as trace:
        got = host.logits(inputs, labels=labels)
    wanted = reference(host, compressor, row, answer, asking)
    assert_same_kept(kept_in(trace, 0), wanted.kept, "several turns with labels")
    assert_close(got[0, -1], wanted.logits[-1], "several turns with labels, logits")


def check_drafts_have_no_say(compressor: Compressor, host: Host) -> None:
    """Draft tokens after the prompt do not rank: assisted decoding equals greedy decoding."""
    for row in (0, 2):
        wanted = reference(host, compressor, row, [7, 9, 11])
        with compress(host.model, compressor) as trace:
            drafted = host.inputs([row], answer=[7, 9, 11])
            got = host.logits(drafted, logits_to_keep=4)[0]
        assert_same_kept(kept_in(trace, 0), wanted.kept, f"row {row} with three draft tokens")
        assert_close(got, wanted.logits[-4:], f"row {row} with three draft tokens, logits")
    inputs, helper = host.inputs([0]), tiny_host(host.name, host.decoder, 1).model
    with compress(host.model, compressor) as trace:
        want, kept = host.generate(inputs), kept_in(trace, 0)
        for options in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
            what = f"decoding with {next(iter(options))}"
            assert_same(host.generate(inputs, **options), want, f"{what}, ids")
            assert_same_kept(kept_in(trace, 0), kept, what)


def check_sliding_window_refused(compressor: Compressor, host: Host) -> None:
    """A prompt longer than a sliding window is refused, with and without a KV cache."""
    decoder = "mistral" if "mistral" in host.adapter.decoders else host.decoder
    windowed = tiny_host(host.name, decoder).like(window=16)
    if not hasattr(windowed.adapter.language_model.config, "sliding_window"):
        return  # a decoder that never slides
    for use_cache in (True, False):
        with compress(windowed.model, compressor):
            assert_refused(
                functools.partial(windowed.logits, windowed.inputs(), use_cache=use_cache),
                "sliding window",
                f"a prompt beyond the sliding window with use_cache={use_cache}",
            )


def check_second_turn(compressor: Compressor, host: Host) -> None:
    """A second turn with the full ids and the returned KV cache equals the reference."""
    inputs = host.inputs()
    options = {"return_dict_in_generate": True, "output_logits": True}
    with compress(host.model, compressor):
        first = host._generate(inputs, **options)
        asked = torch.tensor([[21, 22], [23, 24], [25, 26]])
        ids = torch.cat([first.sequences, asked], dim=1)
        new = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), new).long()], dim=1)
        turn = {"input_ids": ids, "attention_mask": mask}
        second = host._generate(turn, **{CACHE: first.past_key_values}, **options)
    answers = second.sequences[:, inputs["input_ids"].shape[1] :]
    for row in range(len(ROWS)):
        wanted = reference(host, compressor, row, answers[row, :-1].tolist())
        got = torch.stack(second.logits, dim=1)[row]
        assert_close(got, wanted.logits[-len(got) :], f"row {row}, logits of the second turn")


def check_chunked_prefill_refused(compressor: Compressor, host: Host) -> None:
    """An image split over several forwards is refused with a `UserError`."""
    with compress(host.model, compressor):
        assert_refused(
            lambda: host.generate(host.inputs(), prefill_chunk_size=8),
            "prefill_chunk_size",
            "prefill_chunk_size=8",
        )


def check_static_cache_refused(compressor: Compressor, host: Host) -> None:
    """A static KV cache is refused with a `UserError`."""
    with compress(host.model, compressor):
        assert_refused(
            lambda: host.generate(host.inputs(), cache_implementation="static"),
            "static",
            "cache_implementation='static'",
        )
