"""The cases of an analysis: images in the conditions that are possible, encoded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenprune.experiments.common.patch_boxes import ViewSize
from tokenprune.experiments.positional_bias.estimates import NORMAL
from tokenprune.experiments.positional_bias.rearrange import (
    CROPS,
    EXCHANGED,
    Condition,
    Level,
    NotPossible,
    Shown,
    move_pixels,
    move_tokens,
    paired,
)
from tokenprune.experiments.positional_bias.rows import Skip
from tokenprune.layout import Kind, TokenLayout
from tokenprune.pipeline import Pipeline
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "Case",
    "cases",
    "fingerprinted",
    "moved_cases",
    "normal_case",
]


@dataclass(frozen=True, eq=False)
class Case:
    """An image in one condition, encoded.

    Attributes:
        content: (N,) as `rearrange.paired` returns it.
        slot: (N,) crop or frame of each index of the sequence in the original image.
    """

    image: int
    condition: str
    level: str
    tokens: VisualTokens
    content: Tensor
    slot: Tensor

    @cached_property
    def layout(self) -> TokenLayout:
        """The layout, on the CPU."""
        return self.tokens.layout.to("cpu")

    @cached_property
    def geometry(self) -> dict[str, np.ndarray[Any, Any]]:
        """Columns (P,) of the table of tokens that do not depend on the method."""
        layout, index = self.layout, torch.arange(len(self.tokens))
        canvas = layout.kind == Kind.CROP
        (height, width), (rows, cols) = layout.view_shape, layout.canvas_shape
        y = torch.where(
            canvas,
            (layout.canvas_row.float() + 0.5) / max(rows, 1),
            (layout.row.float() + 0.5) / height,
        )
        x = torch.where(
            canvas,
            (layout.canvas_col.float() + 0.5) / max(cols, 1),
            (layout.col.float() + 0.5) / width,
        )
        columns: dict[str, tuple[Tensor, Any]] = {
            "token": (index, np.int32),
            "position": ((index.double() + 0.5) / len(index), np.float64),
            "kind": (layout.kind, np.int8),
            "view": (layout.view, np.int16),
            "slot": (self.slot.cpu(), np.int16),
            "row": (layout.row, np.int16),
            "col": (layout.col, np.int16),
            "y": (y, np.float32),
            "x": (x, np.float32),
            "content": (self.content.cpu(), np.int32),
        }
        return {
            name: values[layout.patches].numpy().astype(kind)
            for name, (values, kind) in columns.items()
        }


def cases(
    pipe: Pipeline,
    index: int,
    shown: Shown,
    signals: frozenset[Signal],
    conditions: Sequence[Condition],
    levels: Sequence[Level],
    skipped: set[Skip],
) -> Iterator[Case]:
    """An encoded image in the normal condition and in all conditions that are possible."""
    normal = fingerprinted(index, _encoded(pipe, shown, signals))
    yield normal_case(index, normal)
    if "selector" in levels:
        yield from moved_cases(index, normal, conditions, skipped)
    pixelwise = [one for one in _fitting(normal.layout, conditions) if one != EXCHANGED]
    for condition in pixelwise if "pipeline" in levels else ():
        try:
            pixels = move_pixels(shown, condition, normal.layout, ViewSize.of(pipe.adapter).side)
            moved = _encoded(pipe, pixels, signals)
            if not _same_geometry(moved.layout, normal.layout):
                raise NotPossible("another crop grid after rearranging")
        except NotPossible as reason:
            skipped.add((index, condition, "pipeline", str(reason)))
        else:
            content = paired(normal.layout, condition)
            yield Case(index, condition, "pipeline", moved, content, _slots(normal.layout))


def fingerprinted(index: int, tokens: VisualTokens) -> VisualTokens:
    """With a fingerprint, which identifies its scores and seeds random methods."""
    if tokens.fingerprint is not None:
        return tokens
    return replace(tokens, fingerprint=torch.tensor([index], dtype=torch.float32))


def normal_case(index: int, tokens: VisualTokens) -> Case:
    layout = tokens.layout
    own = torch.arange(len(layout), device=layout.is_separator.device)
    content = own.masked_fill(layout.is_separator, -1)
    return Case(index, NORMAL, NORMAL, tokens, content, _slots(layout))


def _slots(layout: TokenLayout) -> Tensor:
    """(N,) the crop or frame at each index, from 0; negative for all else."""
    return layout.view - int(layout.modality != "video")


def moved_cases(
    index: int,
    tokens: VisualTokens,
    conditions: Sequence[Condition],
    skipped: set[Skip],
) -> Iterator[Case]:
    """An encoded image in all conditions that are possible, at the selector level."""
    for condition in _fitting(tokens.layout, conditions):
        try:
            content = paired(tokens.layout, condition)
        except NotPossible as reason:
            skipped.add((index, condition, "selector", str(reason)))
        else:
            moved, slots = move_tokens(tokens, condition), _slots(tokens.layout)
            yield Case(index, condition, "selector", moved, content, slots)


def _fitting(layout: TokenLayout, conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions that apply to an image, or to a video."""
    others = CROPS if layout.modality == "video" else ("reversed-frames",)
    return [condition for condition in conditions if condition not in others]


def _encoded(pipe: Pipeline, shown: Shown, signals: frozenset[Signal]) -> VisualTokens:
    if isinstance(shown, Image.Image):
        return pipe.encode([shown], signals)[0]
    return pipe.encode_videos([list(shown)], signals)[0]


def _same_geometry(one: TokenLayout, other: TokenLayout) -> bool:
    return (
        len(one) == len(other)
        and one.grid == other.grid
        and one.canvas_shape == other.canvas_shape
        and torch.equal(one.view, other.view)
    )
