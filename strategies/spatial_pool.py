"""Spatial pooling: every view and canvas averaged on a coarser grid.  No signal, all tokens count.

There is no single official definition.  LLaVA-OneVision pools its video frames this way; here the
unpadded canvas is pooled as one plane, behind the projector, and the grid follows from R.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.budget import budget, coarse_grid
from tokenprune.compressor import Compressor, Selection
from tokenprune.primitives import group_means
from tokenprune.registry import Card, register
from tokenprune.tokens import Kind, VisualTokens, moved


@register("spatial-pool")
@dataclass(frozen=True, kw_only=True)
class SpatialPool(Compressor):
    """Replace each cell of a coarse grid by the mean of its tokens.

    A plane (thumbnail, canvas of crops, frame) of ``h`` x ``w`` tokens becomes ``a`` x ``b`` cells
    with ``a * b <= floor(R * h * w)`` and nearly square; the token at ``(r, c)`` belongs to cell
    ``(floor(r * a / h), floor(c * b / w))``.  The mean stands at the cell's middle token.
    """

    positional = True
    card = Card(paper="Average pooling (baseline)")

    def flops(self, tokens: VisualTokens) -> float:
        """One addition for every number."""
        return float(tokens.features.numel())

    def memory(self, tokens: VisualTokens) -> float:
        """All features in float32, and their sums, means and what is kept."""
        share = 1 + 3 * self.retention
        return super().memory(tokens) + 4.0 * share * tokens.features.numel()

    def select(self, tokens: VisualTokens) -> Selection:
        layout, patches = tokens.layout.host, tokens.layout.host.patches
        on_canvas = (layout.kind == Kind.CROP)[patches]
        row = torch.where(on_canvas, layout.canvas_row[patches], layout.row[patches])
        col = torch.where(on_canvas, layout.canvas_col[patches], layout.col[patches])
        # All crops together are one plane; every other view is one by itself.
        plane = layout.view[patches].masked_fill(on_canvas, 1)
        height, width = (
            torch.where(on_canvas, of_canvas, of_view)
            for of_canvas, of_view in zip(layout.canvas_shape, layout.view_shape, strict=True)
        )
        canvas, view = (
            torch.tensor(_grid(shape, self.retention), device="cpu")
            for shape in (layout.canvas_shape, layout.view_shape)
        )
        grid = torch.where(on_canvas[:, None], canvas, view)
        y, x = row * grid[:, 0] // height, col * grid[:, 1] // width
        # A plane has at most as many cells as there are tokens.
        key = (plane * len(patches) + y) * len(patches) + x
        _, cell = key.unique(return_inverse=True)
        middle = _middle(row, y, height, grid[:, 0]) & _middle(col, x, width, grid[:, 1])
        device, cells = tokens.features.device, int(cell.max()) + 1
        features = tokens.features[tokens.layout.patches]
        means = group_means(features, moved(cell, device), cells)[moved(cell[middle], device)]
        return Selection(patches[middle], means.to(features.dtype))


def _grid(shape: tuple[int, int], retention: float) -> tuple[int, int]:
    """(rows, columns) of cells for a plane, as square as the plane allows."""
    height, width = shape
    return coarse_grid(shape, budget(height * width, retention)) if height * width else (1, 1)


def _middle(place: Tensor, cell: Tensor, length: Tensor, cells: Tensor) -> Tensor:
    """Whether ``place`` is the middle one of those that belong to ``cell``."""
    first = -(-cell * length // cells)  # the least place p with floor(p * cells / length) = cell
    last = -(-(cell + 1) * length // cells) - 1
    return place == (first + last) // 2
