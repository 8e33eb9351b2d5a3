"""Checks of methods from the command line: ``python -m tokenprune.testing golden FOLDER``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenprune.errors import UserError
from tokenprune.testing.golden import replay_folder

__all__ = [
    "app",
    "main",
]


app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def _commands() -> None:
    """Checks of methods, from the command line."""


@app.command()
def golden(
    folder: Annotated[
        Path, typer.Argument(help="A folder of golden vectors, or a folder of such folders.")
    ],
    method: Annotated[str | None, typer.Option(help="Replay only this method's vectors.")] = None,
) -> None:
    """Replay golden vectors and print a verdict for every case.

    Exit status: 0 all match, 1 a mismatch, 2 bad input or nothing replayed.
    """
    console = Console(width=None if Console().is_terminal else 160)
    try:
        results = replay_folder(folder, method)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    table = Table(box=None, pad_edge=False)
    for name in ("method", "case"):
        table.add_column(name, no_wrap=True)
    table.add_column("verdict")
    for case, verdict in results:
        style = "red" if verdict.mismatch else "dim" if verdict.skipped else ""
        table.add_row(case.method, case.id, str(verdict), style=style)
    console.print(table)
    verdicts = [verdict for _, verdict in results]
    bad = sum(bool(verdict.mismatch) for verdict in verdicts)
    skipped = sum(bool(verdict.skipped) for verdict in verdicts)
    reordered = sum(v.reordered and not v.mismatch for v in verdicts)
    exact = len(verdicts) - bad - skipped - reordered
    console.print(
        f"{exact} exact, {reordered} same set, {bad} MISMATCH, {skipped} skipped "
        "(no method replays them)"
    )
    if bad:
        raise typer.Exit(1)
    if skipped == len(verdicts):
        typer.echo("error: nothing was replayed.", err=True)
        raise typer.Exit(2)


def main() -> None:
    """Entry point of ``python -m tokenprune.testing``."""
    app()


if __name__ == "__main__":
    main()
