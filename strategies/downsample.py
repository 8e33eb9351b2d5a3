"""Downsample: a smaller image, of which the vision encoder makes fewer tokens.

A baseline that published methods do not always beat.
"""

from dataclasses import dataclass

from tokenprune.encoder import EncoderCompressor
from tokenprune.registry import Card, register


@register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample(EncoderCompressor):
    """Resize the pixels of every view to ``a`` x ``b`` patches, at most ``floor(R * n)`` of them.

    Among the grids that stretch the view by at most a factor of two, the one with the most patches
    is used; among equals, the one that stretches the view least.  Pixels are resized bilinearly
    with antialiasing, after the processor's normalisation.  Position embeddings are interpolated as
    the vision encoder does it (bicubic).  Each patch of the full view takes the vector of the
    coarse patch in which its centre lies, so that the model packs the view as usual.  One token of
    each coarse patch is kept.
    """

    card = Card(paper="Image resized to fewer patches (baseline)")

    def grid(self, view_shape: tuple[int, int], target: int) -> tuple[int, int]:
        height, width = view_shape

        def worth(grid: tuple[int, int]) -> tuple[int, float]:
            tall, wide = grid[0] * width, grid[1] * height
            stretch = max(tall, wide) / min(tall, wide)
            return (grid[0] * grid[1] if stretch <= 2 else 0), -stretch

        rows = range(1, min(height, target) + 1)
        return max(((row, min(width, target // row)) for row in rows), key=worth)
