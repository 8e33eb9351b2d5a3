"""The columns of the report: one per method and retention."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.grammar import has_retention

__all__ = [
    "Column",
    "table_columns",
]


@dataclass(frozen=True)
class Column:
    """A method at a retention."""

    label: str
    retention: float
    key: str | None
    failed: bool


def table_columns(answers: pd.DataFrame) -> list[Column]:
    """The uncompressed model first, then methods in the order of the run."""
    found = []
    for (label, retention), rows in answers.groupby(["label", "retention"], sort=False):
        failed = bool((rows["status"] == "failed").any())
        found.append(Column(label, float(retention), _key(label, float(retention)), failed))
    return sorted(found, key=lambda column: column.label != UNCOMPRESSED)


def _key(label: str, retention: float) -> str | None:
    """The cell key of a method's answers in the journal; None if the method is unknown here."""
    if label == UNCOMPRESSED:
        return UNCOMPRESSED
    try:
        own = {} if has_retention(label) else {"retention": retention}
        return Cell(tp.parse(label, **own)).key
    except UserError:
        return None
