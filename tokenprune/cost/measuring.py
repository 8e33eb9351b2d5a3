"""The cost of a selection, measured on synthetic tokens of the same shapes.

`Compressor.select` runs once on tokens of the same geometry, widths and dtypes, on the CPU, while
every operator is observed.  The result depends on shapes alone and is cached.  It contains:

* FLOPs of matrix products, convolutions and attention (the formulas of `torch.utils.flop_counter`),
  matrix-vector products and `torch.cdist`.  Element-wise work, reductions and sorting count
  nothing, as in the account of the decoder.
* Bytes of the tensors that ``select`` creates, at their peak.  Buffers inside an operator are not
  seen: on a GPU the workspace of sorting and matrix products comes on top.

The projector belongs to the model: neither its FLOPs nor its intermediate tensors are contained.
Work inside the vision tower happens outside ``select``; its methods state it themselves.
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

_COLUMNS = 64  # random ones of a synthetic vector; wider vectors repeat them
_CPU = torch.device("cpu")
_INPUTS = Signal("llm_inputs")


@dataclass
class Cost:
    """What a piece of work costs.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition are two.
        bytes: The most memory that is held at one time.
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
    """One selection without the values it works on.  Equal works cost the same.

    Attributes:
        part: The strategy.
        full: Layout of the whole image or video, on the CPU.
        by: Class and representation of the strategy.
        geometry: What determines the layout: modality, shapes and view sizes of the whole image,
            and how many patch tokens and separators of it are there.
        shapes: Of every tensor that the strategy asked for.
        entered: As `VisualTokens.entered`.
        is_clustered: Whether there are `VisualTokens.clusters`.
        stated: FLOPs and bytes that the strategy states itself; None where they are measured.
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
            part: The strategy.
            tokens: What it is shown.
            full: Layout of the whole image or video, of which ``tokens`` are what is left.
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
                *(len(full), patches, len(tokens) - patches),
            ),
            shapes=tuple(_Shape(name, one, tuple(v.shape), v.dtype) for name, one, v in seen),
            entered=tokens.entered,
            is_clustered=tokens.clusters is not None,
            stated=(0.0, 0.0) if idle else (part.flops(tokens), part.memory(tokens)),
        )

    def cost(self) -> Cost:
        """What the strategy states, and measurements of what it does not state."""
        flops, held = self.stated
        if flops is None or held is None:
            found = _measured(self)
            flops = found.flops if flops is None else flops
            held = found.bytes if held is None else held
        return Cost(flops, held)

    def tokens(self) -> VisualTokens:
        """Synthetic tokens of these shapes, always the same.

        What is left of the whole layout is spread evenly over it.  In a video every second place
        stands still.
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
    """While open, the operators of this thread add up in the `Cost` that it yields."""
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
    """``values`` in these sizes: every dimension is repeated or cut."""
    for dim, size in enumerate(shape.sizes):
        if size != values.shape[dim]:
            values = values.index_select(dim, torch.arange(size) % values.shape[dim])
    return values.to(shape.dtype)


def _still(features: Tensor, layout: TokenLayout) -> Tensor:
    """``features`` (N, D), at every second place of a video the same in all frames."""
    place = layout.row * layout.view_shape[1] + layout.col
    still = (layout.kind == Kind.FRAME) & (place % 2 == 0)
    return torch.where(still[:, None], features[place.clamp(0, len(features) - 1)], features)
