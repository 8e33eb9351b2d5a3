"""``tokenprune choose``: the method of a run that meets a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenprune.console import (
    FAILED,
    OK,
    Plugin,
    app,
    as_exit_status,
    complete_word,
    method_label,
    new_table,
)
from tokenprune.plugins import import_plugins
from tokenprune.units import bytes_unit, percent

if TYPE_CHECKING:
    from tokenprune.experiments.choose.run import Choice

__all__ = [
    "choice_table",
    "choose",
]


_Folder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of tokenprune compare.")]


_Milliseconds = Annotated[
    float | None, typer.Option(metavar="MS", help="Longest time, in milliseconds.")
]


_Time = Annotated[
    str,
    typer.Option(
        metavar="prefill|total|token",
        help="Which time: until the first token, of a whole answer, or of each further token.",
        autocompletion=complete_word("prefill", "total", "token"),
    ),
]


_Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Largest peak of memory, such as 12GB.")
]


_Flops = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Largest share of the FLOPs of the uncompressed prefill."),
]


_Accuracy = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|Nx",
        help="Least accuracy: 0.9, or 0.95x for 95 % of the uncompressed model's.",
    ),
]


@app.command()
def choose(
    folder: _Folder,
    max_ms: _Milliseconds = None,
    time: _Time = "prefill",
    max_memory: _Memory = None,
    max_flops: _Flops = None,
    min_accuracy: _Accuracy = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    plugin: Plugin = None,
) -> None:
    """Choose a method and a retention ratio of a run for a budget.

    Prints the cells that no other beats (the Pareto frontier), the most accurate one within the
    limits, how often it wins when questions and timed runs are resampled, and the Python lines that
    use it. With --min-accuracy alone it is the cheapest one. Times and memory are those of compare
    --measure.

    Exit status: 0 done, 1 nothing meets the limits, 2 bad input.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.experiments.choose.run import (
            ChooseRequest,
            accuracy_limit,
            byte_limit,
            run,
        )

        least, relative = (None, False) if min_accuracy is None else accuracy_limit(min_accuracy)
        request = ChooseRequest(
            folder=folder,
            max_ms=max_ms,
            time=time,  # type: ignore[arg-type]  # checked with the rest
            max_memory=None if max_memory is None else byte_limit(max_memory),
            max_flops=max_flops,
            min_accuracy=least,
            relative=relative,
            seed=seed,
        )
        choice = run(request)
        _show(choice, time)
    raise typer.Exit(FAILED if choice.pick is None else OK)


def _show(choice: Choice, time: str) -> None:
    Console().print(choice_table(choice, time), "")
    for note in choice.notes:
        typer.echo(f"note: {note}", err=True)
    for name, why in choice.left_out.items():
        typer.echo(f"LEFT OUT {name}: {why}")
    if choice.pick is None:
        typer.echo(
            f"No cell of the run meets the limits; in {percent(choice.none, 0)} of the resamples "
            "none does."
        )
        return
    cell = choice.cells.loc[choice.pick]
    name = cell["label"]
    if name != "uncompressed":
        name = f"{name} at {cell['retention']:g}"
    typer.echo(f"Pick: {name}. It wins in {percent(cell['wins'], 0)} of the resamples.")
    rest = choice.cells.drop(index=choice.pick)
    second = rest["wins"].idxmax() if len(rest) else None
    if second is not None and rest.loc[second, "wins"] > 0:
        other = rest.loc[second]
        typer.echo(
            f"Next: {other['label']} at {other['retention']:g}, in {percent(other['wins'], 0)}."
        )
    typer.echo(f"\n{choice.lines}")


def choice_table(choice: Choice, time: str) -> Table:
    """The Pareto frontier, cheapest first, as a table of at most 80 columns."""
    cells = choice.cells[choice.cells["frontier"]]
    cells = cells.sort_values(["accuracy", "flops"], ascending=False, kind="stable")
    known = cells["bytes"].notna().any()
    unit, scale = bytes_unit(cells["bytes"].max()) if known else ("", 1)
    where = f" Times and memory: {choice.device}, {time}." if choice.device else ""
    table = new_table(
        title="Pareto frontier",
        caption=f"No cell is better in one column and at least as good in the others that are "
        f"limited. {choice.measure.capitalize()} in % with its 95 % confidence interval, on "
        f"{choice.questions} questions. FLOPs: prefill, in % of uncompressed. *: the pick. Wins: "
        f"how often it is the pick when images and timed runs are resampled.{where}",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    table.add_column(choice.measure, justify="right")
    columns = {"ms": ("ms", 1)} if cells["ms"].notna().any() else {}
    columns |= {unit: ("bytes", 2)} if known else {}
    for title, (_, value) in columns.items():
        table.add_column(title, justify="right", value=value)
    table.add_column("FLOPs", justify="right", value=3)
    table.add_column("wins", justify="right")
    for index, row in cells.iterrows():
        low, high = 100 * row["accuracy_low"], 100 * row["accuracy_high"]
        own = {"ms": f"{row['ms']:.4g}", "bytes": f"{row['bytes'] / scale:.3g}"}
        mark = " *" if index == choice.pick else ""
        table.add_row(
            percent(row["retention"], None),
            method_label(row["label"]) + mark,
            f"{100 * row['accuracy']:.1f} ({low:.1f}–{high:.1f})",
            *(own[name] for name, _ in columns.values()),
            percent(row["flops"], 0),
            percent(row["wins"], 0),
        )
    return table
