"""A strategy must not write to what it is shown: other methods look at the same tensors.

`untouched` compares before and after: which tensors there are, and PyTorch's version counter of
each, which every in-place operation raises, also one on a view.  That costs no look at the numbers
and no wait for the device.  Tensors made in `torch.inference_mode` have no counter; of those the
numbers are compared (`digest`).

No counter sees a write through ``.data``, through numpy, or through a pointer.  Where methods share
encodings, `tokenprune.experiments.compare.shared_encodings` compares the numbers as well.  The
weights of the model, which a strategy can reach through `VisualTokens.projector`, are not watched.
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
    """Every tensor that a strategy can get at, by what it is called."""
    signals = {f"signals[{signal.name}, {signal.layer}]": v for signal, v in tokens.signals.items()}
    text = {f"text[{signal.name}, {signal.layer}]": v for signal, v in tokens.text.items()}
    entered = dict(zip(("inputs[0]", "inputs[1]"), tokens.inputs or (), strict=False))
    own = {name: value for name, value in vars(tokens).items() if isinstance(value, Tensor)}
    return own | signals | text | entered | _geometry(tokens.layout)


def _geometry(layout: TokenLayout) -> dict[str, Tensor]:
    """The tensors of a layout, those it computes when they are first asked for included."""
    found = {}
    for name, value in vars(layout).items():
        if isinstance(value, Tensor):
            found[f"layout.{name}"] = value
    found |= {f"layout.places[{kind.name}]": value for kind, value in layout.places.items()}
    if layout.host is not layout:
        found |= {f"host {name}": value for name, value in _geometry(layout.host).items()}
    return found


def digest(values: Tensor) -> Tensor:
    """(N,) int64 sums of the bits of every row of ``values`` (N, ...).

    Whoever changes a number changes the sum of its row, unless other changes make up for it to the
    last bit.
    """
    rows = values.detach().flatten(1) if values.ndim > 1 else values.detach()[..., None]
    rows = rows.contiguous()
    size = rows.element_size()
    # Longer words are fewer; they must fill the row.
    word = next((n for n in (8, 4, 2, 1) if n >= size and rows.shape[1] * size % n == 0), size)
    return rows.view(_WORDS[word]).sum(1, dtype=torch.int64)


@contextmanager
def untouched(who: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise `ContractError` at the end of the block if one of ``tensors`` was written to.

    Args:
        who: Who gets the blame.
        tensors: By what they are called.
    """
    before = {name: _mark(value) for name, value in tensors.items()}
    yield
    for name, value in tensors.items():
        if not _same(_mark(value), before[name]):
            raise _blame(who, name)


@contextmanager
def watched(who: str, tokens: VisualTokens) -> Iterator[None]:
    """`untouched` for all that ``tokens`` shows; nothing may be put in its place either."""
    layout = tokens.layout
    for one in (layout, layout.host):
        _ = one.patches, one.is_separator, one.places  # there before, so that they are watched
    before = shown(tokens)
    with untouched(who, before):
        yield
    after = shown(tokens)
    for name in {**before, **after}:
        known = name in before or "layout." in name  # a layout may work out more of itself
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
        f"{who} wrote to {what}, which other methods are shown as well; work on a copy "
        f"(tokens.features.clone())."
    )
