"""Computes attention rows, keys and values for signals, at O(N·d), under any attention kernel.

Forward hooks read queries and keys of the vision encoder from its projections.  Those of a decoder
layer are read from its KV cache or projected again.  One row costs a thousandth of the layer.  No
module is switched to eager attention.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenprune.units import CHUNK

__all__ = [
    "CHUNK",
    "Projections",
    "attention_received",
    "cls_heads",
    "cls_row",
    "decoder_keys",
    "decoder_mass",
    "decoder_row",
    "decoder_rows",
    "decoder_values",
    "first_arguments",
    "head_rows",
    "key_vectors",
    "moved_keys",
    "projections",
    "proportional_mask",
    "rotary_product",
]


@dataclass
class Projections:
    """Queries and keys of one attention module of the vision encoder.

    Attributes:
        heads: Number of heads.
        scale: Factor of the products of queries and keys.
        query: (views, tokens, heads * head_dim).
        key: (views, tokens, heads * head_dim).
        bias: (views, tokens) bias that a method adds to the logits of each key, or None.
    """

    heads: int
    scale: float
    query: Tensor | None = None
    key: Tensor | None = None
    bias: Tensor | None = None

    def split(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as (views, heads, tokens, head_dim) in float32."""
        return self.by_head(self.query), self.by_head(self.key)

    def by_head(self, values: Tensor | None) -> Tensor:
        """Queries or keys as (views, heads, tokens, head_dim) in float32."""
        if values is None:
            raise RuntimeError("the vision encoder was not run while its projections were tapped")
        return rearrange(values, "v n (h d) -> v h n d", h=self.heads).float()

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax of logits (views, ..., tokens), after adding `bias`."""
        if self.bias is not None:
            shape = len(logits), *[1] * (logits.ndim - 2), -1
            logits = logits + self.bias.reshape(shape).to(logits)
        return logits.softmax(-1)

    def joint(self) -> Projections:
        """The same with all heads joined into one, scaled by the root of the full width."""
        width = self.heads if self.key is None else self.key.shape[-1]
        return replace(self, heads=1, scale=width**-0.5)


@contextmanager
def projections(attention: nn.Module) -> Iterator[Projections]:
    """While open, keep the outputs of ``attention.q_proj`` and ``attention.k_proj``.

    Args:
        attention: An attention module with ``q_proj``, ``k_proj``, ``num_heads`` and ``scale``,
            such as those of CLIP and SigLIP in ``transformers``.  If it normalises queries and
            keys over the full width (``q_norm``, ``k_norm``, as InternVL does), these outputs.
    """
    tapped = Projections(heads=int(attention.num_heads), scale=float(attention.scale))  # type: ignore[arg-type]

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: setattr(tapped, name, output.detach())

    last = "norm" if hasattr(attention, "q_norm") else "proj"
    handles = [
        attention.get_submodule(f"q_{last}").register_forward_hook(keep("query")),
        attention.get_submodule(f"k_{last}").register_forward_hook(keep("key")),
    ]
    try:
        yield tapped
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def first_arguments(module: nn.Module) -> Iterator[list[Tensor]]:
    """While open, keep the first argument of each call of ``module`` by this thread."""
    seen: list[Tensor] = []
    owner = threading.get_ident()  # a method in another thread may call the module too

    def note(_: nn.Module, args: Any) -> None:
        if threading.get_ident() == owner:
            seen.append(args[0].detach())

    handle = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def key_vectors(tapped: Projections) -> Tensor:
    """Keys of every token, mean over heads, unscaled.

    Returns:
        (views, tokens, head_dim) float32; the full width for `Projections.joint`.
    """
    return tapped.by_head(tapped.key).mean(1)  # `split` would also copy the queries to float32


@contextmanager
def head_rows(head: nn.Module) -> Iterator[list[Tensor]]:
    """While open, keep the attention of a pooling head over the patches, mean over heads.

    Args:
        head: The `torch.nn.MultiheadAttention` of a pooling head (``head.attention`` of SigLIP in
            ``transformers``), which returns its row of attention weights.

    Yields:
        A list of (views, patches) tensors in float32, one for each call.
    """
    rows: list[Tensor] = []
    handle = head.register_forward_hook(
        lambda module, args, output: rows.append(output[1].detach()[:, 0].float())
    )
    try:
        yield rows
    finally:
        handle.remove()


def cls_row(tapped: Projections, *, softmax: bool) -> Tensor:
    """Row of the CLS token (entry 0) over all other entries, mean over heads.

    Args:
        tapped: Queries and keys of one attention layer.
        softmax: Whether to normalise over all keys, CLS included; otherwise the scaled products.

    Returns:
        (views, tokens - 1) float32.
    """
    return cls_heads(tapped, softmax=softmax).mean(1)[:, 1:]


def cls_heads(tapped: Projections, *, softmax: bool) -> Tensor:
    """Row of the CLS token (entry 0) over all entries, (views, heads, tokens) float32.

    Args:
        tapped, softmax: As in `cls_row`.
    """
    one = tapped if tapped.query is None else replace(tapped, query=tapped.query[:, :1])
    query, key = one.split()  # copies only one query to float32
    row = torch.einsum("vhd,vhnd->vhn", query[:, :, 0], key) * tapped.scale
    return tapped.softmax(row) if softmax else row


def attention_received(tapped: Projections) -> Tensor:
    """Attention that every token receives, mean over heads and over all queries.

    `CHUNK` queries are computed at a time; nothing of size N×N is kept.

    Returns:
        (views, tokens) float32.
    """
    query, key = tapped.split()
    total = query.new_zeros(query.shape[0], query.shape[2])
    for part in query.split(CHUNK, dim=2):
        logits = part @ key.transpose(-1, -2) * tapped.scale
        total += tapped.softmax(logits).sum((1, 2))
    return total / (query.shape[1] * query.shape[2])


def _projected(attention: nn.Module, name: str, states: Tensor) -> Tensor:
    """(B, heads, M, head_dim) queries (``q``), keys (``k``) or values (``v``), not rotated."""
    dim = int(attention.head_dim)  # type: ignore[arg-type]
    projected = attention.get_submodule(f"{name}_proj")(states)
    heads = rearrange(projected, "b n (h d) -> b n h d", d=dim)
    norm = getattr(attention, f"{name}_norm", None)
    made: Tensor = (heads if norm is None else norm(heads)).transpose(1, 2)
    return made


def _rotated(
    attention: nn.Module, name: str, states: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """(B, heads, M, head_dim) queries (``q``) or keys (``k``) of a decoder layer, rotated."""
    return moved_keys(attention, _projected(attention, name, states), rotary)


def decoder_keys(attention: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """(B, kv_heads, M, head_dim) rotated keys, as a KV cache holds them.

    Args:
        attention: As in `decoder_row`.
        hidden: (B, M, D) its input, after the norm.
        rotary: cos and sin, (B or 1, M, head_dim).

    Returns:
        Keys in the dtype of the model.
    """
    cos, sin = (part.expand(len(hidden), -1, -1) for part in rotary)
    return _rotated(attention, "k", hidden, (cos, sin))


def decoder_values(attention: nn.Module, hidden: Tensor) -> Tensor:
    """(B, kv_heads, M, head_dim) values, as a KV cache holds them.

    Args:
        attention: As in `decoder_row`.
        hidden: (B, M, D) its input, after the norm.

    Returns:
        Values in the dtype of the model.
    """
    return _projected(attention, "v", hidden)


def moved_keys(attention: nn.Module, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (B, kv_heads, M, head_dim) rotated to other position ids.

    Args:
        attention: As in `decoder_row`.
        keys: Rotated keys of a KV cache.
        rotary: cos and sin of the difference of position ids, (B, 1 or M, head_dim).
    """
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    rotated: Tensor = rotate(keys, keys[:, :0], *rotary)[0]  # the function takes queries and keys
    return rotated


def decoder_row(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    query_slots: Tensor,
    visible: Tensor,
    keys: Tensor | None = None,
    past: Tensor | None = None,
) -> Tensor:
    """Attention that one query in each row of the batch pays to every key, mean over heads.

    Args:
        attention: A Llama-like attention module of ``transformers``: ``q_proj``, ``k_proj``,
            ``v_proj``, optionally with grouped-query attention, ``q_norm`` and ``k_norm``.
        hidden: (B, M, D) its input, after the norm.
        rotary: cos and sin, (B or 1, M, head_dim).
        query_slots: (B,) index of the query among the M entries.
        visible: (B, K) bool, the keys that the query attends to, or how often each key counts;
            K >= M if cached keys are in front.
        keys: (B, kv_heads, K, head_dim) rotated keys of the KV cache; computed from ``hidden`` if
            None.
        past: (B, kv_heads, K - M, head_dim) cached keys in front of the computed ones.

    Returns:
        (B, K) float32 softmaxed rows.
    """
    batch = torch.arange(len(hidden), device=hidden.device)
    cos, sin = (part.expand(len(hidden), -1, -1) for part in rotary)
    asking = hidden[batch, query_slots][:, None]
    at = (cos[batch, query_slots][:, None], sin[batch, query_slots][:, None])
    query = _rotated(attention, "q", asking, at)
    if keys is None:
        keys = decoder_keys(attention, hidden, rotary)
        if past is not None:
            keys = torch.cat([past, keys], dim=2)
    # The query heads of a group become rows of one product, so that no key is repeated.
    grouped = rearrange(query, "b (g r) 1 d -> b g r d", g=keys.shape[1])
    logits = (grouped @ keys.transpose(-1, -2)).float() * float(attention.scaling)  # type: ignore[arg-type]
    row: Tensor = (logits + visible.float().log()[:, None, None]).softmax(-1).mean((1, 2))
    return row


def decoder_rows(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    query_slots: Tensor,
    visible: Tensor,
    keys: Tensor | None = None,
    *,
    by_head: bool = False,
) -> Tensor:
    """Attention that several queries of ONE prompt pay to every key, mean over heads.

    `CHUNK` queries are computed at a time, O(T·N·d) in total.

    Args:
        attention: As in `decoder_row`.
        hidden: (M, D) its input, after the norm.
        rotary: cos and sin, (M, head_dim).
        query_slots: (T,) indices of the queries among the M entries.
        visible: (T, K) bool, the keys that each query attends to, or how often each key counts;
            K >= M if cached keys are in front.
        keys: (kv_heads, K, head_dim) rotated keys of the KV cache; computed from ``hidden`` if
            None.
        by_head: Whether to return every head instead of the mean.

    Returns:
        (T, K) float32 softmaxed rows, or (T, K, heads).
    """
    if keys is None:
        keys = decoder_keys(attention, hidden[None], (rotary[0][None], rotary[1][None]))[0]

    def rows(slots: Tensor, allowed: Tensor) -> Tensor:
        heads = _heads(attention, hidden, rotary, slots, allowed, keys)
        return heads.movedim(0, -1) if by_head else heads.mean(0)

    return torch.cat([*map(rows, query_slots.split(CHUNK), visible.split(CHUNK))])


def rotary_product(rotary: tuple[Tensor, Tensor], query_slots: Tensor) -> Tensor:
    """Product of a query and a key of ones after rotation: ``1ᵀ R(i - j) 1 / sqrt(d)``.

    Args:
        rotary: cos and sin, (M, head_dim).
        query_slots: (T,) indices of the queries among the M entries.

    Returns:
        (T, M) float32.
    """
    cos, sin = (part.float() for part in rotary)
    (left, right), (low, high) = cos.chunk(2, -1), sin.chunk(2, -1)
    ones = torch.cat([left - low, right + high], -1)
    result: Tensor = ones[query_slots] @ ones.T / ones.shape[-1] ** 0.5
    return result


def decoder_mass(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    query_slots: Tensor,
    visible: Callable[[Tensor], Tensor],
    keys: Tensor | None = None,
) -> Tensor:
    """Maximum over heads of the attention that every key receives, mean over queries of ONE prompt.

    `CHUNK` queries are computed at a time; nothing of size T×K is kept.

    Args:
        attention, hidden, rotary, query_slots, keys: As in `decoder_rows`.
        visible: Maps (t,) slots to (t, K), as in `decoder_rows`.

    Returns:
        (K,) float32; 0 without queries.
    """
    if keys is None:
        keys = decoder_keys(attention, hidden[None], (rotary[0][None], rotary[1][None]))[0]
    total = hidden.new_zeros(keys.shape[1], dtype=torch.float32)
    for slots in query_slots.split(CHUNK):
        total += _heads(attention, hidden, rotary, slots, visible(slots), keys).amax(0).sum(0)
    return total / max(len(query_slots), 1)


def _heads(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    visible: Tensor,
    keys: Tensor,
) -> Tensor:
    """(heads, t, K) float32 softmaxed attention of the queries in ``slots`` (t,)."""
    at = rotary[0][slots][None], rotary[1][slots][None]
    query = _rotated(attention, "q", hidden[slots][None], at)
    grouped = rearrange(query, "1 (g r) t d -> g (r t) d", g=len(keys))
    logits = (grouped @ keys.transpose(-1, -2)).float() * float(attention.scaling)  # type: ignore[arg-type]
    heads = logits.reshape(query.shape[1], len(slots), keys.shape[1])
    softmaxed: Tensor = (heads + visible.float().log()).softmax(-1)
    return softmaxed


def proportional_mask(
    mask: Tensor | None, sizes: Tensor, queries: int, dtype: torch.dtype
) -> Tensor:
    """An attention mask for a decoder layer that counts key ``j`` ``sizes[j]`` times.

    Args:
        mask: The model's own mask (B or 1, 1, q, K): bool or None (causal) for ``sdpa``, additive
            for ``eager``.
        sizes: (B, K), at least 1.
        queries: Number q of queries.
        dtype: Dtype of the hidden states.

    Returns:
        (B, 1, q, K) additive mask: ``log(sizes)`` where a query attends, elsewhere the minimum of
        the dtype.
    """
    bias = sizes.log().to(dtype)[:, None, None]
    if mask is None:
        keys = sizes.shape[1]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=sizes.device).tril(keys - queries)
    if mask.dtype == torch.bool:
        return bias.expand(-1, -1, queries, -1).masked_fill(~mask, torch.finfo(dtype).min)
    return mask + bias
