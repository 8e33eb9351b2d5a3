"""``tokenprune report``, ``pairs`` and ``table``: the results of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.console import (
    OK,
    ManyValues,
    app,
    as_exit_status,
    method_label,
    new_table,
    progress,
    quiet,
)
from tokenprune.experiments.common import options
from tokenprune.experiments.common.formatting import difference, p_value
from tokenprune.spec import split
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "pairs",
    "pairs_table",
    "report",
    "table",
]


_Folder = Annotated[
    Path, typer.Argument(metavar="RUN_FOLDER", help="Run folder of tokenprune compare.")
]


_First = Annotated[
    bool,
    typer.Option(
        "--first", help="Show the first questions, not those with the most different answers."
    ),
]


_Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The data file of the run, if it has moved."),
]


_Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File of the page. [default: report.html in the run folder]"),
]


_Force = Annotated[bool, typer.Option("--force", help="Replace the file of --out if it exists.")]


_Csv = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="File of the table. [default: pairs.csv in the run folder]"),
]


_Anonymous = Annotated[
    bool,
    typer.Option(
        "--anonymous", help="Leave out user names, the machine's name and absolute paths."
    ),
]


@app.command()
def report(
    folder: _Folder,
    questions: Annotated[
        int, typer.Option(help="Number of questions shown with images and masks.")
    ] = 100,
    first: _First = False,
    data: _Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    out: _Out = None,
    force: _Force = False,
    anonymous: _Anonymous = False,
    metric: options.Metric = None,
) -> None:
    """Write an HTML page about a run: results, figures, and questions with what methods kept.

    The page is a single file that needs no network. The run may be finished, failed or interrupted.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        from tokenprune.experiments.report.run import ReportRequest, run

        quiet()
        request = ReportRequest(
            folder=folder,
            questions=questions,
            first=first,
            data=data,
            out=out,
            force=force,
            anonymous=anonymous,
            metric=metric,
        )
        with progress() as bar:
            outcome = run(request, bar)
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        path = outcome.folder / outcome.files[0]
        size = f"{path.stat().st_size / 2**20:.1f} MiB"
        shown = f"{outcome.answered} of {outcome.wanted} questions"
        typer.echo(f"Written to {path} ({size}): {shown}.")
    raise typer.Exit(OK)


@app.command(cls=ManyValues)
def pairs(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", "-m", metavar="LABEL...", help="Only these methods. [default: all]"
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Only questions of this kind. [default: all questions]")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of permutations.")] = 0,
    out: _Csv = None,
    metric: options.Metric = None,
) -> None:
    """Compare all pairs of methods of a run on the questions that both answered.

    Prints the difference of their accuracies with its 95 % bootstrap interval and the p-value of
    McNemar's exact test, raw and adjusted for the number of pairs (Holm), and writes them as CSV.
    Scores between 0 and 1 are compared by a permutation test instead.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.errors import UserError
        from tokenprune.experiments.report.pairs import PairsRequest, pairs

        labels = tuple(split(methods or ()))
        if methods and not labels:
            raise UserError("--methods needs at least one value.")
        request = PairsRequest(
            folder=folder, methods=labels, kind=kind, seed=seed, out=out, metric=metric
        )
        outcome = pairs(request)
        Console().print(pairs_table(outcome.tables["pairs"]))
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"Written to {outcome.folder / outcome.files[0]}")
    raise typer.Exit(OK)


def pairs_table(found: pd.DataFrame) -> Table:
    """The pairs as a table of at most 80 columns; ``found`` is as `summary.pairs` returns it."""
    number = found["n"].max()
    names = {
        "McNemar": "McNemar's exact test",
        "permutation": "permutation test (whole images together)",
    }
    tests = [names[name] for name in found["test"].dropna().unique()] or ["McNemar's exact test"]
    made = new_table(
        title=f"All pairs of methods on the same questions ({escape(found['kind'].iloc[0])})",
        caption=f"First minus second, in points of accuracy, on {number} questions, with its 95 % "
        f"interval (whole images resampled). p: {' or '.join(tests)}; Holm: adjusted for the "
        f"{len(found)} pairs of this table; - with several seeds.",
    )
    made.add_column("keep", justify="right")
    for name in ("first", "second"):
        made.add_column(name)
    made.add_column("difference", justify="right")
    for name, value in {"p": 1, "Holm": 2}.items():
        made.add_column(name, justify="right", value=value)
    for retention, group in found.groupby("retention", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            made.add_row(
                "" if position else percent(float(str(retention)), None),
                method_label(row["first"]),
                method_label(row["second"]),
                difference(row["difference"], row["low"], row["high"]),
                p_value(row["p"]),
                p_value(row["p_holm"]),
                end_section=position + 1 == len(group),
            )
    return made


@app.command()
def table(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of tokenprune compare.")
    ],
    latex: Annotated[
        bool,
        typer.Option(
            "--latex",
            help="Print LaTeX (booktabs) with intervals and ranks; bold: the best of a column, and "
            "all that its interval does not exclude.",
        ),
    ] = False,
    metric: options.Metric = None,
) -> None:
    """Print several comparisons side by side as one Markdown or LaTeX table.

    One row per method: accuracy in % and, in brackets, the decoder's FLOPs in % of those of the
    uncompressed model.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.report.latex import booktabs
        from tokenprune.experiments.report.side_by_side import markdown, read, side_by_side

        notes: list[str] = []
        if latex:
            typer.echo(booktabs([read(folder, notes, metric) for folder in folders]))
        else:
            typer.echo(markdown(side_by_side(folders, notes, metric)))
        for note in notes:
            typer.echo(f"note: {note}", err=True)
    raise typer.Exit(OK)
