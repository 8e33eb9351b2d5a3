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

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import ContractError
from tokenprune.layout import Kind
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = ["digest", "shown", "untouched", "watched"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def shown(tokens: VisualTokens) -> dict[str, Tensor]:
    """Every tensor that a method can reach, by name."""
    return {_text(*name): value for *name, value in _reached(tokens)}


def _reached(tokens: VisualTokens) -> list[tuple[Any, ...]]:
    """Every tensor that a method can reach, after the parts of its name."""
    found: list[tuple[Any, ...]] = [
        ("", name, value) for name, value in vars(tokens).items() if isinstance(value, Tensor)
    ]
    found += [("signals", signal, value) for signal, value in tokens.signals.items()]
    found += [("text", signal, value) for signal, value in tokens.text.items()]
    found += [("inputs", place, value) for place, value in enumerate(tokens.inputs or ())]
    layout = tokens.layout
    for prefix, one in (("layout", layout), ("host layout", layout.host)):
        if prefix == "layout" or one is not layout:
            found += [
                (prefix, n, value) for n, value in vars(one).items() if isinstance(value, Tensor)
            ]
            found += [(prefix, kind, value) for kind, value in one.places.items()]
    return found


def _text(group: str, name: object) -> str:
    """The name of a tensor in messages, of its parts."""
    if isinstance(name, Signal):
        return f"{group}[{name.name}, {name.layer}]"
    if isinstance(name, Kind):
        return f"{group}.places[{name.name}]"
    if isinstance(name, int):
        return f"{group}[{name}]"
    return f"{group}.{name}" if group else str(name)


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
    before = _marks(tensors.values())
    yield
    for name, mark, now in zip(tensors, before, _marks(tensors.values()), strict=True):
        if not _same(now, mark):
            raise _blame(who, name)


@contextmanager
def watched(who: str, tokens: VisualTokens) -> Iterator[None]:
    """`untouched` for every tensor of ``tokens``; replacing a tensor is an error too."""
    layout = tokens.layout
    for one in (layout, layout.host):
        _ = one.patches, one.is_separator, one.places  # computed now, so that they are watched
    before = _reached(tokens)
    values = [value for *_, value in before]
    marks = _marks(values)
    yield
    after = _reached(tokens)
    same = len(before) == len(after) and all(map(is_, values, [value for *_, value in after]))
    if not same or not all(map(_same, _marks(values), marks)):
        _compare(who, before, marks, after)


def _compare(
    who: str, before: list[tuple[Any, ...]], marks: list[int | Tensor], after: list[tuple[Any, ...]]
) -> None:
    """Raise `ContractError` unless all that is new are further properties of a layout."""
    known = {
        _text(*name): (value, mark) for (*name, value), mark in zip(before, marks, strict=True)
    }
    found = {_text(*name): value for *name, value in after}
    for name in found:
        if name not in known and "layout." not in name:
            raise _blame(who, name)
    for name, (value, mark) in known.items():
        if name not in found or found[name] is not value or not _same(_marks([value])[0], mark):
            raise _blame(who, name)


def _marks(values: Iterable[Tensor]) -> list[int | Tensor]:
    """What changes when the values do."""
    return [digest(value) if value.is_inference() else value._version for value in values]


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
