"""``tokenprune pairs``: any two methods of a run against each other."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.terminal import (
    OK,
    ManyValues,
    app,
    as_exit_status,
    method_label,
    new_table,
    percent,
    split_specs,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["difference", "p_value", "pairs", "table"]


@app.command(cls=ManyValues)
def pairs(
    folder: Annotated[Path, typer.Argument(help="Folder of a run.")],
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", "-m", metavar="LABEL...", help="Only these. [default: all]"),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="Only questions of this kind. [default: all questions]")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the bootstrap samples.")] = 0,
) -> None:
    """Compare every two methods of a run on the questions that both answered.

    Prints the difference of their accuracies with its 95 % bootstrap interval and the p-value of
    McNemar's exact test, as it is and adjusted for the number of pairs (Holm), and writes
    pairs.csv to the folder.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.errors import UserError
        from tokenprune.experiments.csv_files import write_csv
        from tokenprune.experiments.files import check_file, replace_file
        from tokenprune.experiments.intervals import OVERALL
        from tokenprune.experiments.limits import check_number
        from tokenprune.experiments.reading import answers_of

        check_number("seed", seed)
        kind = kind or OVERALL
        labels = tuple(split_specs(methods or ()))
        if methods and not labels:
            raise UserError("--methods needs at least one value.")
        notes: list[str] = []
        answers = answers_of(folder, notes)
        path = folder / ("pairs.csv" if kind == OVERALL else f"pairs-{_file_part(kind)}.csv")
        found = _found(answers, labels, kind, seed)
        check_file(path)
        with replace_file(path) as temporary:
            write_csv(found, temporary)
        console = Console()
        console.print(table(found))
        for note in notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"Written to {path}")
    raise typer.Exit(OK)


def _file_part(kind: str) -> str:
    """``kind`` where it is a plain word, otherwise a digest: data must not name files."""
    if re.fullmatch(r"[\w-]{1,40}", kind, re.ASCII):
        return kind
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def _found(answers: pd.DataFrame, labels: tuple[str, ...], kind: str, seed: int) -> pd.DataFrame:
    """The pairs.  Raises `UserError` for a label or a kind that the run does not have."""
    from tokenprune.errors import UserError, unknown
    from tokenprune.experiments import intervals

    for name in labels:
        if name not in set(answers["label"]):
            raise unknown("method of the run", name, answers["label"].unique())
    if kind != intervals.OVERALL and kind not in set(answers["kind"]):
        raise unknown("kind of question", kind, answers["kind"].unique())
    found = intervals.pairs(answers, seed=seed, labels=labels, kind=kind)
    if found.empty:
        raise UserError(
            "no two methods of the run answered the same questions at the same retention; give at "
            "least two that did."
        )
    return found


def table(found: pd.DataFrame) -> Table:
    """The pairs as a table of at most 80 columns; ``found`` is as `intervals.pairs` returns it."""
    number = found["n"].max()
    made = new_table(
        title=f"Every two methods on the same questions ({escape(found['kind'].iloc[0])})",
        caption=f"First minus second, in points of accuracy, on {number} questions, with its 95 % "
        "interval (whole images resampled). p: McNemar's exact test; Holm: adjusted for the "
        f"{len(found)} pairs of this table; - with several seeds.",
    )
    made.add_column("keep", justify="right")
    for name in ("first", "second"):
        made.add_column(name, overflow="fold")
    for name in ("difference", "p", "Holm"):
        made.add_column(name, justify="right", no_wrap=True)
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


def difference(value: float, low: float, high: float, *, decimals: int = 1) -> str:
    """A difference of accuracies in points and its interval, whose ends have ``decimals``."""

    def points(share: float, digits: int) -> str:
        return f"{round(100 * share, digits) + 0.0:+.{digits}f}"  # no minus in front of zero

    return f"{points(value, 1)} ({points(low, decimals)} to {points(high, decimals)})"


def p_value(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
