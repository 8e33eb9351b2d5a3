"""Embeddings that clients may send to a server, and those that it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tokenprune import serving
from tokenprune.errors import UserError

GOOD = torch.ones(5, 8)


def _check(embeds: Any, dtype: torch.dtype = torch.float32) -> None:
    serving.check_embeds(embeds, width=8, longest=12, dtype=dtype)


@pytest.mark.parametrize(
    "embeds",
    [GOOD, GOOD.half(), GOOD.bfloat16(), [GOOD], (GOOD, GOOD[:1]), GOOD[None], torch.ones(2, 6, 8)],
    ids=str,
)
def test_what_a_server_takes(embeds: Any) -> None:
    _check(embeds)


def _with(value: float) -> torch.Tensor:
    embeds = GOOD.clone()
    embeds[3, 2] = value
    return embeds


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype of PyTorch
        return torch.nested.nested_tensor([GOOD, GOOD])


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        (None, "must be a tensor .* got an object of type NoneType"),
        ("AAAA", "got an object of type str"),
        (torch.ones(8), r"got a float32 tensor of shape \(8,\)"),
        (torch.ones(1, 1, 5, 8), r"got a float32 tensor of shape \(1, 1, 5, 8\)"),
        ([[1.0] * 8], "embedding 0 must be a tensor .* got an object of type list"),
        (torch.ones(5, 7), r"embedding 0 must have the shape \(tokens, 8\) .* got \(5, 7\)"),
        ([GOOD, torch.ones(8)], r"embedding 1 must have the shape .* got \(8,\)"),
        (torch.ones(0, 8), "at least one token"),
        ([], "have 0 tokens together"),
        (GOOD[None][:0], "have 0 tokens together"),
        (torch.ones(13, 8), "have 13 tokens together, but this server takes 1 to 12"),
        ([GOOD, GOOD, GOOD], "have 15 tokens together"),
        (torch.ones(1, 1, 8).expand(10**12, 1, 8), "have 1000000000000 tokens together"),
        (GOOD.double(), "of float32, bfloat16, float16, got a float64 tensor"),
        (GOOD.long(), "got a int64 tensor"),
        (GOOD.to(torch.complex64), "got a complex64 tensor"),
        (GOOD.to_sparse(), r"dense tensor with values, got a float32 tensor \(sparse_coo\)"),
        ([GOOD.to_sparse()], "embedding 0 must be a dense tensor"),
        (GOOD.to("meta"), "dense tensor with values, .* on meta"),
        (_nested(), "dense tensor with values"),
        (_with(torch.nan), "embedding 0 has numbers that are NaN or infinite in float32"),
        ([GOOD, _with(-torch.inf)], "embedding 1 has numbers"),
    ],
)
def test_what_a_server_refuses(embeds: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        _check(embeds)
    assert str(caught.value).count(". ") == 0  # one sentence


def test_a_number_that_the_server_cannot_hold_is_infinite() -> None:
    _check(_with(1e6), torch.bfloat16)
    with pytest.raises(UserError, match="NaN or infinite in float16"):
        _check(_with(1e6), torch.float16)
