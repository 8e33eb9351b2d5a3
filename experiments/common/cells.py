"""One cell of an experiment: a method at a retention."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenprune.experiments.common.run_folder import UNCOMPRESSED

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = [
    "Cell",
    "CellRecord",
    "Failure",
    "Matched",
    "ordered",
    "without_seed",
]


@dataclass(frozen=True)
class Matched:
    """Why a cell has its retention ratio: at it, the cell costs as much as `uniform`.

    Attributes:
        kind: Which cost (`setting.MATCHED_COSTS`).
        asked: Retention of `uniform`, whose cost is the target.
        target: That cost, on a representative prompt.
        cost: What the cell costs there.
    """

    kind: str
    asked: float
    target: float
    cost: float


@dataclass(frozen=True)
class Cell:
    """One column of a comparison: a method at a retention ratio, or a reference.

    Attributes:
        compressor: None for the uncompressed model.
        name: Of a reference without a retention ratio, such as ``thumbnail-only``; empty for a
            method and for the uncompressed model.
        without_images: Whether the question is asked without its images.
        pooled: Whether the method is one of several that differ only in their `seed` and are
            reported together, under the label without the seed.
    """

    compressor: Compressor | None = None
    name: str = ""
    without_images: bool = False
    pooled: bool = False
    matched: Matched | None = None

    @property
    def key(self) -> str:
        """The key of the answers in the journal.

        Every method at R = 1 is the uncompressed model, so these cells share their answers.
        """
        if self.without_images:
            return self.name
        if self.compressor is None or self.compressor.retention == 1:
            return UNCOMPRESSED
        return repr(self.compressor)

    @property
    def method(self) -> str:
        return self.name or (UNCOMPRESSED if self.compressor is None else self.compressor.name)

    @property
    def label(self) -> str:
        """The method, with the options that differ from its defaults."""
        if self.name or self.compressor is None:
            return self.name or UNCOMPRESSED
        shown = without_seed(self.compressor) if self.pooled else self.compressor
        return shown.label

    @property
    def retention(self) -> float:
        """R; NaN for a reference that has none."""
        if self.name:
            return math.nan
        return 1.0 if self.compressor is None else self.compressor.retention

    @property
    def asked(self) -> float:
        """The requested retention ratio; not the cell's own if that was solved for."""
        return self.retention if self.matched is None else self.matched.asked

    @property
    def parameters(self) -> str:
        """Every option but the retention, as ``name=value`` pairs."""
        if self.compressor is None:
            return ""
        return ", ".join(
            f"{item.name}={getattr(self.compressor, item.name)!r}"
            for item in dataclasses.fields(self.compressor)
            if item.name != "retention"
        )

    def __str__(self) -> str:
        if self.name or self.compressor is None:
            return self.label
        return f"{self.compressor.label} at {self.retention:g}"


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """A `Cell` without its compressor, as a manifest stores it.

    It reads the answers of a method whose code is not there.

    Attributes:
        key, method, label, parameters, name, matched: Of the cell.
        retention: Of the cell; None for NaN, which is not JSON.
    """

    key: str
    method: str
    label: str
    parameters: str
    name: str
    retention: float | None
    matched: Matched | None = None

    @classmethod
    def of(cls, cell: Cell) -> CellRecord:
        """The record of a cell."""
        retention = None if math.isnan(cell.retention) else cell.retention
        names = ("key", "method", "label", "parameters", "name", "matched")
        return cls(**{name: getattr(cell, name) for name in names}, retention=retention)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> CellRecord:
        """The record that `dataclasses.asdict` turned into ``stored``."""
        matched = stored.get("matched")
        return cls(**{**stored, "matched": Matched(**matched) if matched else None})

    @property
    def asked(self) -> float | None:
        """The requested retention ratio; not the cell's own if that was solved for."""
        return self.retention if self.matched is None else self.matched.asked


def ordered(records: Iterable[CellRecord]) -> list[CellRecord]:
    """The cells of several requests, each once, in the order that one request gives them."""
    found = list(dict.fromkeys(records))
    beside = [one for one in found if one.name or one.method == UNCOMPRESSED]
    rest = [one for one in found if one not in beside]
    labels = list(dict.fromkeys(one.label for one in rest))
    rest.sort(key=lambda one: (labels.index(one.label), -(one.retention or 0)))
    return [*beside, *rest]


def without_seed(compressor: Compressor) -> Compressor:
    """The method with its default seed; the method itself if it has no `seed`."""
    plain = {item.name: item.default for item in dataclasses.fields(compressor)}
    if "seed" not in plain:
        return compressor
    changes: dict[str, Any] = {"seed": plain["seed"]}
    return dataclasses.replace(compressor, **changes)


@dataclass(frozen=True)
class Failure:
    """Why a cell failed: the error in one line, and the whole traceback."""

    error: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException, about: str = "") -> Failure:
        """The message of ``error``, even if it cannot be printed, and what it is ``about``."""
        name = type(error).__name__
        try:
            message = str(error).strip().splitlines()
        except Exception:
            message = ["(its message cannot be printed)"]
        try:
            trace = "".join(map(_relative_line, traceback.format_exception(error)))
        except Exception:
            trace = f"{''.join(traceback.format_tb(error.__traceback__))}{name}\n"
        said = f"{name}: {message[0]}" if message else name
        return cls(f"{said} ({about})" if about else said, trace)


def _relative_line(line: str) -> str:
    """A line of a traceback with its file relative to the import path."""
    roots = {str(Path.cwd()), *filter(None, sys.path)}
    for root in sorted(roots, key=len, reverse=True):
        line = line.replace(f'File "{root}{os.sep}', 'File "')
    return line
