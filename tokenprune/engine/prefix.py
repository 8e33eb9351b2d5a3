"""Runs the decoder layers in front of every cut once for all compressors of a batch of prompts.

The output of the layers in front of a compressor's first cut does not depend on the compressor.  A
`Prefix` records it when the first `compress` context runs these layers, and repeats it in the
others.  Their KV cache gets the same entries, and the next layer gets the same hidden states, bit
for bit.  Attention rows and keys in front of the same cut are also computed once.  The call of
``model.generate`` does not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenprune.compressor import Compressor, Stage
from tokenprune.engine.cache import CACHE
from tokenprune.engine.decoder import cuts_of, queried_layers, tapped_layers
from tokenprune.engine.guard import Ours, shadowed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from tokenprune.adapter import Adapter

__all__ = [
    "Prefix",
    "Repetition",
    "in_front",
]


Tap = Callable[[int, Tensor, tuple[Tensor, Tensor], Tensor | None], None]


@dataclass(eq=False)
class _Ran:
    """The output of one decoder layer for the prompts.

    Attributes:
        keys, values: (B, kv_heads, S, head_dim) as in the KV cache.
        output: Output of the layer, if a compressor cuts after it.
        tapped: (B, S, D) input of its attention module, if a compressor needs it.
        queries: (B, S, heads * head_dim) that it projected, if a compressor needs them.
    """

    keys: Tensor
    values: Tensor
    output: Any = None
    tapped: Tensor | None = None
    queries: Tensor | None = None


class Prefix:
    """The output of the first decoder layers for one batch of prompts.

    Use a new one for every batch, and share one only between compressors that select the same
    tokens in front of the language model.

    Attributes:
        cuts: Layers in front of which a compressor cuts first.
        taps: Layers whose attention input a compressor needs.
        queried: Layers whose queries a compressor needs.
    """

    def __init__(self, adapter: Adapter, compressors: Iterable[Compressor | None]) -> None:
        """Prepare to share layers between ``compressors``.

        Raises:
            ValueError: They select differently in front of the language model.
        """
        compressors = list(compressors)
        if len({repr(in_front(compressor)) for compressor in compressors}) > 1:
            raise ValueError("these compressors do not give the language model the same tokens")
        self.cuts: set[int] = set()
        self.taps: set[int] = set()
        self.queried: set[int] = set()
        for compressor in compressors:
            inside = cuts_of(adapter, compressor)
            needs = compressor.needs if compressor is not None else frozenset()
            self.cuts |= {min(inside)} if inside else set()
            self.taps |= tapped_layers(needs, inside)
            self.queried |= queried_layers(inside)
        self._ran: dict[int, _Ran] = {}
        self._computed: dict[Hashable, Tensor] = {}
        self._prompts: Sequence[Any] = ()

    def clear(self) -> None:
        """Forget all recorded outputs."""
        self._ran.clear()
        self._computed.clear()

    @contextmanager
    def installed(
        self, layers: Sequence[nn.Module], first_cut: int, tap: Tap
    ) -> Iterator[Repetition]:
        """While open, ``layers`` in front of ``first_cut`` record or repeat their output.

        Args:
            layers: All decoder layers.
            first_cut: Layer in front of which the compressor cuts first, or the number of layers.
            tap: Called with the attention input, rotary embedding and queries of a layer that is
                repeated instead of run.
        """
        run = Repetition(self, min(first_cut, max(self.cuts, default=0)), tap)
        with ExitStack() as stack:
            for index in range(run.until):
                forward = functools.partial(run.layer(index), layers[index].forward)
                stack.enter_context(shadowed(layers[index], "forward", forward))
                if index in self.taps:
                    attention = layers[index].get_submodule("self_attn")
                    hook = Ours(run.record(index))
                    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                if index in self.queried:
                    projection = layers[index].get_submodule("self_attn.q_proj")
                    handle = projection.register_forward_hook(Ours(run.record_queries(index)))
                    stack.callback(handle.remove)
            yield run


def in_front(compressor: Compressor | None) -> tuple[Compressor, ...]:
    """The parts of ``compressor`` that act in front of the language model."""
    parts = compressor.parts() if compressor is not None else ()
    return tuple(part for part in parts if part.stage is not Stage.LLM)


class Repetition:
    """The use of a `Prefix` in one open context: layers in front of ``skip`` are not run again."""

    def __init__(self, prefix: Prefix, until: int, tap: Tap) -> None:
        self.prefix = prefix
        self.until = until
        self.tap = tap
        self.open = False
        self.skip = 0
        self._entered: Tensor | None = None
        self._queries: Tensor | None = None

    def begin(self, cache: Cache | None, prompts: Sequence[Any]) -> None:
        """Begin a forward of the language model.

        Args:
            cache: The KV cache.
            prompts: Input ids, mask and images, which determine the prompts; empty if the forward
                does not run whole prompts with images.

        Raises:
            RuntimeError: The prefix belongs to other prompts.
        """
        fresh = cache is not None and cache.get_seq_length() == 0
        self.open = fresh and bool(prompts) and not torch.is_grad_enabled()
        self.skip = 0
        if not self.open:
            return
        ran = self.prefix._ran
        if not ran:
            self.prefix._prompts = prompts
        elif not _same(prompts, self.prefix._prompts):
            raise RuntimeError("a Prefix belongs to one batch of prompts; make a new one")
        missing = next((at for at in range(self.until) if at not in ran), self.until)
        self.skip = max((cut for cut in self.prefix.cuts if cut <= missing), default=0)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """The result of ``compute``, shared by all contexts that use the same ``key``."""
        if not self.open:
            return compute()
        computed = self.prefix._computed
        if key not in computed:
            computed[key] = compute()
        return computed[key]

    def end(self) -> None:
        """End the forward."""
        self.open, self._entered, self._queries = False, None, None

    def record(self, index: int) -> Callable[..., None]:
        """A hook that records the attention input of layer ``index``."""

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.open and index not in self.prefix._ran:
                self._entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def record_queries(self, index: int) -> Callable[..., None]:
        """A hook that records the queries that layer ``index`` projected."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self.open and index not in self.prefix._ran:
                self._queries = output

        return hook

    def layer(self, index: int) -> Callable[..., Any]:
        """The ``forward`` of layer ``index``, which runs it or repeats its output."""

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            cache: Any = kwargs.get(CACHE)
            if not self.open or cache is None:
                return original(*args, **kwargs)
            ran = self.prefix._ran
            hidden = args[0] if args else kwargs["hidden_states"]
            if index < self.skip:
                before = ran[index]
                cache.update(before.keys, before.values, index)
                if before.tapped is not None:
                    rotary = kwargs["position_embeddings"]
                    self.tap(index, before.tapped, rotary, before.queries)
                return before.output if index + 1 == self.skip else hidden
            output = original(*args, **kwargs)
            held = cache.layers[index]
            # A cache with a sliding window holds only a part of the keys, a quantised one none.
            if index not in ran and held.keys.shape[-2] == hidden.shape[1]:
                left = output if index + 1 in self.prefix.cuts else None
                ran[index] = _Ran(held.keys, held.values, left, self._entered, self._queries)
            self._entered = self._queries = None
            return output

        return forward


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )
