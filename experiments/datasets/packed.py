"""Images inside larger files, which are read when they are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import Encoded

__all__ = ["Bytes", "DatasetImage", "ParquetImage", "holds_images", "open_dataset"]


@dataclass(frozen=True)
class Bytes(Encoded):
    """An image in memory, still encoded."""

    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True)
class ParquetImage(Encoded):
    """An image in a cell of a Parquet file.

    Attributes:
        file: Path of the file.
        group: Index of the row group.
        column: Name of the column: bytes, or a structure with ``bytes`` and ``path``.
        row: Index in the row group.
        index: Index in the list of the cell; None if the cell is the image.
    """

    file: str
    group: int
    column: str
    row: int
    index: int | None = None

    def _cell(self) -> Any:
        changed = Path(self.file).stat().st_mtime_ns
        return _column(self.file, self.group, self.column, changed)[self.row]

    def read(self) -> bytes:
        cell = self._cell()
        value = cell if self.index is None else cell[self.index]
        return _content(value.as_py(), Path(self.file).parent)

    def count(self) -> int:
        """The number of images in the cell, which holds a list."""
        cell = self._cell()
        return len(cell) if cell.is_valid else 0


@lru_cache(maxsize=2)  # questions are asked in the order of the file
def _column(file: str, group: int, column: str, changed: int) -> Any:
    """A column of a row group; ``changed``, the time of the file, keeps old content out."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file).read_row_group(group, columns=[column])[column]


@dataclass(frozen=True)
class DatasetImage(Encoded):
    """An image in a data set that ``datasets`` wrote.

    Attributes:
        folder, split: As of `open_dataset`.
        column: Name of the column.
        row: Index of the row.
        index: Index in the list of the cell; None if the cell is the image.
    """

    folder: str
    split: str | None
    column: str
    row: int
    index: int | None = None

    def _cell(self) -> Any:
        return _image_column(self.folder, self.split, self.column)[self.row][self.column]

    def read(self) -> bytes:
        value = self._cell() if self.index is None else self._cell()[self.index]
        return _content(value, Path(self.folder))

    def count(self) -> int:
        """The number of images in the cell, which holds a list."""
        return len(self._cell() or ())


@lru_cache(maxsize=4)
def _image_column(folder: str, split: str | None, column: str) -> Any:
    from datasets import Image, List

    found = open_dataset(folder, split).select_columns([column])
    single = type(found.features[column]).__name__ == "Image"
    return found.cast_column(column, Image(decode=False) if single else List(Image(decode=False)))


def holds_images(kind: Any) -> bool:
    """Whether a column of this feature of ``datasets`` holds images, or lists of them."""
    inner = getattr(kind, "feature", None)
    return type(kind).__name__ == "Image" or (inner is not None and holds_images(inner))


def _content(value: Any, folder: Path) -> bytes:
    """The bytes of an image that is stored, or whose path is."""
    if isinstance(value, dict):
        path = value.get("path")
        value = folder / path if value.get("bytes") is None and path else value.get("bytes")
    if isinstance(value, Path):
        return value.read_bytes()
    if not isinstance(value, bytes):
        raise OSError("the cell is empty")
    return value


def open_dataset(folder: str, split: str | None = None) -> Any:
    """The data set that ``datasets`` wrote into ``folder`` with ``save_to_disk``.

    Args:
        folder: The folder.
        split: One of its splits; None if there is one only.

    Raises:
        UserError: `datasets` is not installed, the folder is damaged, or ``split`` is unknown or
            lacking.
    """
    if find_spec("datasets") is None:
        raise UserError(
            f"{folder!r} is a data set of the package datasets, which is not installed; run "
            "pip install -e '.[datasets]', or save it as Parquet (to_parquet)."
        )
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(folder)
    except Exception as error:  # a damaged folder can raise anything
        raise UserError(f"cannot read the data set {folder!r}: {error}.") from error
    if not isinstance(found, DatasetDict):
        if split is not None:
            raise UserError(f"the data set {folder!r} has no splits; leave --split out.")
        return found
    names = list(found)
    if split is None and len(names) == 1:
        split = names[0]
    if split not in found:
        raise UserError(
            f"the data set {folder!r} has the splits {', '.join(map(str, names))}; choose one with "
            "--split."
        )
    return found[split]
