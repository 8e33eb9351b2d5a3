"""The encoder stage: the contract of a method that acts inside the vision encoder.

A method may resize a view (`EncoderCompressor.grid`), and may merge or drop entries between
attention and MLP of every layer up to the one whose output is used (`EncoderCompressor.reduce`).
The vision encoder then runs on shorter sequences.  Its output is copied back to all patches, so
that the model packs it as usual.  `VisualTokens.clusters` records which patches share a vector, and
one token of each cluster enters the language model.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenprune.allocators import Proportional
from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Selection, Stage, warn_about_empty_views
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout, listed
from tokenprune.ops.clustering import central_members
from tokenprune.ops.ranking import top_per_view
from tokenprune.tokens import VisualTokens

__all__ = [
    "EncoderCompressor",
    "EncoderTokens",
    "Reduction",
    "encoder_part",
]


class Reduction(NamedTuple):
    """How the n entries of each of V views merge.

    Attributes:
        group: (V, n) int64 index in [0, left) of the entry that each entry merges into; every index
            occurs.  -1 drops an entry: it counts as zeros if the model interpolates or pools
            patches.  The entries in front of the patches must keep their index.
        left: Number of remaining entries, the same in all views.
    """

    group: Tensor
    left: int


@dataclass(frozen=True, eq=False)
class EncoderTokens:
    """V views between attention and MLP of one encoder layer.

    Attributes:
        layer: Index of the layer.
        layers: Number of layers up to the one whose output is used.
        prefix: Number of entries in front of the patches: 1 with a CLS token, otherwise 0.
        patches: Number of patches of each view in front of the first layer.
        target: Number of entries after the prefix that each view should end with.
        states: (V, n, D) hidden states.
        keys: (V, n, d) keys of the layer, mean over heads, float32.
        size: (V, n) float32 number of patches that each entry stands for.
    """

    layer: int
    layers: int
    prefix: int
    patches: int
    target: int
    states: Tensor
    keys: Tensor
    size: Tensor


@dataclass(frozen=True, kw_only=True)
class EncoderCompressor(Compressor, ABC):
    """A method that acts inside the vision encoder.  Subclasses override `grid`, `reduce` or both.

    R is the share of patch tokens that enter the language model, as for every method.  A view
    should end with ``floor(R * n)`` vectors, where ``n`` is the number of tokens of a full view.

    A cluster is the patches that share a vector.  `select` keeps one token of each cluster: the one
    nearest to the mean location of the cluster, and the earlier one of a tie.  A cluster entirely
    inside the canvas padding is dropped with the padding.  If more clusters remain than the budget
    allows (merged padding, a resampled canvas, a target that is not reached), each view keeps its
    largest clusters.

    If the model resamples the canvas or pools video frames, a token belongs to the cluster of the
    patch that contains its centre, and has the interpolated or pooled features.
    """

    stage: ClassVar[Stage] = Stage.ENCODER
    location_aware: ClassVar[bool] = True

    @property
    def fills_budget(self) -> bool:
        return False  # the patches of a cluster become one token

    def grid(self, view_shape: tuple[int, int], target: int) -> tuple[int, int]:
        """(rows, columns) of patches that a view is resized to; ``view_shape`` for no resizing."""
        return view_shape

    def reduce(self, tokens: EncoderTokens) -> Reduction | None:
        """The merges and drops in this layer, or None."""
        return None

    @property
    def by_content(self) -> bool:
        """Whether the number of kept tokens depends on the content of the image."""
        return self.reduces and self.retention < 1

    @property
    def reduces(self) -> bool:
        """Whether the method overrides `reduce`, which needs the keys."""
        return type(self).reduce is not EncoderCompressor.reduce

    def bias(self, size: Tensor) -> Tensor | None:
        """(V, n) bias of the attention logits of every key, given its size; None for no bias.

        The logarithm is proportional attention (ToMe, arXiv 2210.09461, equation 1).
        """
        return size.log()

    def patch_count(self, layout: TokenLayout) -> int | None:
        """For a method that resizes images, from the cells of `grid`; None for one that merges.

        The vision encoder makes more patches of a video frame than the layout has tokens.
        """
        if self.reduces or layout.modality == "video":
            return None
        host = layout.host
        rows, cols = self.grid(host.view_shape, budget(host.view_sizes[0], self.retention))
        row, col, view = (values[host.patches] for values in (host.row, host.col, host.view))
        # The coarse patch in which the centre of each patch lies.
        row = (2 * row + 1) * rows // (2 * host.view_shape[0])
        col = (2 * col + 1) * cols // (2 * host.view_shape[1])
        cells = ((view * rows + row) * cols + col).unique() // (rows * cols)
        there: list[int] = torch.bincount(cells, minlength=host.views).tolist()
        return sum(map(min, Proportional().shares(host, self.retention), there))

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.clusters is None:
            raise UserError(
                f"{self.name or type(self).__name__} acts inside the vision encoder, but these "
                "features were encoded without it; run it with tokenprune.compress, or pass it to "
                "pipe.encode."
            )
        layout, cluster = tokens.layout.host, tokens.clusters.cpu()
        there = listed((cluster >= 0) & ~layout.is_separator)
        found, members = central_members(cluster[there], layout.row[there], layout.col[there])
        chosen = there[found]
        size = cluster.new_full((len(layout),), -1)
        size[chosen] = members
        views = torch.bincount(layout.view[chosen], minlength=layout.views)
        share = Proportional().counts(tokens, size, self.retention)
        keep = top_per_view(layout, size, torch.minimum(share, views))
        warn_about_empty_views(self, layout, keep)
        return Selection(keep)


def encoder_part(compressor: Compressor | None) -> EncoderCompressor | None:
    """The part of ``compressor`` that acts inside the vision encoder at R < 1, or None."""
    for part in compressor.parts() if compressor is not None else ():
        if isinstance(part, EncoderCompressor) and part.retention < 1:
            return part
    return None
