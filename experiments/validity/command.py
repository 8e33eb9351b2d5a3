"""``tokenprune validity``: does a run rank methods as papers do?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.console import (
    OK,
    app,
    as_exit_status,
    complete_word,
    method_label,
    new_table,
    progress,
    quiet,
)
from tokenprune.experiments.common import options
from tokenprune.experiments.common.published_models import MODELS
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "disagreements",
    "tau_table",
    "validity",
]


_Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]",
        help="Folder of a comparison. [default: a new comparison of all methods that have "
        "published figures]",
    ),
]


_Published = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help=f"Model of the published figures: {', '.join(MODELS[:-1])} or {MODELS[-1]}. "
        "[default: the counterpart of the run's model]",
        autocompletion=complete_word(*MODELS),
    ),
]


_Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Without RUN: testbed, Hub id or local folder. [default: testbed-next]",
        callback=options.resolved,
    ),
]


_Out = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder of the tables. [default: the run folder]"),
]


@app.command()
def validity(
    folder: _Folder = None,
    published: _Published = None,
    model: _Model = None,
    questions: options.Questions = None,
    modality: options.Modality = None,
    batch_size: options.BatchSize = None,
    device: options.Device = None,
    seed: options.Seed = 0,
    out: _Out = None,
) -> None:
    """Compare the ranking of methods in a run with published rankings.

    Prints Kendall's tau-b per source and of all sources, with a bootstrap interval over the images
    of the run, and the pairs of methods whose order differs. Only methods of one table at one
    retention are compared. Without RUN, all methods that have published figures run first: minutes
    on a testbed.

    Exit status: 0 done, 1 a method failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status():
        from tokenprune.errors import UserError
        from tokenprune.experiments.validity.run import ValidityRequest, validity

        asked: dict[str, Any] = {
            "model": model,
            "questions": questions,
            "modality": modality,
            "batch_size": batch_size,
            "device": device,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        if folder is not None and given:
            names = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{names} belong to a new comparison; leave out either these or RUN.")
        request = ValidityRequest(folder=folder, published=published, seed=seed, out=out, **given)
        quiet()
        started = options.stoppable()
        with progress() as bar:
            outcome = validity(request, bar)
        if outcome.status == "interrupted":
            raise typer.Exit(options.interrupted(outcome))
        console = Console()
        console.print(tau_table(outcome.tables["validity"], outcome.about), "")
        opposite = disagreements(outcome.tables["pairs"])
        console.print(opposite if opposite.row_count else "No pair is in opposite order.", "")
        if folder is None:
            status = options.closing(outcome, started)
        else:
            for note in outcome.notes:
                typer.echo(f"note: {note}", err=True)
            typer.echo(options.written(outcome))
            status = OK
    raise typer.Exit(status)


def tau_table(found: pd.DataFrame, about: Any) -> Table:
    """At most 80 columns; ``found`` is as `run.taus` returns it."""
    made = new_table(
        title=escape(f"Ranking of methods: {about['run']} and published {about['published']}"),
        caption="Tau-b: Kendall's rank correlation of accuracy with the published average, 1 for "
        "the same order, 0 for unrelated ones, and its 95 % interval (images of the run resampled, "
        "published figures fixed). Keep: in the source, in the run.",
    )
    made.add_column("source")
    made.add_column("keep", justify="right")
    for value, name in enumerate(["methods", "pairs", "opposed", "tau-b"]):
        made.add_column(name, justify="right", value=value)
    for _, row in found.iterrows():
        whole = row["at"] != row["at"]
        name = row["source"] if whole else f"{row['source']}, {row['table']}"
        made.add_row(
            escape(name),
            "all" if whole else f"{percent(row['at'], None)}, {percent(row['retention'], None)}",
            *(str(row[name]) for name in ("methods", "pairs", "discordant")),
            f"{row['tau']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            end_section=whole,
        )
    return made


def disagreements(found: pd.DataFrame) -> Table:
    """The pairs whose order differs in some ranking; ``found`` is as `run.pairs_of` returns it."""
    made = new_table(
        title="Pairs in opposite order",
        caption="The first is better in the source, the second in the run. In: rankings that "
        "disagree, of those with both. Differences are means over these rankings, in points of the "
        "relative average and of accuracy. Sure: the share of resamples in which the run keeps its "
        "order, on average.",
    )
    for name in ("first", "second"):
        made.add_column(name)
    for value, name in enumerate(["in", "published", "run", "sure"]):
        made.add_column(name, justify="right", value=3 - value)
    total: Counter[frozenset[str]] = Counter(
        map(frozenset, zip(found["first"], found["second"], strict=True))
    )
    opposite = found[found["order"] == "disagrees"]
    groups = sorted(
        opposite.groupby(["first", "second"], sort=False),
        key=lambda item: item[1]["measured_difference"].mean(),
    )
    for (first, second), rows in groups:
        made.add_row(
            method_label(first),
            method_label(second),
            f"{len(rows)} of {total[frozenset((first, second))]}",
            f"{100 * rows['published_difference'].mean():+.1f}",
            f"{100 * rows['measured_difference'].mean():+.1f}",
            percent(rows["opposed"].mean(), 0),
        )
    return made
