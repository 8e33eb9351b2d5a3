"""Tables as CSV files that are harmless in a spreadsheet and can be read back unchanged.

A spreadsheet executes cells that begin with ``=``, ``+``, ``-`` or ``@``, and texts may come from
untrusted data; such texts get a leading apostrophe.  A text such as ``NA`` stays a text.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tokenprune.experiments.common.files import replace_file

__all__ = [
    "read_csv",
    "write_csv",
    "write_tables",
]


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write ``table`` without its index; texts and column names are made harmless."""
    safe = table.rename(columns=_harmless)
    for place, kind in enumerate(safe.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            safe.isetitem(place, safe.iloc[:, place].map(_harmless))
    safe.to_csv(path, index=False)


def write_tables(folder: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write ``<name>.csv`` of every table to ``folder``, each atomically."""
    for name, table in tables.items():
        with replace_file(folder / f"{name}.csv") as temporary:
            write_csv(table, temporary)


def read_csv(path: Path) -> pd.DataFrame:
    """Read what `write_csv` wrote.  Only empty cells are missing values."""
    found = pd.read_csv(path, keep_default_na=False, na_values=[""])
    found = found.rename(columns=_plain)
    for place, kind in enumerate(found.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            found.isetitem(place, found.iloc[:, place].map(_plain))
    return found


def _harmless(cell: object) -> object:
    if isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell):
        return f"'{cell}"
    return cell


def _plain(cell: object) -> object:
    if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell):
        return cell[1:]
    return cell
