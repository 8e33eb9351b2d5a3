"""Tables that fit the terminal.  No name and no number is broken over two lines.

Columns of text wrap between words.  If the table is still too wide, columns are left out, those of
the lowest value first, and the caption names them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

__all__ = ["FittedTable"]


_WORD = 40  # longer words in columns of text may be broken


class FittedTable(Table):
    """A table that fits the width of the console that prints it."""

    def __init__(self, *headers: str, continued: bool = False, **options: Any) -> None:
        """An empty table.

        Args:
            *headers: Headers of columns that are always shown.
            continued: Whether columns that do not fit follow in a further table, instead of being
                left out.
            **options: As of `rich.table.Table`.
        """
        self._values: list[int | None] = []
        self._prose: list[bool] = []
        self._continued = continued
        super().__init__(**options)
        for header in headers:
            self.add_column(header)

    def add_column(
        self,
        header: Any = "",
        *args: Any,
        value: int | None = None,
        prose: bool = False,
        **options: Any,
    ) -> None:
        """Add a column.

        Args:
            header: As of `rich.table.Table.add_column`, with ``args`` and ``options``.
            value: Columns with the lowest value are left out first; None is never left out.
            prose: Whether the column is text, which may wrap between words.
        """
        self._values.append(value)
        self._prose.append(prose)
        super().add_column(header, *args, **options)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sizes = [self._size(console, options, index) for index in range(len(self.columns))]
        shown, rest = self._chosen(sizes, options.max_width)
        while rest and self._continued:
            yield from self._part(console, options, shown, sizes, caption=None)
            yield ""
            shown, rest = self._chosen(sizes, options.max_width, rest)
        names = ", ".join(str(self.columns[index].header) for index in rest).replace("\n", " ")
        left_out = f"Columns left out at this width: {names}." if rest else ""
        caption = " ".join(str(words) for words in (self.caption, left_out) if words)
        yield from self._part(console, options, shown, sizes, caption=caption or None)

    def _size(self, console: Console, options: ConsoleOptions, index: int) -> tuple[int, int]:
        """The least and the best width of a column."""
        column = self.columns[index]
        wide = options.update(max_width=10_000)
        cells = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        best = max((cell.maximum for cell in cells), default=0)
        if not self._prose[index]:
            return best, best
        return min(max(cell.minimum for cell in cells), _WORD), best

    def _chosen(
        self, sizes: Sequence[tuple[int, int]], width: int, of: Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """The indices of the columns that fit into ``width``, and those of the others.

        Args:
            sizes: As of `_size`, for all columns.
            width: Of the console.
            of: Columns of which some are chosen, besides those that are always shown.
        """
        worth = {index: value for index, value in enumerate(self._values) if value is not None}
        optional = sorted(worth if of is None else of, key=lambda index: (-worth[index], index))
        rest: list[int] = []
        shown = [index for index in range(len(sizes)) if index not in worth]
        for position, index in enumerate(optional):
            more = [*shown, index]
            first = position == 0 and self._continued  # else it would never end
            if first or (not rest and sum(sizes[i][0] for i in more) <= self._room(width, more)):
                shown = more
            else:
                rest.append(index)
        return sorted(shown), sorted(rest)

    def _room(self, width: int, shown: Sequence[int]) -> int:
        """The width that is left for the content of the columns."""
        _, right, _, left = self.padding
        return width - (len(shown) - 1) * (self.box is not None) - len(shown) * (left + right)

    def _part(
        self,
        console: Console,
        options: ConsoleOptions,
        shown: Sequence[int],
        sizes: Sequence[tuple[int, int]],
        *,
        caption: str | None,
    ) -> RenderResult:
        """The table with the columns ``shown`` alone."""
        part = copy.copy(self)
        room = self._room(options.max_width, shown)
        widths = fitted([sizes[index] for index in shown], room)
        part.columns = [
            _narrowed(self.columns[index], position, width, wraps=width < sizes[index][1])
            for position, (index, width) in enumerate(zip(shown, widths, strict=True))
        ]
        part.caption = caption
        yield from Table.__rich_console__(part, console, options)


def _narrowed(column: Column, position: int, width: int, *, wraps: bool) -> Column:
    """A copy of ``column`` at another position, with a fixed width."""
    made = copy.copy(column)
    made._index, made.width = position, width
    made.no_wrap, made.overflow = not wraps, "fold"
    return made


def fitted(sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Widths of columns whose sum is at most ``room``, where that is possible.

    Each width lies between the least and the best one in ``sizes``.  The widest column that may
    shrink is shrunk first.  If the least widths do not fit, the widest columns are cut down to
    eight characters.
    """
    widths = [best for _, best in sizes]
    floors = [least for least, _ in sizes]
    if sum(floors) > room:
        floors = [min(least, 8) for least in floors]
    while sum(widths) > room:
        able = [index for index, width in enumerate(widths) if width > floors[index]]
        if not able:
            break
        widths[max(able, key=lambda index: widths[index])] -= 1
    return widths
