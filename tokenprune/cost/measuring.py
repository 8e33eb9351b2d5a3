"""Measures the cost of a selection on synthetic tokens of the same shapes.

`Compressor.select` runs once on tokens of the same geometry, widths and dtypes, on the CPU, while
every operator is observed.  The result depends only on shapes and is cached.  It contains:

* FLOPs of matrix products, convolutions and attention (the formulas of `torch.utils.flop_counter`),
  matrix-vector products and `torch.cdist`.  Element-wise work, reductions and sorting do not count,
  as for the decoder.
* Peak bytes of the tensors that ``select`` creates.  Buffers inside an operator are not observed:
  on a GPU the workspace of sorting and matrix products is added.

The projector belongs to the model: neither its FLOPs nor its intermediate tensors are included.
Work inside the vision encoder is done outside ``select``; encoder methods state its cost.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tokenprune.compressor import Compressor
from tokenprune.layout import Kind, TokenLayout
from tokenprune.precision import without_autocast
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

__all__ = ["Cost", "Work", "observed"]

_COLUMNS = 64  # random columns of a synthetic vector; wider vectors repeat them
_CPU = torch.device("cpu")
_INPUTS = Signal("llm_inputs")


@dataclass
class Cost:
    """The cost of a computation.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition are two.
        bytes: Peak memory.
    """

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class _Shape:
    """Sizes and dtype of one tensor of `VisualTokens`."""

    attribute: str
    signal: Signal | None
    sizes: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Work:
    """One selection without the values of its tensors.  Equal instances have equal costs.

    Attributes:
        part: The method.
        full: Layout of the whole image or video, on the CPU.
        by: Class and representation of the method.
        geometry: Modality, shapes and view sizes of the whole image, and the numbers of remaining
            patch tokens and separators.
        shapes: Shapes of all tensors that the method asks for.
        entered: As `VisualTokens.entered`.
        is_clustered: Whether there are `VisualTokens.clusters`.
        stated: FLOPs and bytes that the method states; None for a figure that is measured.
    """

    part: Compressor = field(compare=False, repr=False)
    full: TokenLayout = field(compare=False, repr=False)
    by: tuple[type, str]
    geometry: tuple[Any, ...]
    shapes: tuple[_Shape, ...]
    entered: int | None
    is_clustered: bool
    stated: tuple[float | None, float | None]

    @classmethod
    def of(cls, part: Compressor, tokens: VisualTokens, full: TokenLayout) -> Work:
        """The selection by ``part`` among ``tokens``, which may be on the ``meta`` device.

        Args:
            part: The method.
            tokens: The tokens that it receives.
            full: Layout of the whole image or video, which ``tokens`` are a part of.
        """
        asked = {tokens.found_as(signal) for signal in part.needs}
        seen: list[tuple[str, Signal | None, Tensor]] = [("features", None, tokens.features)]
        seen += [("signals", one, value) for one, value in tokens.signals.items() if one in asked]
        seen += [("text", one, value) for one, value in tokens.text.items() if one in asked]
        if tokens.inputs is not None and _INPUTS in asked:
            seen += [("inputs", None, value) for value in tokens.inputs]
        patches = len(tokens.layout.patches)
        idle = part.retention == 1 or not patches  # `select` does not run
        return cls(
            part=part,
            full=full.host,
            by=(type(part), repr(part)),
            geometry=(
                *(full.modality, full.grid, full.view_shape, full.canvas_shape, full.view_sizes),
                *(full.native, len(full), patches, len(tokens) - patches),
            ),
            shapes=tuple(_Shape(name, one, tuple(v.shape), v.dtype) for name, one, v in seen),
            entered=tokens.entered,
            is_clustered=tokens.clusters is not None,
            stated=(0.0, 0.0) if idle else (part.flops(tokens), part.memory(tokens)),
        )

    def cost(self) -> Cost:
        """The figures that the method states; the others are measured."""
        flops, held = self.stated
        if flops is None or held is None:
            found = _measured(self)
            flops = found.flops if flops is None else flops
            held = found.bytes if held is None else held
        return Cost(flops, held)

    def tokens(self) -> VisualTokens:
        """Synthetic tokens of these shapes, the same in every call.

        The remaining entries are spaced evenly over the whole layout.  In a video, every second
        location has the same content in all frames.
        """
        *_, patches, separators = self.geometry
        left = (self.full.patches, patches), (self.full.separators, separators)
        layout = self.full.take(torch.cat([_even(*some) for some in left]).sort().values)
        _ = layout.patches, layout.is_separator, layout.places, layout.view_sizes  # cached there
        signals = frozenset(one.signal for one in self.shapes if one.signal is not None)
        widths = {name: _COLUMNS for name in ("features", *(one.name for one in signals))}
        drawn = sample_tokens(signals, layout, widths=widths)
        made: dict[str, Any] = {"signals": {}, "text": {}, "inputs": []}
        for one in self.shapes:
            if one.attribute == "features":
                made["features"] = _resized(_still(drawn.features, layout), one)
            elif one.signal is None:
                source = (drawn.inputs or ())[len(made["inputs"])]
                made["inputs"].append(_resized(source, one))
            else:
                source = getattr(drawn, one.attribute)[one.signal]
                made[one.attribute][one.signal] = _resized(source, one)
        features: Tensor = made["features"]
        return VisualTokens(
            layout=layout,
            features=features,
            signals=made["signals"],
            fingerprint=drawn.fingerprint,
            projector=lambda vectors: features.new_zeros(len(vectors), features.shape[1]),
            entered=self.entered,
            text=made["text"],
            inputs=tuple(made["inputs"]) or None,
            clusters=drawn.clusters if self.is_clustered else None,
        )


@lru_cache(maxsize=4096)
def _measured(work: Work) -> Cost:
    with (
        _CPU,
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        without_autocast(_CPU),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the real selection warns
        tokens = work.tokens()
        with observed() as cost:
            work.part.select(tokens)
    return cost


@contextmanager
def observed() -> Iterator[Cost]:
    """While open, add the cost of this thread's operators to the `Cost` that it yields."""
    cost = Cost()
    with _Observer(cost):
        yield cost


class _Observer(TorchDispatchMode):
    """Adds up FLOPs and tracks the storages that operators create."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost, self.held = cost, 0
        self.known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._track(one, is_new=False)
        made = func(*args, **kwargs)
        count = _FLOPS.get(func.overloadpacket)
        if count is not None:
            self.cost.flops += count(*args, **kwargs, out_val=made)
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._track(one, is_new=True)
        self.cost.bytes = max(self.cost.bytes, self.held)
        return made

    def _track(self, values: Tensor, is_new: bool) -> None:
        storage = values.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if is_new else 0
        if key in self.known:
            return

        def released(_: object) -> None:
            self.held -= size
            del self.known[key]

        self.held += size
        self.known[key] = weakref.ref(storage, released)


def _of_vector(matrix: Tensor, vector: Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


def _of_distances(one: Tensor, other: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return 2 * out_val.numel() * one.shape[-1]


_FLOPS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.mv: _of_vector,
    torch.ops.aten.dot: _of_vector,
    torch.ops.aten._euclidean_dist: _of_distances,
    torch.ops.aten._cdist_forward: _of_distances,
}


def _even(index: Tensor, count: int) -> Tensor:
    """``count`` evenly spaced entries of ``index`` (M,), at most M."""
    return index[torch.arange(count) * len(index) // max(count, 1)]


def _resized(values: Tensor, shape: _Shape) -> Tensor:
    """``values`` in these sizes: every dimension is repeated or truncated."""
    for dim, size in enumerate(shape.sizes):
        if size != values.shape[dim]:
            values = values.index_select(dim, torch.arange(size) % values.shape[dim])
    return values.to(shape.dtype)


def _still(features: Tensor, layout: TokenLayout) -> Tensor:
    """``features`` (N, D), the same in all frames at every second location of a video."""
    place = layout.row * layout.view_shape[1] + layout.col
    still = (layout.kind == Kind.FRAME) & (place % 2 == 0)
    return torch.where(still[:, None], features[place.clamp(0, len(features) - 1)], features)
