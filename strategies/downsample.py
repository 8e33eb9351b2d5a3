"""Downsample: the image itself made smaller, so that the vision tower makes fewer tokens of it.

The plainest way to fewer tokens, and a baseline that published methods do not always beat.
"""

from dataclasses import dataclass

from tokenprune.budget import coarse_grid
from tokenprune.encoder import EncoderCompressor
from tokenprune.registry import Card, register


@register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample(EncoderCompressor):
    """Resize the pixels of every view to ``a`` x ``b`` patches, at most ``floor(R * n)`` of them.

    The grid is as square as that allows, as in ``spatial-pool``.  Pixels are resized bilinearly
    with antialiasing, behind the processor's normalisation; position embeddings are interpolated as
    the tower does it (bicubic).  A patch of the full view takes the vector of the coarse one that
    its centre lies in, so that the model packs the view as ever, and one token of each coarse patch
    stays.
    """

    card = Card(paper="Image resized to fewer patches (baseline)")

    def grid(self, view_shape: tuple[int, int], target: int) -> tuple[int, int]:
        return coarse_grid(view_shape, target)
