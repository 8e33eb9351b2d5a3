"""The table of tokens of `positional_bias`, and the files of its finished batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.positional_bias.estimates import NORMAL
from tokenprune.experiments.positional_bias.rearrange import CONDITIONS, LEVELS
from tokenprune.layout import Kind

__all__ = [
    "Parts",
    "Rows",
    "Skip",
    "joined",
]


Skip = tuple[int, str, str, str]
"""Index of an image, condition and level in which it was skipped, and why."""


_ORDER = [
    *("method", "retention", "modality", "image", "condition", "level", "token", "position"),
    *("kind", "view", "slot", "slots", "grid", "row", "col", "y", "x", "content"),
    *("kept", "kept_first", "score"),
]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one method's selection of one image in one condition.

    Attributes:
        shared: Values that all rows share, by column.
        columns: (P,) values of the other columns.
    """

    shared: Mapping[str, Any]
    columns: Mapping[str, np.ndarray[Any, Any]]


class Parts:
    """Finished batches, one file each, which a resumed run reads.

    Files are written atomically.  A finished image is not computed again, whatever the batch size.

    Attributes:
        skipped: Images that could not be rearranged, of finished and of current batches.
    """

    def __init__(self, folder: Path | None) -> None:
        """Read ``folder``, if it exists; None keeps all batches in memory only."""
        self.folder = folder
        self.skipped: set[Skip] = set()
        self._found: dict[tuple[str, float], list[Rows]] = {}
        self._images: dict[tuple[str, float], set[int]] = {}
        self._next = 0
        for path in sorted(folder.glob("*.parquet")) if folder is not None else ():
            self._next = int(path.stem) + 1
            table = pd.read_parquet(path)
            self.skipped.update((image, *why) for image, *why in table.attrs["skipped"])
            self._enter(_split(table))

    def __len__(self) -> int:
        """Number of finished images, summed over methods."""
        return sum(map(len, self._images.values()))

    def images(self, method: str, retention: float) -> set[int]:
        """The finished images of a method."""
        return self._images.get((method, retention), set())

    def rows(self, method: str, retention: float) -> list[Rows]:
        """All finished rows of a method, in the order of their computation."""
        return self._found.get((method, retention), [])

    def add(self, rows: Sequence[Rows]) -> None:
        """Store a finished batch of a method."""
        if not rows:
            return
        if self.folder is not None:
            images = {one.shared["image"] for one in rows}
            made = [pd.DataFrame({**one.columns, **one.shared}) for one in rows]
            table = pd.concat(made, ignore_index=True)
            table.attrs["skipped"] = sorted(skip for skip in self.skipped if skip[0] in images)
            with replace_file(self.folder / f"{self._next:06}.parquet") as temporary:
                table.to_parquet(temporary, index=False)
            self._next += 1
        self._enter(rows)

    def _enter(self, rows: Sequence[Rows]) -> None:
        for one in rows:
            key = one.shared["method"], one.shared["retention"]
            self._found.setdefault(key, []).append(one)
            self._images.setdefault(key, set()).add(one.shared["image"])


def _split(table: pd.DataFrame) -> list[Rows]:
    """The rows of a file that `Parts.add` wrote."""
    names = ["method", "retention", "modality", "image", "condition", "level", "slots", "grid"]
    found = []
    for shared, part in table.groupby(names, sort=False):
        columns = {name: part[name].to_numpy() for name in table.columns if name not in names}
        found.append(Rows(dict(zip(names, shared, strict=True)), columns))
    return found


def joined(parts: Sequence[Rows]) -> pd.DataFrame:
    """The table of tokens; repetitive text columns are categorical."""
    if not parts:
        return pd.DataFrame(columns=_ORDER)
    sizes = [len(part.columns["token"]) for part in parts]
    columns: dict[str, Any] = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    known = {"condition": [NORMAL, *CONDITIONS], "level": [NORMAL, *LEVELS]}
    for name in parts[0].shared:
        values = [part.shared[name] for part in parts]
        if isinstance(values[0], str):
            categories = known.get(name, list(dict.fromkeys(values)))
            codes = pd.Categorical(values, categories).codes.repeat(sizes)
            columns[name] = pd.Categorical.from_codes(codes, categories)
        else:
            columns[name] = np.repeat(np.asarray(values), sizes)
    kinds = [kind.name.lower() for kind in Kind]
    columns["kind"] = pd.Categorical.from_codes(columns["kind"], kinds)
    return pd.DataFrame(columns)[_ORDER]
