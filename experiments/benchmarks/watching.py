"""Count the synchronisations of a selection and the size of its largest tensor."""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenprune.compressor import Compressor
from tokenprune.experiments.benchmarks.second_device import OTHER, SecondDevice, put
from tokenprune.tokens import VisualTokens


@dataclass
class Watched:
    """The operations recorded by `watching`.

    Attributes:
        largest: Elements of the largest new tensor.
        attention: Calls of scaled_dot_product_attention.
        fused: How many of these calls ran in one fused kernel.
    """

    largest: int = 0
    attention: int = 0
    fused: int = 0


def host_waits(part: Compressor, tokens: VisualTokens) -> Counter[str]:
    """Causes of synchronisations while ``part`` selects, each with its count.

    For tokens on a GPU, CUDA reports them, without a cause.  Tokens on the CPU are moved to a
    simulated device (`SecondDevice`).
    """
    if tokens.features.device.type == "cuda":
        count = cuda_waits(lambda: part(tokens))
        return Counter({"synchronisation": count} if count else {})
    device = SecondDevice()
    with device:
        there = _elsewhere(tokens)
        device.waits.clear()
        part(there)
    return device.waits


def cuda_waits(work: Callable[[], Any]) -> int:
    """Number of synchronisations with the GPU in ``work``, as CUDA reports them."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(one.message) for one in caught)


def _elsewhere(tokens: VisualTokens) -> VisualTokens:
    """The same tokens on the second device; the host knows their geometry."""
    for weight in getattr(tokens.projector, "parameters", tuple)():
        put(weight, OTHER)
    return replace(
        tokens,
        features=tokens.features.to(OTHER),
        layout=tokens.layout.to(OTHER),
        signals={name: value.to(OTHER) for name, value in tokens.signals.items()},
        text={name: value.to(OTHER) for name, value in tokens.text.items()},
        inputs=tokens.inputs and (tokens.inputs[0].to(OTHER), tokens.inputs[1].to(OTHER)),
    )


class _Operators(TorchDispatchMode):
    def __init__(self, seen: Watched) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        given, kept = tree_leaves((args, kwargs)), tree_leaves(made)
        before = {_place(one) for one in given if isinstance(one, Tensor)}
        if name.startswith("aten::_scaled_dot_product") and not name.endswith("_math"):
            self.seen.fused += 1
        for one in kept:
            if isinstance(one, Tensor) and _place(one) not in before:
                self.seen.largest = max(self.seen.largest, one.numel())
        return made


def _place(one: Tensor) -> int:
    """The address of its storage, which a view shares with its base."""
    return one.untyped_storage().data_ptr()


class _Methods(TorchFunctionMode):
    def __init__(self, seen: Watched) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.attention += 1
        return func(*args, **(kwargs or {}))


class watching:
    """While open, it records operations in the `Watched` that it yields."""

    def __enter__(self) -> Watched:
        self.seen = Watched()
        self._modes = _Methods(self.seen), _Operators(self.seen)
        for mode in self._modes:
            mode.__enter__()  # type: ignore[no-untyped-call]
        return self.seen

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)  # type: ignore[no-untyped-call]
