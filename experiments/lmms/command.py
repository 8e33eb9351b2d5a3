"""``tokenprune import-lmms``: logs of lmms-eval as a run folder."""

from __future__ import annotations

import math
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
from tokenprune.experiments.common.formatting import arrow, arrows
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["import_lmms", "results_table"]


_Logs = Annotated[
    list[Path],
    typer.Argument(
        metavar="LOGDIR...",
        help="Folders that lmms-eval received as --output_path, run with --log_samples.",
    ),
]


_Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="TASK=METRIC...",
        help="Metric of lmms-eval that scores a task. [default: the first one of the task]",
    ),
]


_Images = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder given as save_images, for the masks of tokenprune report."
    ),
]


@app.command("import-lmms", cls=ManyValues)
def import_lmms(
    logs: _Logs,
    metric: _Metrics = None,
    images: _Images = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    out: options.Out = None,
    formats: options.Formats = None,
    width: options.Width = "page",
    no_title: options.NoTitle = False,
) -> None:
    """Turn logs of lmms-eval into a run folder.

    Every log of a model tokenprune_... is a method at a retention ratio. The answers are paired by
    document, and scored as lmms-eval scored them. The folder is that of a comparison: report,
    pairs and table read it.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.errors import UserError
        from tokenprune.experiments.lmms.run import ImportRequest, run

        quiet()
        metrics = {}
        for text in metric or ():
            task, equals, name = text.partition("=")
            if not (task and equals and name):
                raise UserError(f"--metric must be TASK=METRIC, got {text!r}.")
            metrics[task] = name
        request = ImportRequest(
            logs=tuple(logs),
            metrics=metrics,
            images=images,
            seed=seed,
            out=out,
            figures=options.figures(formats, width, no_title),
        )
        with progress() as bar:
            outcome = run(request, bar)
        Console().print(results_table(outcome.summary), "")
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(options.written(outcome))
    raise typer.Exit(OK)


def results_table(summary: pd.DataFrame) -> Table:
    """Accuracy, agreement and cost of every method on every task; ``summary`` as in the folder."""
    table = new_table(
        title="Answers of lmms-eval",
        caption="Accuracy: mean score of lmms-eval in % with its 95 % interval. "
        f"{arrows(summary)} Same: answers in % that equal those of the uncompressed model. "
        "Tokens: layer average of visual tokens. Of all: FLOPs of the decoder's prefill in % of "
        "the uncompressed ones.",
    )
    table.add_column("task")
    table.add_column("keep", justify="right")
    table.add_column("method")
    for name, value in {"accuracy": None, "": None, "same": 2, "tokens": 3, "of all": 4}.items():
        table.add_column(name, justify="right", value=value)
    for kind, rows in summary.groupby("kind", sort=False):
        for position, (_, row) in enumerate(rows.iterrows()):
            table.add_row(
                "" if position else escape(str(kind)),
                percent(row["retention"], None),
                method_label(row["label"]),
                _accuracy(row),
                arrow(row),
                _shown(100 * row["agreement"]),
                _shown(row["layer_average"]),
                _shown(100 * row["flops"] / row["uncompressed_flops"], " %"),
                end_section=position + 1 == len(rows),
            )
    return table


def _accuracy(row: pd.Series) -> str:
    """The accuracy in % and its interval; a dash if no answer has a score."""
    low, high = (_shown(100 * row[f"accuracy_{end}"], decimals=0) for end in ("low", "high"))
    value = _shown(100 * row["accuracy"])
    return value if value == "-" else f"{value} {low}–{high}"


def _shown(value: float, unit: str = "", decimals: int = 1) -> str:
    """A figure; a dash if it is unknown."""
    return "-" if math.isnan(value) else f"{value:.{decimals}f}{unit}"
