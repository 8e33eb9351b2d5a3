"""``tokenprune table``: runs side by side on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.terminal import OK, app, as_exit_status

__all__ = ["table"]


@app.command()
def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that compare has written.")
    ],
) -> None:
    """Print several comparisons side by side as one Markdown table.

    One row per method: accuracies in % and, in brackets, the decoder's FLOPs in % of the full ones.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.tables import markdown, side_by_side

        notes: list[str] = []
        typer.echo(markdown(side_by_side(folders, notes)))
        for note in notes:
            typer.echo(f"note: {note}", err=True)
    raise typer.Exit(OK)
