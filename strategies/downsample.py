"""Downsample: the image itself made smaller, so that the vision tower makes fewer tokens of it.

The plainest way to fewer tokens, and a baseline that published methods do not always beat.
"""

from dataclasses import dataclass

from tokenprune.encoder import EncoderCompressor
from tokenprune.registry import Card, register


@register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample(EncoderCompressor):
    """Resize the pixels of every view to ``a`` x ``b`` patches, at most ``floor(R * n)`` of them.

    Of the grids that stretch the view by no more than a factor of two, the one with the most
    patches, and of those the one that stretches it least.  Pixels are resized bilinearly with
    antialiasing, behind the processor's normalisation; position embeddings are interpolated as the
    tower does it (bicubic).  A patch of the full view takes the vector of the coarse one that its
    centre lies in, so that the model packs the view as ever, and one token of each coarse patch
    stays.
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
