"""Matching and merging of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.layout import listed, moved
from tokenprune.ops.similarity import most_similar, parts

__all__ = [
    "Matching",
    "assigned",
    "bipartite_matching",
    "group_means",
    "group_sums",
    "merge_weighted",
    "nearest_others",
    "spread",
    "tally",
]


def group_means(vectors: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, D) float32 mean of the vectors (P, D) of every group (P,); 0 for an empty group."""
    sums = group_sums(vectors.float(), group, groups)
    return sums / tally(group, groups).clamp(min=1)[:, None]


def group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(groups, ...) sum of the values (P, ...) of every group (P,), in their order.

    The result is deterministic.  On a GPU the order of `index_add_` varies; `index_put_` sorts
    first.
    """
    sums = values.new_zeros(groups, *values.shape[1:])
    if values.device.type == "cpu":
        return sums.index_add_(0, group, values)
    return sums.index_put_((group,), values, accumulate=True)


def tally(group: Tensor, groups: int) -> Tensor:
    """(groups,) number of entries of each group (P,), like `bincount` without synchronisation."""
    return group.new_zeros(groups).index_add_(0, group, torch.ones_like(group))


class Matching(NamedTuple):
    """The entries that merge in each of V sequences of n, and the index of each in the output.

    Attributes:
        unmerged: (V, a - r) half the index of the even entries that do not merge, in output order;
            ``a`` is the number of even entries.
        source: (V, r) half the index of the even entries that merge, the most similar first.
        target: (V, r) for each of them, (index - 1) / 2 of the odd entry that it merges into.
        group: (V, n) index of every entry in the output of n - r.
    """

    unmerged: Tensor
    source: Tensor
    target: Tensor
    group: Tensor

    @property
    def left(self) -> int:
        """Number of entries of the output."""
        return self.group.shape[1] - self.source.shape[1]


def bipartite_matching(
    vectors: Tensor, count: int, *, class_token: bool = False, distill_token: bool = False
) -> Matching:
    """Match the entries of even index with those of odd index, and select the best pairs.

    Every even entry is matched with the odd entry of the largest cosine.  The ``count`` pairs with
    the largest cosines merge; several may merge into one entry.  A class token (entry 0) never
    merges, and no entry merges into a distillation token (entry 1).

    The output has the unmerged even entries, the most similar first (with a class token, in their
    original order), then all odd entries.  With a distillation token, the first entries of both
    come first (ToMe, arXiv 2210.09461, section 3; official ``tome/merge.py``).

    Args:
        vectors: (V, n, d); compared in float32.
        count: Number of pairs to merge; at most half of the entries that are no special tokens.
        class_token: Whether entry 0 is a class token.
        distill_token: Whether entry 1 is a distillation token.
    """
    views, entries, _ = vectors.shape
    count = max(0, min(count, (entries - class_token - distill_token) // 2))
    unit = F.normalize(vectors.float(), dim=-1)
    sources, targets = unit[:, ::2], unit[:, 1::2]
    even, odd = sources.shape[1], targets.shape[1]
    best, partner = unit.new_zeros(views, even), None
    if odd:
        best, partner = _best_partners(sources, targets, distill_token)
    if class_token:
        best[:, 0] = -torch.inf
    order = best.argsort(dim=-1, descending=True, stable=True)
    source, unmerged = order[:, :count], order[:, count:]
    if class_token:
        unmerged = unmerged.sort(dim=-1).values
    place = torch.arange(entries, device=vectors.device)
    if not count or partner is None:  # without a merge the order does not change
        return Matching(unmerged, source, source, place.expand(views, -1))
    target = partner.gather(1, source)
    alone = even - count
    first, second = place[:alone].clone(), place[alone : alone + odd].clone()
    if distill_token:
        first[1:] += 1
        second[0] = min(alone, 1)
    group = place.repeat(views, 1)
    group[:, 1::2] = second
    group[:, ::2] = (
        torch.empty_like(order)
        .scatter_(1, unmerged, first.expand(views, -1))
        .scatter_(1, source, second[target])
    )
    return Matching(unmerged, source, target, group)


def _best_partners(sources: Tensor, targets: Tensor, distill_token: bool) -> tuple[Tensor, Tensor]:
    """(V, a) largest product of each of ``sources`` with ``targets`` (V, b, d), and its index."""
    found = []
    for part in parts(sources.shape[1], targets.shape[0] * targets.shape[1]):
        cosine = sources[:, part] @ targets.mT
        if distill_token:
            cosine[:, :, :1] = -torch.inf
        found.append(cosine.max(-1))
    best, partner = zip(*found, strict=True)
    return torch.cat(best, 1), torch.cat(partner, 1)


def merge_weighted(
    vectors: Tensor, size: Tensor, group: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Average the entries of each group, weighted by their sizes, and add up the sizes.

    Args:
        vectors: (V, n, C); averaged in float32.
        size: (V, n) weight of each entry.
        group: (V, n) group of each entry, in [0, count); -1 drops it.
        count: Number of groups.  No group may be empty.

    Returns:
        (V, count, C) in the dtype of ``vectors``, and (V, count) sizes.
    """
    slot = torch.where(group < 0, count, group)  # dropped entries form an extra group
    total = size.new_zeros(len(size), count + 1).scatter_add(1, slot, size)
    weighted = vectors.float() * size[..., None]
    sums = weighted.new_zeros(len(size), count + 1, vectors.shape[-1])
    sums = sums.scatter_add(1, slot[..., None].expand_as(weighted), weighted)
    merged = sums[:, :count] / total[:, :count, None]
    return merged.to(vectors.dtype), total[:, :count]


def spread(vectors: Tensor, group: Tensor) -> Tensor:
    """(V, n, ...) the row of each entry's group (V, n) in ``vectors`` (V, m, ...); 0 for -1."""
    index = group.to(vectors.device).reshape(*group.shape, *[1] * (vectors.ndim - 2))
    rows = vectors.gather(1, index.clamp(min=0).expand(*group.shape, *vectors.shape[2:]))
    return rows.masked_fill(index < 0, 0)


def nearest_others(centres: Tensor, keys: Tensor, own: Tensor, count: int) -> Tensor:
    """The indices of the ``count`` most similar ``keys`` (M, D) for each of ``centres`` (C, D).

    Args:
        centres, keys: Vectors of unit length.
        own: (C,) index of each centre among the keys, which is excluded.
        count: Number of keys, at most M - 1.

    Returns:
        (C, count), the most similar first.
    """
    found = []
    for part in parts(len(centres), len(keys)):
        near = centres[part] @ keys.T
        near.scatter_(1, own[part, None], -torch.inf)
        order = near.argsort(dim=-1, descending=True, stable=True)
        found.append(order[:, : min(count, len(keys) - 1)].clone())  # releases the rest
    return torch.cat(found)


def assigned(rest: Tensor, count: int, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide the indices ``rest`` (M,) into evenly spaced targets and entries that merge into them.

    Args:
        rest: Indices into ``keys``, in raster order.
        count: Number of targets, at most M.
        keys: (N, D) vectors of unit length.

    Returns:
        (count,) targets and (M - count,) others, both from ``rest``; and for each of the others,
        (M - count,) the index of the most similar target.
    """
    step = max(1, len(rest) // count)
    other = torch.ones(len(rest), dtype=torch.bool, device="cpu")  # needs no values of the device
    other[: count * step : step] = False
    targets = rest[: count * step : step]
    others = rest[moved(listed(other), rest.device)]
    return targets, others, most_similar(keys[others], keys[targets])
