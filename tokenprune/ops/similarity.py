"""Cosines of tokens, a block at a time, so that no table of all pairs exists."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BLOCK",
    "ELSEWHERE",
    "FEWEST",
    "LISTED",
    "ROUNDING",
    "TABLE",
    "Nearest",
    "cosine_distances",
    "distance_of",
    "fits",
    "most_similar",
    "parts",
    "products",
    "tabled",
    "unit",
]


BLOCK = 2**23
"""Entries of the largest block: 32 MiB in float32, all pairs of 2,896 tokens."""

ELSEWHERE = 2**28
"""Entries of the largest table on a device other than a CPU: all pairs of 16,384 tokens, 1 GiB."""

ROUNDING = 2.0**-19
"""Cosine distances up to this value are set to 0.

The float32 distance of equal vectors is a rounding error.  Equal vectors must tie, so that the
index breaks the tie.
"""

FEWEST = 16
"""A product of fewer rows or columns may round differently."""

LISTED = 32
"""Neighbours that `Nearest` keeps of every vector."""

TABLE = 1024
"""Vectors up to which `Nearest` makes a table of all products, which then is faster."""


def fits(rows: int) -> bool:
    """Whether the table of all pairs of ``rows`` fits a `BLOCK`."""
    return rows * rows <= BLOCK


def tabled(vectors: Tensor) -> bool:
    """Whether the table of all pairs of vectors (P, D) may exist as a whole on their device.

    On a device that computes ahead of the host, blocks whose number depends on their content cost
    a synchronisation each, so that larger tables are made there.
    """
    return len(vectors) ** 2 <= (BLOCK if vectors.device.type == "cpu" else ELSEWHERE)


def parts(rows: int, columns: int) -> list[slice]:
    """``rows`` in slices of nearly equal size, each of which times ``columns`` fits a `BLOCK`.

    What is made of a slice is written into a tensor that exists before.  Small tensors that stay
    between large ones that go would keep the memory of the large ones from being used again.
    """
    count = max(1, min(-(-rows * columns // BLOCK), rows // FEWEST))
    edges = [rows * part // count for part in range(count + 1)]
    return [slice(first, end) for first, end in pairwise(edges)]


def unit(vectors: Tensor) -> Tensor:
    """(P, D) float32 the vectors (P, D), scaled to unit length; zeros stay zeros."""
    return F.normalize(vectors.float(), dim=-1)


def most_similar(vectors: Tensor, targets: Tensor) -> Tensor:
    """(P,) index of the one of ``targets`` (T, D) with the largest product with each vector (P, D).

    Ties go to the earlier target.
    """
    index = torch.empty(len(vectors), dtype=torch.int64, device=vectors.device)
    for part in parts(len(vectors), len(targets)):
        index[part] = (vectors[part] @ targets.T).argmax(1)
    return index


def products(left: Tensor, right: Tensor) -> Tensor:
    """(R, C) ``left @ right.T`` of left (R, D) and right (C, D).

    On a CPU, the bits of an entry do not depend on the other rows: equal tokens tie, in whatever
    block they are.  A product of a few rows rounds differently, so that copies of them fill it up.
    """
    return (_filled(left) @ _filled(right).T)[: len(left), : len(right)]


def _filled(rows: Tensor) -> Tensor:
    """``rows`` (P, D), repeated up to `FEWEST`."""
    return rows if len(rows) >= FEWEST else rows.repeat(FEWEST, 1)[:FEWEST]


class Nearest:
    """The largest product of vectors with the members of a set, for one set after the other.

    Sets only shrink: all rows and members of a call are among those of the call before.  Every
    vector has a list of the `LISTED` vectors with the largest products.  If some of them are
    members, no product is computed again.  If none is, the vector is listed anew among the vectors
    of the call.

    The products of a few vectors (`TABLE`) form one table instead.  So do, where they may
    (`tabled`), those on other devices than the CPU, as a look into a list is a synchronisation.

    Args:
        vectors: (P, D).
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        self._table: Tensor | None = None
        if len(vectors) <= TABLE or (vectors.device.type != "cpu" and tabled(vectors)):
            self._table = vectors @ vectors.T
            return
        everything = torch.arange(len(vectors), device=vectors.device)
        self._listed = everything.new_zeros(len(vectors), min(LISTED, len(vectors)))
        self._products = torch.empty_like(self._listed, dtype=vectors.dtype)
        for part in parts(len(vectors), len(vectors)):
            self._list(everything[part], everything)

    def largest(self, rows: Tensor, members: Tensor) -> Tensor:
        """(R,) the largest product of each of ``rows`` (R,) with one of ``members`` (M,).

        Both are indices of vectors, without a common entry.
        """
        if self._table is not None:
            return self._table[rows[:, None], members].amax(1)
        member = torch.zeros_like(self._listed[:, 0], dtype=torch.bool).index_fill_(0, members, 1)
        known = self._products[rows].masked_fill_(~member[self._listed[rows]], -torch.inf).amax(1)
        lost = known.isneginf().nonzero()[:, 0]
        left = torch.cat([rows, members])
        for part in parts(len(lost), len(left)) if len(lost) else []:
            some = lost[part]
            known[some] = self._list(rows[some], left)[:, len(rows) :].amax(1)
        return known

    def _list(self, rows: Tensor, left: Tensor) -> Tensor:
        """List ``rows`` (R,) anew among ``left`` (L,); their products (R, L)."""
        found = products(self._vectors[rows], self._vectors[left])
        best = found.topk(min(self._listed.shape[1], len(left)))
        count = best.values.shape[1]
        self._products[rows, :count] = best.values
        self._listed[rows, :count] = left[best.indices]
        return found


def distance_of(cosine: Tensor) -> Tensor:
    """One minus the cosine; up to `ROUNDING` it is 0.  It never rises with the cosine."""
    return torch.threshold_(1 - cosine, ROUNDING, 0.0)


def cosine_distances(features: Tensor) -> Tensor:
    """(P, P) float32 `distance_of` the cosines of the rows (P, D)."""
    rows = unit(features)
    return distance_of(rows @ rows.T)
