"""A second device without the hardware: tensors on the CPU that behave as if they were elsewhere.

A tensor "on" the second device carries a mark.  `TwoDevices` watches every call of PyTorch: results
carry the mark of what they were made from, ``.device`` and ``.to`` tell and change it, and a call
that mixes devices raises, as CUDA does.  Values are computed on the CPU, so that results can be
compared to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, OTHER = torch.device("cpu"), torch.device("cuda:1")


def where(tensor: Tensor) -> torch.device:
    """The device a tensor pretends to be on."""
    return OTHER if getattr(tensor, "_elsewhere", False) else CPU


def _put(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        value._elsewhere = device == OTHER  # type: ignore[attr-defined]
    return value


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class TwoDevices(TorchFunctionMode):
    """While open, marks follow the tensors and devices may not be mixed."""

    free = (Tensor.copy_, Tensor.size, Tensor.dim, Tensor.__len__, Tensor.__repr__)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
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
            inside = [args[0], *args[2:]]  # the indices alone may lie on the CPU
        if func not in self.free:
            self._check(func, inside)
        real = [CPU if isinstance(x, torch.device) else x for x in args]
        named = {k: CPU if isinstance(x, torch.device) else x for k, x in kwargs.items()}
        out = func(*real, **named)
        home = wanted or next((where(x) for x in inside if x.ndim), None)
        if home is None:
            home = where(inside[0]) if inside else CPU
        if any(out is x for x in inside):
            # `x.to(y)` gives x itself back where nothing changes; a move must make a new tensor.
            if func is not Tensor.to or where(out) == home:
                return out
            out = out.view_as(out)
        return tree_map(lambda value: _put(value, home), out)

    @staticmethod
    def _check(func: Any, inside: Iterable[Any]) -> None:
        found = {where(x) for x in inside if isinstance(x, Tensor) and x.ndim}
        scalars = {where(x) for x in inside if isinstance(x, Tensor) and not x.ndim}
        if len(found) > 1 or (found == {CPU} and OTHER in scalars):
            raise RuntimeError(f"{func} got tensors on two devices")


class _Align(ModelHook):
    """What accelerate does for a module on a device: move the inputs, inside ``forward``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def move(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        return tree_map(move, args), {
            name: value if name in ("cache", "past_key_values") else tree_map(move, value)
            for name, value in kwargs.items()
        }


def place(module: nn.Module, device: torch.device) -> None:
    """Put a module's weights on a device and have its inputs moved there."""
    for weight in [*module.parameters(), *module.buffers()]:
        _put(weight, device)
    add_hook_to_module(module, _Align(device))
