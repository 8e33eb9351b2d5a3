"""What a selection does behind its caller's back: waits for the device, and large tensors."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Operators whose result, or its size, the host has to know.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::histc",
    "aten::is_nonzero",
    "aten::equal",
}
HOST = {"tolist", "numpy", "cpu"}


@dataclass
class Watched:
    """What was seen.

    Attributes:
        waits: Name of what made the host wait to how often.
        largest: Elements of the largest tensor that was made.
        attention: Calls of scaled_dot_product_attention.
        fused: Those among them that ran in one fused kernel.
    """

    waits: Counter[str] = field(default_factory=Counter)
    largest: int = 0
    attention: int = 0
    fused: int = 0
    _device: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def on_device(self, some: Iterable[Any]) -> None:
        """Take the tensors of ``some`` for tensors on the GPU."""
        for one in some:
            if isinstance(one, Tensor):
                self._device[one] = True

    def is_on_device(self, one: Any) -> bool:
        return isinstance(one, Tensor) and one in self._device


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Watched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        given, kept = tree_leaves((args, kwargs)), tree_leaves(made)
        before = {_place(one) for one in given if isinstance(one, Tensor)}
        if not any(self.seen.is_on_device(one) for one in given):
            return made
        self.seen.on_device(kept)
        if name in WAITING:
            self.seen.waits[name] += 1
        elif name in ("aten::index", "aten::index_put", "aten::index_put_"):
            # A mask as an index is turned into places first.
            masks = [one for one in args[1] if one is not None and one.dtype == torch.bool]
            self.seen.waits["mask as index"] += len(masks)
        elif name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size"):
            self.seen.waits[name] += 1
        elif name.startswith("aten::_scaled_dot_product") and not name.endswith("_math"):
            self.seen.fused += 1
        for one in kept:
            if isinstance(one, Tensor) and _place(one) not in before:
                self.seen.largest = max(self.seen.largest, one.numel())
        return made


def _place(one: Tensor) -> int:
    """Where its memory is; a view's is that of what it shows."""
    return one.untyped_storage().data_ptr()


class _Methods(TorchFunctionMode):
    def __init__(self, seen: Watched) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST and args and self.seen.is_on_device(args[0]):
            self.seen.waits[name] += 1
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.attention += 1
        return func(*args, **(kwargs or {}))


class watching:
    """While open, what is run is noted in the `Watched` it yields.

    On the CPU nothing waits; what is counted is what would wait on a GPU if the tensors given, and
    all that is computed from them, lay there.
    """

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __enter__(self) -> Watched:
        self.seen = Watched()
        self.seen.on_device(self.given)
        self._modes = _Methods(self.seen), _Operators(self.seen)
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self.seen

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # type: ignore[no-untyped-call]
