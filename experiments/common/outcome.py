"""The outcome of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tokenprune.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.common.cells import Failure

__all__ = [
    "Outcome",
]


@dataclass(frozen=True, repr=False)
class Outcome:
    """The status and the results of an experiment.  Notebooks show its main table.

    Attributes:
        folder: The run folder.
        status: ``complete``, ``failed`` (an answer is missing) or ``interrupted``.
        tables: Name to table, the main table first.
        files: Names of the files in ``folder`` that a reader opens.
        answered, wanted: Answers that exist, and answers of a complete run.  Of a report: questions
            on the page, and questions of the run.
        new: Answers that this call added.
        failures: Cell to the reason why it failed, in the order of the cells.
        missing: Question id to the cells that failed on it alone, and why.
        skipped: Methods or settings that were left out, and why.
        notes: Sentences that qualify the tables.
        about: Name to a description, e.g. of the question or the prompt.
    """

    folder: Path
    status: str = "complete"
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    answered: int = 0
    wanted: int = 0
    new: int = 0
    failures: Mapping[Any, Failure] = field(default_factory=dict)
    missing: Mapping[str, Mapping[Any, Failure]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> pd.DataFrame:
        """As in ``summary.csv``; only comparisons and experiments based on one have it."""
        return self.tables["summary"]

    def to_frame(self) -> pd.DataFrame:
        """The main table: the first of ``tables``, empty if there is none."""
        import pandas as pd

        return next(iter(self.tables.values()), pd.DataFrame())

    def figure(self, name: str = "", width: int = 900) -> Image.Image:
        """A figure of the run, small enough for a notebook, which shows it.

        Args:
            name: Of its file, without the ending; the first figure if empty.
            width: Maximum width in pixels.

        Raises:
            UserError: The run has no such figure.
        """
        files = [*self.folder.glob("*.png"), *self.folder.glob("plots/*.png")]
        found = {file.stem: file for file in sorted(files, key=lambda file: file.stem)}
        if not found:
            raise UserError(f"the run in {str(self.folder)!r} has no figure as PNG.")
        if name and name not in found:
            raise unknown("figure", name, found)
        with Image.open(found[name or next(iter(found))]) as image:
            image.thumbnail((width, 4 * width), Image.Resampling.LANCZOS)
            # Figures have few colours: a palette keeps the text sharp and the notebook small.
            return image.convert("RGB").quantize(128)

    def __repr__(self) -> str:
        parts = [self.status, f"folder={str(self.folder)!r}"]
        if self.wanted:
            parts.append(f"{self.answered} of {self.wanted} answered")
        if self.failures:
            parts.append(f"{len(self.failures)} failed")
        if self.tables:
            shapes = (
                f"{name} {len(table)}x{table.shape[1]}" for name, table in self.tables.items()
            )
            parts.append(f"tables: {', '.join(shapes)}")
        return f"Outcome({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """The main table below a line about the run."""
        shown: Any = self.to_frame()
        return f"<p>{escape(repr(self))}</p>{shown._repr_html_() if len(shown.columns) else ''}"
