"""HTML tables, as notebooks show them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["html_table"]


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """A table of two columns under ``title``; empty values are left out.

    Args:
        title: Plain text.
        rows: Values by name.  Line breaks are kept, web addresses become links.
    """
    body = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{escape(name)}</th>"
        f"<td style='text-align:left'>{_cell(str(value))}</td></tr>"
        for name, value in rows.items()
        if str(value)
    )
    return f"<table><caption style='text-align:left'>{escape(title)}</caption>{body}</table>"


def _cell(text: str) -> str:
    shown = escape(text).replace("\n", "<br>")
    return (
        f"<a href='{shown}'>{shown}</a>"
        if text.startswith("https://") and " " not in text
        else shown
    )
