"""The decoder layers in front of every cut, run once for all compressors of a batch of prompts.

What runs in front of a compressor's first cut does not depend on the compressor.  A `Prefix` notes
what those layers made of the prompts when one `compress` context ran them, and hands it to the
others: their KV cache gets the same entries, the layer behind gets the same hidden states, to the
last bit; whoever looks at attention or keys in front of the same cut is shown the same.  The call
of ``model.generate`` stays what it is.
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
from tokenprune.engine.decoder import cuts_of, tapped_layers
from tokenprune.engine.guard import Ours, shadowed

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from tokenprune.adapter import Adapter

__all__ = [
    "Prefix",
    "in_front",
]


Tap = Callable[[int, Tensor, tuple[Tensor, Tensor]], None]


@dataclass(eq=False)
class _Ran:
    """What one decoder layer made of the prompts.

    Attributes:
        keys, values: (B, kv_heads, S, head_dim) as the KV cache holds them.
        output: What the layer returned, where a compressor goes on from there.
        tapped: (B, S, D) input of its attention module, where a compressor wants it.
    """

    keys: Tensor
    values: Tensor
    output: Any = None
    tapped: Tensor | None = None


class Prefix:
    """What the first decoder layers made of one batch of prompts.

    Use a new one for every batch, and the same one only with compressors that act alike in front
    of the language model.

    Attributes:
        cuts: Layers in front of which somebody goes on.
        taps: Layers whose attention input somebody wants.
    """

    def __init__(self, adapter: Adapter, compressors: Iterable[Compressor | None]) -> None:
        """Share what ``compressors`` have in common.

        Raises:
            ValueError: They act differently in front of the language model.
        """
        compressors = list(compressors)
        if len({repr(in_front(compressor)) for compressor in compressors}) > 1:
            raise ValueError("these compressors do not show the language model the same tokens")
        self.cuts: set[int] = set()
        self.taps: set[int] = set()
        for compressor in compressors:
            inside = cuts_of(adapter, compressor)
            needs = compressor.needs if compressor is not None else frozenset()
            self.cuts |= {min(inside)} if inside else set()
            self.taps |= tapped_layers(needs, inside)
        self._ran: dict[int, _Ran] = {}
        self._looked: dict[Hashable, tuple[Tensor, list[list[Any]]]] = {}
        self._prompts: Sequence[Any] = ()

    def clear(self) -> None:
        """Forget what the layers made."""
        self._ran.clear()
        self._looked.clear()

    @contextmanager
    def installed(self, layers: Sequence[nn.Module], first_cut: int, tap: Tap) -> Iterator[_Run]:
        """While open, ``layers`` in front of ``first_cut`` note or repeat what they do.

        Args:
            layers: All decoder layers.
            first_cut: Where the compressor cuts first, or the number of layers.
            tap: Called in place of a hook on the attention module of a layer that is not run.
        """
        run = _Run(self, min(first_cut, max(self.cuts, default=0)), tap)
        with ExitStack() as stack:
            for index in range(run.until):
                forward = functools.partial(run.layer(index), layers[index].forward)
                stack.enter_context(shadowed(layers[index], "forward", forward))
                if index in self.taps:
                    attention = layers[index].get_submodule("self_attn")
                    note = Ours(run.note(index))
                    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
                    stack.callback(handle.remove)
            yield run


def in_front(compressor: Compressor | None) -> tuple[Compressor, ...]:
    """The parts of ``compressor`` that act in front of the language model."""
    parts = compressor.parts() if compressor is not None else ()
    return tuple(part for part in parts if part.stage is not Stage.LLM)


class _Run:
    """One open context's use of a `Prefix`: layers before ``skip`` are repeated, not run."""

    def __init__(self, prefix: Prefix, until: int, tap: Tap) -> None:
        self.prefix = prefix
        self.until = until
        self.tap = tap
        self.open = False
        self.skip = 0
        self._entered: Tensor | None = None

    def begin(self, cache: Cache | None, prompts: Sequence[Any]) -> None:
        """A forward of the language model begins.

        Args:
            cache: Its KV cache.
            prompts: Input ids and images; equal ones make an equal prompt.  Empty where the forward
                is not one of the whole prompt.

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

    def once(
        self, key: Hashable, account: Sequence[list[Any]], look: Callable[[], Tensor]
    ) -> Tensor:
        """What ``look`` computes, once for all contexts that look at the same in front of all cuts.

        Args:
            key: What is looked at.
            account: Lists that ``look`` enters its cost into; each context gets the same entries.
            look: Computes it.
        """
        if not self.open:
            return look()
        looked = self.prefix._looked
        if key in looked:
            value, entries = looked[key]
            for one, more in zip(account, entries, strict=True):
                one.extend(more)
            return value
        before = [len(one) for one in account]
        value = look()
        looked[key] = value, [one[at:] for one, at in zip(account, before, strict=True)]
        return value

    def end(self) -> None:
        """The forward is over."""
        self.open, self._entered = False, None

    def note(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.open and index not in self.prefix._ran:
                self._entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    def layer(self, index: int) -> Callable[..., Any]:
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
                    self.tap(index, before.tapped, kwargs["position_embeddings"])
                return before.output if index + 1 == self.skip else hidden
            output = original(*args, **kwargs)
            held = cache.layers[index]
            # Not all of it is in a cache with a sliding window, and none of it in a quantised one.
            if index not in ran and held.keys.shape[-2] == hidden.shape[1]:
                left = output if index + 1 in self.prefix.cuts else None
                ran[index] = _Ran(held.keys, held.values, left, self._entered)
            self._entered = None
            return output

        return forward


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )
