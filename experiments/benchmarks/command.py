"""``tokenprune benchmark``: what tokenprune itself costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from tokenprune.console import (
    FAILED,
    OK,
    ManyValues,
    app,
    as_exit_status,
    new_table,
    progress,
    quiet,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "benchmark",
]


_Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME...",
        help="Which of startup, context, selection, loops, prefill, growth, sharing. "
        "[default: all]",
    ),
]


_Quick = Annotated[
    bool, typer.Option("--quick", help="Use toy sizes, to check that everything runs.")
]


_Against = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Compare with the figures of another file."),
]


_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File for the figures, .csv or .parquet. [default: a new file in runs/]",
    ),
]


_Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


@app.command(cls=ManyValues)
def benchmark(
    only: _Only = None,
    quick_run: _Quick = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    against: _Against = None,
    out: _Out = None,
    force: _Force = False,
) -> None:
    """Measure what selecting tokens and comparing methods cost, as ratios.

    Writes one row per figure, with machine, versions and date. Close other programs before you run
    it. The same command continues an interrupted run.

    Exit status: 0 done, 1 a figure is worse than in the file of --against, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.benchmarks.run import BENCHMARKS, BenchmarkRequest, run

        quiet()
        request = BenchmarkRequest(
            only=only or BENCHMARKS,
            quick=quick_run,
            device=device,
            against=against,
            out=out,
            force=force,
        )
        with progress() as bar:
            outcome = run(request, bar)
        console = Console()
        for name, group in outcome.tables["figures"].groupby("benchmark", sort=False):
            _show(console, str(name), group)
        path = outcome.folder / outcome.files[0]
        console.print(f"Written to {path}.", soft_wrap=True, highlight=False, markup=False)
        if "changes" in outcome.tables:
            _show_changes(console, outcome.tables["changes"], against)
    raise typer.Exit(FAILED if outcome.status == "failed" else OK)


def _show(console: Console, name: str, group: pd.DataFrame) -> None:
    shown = new_table(title=name)
    for column in ("case", "figure"):
        shown.add_column(column, prose=True)
    shown.add_column("value", justify="right")
    shown.add_column("goal", justify="right", value=1)
    shown.add_column("")
    before = None
    for row in group.itertuples():
        sign = "≤" if row.better == "low" else "≥"
        goal = "" if row.goal != row.goal else f"{sign} {row.goal:g}"
        verdict = "" if not goal else "met" if row.met else "MISSED"
        unit = "" if row.unit in ("ratio", "count", "exponent") else f" {row.unit}"
        case = "" if row.case == before else escape(str(row.case))
        shown.add_row(case, escape(str(row.figure)), f"{row.value:.3g}{unit}", goal, verdict)
        before = row.case
    console.print(shown, "")


def _show_changes(console: Console, moved: pd.DataFrame, against: Path | None) -> None:
    if not len(moved):
        console.print(f"No figure changed by more than 10 % since {against}.", soft_wrap=True)
        return
    shown = new_table(title=f"Since {against}")
    shown.add_column("benchmark", value=1)
    for column in ("case", "figure"):
        shown.add_column(column, prose=True)
    shown.add_column("earlier", value=2)
    for column in ("now", "ratio", ""):
        shown.add_column(column)
    for row in moved.itertuples():
        noise = f" ± {row.ratio * row.noise:.1g}" if row.noise else ""
        shown.add_row(
            str(row.benchmark), escape(str(row.case)), escape(str(row.figure)),
            f"{row.earlier:.3g}", f"{row.value:.3g}", f"{row.ratio:.3g}{noise}",
            "WORSE" if row.worse else "better",
        )  # fmt: skip
    console.print(shown)
