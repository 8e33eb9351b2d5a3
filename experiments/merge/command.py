"""``tokenprune merge``: several runs of the same questions as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenprune.console import FAILED, OK, ManyValues, app, as_exit_status, method_label, new_table
from tokenprune.experiments.common import options
from tokenprune.experiments.common.formatting import difference, p_value
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "merge",
    "merged_table",
]


_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the merged run. [default: a folder in runs/, named after it]",
    ),
]


@app.command(cls=ManyValues)
def merge(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of tokenprune compare.")
    ],
    out: _Out = None,
    formats: options.Formats = None,
    width: options.Width = "page",
    no_title: options.NoTitle = False,
) -> None:
    """Merge runs of the same questions, made in several places, into a new run.

    The runs must agree in model, questions, prompt, dtype and code; otherwise the command names
    what differs. Writes answers, summary, paired tests of all methods and plots. The runs stay as
    they are.

    Exit status: 0 done, 1 an answer is missing, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.merge.run import MergeRequest, run

        request = MergeRequest(
            folders=tuple(folders), out=out, figures=options.figures(formats, width, no_title)
        )
        outcome = run(request)
        Console().print(merged_table(outcome.summary), "")
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(f"{outcome.answered} answers.\n{options.written(outcome)}")
    raise typer.Exit(OK if outcome.status == "complete" else FAILED)


def merged_table(summary: pd.DataFrame) -> Table:
    """Accuracies of all methods, and their paired differences from uniform."""
    from tokenprune.experiments.common.summary import OVERALL

    rows = summary[(summary["kind"] == OVERALL) & (summary["status"] == "ok")]
    rows = rows[(rows["retention"] < 1) | (rows["method"] == "uncompressed")]
    rows = rows.sort_values("asked_retention", ascending=False, kind="stable")
    table = new_table(
        title="All methods",
        caption="Accuracy in % with its 95 % confidence interval. Difference: from uniform at that "
        "retention ratio, in points, on the questions that both answered; p: of that difference.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    for name, value in {"accuracy": None, "difference": 2, "p": 1}.items():
        table.add_column(name, justify="right", value=value)
    for retention, group in rows.groupby("asked_retention", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            ends = (row[f"vs_uniform{end}"] for end in ("", "_low", "_high"))
            alone = row["label"] in ("uniform", "uncompressed") or row.isna()["vs_uniform"]
            table.add_row(
                "" if position else percent(float(str(retention)), None),
                method_label(row["label"]),
                f"{100 * row['accuracy']:.1f} "
                f"({100 * row['accuracy_low']:.1f}–{100 * row['accuracy_high']:.1f})",
                "" if alone else difference(*ends),
                "" if alone else p_value(row["vs_uniform_p"]),
                end_section=position + 1 == len(group),
            )
    return table
