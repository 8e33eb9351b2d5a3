"""Assertions and observers that the checks share."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenprune.compressor import Chain, Compressor, Selection
from tokenprune.engine.trace import Trace
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens

__all__ = [
    "Check",
    "assert_close",
    "assert_refused",
    "assert_same",
    "assert_same_bits",
    "assert_same_kept",
    "called",
    "columns_on",
    "kept_in",
    "rng_state",
    "seeded",
    "spying",
    "vision_products",
    "with_fields",
]


Check = Callable[..., None]


TOLERANCE = 1e-4


def with_fields(compressor: Compressor, **fields: Any) -> Compressor:
    """The same method with other fields; in a chain, every part gets them."""
    if isinstance(compressor, Chain):
        return Chain.of(*(replace(part, **fields) for part in compressor.members))
    return replace(compressor, **fields)


# -- observers and assertions --------------------------------------------------------------------


class Seen(NamedTuple):
    """One call of a self-attention module.

    Attributes:
        length: Number of tokens.
        positions: (B or 1, length) position ids.
        rotary: cos and sin (B or 1, length, head_dim) of the rotary embedding.
        attentions: Whether ``output_attentions`` was set.
    """

    length: int
    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    attentions: bool


@contextmanager
def spying(host: Host) -> Iterator[list[Seen]]:
    """While open, record the calls of every self-attention module of the decoder."""
    calls: list[Seen] = []

    def note(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        asked = bool(kwargs.get("output_attentions"))
        rotary = kwargs["position_embeddings"]
        calls.append(Seen(hidden.shape[1], kwargs["position_ids"], rotary, asked))

    handles = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for layer in host.adapter.decoder_layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def vision_products(host: Host) -> Iterator[list[int]]:
    """While open, record the FLOPs of attention and MLP of every encoder layer that runs."""
    found: list[int] = []

    def attention(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        views, tokens, width = (kwargs.get("hidden_states", args[0] if args else None)).shape
        found.append(views * (4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width))

    def linear(module: Any, args: Any) -> None:
        views, tokens, width = args[0].shape
        found.append(views * 2 * tokens * width * module.out_features)

    def packed(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        (tokens, width), ends = args[0].shape, kwargs["cu_seqlens"]
        pairs = int(ends.diff().square().sum())
        found.append(4 * 2 * tokens * width**2 + 2 * 2 * pairs * width)

    running: list[bool] = []  # methods that merge call the projector outside the encoder

    def mapped(module: Any, args: Any) -> None:
        if running:
            found.append(2 * args[0].numel() * module.out_features)

    handles = []
    if host.adapter.facts.vision.native:
        tower = host.adapter.vision_tower
        handles.append(tower.register_forward_pre_hook(lambda *_: running.append(True)))
        handles.append(tower.register_forward_hook(lambda *_: running.clear()))
        linears = [module for module in host.adapter.vision_tower.modules()]
        for layer in host.adapter.vision_layers:
            handles.append(layer.attn.register_forward_pre_hook(packed, with_kwargs=True))
            inside = [*layer.attn.modules()]
            linears = [module for module in linears if module not in inside]
        handles += [
            module.register_forward_pre_hook(mapped)
            for module in linears
            if isinstance(module, nn.Linear)
        ]
    for index, layer in enumerate([] if handles else host.adapter.vision_layers):
        module = host.adapter.vision_attention(index)
        handles.append(module.register_forward_pre_hook(attention, with_kwargs=True))
        handles += [
            module.register_forward_pre_hook(linear)
            for module in layer.mlp.modules()
            if isinstance(module, nn.Linear)
        ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    """Raise unless the numbers agree within `TOLERANCE` (absolute, and relative to 1)."""
    if got.shape != want.shape:
        raise AssertionError(f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}")
    wrong = (got - want).abs().float() > TOLERANCE * (1 + want.abs().float())
    wrong |= got.isnan() != want.isnan()
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} numbers differ, the first at {at}: "
            f"{got[at].item():.6g} instead of {want[at].item():.6g}"
        )


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Raise unless the tensors are equal."""
    if not torch.equal(got, want):
        raise AssertionError(f"{what}: {got.tolist()} instead of {want.tolist()}")


def kept_in(trace: Trace, row: int) -> list[Tensor]:
    """The kept indices of every selection in ``row``, in order."""
    return [record.keep for record in trace.selections if record.row == row]


def assert_same_kept(got: Sequence[Tensor], want: Sequence[Tensor], what: str) -> None:
    """Raise unless both lists have the same selections."""
    if len(got) != len(want):
        raise AssertionError(f"{what}: {len(got)} selections instead of {len(want)}")
    for index, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        assert_same(mine, theirs, f"{what}: selection {index} keeps")


def assert_refused(action: Callable[[], Any], word: str, what: str) -> None:
    """Raise unless ``action`` raises a `UserError` whose message contains ``word``."""
    try:
        action()
    except UserError as error:
        sentence = str(error)
    else:
        raise AssertionError(f"{what} was not refused")
    if word not in sentence:
        raise AssertionError(f"{what}: refused, but without naming {word!r}: {sentence}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, every global generator is seeded; their states are restored afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def rng_state() -> tuple[Any, ...]:
    """The states of the global generators of Python, NumPy and PyTorch."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global state is the point)
    return random.getstate(), name, np.asarray(keys).tolist(), rest, torch.get_rng_state().tolist()


def columns_on(side: str, length: int, width: int) -> slice:
    """Columns of a prompt of ``length`` in a batch of ``width`` columns padded on ``side``."""
    return slice(width - length, width) if side == "left" else slice(0, length)


def called(part: Compressor, tokens: VisualTokens) -> Selection:
    """The selection of ``part`` as the engine receives it, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        return part(tokens)


def assert_same_bits(got: Tensor, want: Tensor, what: str) -> None:
    """Raise unless the tensors are bit-identical."""
    if got.shape != want.shape:
        raise AssertionError(f"{what} are {tuple(got.shape)} instead of {tuple(want.shape)}")
    if not torch.equal(got, want):
        raise AssertionError(f"{what} differ by up to {(got - want).abs().max():.2g}")
