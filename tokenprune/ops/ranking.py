"""Rankings and scores of tokens."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune.layout import TokenLayout, listed, moved
from tokenprune.ops.merging import group_sums
from tokenprune.ops.similarity import ROUNDING

__all__ = [
    "ROUNDING",
    "all_finite",
    "best_per_view",
    "lengths",
    "normalise",
    "outliers",
    "top",
    "top_per_view",
    "with_others",
]


def all_finite(scores: Tensor) -> Tensor:
    """() bool, whether no score is NaN or infinite; it reads the scores once."""
    if not scores.numel():
        return torch.ones((), dtype=torch.bool, device=scores.device)
    low, high = scores.aminmax()  # NaN propagates
    finite: Tensor = 0 * low == 0 * high
    return finite


def top_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[v]`` highest-scored patch tokens of every view ``v``.

    Scores are compared in float32, and the index breaks ties.  The result therefore does not depend
    on the backend, also for bfloat16 scores, which tie often.

    Args:
        layout: Geometry of the N entries.
        scores: (N,) higher is kept first; values at separators are ignored.
        counts: (V,) int64.

    Returns:
        (M,) sorted indices into the N entries, on the device of the scores.  If the counts are not
        on the CPU, the indices are on the CPU, after one synchronisation.
    """
    ranked, kept = _ranked_per_view(layout, scores, counts)
    if counts.device.type != "cpu" or kept.device.type == "cpu":
        return listed(_as_mask(ranked, kept, len(layout)))
    total = sum(map(min, counts.tolist(), layout.view_sizes))
    return ranked[kept.int().argsort(descending=True, stable=True)[:total]].sort().values


def best_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> Tensor:
    """(N,) bool, the entries that `top_per_view` lists, without synchronisation."""
    return _as_mask(*_ranked_per_view(layout, scores, counts), len(layout))


def _ranked_per_view(layout: TokenLayout, scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) indices of the patch tokens, view by view, and (P,) bool, the best ones of each view."""
    layout = layout.to(scores.device)
    # On short vectors, `index_select` takes a quarter of the time of indexing.
    of_patches = scores.index_select(0, layout.patches).float()
    order = of_patches.argsort(descending=True, stable=True)
    ranked = layout.patches.index_select(0, order)
    view = layout.view.index_select(0, ranked)
    grouped = view.argsort(stable=True)
    view = view.index_select(0, grouped)
    sizes = torch.tensor(layout.view_sizes, device="cpu")
    ends = moved(sizes.cumsum(0) - sizes, view.device) + moved(counts, view.device)
    place = torch.arange(len(view), device=view.device)
    return ranked.index_select(0, grouped), place < ends.index_select(0, view)


def _as_mask(index: Tensor, which: Tensor, size: int) -> Tensor:
    """(size,) bool, ``which`` (P,) at ``index`` (P,)."""
    return torch.zeros(size, dtype=torch.bool, device=index.device).scatter_(0, index, which)


def top(scores: Tensor, count: int) -> Tensor:
    """Sorted indices of the ``count`` highest scores (P,); ties go to the earlier entry."""
    values = scores.detach().float()
    if values.device.type == "cpu" and 0 < count < len(values):
        # In linear time; a device would have to wait for the number of ties.
        least = values.kthvalue(len(values) - count + 1).values.numpy()
        kept = values.numpy() >= least
        many = np.count_nonzero(kept) - count
        if many > 0:
            kept[(values.numpy() == least).nonzero()[0][-many:]] = False
        if many >= 0 and not np.isnan(least):  # a NaN counts as the highest score
            return torch.from_numpy(kept.nonzero()[0])
    order = values.argsort(descending=True, stable=True)
    return order[:count].sort().values


def lengths(vectors: Tensor) -> Tensor:
    """(P,) Euclidean norms of ``vectors`` (P, D), computed in float32 without a copy of all."""
    some = vectors.split(1024)
    return torch.cat([torch.linalg.vector_norm(part.float(), dim=-1) for part in some])


def normalise(
    scores: Tensor, view: Tensor, views: int, how: Literal["l2", "minmax", "none"] = "l2"
) -> Tensor:
    """Bring the scores of every view to a common scale.

    Args:
        scores: (P,).
        view: (P,) view of each entry.
        views: Number of views.
        how: ``l2`` divides by the view's Euclidean norm (at least 1e-12), ``minmax`` maps the
            view to [0, 1], ``none`` changes nothing.
    """
    if how == "none":
        return scores
    if how == "l2":
        squares = group_sums(scores.square(), view, views)
        return scores / squares.sqrt().clamp(min=1e-12)[view]
    low = scores.new_full((views,), torch.inf).scatter_reduce(0, view, scores, "amin")
    high = scores.new_full((views,), -torch.inf).scatter_reduce(0, view, scores, "amax")
    return (scores - low[view]) / (high - low).clamp(min=1e-12)[view]


def outliers(scores: Tensor) -> int:
    """The number of ``scores`` (P,) above ``Q3 + 1.5 (Q3 - Q1)``, with interpolated quartiles."""
    low, high = (scores.float().quantile(share) for share in (0.25, 0.75))
    return int((scores > high + 1.5 * (high - low)).sum())


def with_others(
    chosen: Tensor, size: int, preferred: slice, count: int, *, preferred_only: bool = False
) -> Tensor:
    """The ``chosen`` indices (K,), followed by up to ``count`` other indices.

    Of the others, those in ``preferred`` come first, then the rest, both in ascending order.

    Args:
        chosen: Indices in [0, size).
        size: Number of entries.
        preferred: Preferred indices in [0, size).
        count: Maximum number of others.
        preferred_only: Whether only preferred indices may follow.
    """
    rank = torch.ones(size, device=chosen.device)
    rank[preferred] = 2
    rank[chosen] = 0
    if preferred_only:
        count = min(count, int((rank == 2).sum()))
    return torch.cat([chosen, rank.argsort(descending=True, stable=True)[:count]])
