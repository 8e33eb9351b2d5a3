"""``tokenprune published``: what papers state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    complete_word,
    method_label,
    new_table,
)
from tokenprune.experiments.common.published_models import MODELS
from tokenprune.spec import ratios, split
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "published",
    "tables",
]


_Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help=f"{', '.join(MODELS[:-1])} or {MODELS[-1]}, or the Hub id of its checkpoint.",
        autocompletion=complete_word(*MODELS),
    ),
]


_Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "-m", metavar="NAME...", help="Only these methods. [default: all]"),
]


_Benchmarks = Annotated[
    list[str] | None,
    typer.Option(
        "--benchmark", "-b", metavar="NAME...", help="Show the scores on these benchmarks, too."
    ),
]


_Retention = Annotated[
    list[str] | None,
    typer.Option(
        "--retention", "-r", metavar="R...", help="Only figures near these ratios. [default: all]"
    ),
]


_Csv = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the figures, with their sources, to this CSV file."),
]


_MEANING = (
    "Average: in % of the uncompressed model, the mean over the benchmarks that all methods of the "
    "table report at that retention. Stated: the average that the source states, in % of that of "
    "the uncompressed model. Tokens are counted as in the source, for methods inside the language "
    "model usually as the average over its layers."
)


@app.command(cls=ManyValues)
def published(
    model: _Model = "llava-next-7b",
    methods: _Methods = None,
    benchmark: _Benchmarks = None,
    retention: _Retention = None,
    out: _Csv = None,
) -> None:
    """Print what papers state about methods on one model, with the source of each figure.

    Averages are relative to the uncompressed model: computed from the benchmarks of the table, and
    as the source states them.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.errors import UserError
        from tokenprune.experiments.published.run import PublishedRequest, published

        chosen = {"--methods": split(methods or ()), "--benchmark": split(benchmark or ())}
        for option, given in (("--methods", methods), ("--benchmark", benchmark)):
            if given and not chosen[option]:
                raise UserError(f"{option} needs at least one value.")
        request = PublishedRequest(
            model=model,
            methods=tuple(chosen["--methods"]),
            benchmarks=tuple(chosen["--benchmark"]),
            retention=ratios(retention) if retention else (),
            out=out,
        )
        _, found = published(request)
        console = Console()
        for table in tables(found, request.benchmarks):
            console.print(table, "")
        typer.echo(_MEANING)
        if out is not None:
            typer.echo(f"Written to {out}")
    raise typer.Exit(OK)


def tables(found: pd.DataFrame, benchmarks: Sequence[str] = ()) -> Iterator[Table]:
    """One table per source; ``found`` is as `run.published` returns it."""
    for (source, place), group in found.groupby(["source", "table"], sort=False):
        first = group.iloc[0]
        made = new_table(
            title=escape(f"{source}, {place}: {first['address']}"),
        )
        made.add_column("keep", justify="right")
        made.add_column("tokens", justify="right")
        made.add_column("method")
        for value, name in enumerate(["average", "stated", *benchmarks]):
            made.add_column(name, justify="right", value=value)
        for retention, rows in group.groupby("retention", sort=False):
            ordered = rows.sort_values("average", ascending=False)
            for position, (_, row) in enumerate(ordered.iterrows()):
                made.add_row(
                    "" if position else percent(float(str(retention)), None),
                    "" if position or row["tokens"] != row["tokens"] else f"{row['tokens']:.0f}",
                    method_label(row["label"]),
                    *(f"{100 * row[name]:.1f}" for name in ("average", "stated")),
                    *(_score(row[name]) for name in benchmarks),
                    end_section=position + 1 == len(ordered),
                )
        yield made


def _score(value: float) -> str:
    return "-" if value != value else f"{value:g}"
