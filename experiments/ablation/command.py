"""``tokenprune ablation``: sweep options of methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.console import ManyValues, app, as_exit_status, new_table, progress, quiet
from tokenprune.experiments.common import options
from tokenprune.experiments.common.formatting import difference, p_value
from tokenprune.experiments.common.option_groups import (
    DRAWING,
    JOB,
    LOADING,
    WORDING,
    DrawingOptions,
    JobOptions,
    LoadingOptions,
    WordingOptions,
    grouped,
)
from tokenprune.plugins import import_plugins
from tokenprune.spec import ratios
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ablation",
    "tables",
]


_Sweeps = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SWEEP]...",
        help="Before the options: method:option=value,value;option=value,value. Options "
        "are separated by ';', values by ','; 'default' is the default of an option.",
    ),
]


@app.command(cls=ManyValues)
@grouped
def ablation(
    sweeps: _Sweeps = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Also sweep the options of GlobalCom², one by one.")
    ] = False,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("0.25")] = None,
    model: options.Model = "testbed-next",
    questions: options.Questions = None,
    data: options.Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    modality: options.Modality = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    wording: WordingOptions = WORDING,
    loading: LoadingOptions = LOADING,
    out: options.Out = None,
    drawing: DrawingOptions = DRAWING,
    job: JobOptions = JOB,
    max_new_tokens: options.MaxNewTokens = 8,
) -> None:
    """Sweep options of methods.

    The sweep 'globalcom2:alpha=0,0.5,1;tau=1,10' runs six settings. Prints every setting with its
    difference from the first one on the same questions, and draws curves, or heat maps where two
    options are swept.

    Exit status: 0 done, 1 a setting failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        from tokenprune.experiments.ablation.run import PAPER, AblationRequest, run

        request = AblationRequest(
            cluster=job.cluster,
            sweeps=tuple(dict.fromkeys([*(sweeps or ()), *(PAPER if paper else ())])),
            retention=ratios(retention or ["0.25"]),
            model=model,
            questions=questions,
            data=data,
            modality=modality,  # type: ignore[arg-type]  # checked with the rest
            batch_size=batch_size,
            seed=seed,
            **vars(wording),
            **vars(loading),
            out=out,
            figures=drawing.figures,
            max_new_tokens=max_new_tokens,
        )
        quiet()
        started = options.stoppable()
        with progress(job.log_file) as bar:
            outcome = run(request, bar)
        for table in tables(outcome.tables["ablation"]) if "ablation" in outcome.tables else ():
            Console().print(table, "")
        status = options.closing(outcome, started)
    raise typer.Exit(status)


def tables(found: pd.DataFrame) -> Iterator[Table]:
    """A table of at most 80 columns for every sweep; ``found`` as `differences` returns it."""
    if found.empty:
        return
    for _, sweep in found.groupby("sweep", sort=False):
        first, second = sweep["first"].iloc[0], sweep["second"].iloc[0]
        made = new_table(title=escape(f"{sweep['method'].iloc[0]}, by {first} {second}".strip()))
        made.add_column("keep", justify="right")
        made.add_column(escape(first))
        if second:
            made.add_column(escape(second))
        made.add_column("accuracy", justify="right")
        values = {"to the first": 5, "p": 3, "Holm": 4, "KL": 1, "tokens": 2}
        for name, value in values.items():
            made.add_column(name, justify="right", value=value)
        for retention, group in sweep.groupby("retention", sort=False):
            for position, (_, row) in enumerate(group.iterrows()):
                alone = math.isnan(row["low"])
                made.add_row(
                    "" if position else percent(float(str(retention)), None),
                    escape(row["first_value"]),
                    *([escape(row["second_value"])] if second else []),
                    f"{100 * row['accuracy']:.1f}",
                    "" if alone else difference(row["difference"], row["low"], row["high"]),
                    "" if alone else p_value(row["p"]),
                    "" if alone else p_value(row["p_holm"]),
                    f"{row['kl']:.3f}",
                    f"{row['visual_tokens']:.1f}",
                    end_section=position + 1 == len(group),
                )
        yield made
