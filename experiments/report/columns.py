"""The columns of the report: one per method and retention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell, CellRecord
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.grammar import has_retention

__all__ = [
    "Column",
    "table_columns",
]


@dataclass(frozen=True)
class Column:
    """A method at a retention, with the key of its answers in the journal, if it is known."""

    label: str
    retention: float
    key: str | None
    failed: bool


def table_columns(answers: pd.DataFrame, cells: Sequence[Cell | CellRecord]) -> list[Column]:
    """The uncompressed model first, then methods in the order of the run.

    Args:
        answers: As in ``answers.parquet``, without references.
        cells: Those of the run; of several seeds, the first one is shown.  Empty for an older run
            with methods that are unknown here.
    """
    keys: dict[tuple[str, float | None], str] = {}
    for cell in cells:
        keys.setdefault((cell.label, cell.retention), cell.key)
    found = []
    for (label, retention), rows in answers.groupby(["label", "retention"], sort=False):
        failed = bool((rows["status"] == "failed").any())
        key = keys.get((label, float(retention))) if cells else _key(label, float(retention))
        found.append(Column(label, float(retention), key, failed))
    return sorted(found, key=lambda column: column.label != UNCOMPRESSED)


def _key(label: str, retention: float) -> str | None:
    """The cell key of a method of an older run; None if the method is unknown here."""
    if label == UNCOMPRESSED:
        return UNCOMPRESSED
    try:
        own = {} if has_retention(label) else {"retention": retention}
        return Cell(tp.parse(label, **own)).key
    except UserError:
        return None
