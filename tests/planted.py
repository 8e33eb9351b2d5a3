"""Methods whose positional bias is known, and data for tests of its measurement."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from tokenprune.allocators import Allocator, TopK
from tokenprune.compressor import ScoringCompressor
from tokenprune.experiments.positional_bias.command import tables
from tokenprune.layout import Kind, TokenLayout
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.strategy_checks import LAYOUTS
from tokenprune.tokens import VisualTokens

FULL = LAYOUTS["2x2"]
PADDED = LAYOUTS["2x2 padded"]
VIDEO = LAYOUTS["video"]


def encoded(count: int = 24, *layouts: TokenLayout) -> list[VisualTokens]:
    """Synthetic images that cycle through the layouts; default: 2x2 crops."""
    some = layouts or (FULL,)
    return [sample_tokens(frozenset(), some[i % len(some)], seed=i) for i in range(count)]


def row(table: pd.DataFrame, condition: str, level: str = "selector", **fields: Any) -> pd.Series:
    """The only row of a condition."""
    chosen = (table["condition"] == condition) & (table["level"] == level)
    for name, value in fields.items():
        chosen &= table[name] == value
    (index,) = table.index[chosen]
    return table.loc[index]


@dataclass(frozen=True, kw_only=True)
class Planted(ScoringCompressor):
    """Scores content, plus ``late`` times the index in the sequence, plus ``right`` times x."""

    allocator: Allocator = field(default_factory=TopK)
    content: float = 1.0
    late: float = 0.0
    right: float = 0.0

    def score(self, tokens: VisualTokens) -> Tensor:
        layout = tokens.layout
        x = torch.where(
            layout.kind == Kind.CROP,
            (layout.canvas_col + 0.5) / max(layout.canvas_shape[1], 1),
            (layout.col + 0.5) / layout.view_shape[1],
        )
        place = torch.linspace(0, 1, len(tokens))
        return self.content * tokens.features[:, 0] + self.late * place + self.right * x


def printed(found: pd.DataFrame) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    return console.export_text()
