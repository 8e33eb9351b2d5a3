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
from itertools import pairwise
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
    "mean_query",
    "moved_keys",
    "packed_projections",
    "projections",
    "proportional_mask",
    "rotary_product",
]


_AT_ONCE = {False: 2**19, True: 2**25}
"""Logits of `decoder_mass` at a time: as many as a CPU's cache holds, or as keep a GPU busy."""


@dataclass
class Projections:
    """Queries and keys of one attention module of the vision encoder.

    Attributes:
        heads: Number of heads.
        scale: Factor of the products of queries and keys.
        query: (views, tokens, heads * head_dim).
        key: (views, tokens, heads * head_dim).
        bias: (views, tokens) bias that a method adds to the logits of each key, or None.
        windows: If the views are packed in one row, for each run of tokens that attend to each
            other its length and the number of tokens of its view; else empty.
        rotary: cos and sin (tokens, head_dim) by which the layer rotates queries and keys, or None.
    """

    heads: int
    scale: float
    query: Tensor | None = None
    key: Tensor | None = None
    bias: Tensor | None = None
    windows: tuple[tuple[int, int], ...] = ()
    rotary: tuple[Tensor, Tensor] | None = None

    def split(self) -> tuple[Tensor, Tensor]:
        """Queries and keys as (views, heads, tokens, head_dim) in float32."""
        return self.by_head(self.query), self.by_head(self.key)

    def by_head(self, values: Tensor | None) -> Tensor:
        """Queries or keys as (views, heads, tokens, head_dim) in float32."""
        if values is None:
            raise RuntimeError("the vision encoder was not run while its projections were tapped")
        return rearrange(values, "v n (h d) -> v h n d", h=self.heads).float()

    def rotated(self) -> tuple[Tensor, Tensor]:
        """`split` with the layer's rotation, whose channels ``i`` and ``i + d / 2`` are a pair."""
        query, key = self.split()
        if self.rotary is None:
            return query, key
        cos, sin = (part.float() for part in self.rotary)

        def turned(values: Tensor) -> Tensor:
            left, right = values.chunk(2, -1)
            return values * cos + torch.cat([-right, left], -1) * sin

        return turned(query), turned(key)

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
def packed_projections(tower: nn.Module, attention: nn.Module) -> Iterator[Projections]:
    """While open, keep queries and keys of one attention module of a vision encoder of Qwen-VL.

    All views are one sequence, in which a view attends to itself, or each window of it.

    Args:
        tower: The vision encoder, which is called with ``grid_thw``: frames, rows and columns of
            the patches of every image or video.
        attention: An attention module with a fused projection ``qkv``, ``num_heads`` and
            ``scaling``, which is called with ``cu_seqlens`` and ``position_embeddings``.
    """
    tapped = Projections(heads=int(attention.num_heads), scale=float(attention.scaling))  # type: ignore[arg-type]
    views: list[int] = []

    def note_grid(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        views.clear()
        for frames, rows, cols in kwargs["grid_thw"].tolist():
            views.extend([rows * cols] * frames)

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ends = kwargs["cu_seqlens"].tolist()
        owner, windows, left = iter(views), [], 0
        for length in (end - start for start, end in pairwise(ends)):
            if not left:
                left = view = next(owner)
            windows.append((length, view))
            left -= length
        tapped.windows, tapped.rotary = tuple(windows), kwargs["position_embeddings"]

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        query, key, _ = output.detach()[None].chunk(3, -1)
        tapped.query, tapped.key = query, key

    handles = [
        tower.register_forward_pre_hook(note_grid, with_kwargs=True),
        attention.register_forward_pre_hook(note, with_kwargs=True),
        attention.get_submodule("qkv").register_forward_hook(keep),
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

    `CHUNK` queries are computed at a time; nothing of size N×N is kept.  Queries outside a token's
    window pay it no attention.

    Returns:
        (views, tokens) float32.
    """
    query, key = tapped.rotated()
    if not tapped.windows:
        return _received(tapped, query, key) / (query.shape[1] * query.shape[2])
    lengths = [length for length, _ in tapped.windows]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), tapped.windows, strict=True)
    found = [_received(tapped, *both) / (query.shape[1] * view) for *both, (_, view) in parts]
    return torch.cat(found, -1)


def _received(tapped: Projections, query: Tensor, key: Tensor) -> Tensor:
    """(views, tokens) sum over heads and queries of the attention that every key receives."""
    total = query.new_zeros(query.shape[0], query.shape[2])
    for part in query.split(CHUNK, dim=2):
        logits = part @ key.transpose(-1, -2) * tapped.scale
        total += tapped.softmax(logits).sum((1, 2))
    return total


def _projected(attention: nn.Module, name: str, states: Tensor) -> Tensor:
    """(B, heads, M, head_dim) queries (``q``), keys (``k``) or values (``v``), not rotated."""
    return _by_head(attention, name, attention.get_submodule(f"{name}_proj")(states))


def _by_head(attention: nn.Module, name: str, projected: Tensor) -> Tensor:
    """(B, heads, M, head_dim) of the output (B, M, heads * head_dim) of a projection."""
    dim = int(attention.head_dim)  # type: ignore[arg-type]
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
    query: Tensor | None = None,
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
        query: (B, heads, 1, head_dim) the query; computed from ``hidden`` if None.

    Returns:
        (B, K) float32 softmaxed rows.
    """
    if query is None:
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


def mean_query(attention: nn.Module, hidden: Tensor, seen: Tensor) -> Tensor:
    """(1, heads, 1, head_dim) mean of the queries of ONE prompt, without rotation.

    Without a norm of the queries it is the query of the mean state, because the projection is
    linear.

    Args:
        attention: As in `decoder_row`.
        hidden: (M, D) its input, after the norm.
        seen: (M,) bool, the entries whose queries count.
    """
    if getattr(attention, "q_norm", None) is None:
        mean = (hidden.float() * seen[:, None]).sum(0) / seen.sum()
        return _projected(attention, "q", mean.to(hidden)[None, None])
    parts = zip(hidden.split(CHUNK), seen.split(CHUNK), strict=True)
    sums = [
        (_projected(attention, "q", some[None]).float() * counts[:, None]).sum(2, keepdim=True)
        for some, counts in parts
    ]
    return (torch.stack(sums).sum(0) / seen.sum()).to(hidden)


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
    queries: Tensor | None = None,
) -> Tensor:
    """Maximum over heads of the attention that every key receives, mean over queries of ONE prompt.

    `CHUNK` queries are compared at a time, for as many heads as `_AT_ONCE` allows; nothing of size
    T×K is kept.  The keys of later entries, which no query sees, are left out.

    Args:
        attention, hidden, rotary, keys: As in `decoder_rows`.
        query_slots: (T,) distinct indices of the queries among the M entries.
        visible: Maps (t,) slots to (t, K), as in `decoder_rows`.  No query sees a later entry.
        queries: (M, heads * head_dim) output of ``q_proj``; computed from ``hidden`` if None.

    Returns:
        (K,) float32; 0 without queries.
    """
    if keys is None:
        keys = decoder_keys(attention, hidden[None], (rotary[0][None], rotary[1][None]))[0]
    total = hidden.new_zeros(keys.shape[1], dtype=torch.float32)
    left = len(query_slots)
    if not left:
        return total
    ordered = query_slots.sort().values
    asking = _queries(attention, hidden, rotary, ordered, queries).unflatten(0, (len(keys), -1))
    scaling = float(attention.scaling)  # type: ignore[arg-type]
    for slots, some in zip(ordered.split(CHUNK), asking.split(CHUNK, 2), strict=True):
        left -= len(slots)
        seen = keys.shape[1] - left  # known to the host: each later query is in a later slot
        bias = visible(slots)[:, :seen].float().log()
        total[:seen] += _largest(some, keys[:, :seen], bias, scaling).sum(0)
    return total / len(query_slots)


def _largest(queries: Tensor, keys: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """(t, K) float32 maximum over heads of the softmaxed attention.

    Args:
        queries: (kv_heads, r, t, head_dim) rotated, of r heads a group.
        keys: (kv_heads, K, head_dim) rotated.
        bias: (t, K) float32 logarithms of how often each key counts.
        scaling: Factor of the products of queries and keys.
    """
    at_once = max(1, _AT_ONCE[bias.is_cuda] // (queries.shape[1] * bias.numel()))
    most = torch.zeros_like(bias)
    for some, there in zip(queries.split(at_once), keys.split(at_once), strict=True):
        flat = some.flatten(1, 2)
        # A batched product in bfloat16 on the CPU would copy its operands.
        products = flat[0] @ there[0].T if len(flat) == 1 else flat @ there.transpose(-1, -2)
        logits = torch.add(bias, products.view(-1, *bias.shape).float(), alpha=scaling)
        heads = logits.softmax(-1)
        torch.maximum(most, heads[0] if len(heads) == 1 else heads.amax(0), out=most)
    return most


def _heads(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    visible: Tensor,
    keys: Tensor,
) -> Tensor:
    """(heads, t, K) float32 softmaxed attention of the queries in ``slots`` (t,)."""
    query = _queries(attention, hidden, rotary, slots)
    grouped = rearrange(query, "(g r) t d -> g (r t) d", g=len(keys))
    logits = (grouped @ keys.transpose(-1, -2)).float() * float(attention.scaling)  # type: ignore[arg-type]
    heads = logits.reshape(-1, len(slots), keys.shape[1])
    softmaxed: Tensor = (heads + visible.float().log()).softmax(-1)
    return softmaxed


def _queries(
    attention: nn.Module,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    slots: Tensor,
    projected: Tensor | None = None,
) -> Tensor:
    """(heads, t, head_dim) rotated queries in ``slots`` (t,)."""
    at = rotary[0][slots][None], rotary[1][slots][None]
    if projected is None:
        return _rotated(attention, "q", hidden[slots][None], at)[0]
    return moved_keys(attention, _by_head(attention, "q", projected[slots][None]), at)[0]


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
