"""Spatial pooling: average the tokens on a coarser grid.  A baseline without signals.

There is no single official definition.  LLaVA-OneVision pools its video frames this way.  Here the
unpadded canvas is pooled as one plane, after the projector, and the grid follows from R.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.budget import budget, coarse_grid
from tokenprune.compressor import Compressor, Selection
from tokenprune.layout import Kind, TokenLayout, moved
from tokenprune.ops.clustering import central_members
from tokenprune.ops.merging import group_means
from tokenprune.ops.spatial import patches_by_plane
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("spatial-pool")
@dataclass(frozen=True, kw_only=True)
class SpatialPool(Compressor):
    """Replace each cell of a coarse grid by the mean of its tokens.

    A plane (thumbnail, canvas of crops or frame) of ``h`` x ``w`` tokens becomes ``a`` x ``b``
    cells that are nearly square, with ``a * b <= floor(R * h * w)``.  The token at ``(r, c)``
    belongs to cell ``(floor(r * a / h), floor(c * b / w))``.  The mean takes the location of the
    cell's middle token.

    A method in the vision encoder leaves gaps in the plane of ``n`` tokens.  The grid is then the
    finest one of which at most ``floor(R * n)`` cells hold a token, and the mean takes the location
    of the token nearest to the middle of the tokens in its cell.
    """

    location_aware = True
    card = Card(paper="Average pooling (baseline)")

    def cells(self, layout: TokenLayout) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(M,) patches, rows, columns and cells of every plane, on the CPU."""
        for patches in patches_by_plane(layout):
            row, col, shape = _places(layout, patches)
            yield patches, row, col, _cells(row, col, shape, budget(len(patches), self.retention))

    def patch_count(self, layout: TokenLayout) -> int:
        return sum(len(cell.unique()) for _, _, _, cell in self.cells(layout.host))

    def select(self, tokens: VisualTokens) -> Selection:
        layout, members, cells, kept, count = tokens.layout.host, [], [], [], 0
        for patches, row, col, cell in self.cells(layout):
            middle, sizes = central_members(cell, row, col)
            members.append(patches)
            kept.append(patches[middle])
            cells.append(cell + count)
            count += len(sizes)
        keep, order = torch.cat(kept).sort()
        device = tokens.features.device
        member, cell, place = (
            moved(index, device) for index in (torch.cat(members), torch.cat(cells), order)
        )

        def merging(vectors: Tensor) -> Tensor:
            return group_means(vectors[member], cell, count)[place].to(vectors)

        return Selection(keep, merging(tokens.features), merging=merging)


def _places(layout: TokenLayout, patches: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """(M,) rows and (M,) columns of the patches of a plane, and the shape of the plane."""
    if bool((layout.kind[patches] == Kind.CROP).all()):
        return layout.canvas_row[patches], layout.canvas_col[patches], layout.canvas_shape
    return layout.row[patches], layout.col[patches], layout.view_shape


def _cells(row: Tensor, col: Tensor, shape: tuple[int, int], most: int) -> Tensor:
    """(M,) cell of each token of a plane, numbered from 0 in reading order.

    Args:
        row, col: (M,) locations of the tokens.
        shape: (rows, columns) of the plane.
        most: How many cells may hold a token; at least 1.
    """
    height, width = shape
    complete = len(row) == height * width
    best, filled = torch.zeros_like(row), 0
    # With gaps, some cells are empty, so that a finer grid may fit.
    counts = range(most, most + 1 if complete else height * width + 1)
    for grid in dict.fromkeys(coarse_grid(shape, count) for count in counts):
        key = row * grid[0] // height * grid[1] + col * grid[1] // width
        found, cell = key.unique(return_inverse=True)
        if filled < len(found) <= most:
            best, filled = cell, len(found)
    return best
