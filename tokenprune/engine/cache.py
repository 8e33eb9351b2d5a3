"""KV-cache layers of a compressed prompt."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.masking_utils import create_causal_mask

from tokenprune.engine.guard import PAGED
from tokenprune.errors import UserError

__all__ = [
    "CACHE",
    "PrunedLayer",
    "adopt",
    "is_pruned",
    "refuse_beyond_window",
    "refuse_paged",
    "settle_layers",
    "window_of",
]


# Name of the KV-cache argument of models and masks, which transformers 5.24 changed.
CACHE = (
    "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
)


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer with fewer entries than tokens of the prompt.

    `generate` reads the uncompressed length, so that ids, masks and position ids include dropped
    tokens.  The mask factory reads the number of stored entries, with the dropped ones as an
    offset, as in a sliding window.  The state of each row is stored in the layer, so that beam
    reordering, batch selection and interleaved generations work.

    Attributes:
        valid: (B, K) bool, the stored entries that are not padding.  It includes entries that
            `expect` announced and the attention module has not written yet.
        dropped: Number of columns dropped so far.
        cut: Number of cuts in front of this layer; layers with the same number share a mask.
        shift: (B, 1) amount subtracted from the position ids of later tokens.
        extra: (B, 1) additional amount subtracted from this layer on, or None.
        sizes: (B, K) how often attention counts each entry of `valid`; None if once.
        replaced: The plain layer that `settle_layers` may restore at the end of the forward.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, layer: DynamicLayer, valid: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.__dict__.update(layer.__dict__)
        self.valid = valid[:, : self._physical()]
        self.dropped = 0
        self.cut = 0
        self.shift = torch.zeros(len(valid), 1, dtype=torch.long, device=valid.device)
        self.extra: Tensor | None = None
        self.sizes: Tensor | None = None
        self.window: int | None = getattr(layer, "sliding_window", None)
        self.replaced: DynamicLayer | None = layer

    @property
    def held(self) -> int:
        """Number of entries that have been written."""
        return self._physical()

    def _physical(self) -> int:
        return _entries(self)

    def expect(self, valid: Tensor, dropped: int = 0, sizes: Tensor | None = None) -> None:
        """Announce the entries of the next `update`; a second call replaces the first.

        Args:
            valid: (B, q) bool, the new entries that are not padding.
            dropped: Number of columns dropped from them since the last announcement.
            sizes: (B, q) how often attention counts each; None if once.
        """
        new, held = valid.to(self.valid.device), self._physical()
        if sizes is not None or self.sizes is not None:
            before = self.valid.new_ones(len(new), held) if self.sizes is None else self.sizes
            coming = torch.ones_like(new) if sizes is None else sizes.to(new.device)
            self.sizes = torch.cat([before[:, :held].float(), coming.float()], dim=1)
        self.valid = torch.cat([self.valid[:, :held], new], dim=1)
        self.dropped += dropped
        refuse_beyond_window(self.dropped + self.valid.shape[1], self.window)

    def mask(self) -> Tensor:
        """(B, dropped + K) bool mask of this layer for `create_causal_mask`."""
        gap = self.valid.new_zeros(len(self.valid), self.dropped)
        return torch.cat([gap, self.valid], dim=1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append entries.  Raises `UserError` unless `expect` announced them."""
        if self._physical() + key_states.shape[-2] != self.valid.shape[1]:
            raise UserError(
                "this KV cache holds a compressed prompt; continue it inside "
                "`with tokenprune.compress(model, ...)`, or start again with a new cache."
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    def get_seq_length(self) -> int:
        """Number of tokens, dropped ones included."""
        return self.dropped + self._physical()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset): the numbers of stored and of dropped entries."""
        return self._physical() + query_length, self.dropped

    def reset(self) -> None:
        """Remove all entries."""
        super().reset()
        self.valid, self.dropped, self.cut = self.valid[:, :0], 0, 0
        self.shift, self.extra, self.sizes = torch.zeros_like(self.shift), None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens."""
        super().crop(tokens_to_remove)
        self.valid = self.valid[:, : self._physical()]
        self.sizes = None if self.sizes is None else self.sizes[:, : self._physical()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows by ``beam_idx``."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        self._rows(
            torch.arange(len(self.valid), device=self.valid.device).repeat_interleave(repeats)
        )

    def _rows(self, index: Tensor) -> None:
        index = index.to(self.valid.device)
        self.valid, self.shift = self.valid[index], self.shift[index]
        self.extra = None if self.extra is None else self.extra[index]
        self.sizes = None if self.sizes is None else self.sizes[index]


def window_of(config: Any) -> int | None:
    """Length of the sliding window of a decoder with this configuration, or None."""
    windows = [getattr(one, "sliding_window", None) for one in DynamicCache(config=config).layers]
    return min((window for window in windows if window is not None), default=None)


def refuse_beyond_window(length: int, window: int | None) -> None:
    """Raise `UserError` if a sequence of ``length`` tokens is longer than a sliding ``window``."""
    if window is not None and length > window:
        raise UserError(
            f"the sequence has {length} tokens, more than the model's sliding window of {window}, "
            "which compression does not support; shorten the prompt or the generation."
        )


def _entries(layer: DynamicLayer) -> int:
    """Number of tokens whose keys ``layer`` holds."""
    return layer.keys.shape[-2] if layer.keys is not None and layer.keys.numel() else 0


def is_pruned(cache: Cache | None) -> bool:
    """Whether ``cache`` holds a compressed prompt."""
    return cache is not None and any(isinstance(layer, PrunedLayer) for layer in cache.layers)


def settle_layers(cache: Cache, *, cut: bool) -> None:
    """Restore the plain layers of a cache at the end of a forward that dropped nothing.

    Args:
        cache: A cache that `adopt` changed.
        cut: Whether the forward dropped or merged any token.
    """
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PrunedLayer) and (plain := layer.replaced) is not None:
            layer.replaced = None
            if not cut and layer.keys is not None and layer.values is not None:
                if type(plain) is DynamicLayer:  # it can reuse the tensors without a copy
                    names = {"keys", "values", "dtype", "device", "is_initialized"}
                    plain.__dict__.update({k: v for k, v in vars(layer).items() if k in names})
                else:
                    held = _entries(plain)
                    plain.update(layer.keys[:, :, held:], layer.values[:, :, held:])
                cache.layers[index] = plain


def refuse_paged(cache: Any) -> None:
    """Raise `UserError` for a KV cache without layers, such as a paged one."""
    if cache is not None and not hasattr(cache, "layers"):
        raise UserError(f"a {type(cache).__name__} is not a KV cache of layers: {PAGED}")


def adopt(cache: Cache, valid: Tensor, layers: int) -> list[PrunedLayer]:
    """Replace the layers of ``cache`` in place by `PrunedLayer`; their entries stay.

    Args:
        cache: A dynamic cache.
        valid: (B, K) bool, the current entries that are not padding; a layer with fewer entries
            uses the first of them.
        layers: Number of decoder layers, for caches that create their layers lazily.

    Raises:
        UserError: The cache has a layer that is not dynamic, such as a static or quantised one.
    """
    while len(cache.layers) < layers:
        cache.layers.append(DynamicLayer())
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or cache.is_compileable:
            raise UserError(
                f"compression works with dynamic KV caches, got a layer of type "
                f"{type(layer).__name__}; use cache_implementation='dynamic' or DynamicCache()."
            )
        if not isinstance(layer, PrunedLayer):
            refuse_beyond_window(valid.shape[1], getattr(layer, "sliding_window", None))
            device = valid.device if layer.keys is None else layer.keys.device
            cache.layers[index] = PrunedLayer(layer, valid.to(device))
    return cache.layers  # type: ignore[return-value]
