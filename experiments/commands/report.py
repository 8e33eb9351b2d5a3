"""``tokenprune report``: a page to look through a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.experiments.commands import _options as options
from tokenprune.terminal import OK, app, as_exit_status, progress, quiet

__all__ = ["report"]


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="What tokenprune compare wrote.")
    ],
    questions: Annotated[int, typer.Option(help="How many to show with images and masks.")] = 100,
    first: Annotated[
        bool,
        typer.Option(
            "--first", help="Show the first ones, not those that methods answer most differently."
        ),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The run's data file, if it was moved since."),
    ] = None,
    max_image_pixels: options.MaxImagePixels = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="[default: report.html in the folder]")
    ] = None,
    anonymous: Annotated[
        bool,
        typer.Option(
            "--anonymous", help="Leave out user names, the machine's name and absolute paths."
        ),
    ] = False,
) -> None:
    """Write a page about a run: results, figures, and every question with what methods kept.

    The page is one file that needs no network. Finished, failed and interrupted runs will do.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        from tokenprune.experiments.report import Request, report

        quiet()
        request = Request(
            folder=folder,
            questions=questions,
            first=first,
            data=data,
            out=out,
            anonymous=anonymous,
        )
        with progress() as tell:
            written = report(request, tell)
        for note in written.notes:
            typer.echo(f"note: {note}", err=True)
        size = f"{written.path.stat().st_size / 2**20:.1f} MiB"
        typer.echo(
            f"Written to {written.path} ({size}): {written.shown} of {written.of} questions."
        )
    raise typer.Exit(OK)
