"""A simulated second device: tensors in CPU memory that behave as if they were on a GPU.

A tensor "on" the second device carries a mark.  `SecondDevice` intercepts every call of PyTorch:
results inherit the mark of their inputs, ``.device`` reads it and ``.to`` changes it.  A call that
mixes devices raises, as on CUDA.  Calls that would synchronise the host with the device are
counted.  Values are computed on the CPU, so results can be compared bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CPU", "OTHER", "SecondDevice", "put", "where"]

CPU, OTHER = torch.device("cpu"), torch.device("cuda:1")

# Calls whose result, or the size of it, the host needs: each synchronises.
_SYNCHRONISING = {
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__int__, Tensor.__float__, Tensor.__bool__,
    Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique,
    torch.unique_consecutive, Tensor.bincount, torch.bincount, torch.histc, Tensor.masked_select,
    torch.masked_select, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
}  # fmt: skip
_REPEAT = (torch.repeat_interleave, Tensor.repeat_interleave)


def where(tensor: Tensor) -> torch.device:
    """The simulated device of a tensor."""
    return OTHER if getattr(tensor, "_elsewhere", False) else CPU


def put(value: Any, device: torch.device) -> Any:
    """Mark a tensor as being on ``device``; other values are returned unchanged."""
    if isinstance(value, Tensor):
        value._elsewhere = device == OTHER  # type: ignore[attr-defined]
    return value


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class SecondDevice(TorchFunctionMode):
    """While active, marks follow the tensors and devices must not be mixed.

    Attributes:
        waits: Cause of a synchronisation to how often it occurred.
    """

    free = (Tensor.copy_, Tensor.size, Tensor.dim, Tensor.__len__, Tensor.__repr__)

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return where(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        wanted = next((x for x in given if isinstance(x, torch.device)), None)
        inside = list(_tensors((args, kwargs)))
        if func is Tensor.to:
            if wanted is None:
                wanted = where(args[1] if len(inside) > 1 else args[0])
            inside = inside[:1]
        elif func is Tensor.cpu:
            wanted = CPU
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and where(args[0]) == OTHER:
            inside = [args[0], *args[2:]]  # only the indices may be on the CPU
        if func not in self.free:
            self._check(func, inside)
        if why := _synchronisation(func, args, kwargs, wanted):
            self.waits[why] += 1
        real = [CPU if isinstance(x, torch.device) else x for x in args]
        named = {k: CPU if isinstance(x, torch.device) else x for k, x in kwargs.items()}
        out = func(*real, **named)
        home = wanted or next((where(x) for x in inside if x.ndim), None)
        if home is None:
            home = where(inside[0]) if inside else CPU
        if any(out is x for x in inside):
            # `x.to(y)` returns x itself where nothing changes; a move must make a new tensor.
            if func not in (Tensor.to, Tensor.cpu) or where(out) == home:
                return out
            out = out.view_as(out)
        return tree_map(lambda value: put(value, home), out)

    @staticmethod
    def _check(func: Any, inside: Iterable[Any]) -> None:
        found = {where(x) for x in inside if isinstance(x, Tensor) and x.ndim}
        scalars = {where(x) for x in inside if isinstance(x, Tensor) and not x.ndim}
        if len(found) > 1 or (found == {CPU} and OTHER in scalars):
            raise RuntimeError(f"{func} got tensors on two devices")


def _synchronisation(func: Any, args: Any, kwargs: Any, wanted: torch.device | None) -> str:
    """Why the call synchronises with the second device; empty if it does not."""
    first = args[0] if args else None
    elsewhere = isinstance(first, Tensor) and where(first) == OTHER
    name = getattr(func, "__name__", "")
    if func in (Tensor.to, Tensor.cpu):
        if elsewhere and wanted == CPU:
            return "to the host"
        if not elsewhere and wanted == OTHER and not kwargs.get("non_blocking"):
            return "to the device"
    elif func in (torch.tensor, torch.as_tensor) and wanted == OTHER:
        return "to the device"
    elif elsewhere and func in (Tensor.new_tensor, *_SYNCHRONISING):
        return name
    elif func is torch.where and len(args) == 1:
        return "nonzero" if elsewhere else ""
    elif elsewhere and func in _REPEAT:
        counted = len(args) > 1 and isinstance(args[1], Tensor) and "output_size" not in kwargs
        return name if counted or len(args) == 1 else ""
    elif elsewhere and func in (Tensor.__getitem__, Tensor.__setitem__):
        return _index(args)
    return ""


def _index(args: Any) -> str:
    """Why indexing synchronises: a mask, a scalar on the device, or indices on the host."""
    parts = [part for part in _flat(args[1]) if isinstance(part, Tensor)]
    number = len(args) > 2 and not (isinstance(args[2], Tensor) and args[2].ndim)
    if number and len(parts) == 1 and parts[0].dtype == torch.bool:
        return ""  # filling a mask with a scalar does not need its count
    for part in parts:
        if part.dtype == torch.bool:
            return "mask as index"
        if where(part) == CPU:
            return "index on the host"
        if not part.ndim:
            return "number as index"
    return ""


def _flat(index: Any) -> Iterable[Any]:
    return index if isinstance(index, tuple | list) else (index,)
