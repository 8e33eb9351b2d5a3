"""The encoder stage: what a method that acts inside the vision tower sees, and how it is run.

A method may hand the tower a smaller view (`EncoderCompressor.grid`), and may merge or drop entries
between attention and MLP of every layer up to the one whose output is used
(`EncoderCompressor.reduce`).  The tower then really works on shorter sequences.  What it returns is
spread over the patches again, so that the model packs it as ever; which patches share a vector
rides along as `VisualTokens.clusters`, and in front of the language model one entry of each
cluster stays.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenprune.allocators import Proportional
from tokenprune.compressor import Compressor, Selection, Stage, warn_about_empty_views
from tokenprune.errors import UserError
from tokenprune.layout import listed
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
    """What becomes of the entries of every view.

    Attributes:
        group: (V, n) int64 place of every entry in what is left, in [0, left), none of them
            empty; -1 drops it: where the model mixes patches, it then counts as zeros.  The entries
            in front of the patches must stay where they are.
        left: How many are left, the same number in all views.
    """

    group: Tensor
    left: int


@dataclass(frozen=True, eq=False)
class EncoderTokens:
    """V views between attention and MLP of one encoder layer.

    Attributes:
        layer: Index of the layer.
        layers: How many layers there are up to the one whose output is used.
        prefix: Entries in front of the patches (a CLS token, or nothing).
        patches: Patches that each view had in front of the first layer.
        target: Entries behind the prefix that each view should have in the end.
        states: (V, n, D) hidden states.
        keys: (V, n, d) keys of the layer, mean over heads, float32.
        size: (V, n) float32 how many patches each entry stands for.
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
    """A method that acts inside the vision tower.  Subclasses override `grid`, `reduce` or both.

    R is the share of patch tokens that enter the language model, as everywhere; a view is to have
    ``floor(R * n)`` vectors of the ``n`` tokens that the model makes of a full view.  `select` then
    keeps one token of each cluster of patches that share a vector: of those in the packed sequence
    the one nearest to their mean place, the earlier of equally near ones.  A cluster that lies in
    the padding of the canvas altogether vanishes with it.  Where more clusters are left than the
    budget allows (padding that merged, a canvas that the model resamples, a target out of reach),
    the largest of each view stay.

    Where the model resamples a canvas or pools video frames, a token belongs to the cluster of the
    patch that its centre lies in, and its features are what the model mixed there.
    """

    stage: ClassVar[Stage] = Stage.ENCODER
    location_aware: ClassVar[bool] = True

    @property
    def fills_budget(self) -> bool:
        return False  # patches that share a vector become one token

    def grid(self, view_shape: tuple[int, int], target: int) -> tuple[int, int]:
        """(rows, columns) of patches that a view is resized to; ``view_shape`` leaves it alone."""
        return view_shape

    def reduce(self, tokens: EncoderTokens) -> Reduction | None:
        """What merges or goes in this layer; None for nothing."""
        return None

    @property
    def by_content(self) -> bool:
        """Whether the image decides which patches share a vector, and so how many are left."""
        return self.reduces and self.retention < 1

    @property
    def reduces(self) -> bool:
        """Whether it does anything between attention and MLP, so that it has to see keys."""
        return type(self).reduce is not EncoderCompressor.reduce

    def bias(self, size: Tensor) -> Tensor | None:
        """(V, n) what is added to the attention logits of every key, given its size, or None.

        The logarithm lets an entry weigh as much as the patches it stands for (proportional
        attention of ToMe, arXiv 2210.09461, equation 1).
        """
        return size.log()

    def select(self, tokens: VisualTokens) -> Selection:
        if tokens.clusters is None:
            raise UserError(
                f"{self.name or type(self).__name__} acts inside the vision tower, but these "
                "features were encoded without it; run it with tokenprune.compress, or give it to "
                "adapter.encode."
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
    """The part of ``compressor`` that changes how the vision tower runs, if there is one."""
    for part in compressor.parts() if compressor is not None else ():
        if isinstance(part, EncoderCompressor) and part.retention < 1:
            return part
    return None
