"""A method must not write to the tensors that it receives: other methods share them.

`untouched` compares PyTorch's version counter of every tensor before and after the method.  Each
in-place operation increments it, also one on a view.  The comparison reads no values and needs no
synchronisation.  Tensors made in `torch.inference_mode` have no counter; checksums of their values
are compared (`digest`).

A write through ``.data``, through NumPy or through a pointer does not change the counter.  If
methods share encodings, ``tokenprune compare`` therefore compares checksums too.  The weights of
the model, which a method can reach through `VisualTokens.projector`, are not watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ContractError
from tokenprune.layout import TokenLayout
from tokenprune.tokens import VisualTokens

__all__ = ["digest", "shown", "untouched", "watched"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def shown(tokens: VisualTokens) -> dict[str, Tensor]:
    """Every tensor that a method can reach, by name."""
    signals = {f"signals[{signal.name}, {signal.layer}]": v for signal, v in tokens.signals.items()}
    text = {f"text[{signal.name}, {signal.layer}]": v for signal, v in tokens.text.items()}
    entered = dict(zip(("inputs[0]", "inputs[1]"), tokens.inputs or (), strict=False))
    own = {name: value for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    return own | signals | text | entered | _geometry(tokens.layout)


def _geometry(layout: TokenLayout) -> dict[str, Tensor]:
    """The tensors of a layout, including its cached properties."""
    found = {}
    for name, value in vars(layout).items():
        if isinstance(value, Tensor):
            found[f"layout.{name}"] = value
    found |= {f"layout.places[{kind.name}]": value for kind, value in layout.places.items()}
    if layout.host is not layout:
        found |= {f"host {name}": value for name, value in _geometry(layout.host).items()}
    return found


def digest(values: Tensor) -> Tensor:
    """(N,) int64 checksums of the rows of ``values`` (N, ...): sums of their words.

    A changed number changes the sum of its row, unless other changes cancel it exactly.
    """
    rows = values.detach().flatten(1) if values.ndim > 1 else values.detach()[..., None]
    rows = rows.contiguous()
    size = rows.element_size()
    # Longer words are fewer, but their size must divide that of the row.
    word = next((n for n in (8, 4, 2, 1) if n >= size and rows.shape[1] * size % n == 0), size)
    return rows.view(_WORDS[word]).sum(1, dtype=torch.int64)


@contextmanager
def untouched(who: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise `ContractError` at the end of the block if one of ``tensors`` has changed.

    Args:
        who: Name of the method, for the message.
        tensors: The tensors by name.
    """
    before = {name: _mark(value) for name, value in tensors.items()}
    yield
    for name, value in tensors.items():
        if not _same(_mark(value), before[name]):
            raise _blame(who, name)


@contextmanager
def watched(who: str, tokens: VisualTokens) -> Iterator[None]:
    """`untouched` for every tensor of ``tokens``; replacing a tensor is an error too."""
    layout = tokens.layout
    for one in (layout, layout.host):
        _ = one.patches, one.is_separator, one.places  # computed now, so that they are watched
    before = shown(tokens)
    with untouched(who, before):
        yield
    after = shown(tokens)
    for name in {**before, **after}:
        known = name in before or "layout." in name  # a layout may compute further properties
        if after.get(name) is not before.get(name, after.get(name)) or not known:
            raise _blame(who, name)


def _mark(value: Tensor) -> int | Tensor:
    return digest(value) if value.is_inference() else value._version


def _same(one: int | Tensor, other: int | Tensor) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _blame(who: str, name: str) -> ContractError:
    what: Any = name.removeprefix("host ")
    return ContractError(
        f"{who} wrote to {what}, which other methods receive as well; work on a copy "
        f"(tokens.features.clone())."
    )
