"""``tokenprune export``: a folder with which a method of a run is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenprune.console import OK, app, as_exit_status, complete_method, quiet
from tokenprune.experiments.common import options

__all__ = ["export"]


_Method = Annotated[
    str,
    typer.Option(
        metavar="SPEC", help="The method, as the run calls it.", autocompletion=complete_method
    ),
]


_Retention = Annotated[
    float | None,
    typer.Option(
        "--retention", "-r", metavar="R", help="Its retention ratio. [default: the only one]"
    ),
]


_Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="[default: a new folder in runs/]")
]


_Weights = Annotated[
    bool,
    typer.Option(
        "--weights",
        help="Copy the model too, with the names that vLLM gives to weights. A testbed is always "
        "copied.",
    ),
]


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_FOLDER", help="Run folder of tokenprune compare.")
    ],
    method: _Method,
    retention: _Retention = None,
    weights: _Weights = False,
    out: _Out = None,
    force: options.Force = False,
) -> None:
    """Write a folder with which a method of a run is served by vLLM.

    It has the spec, the versions, the measured accuracy and cost, an example client, and the
    commands that start the server.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.export.run import ExportRequest, run

        quiet()
        made = run(
            ExportRequest(
                folder=folder,
                method=method,
                retention=retention,
                out=out,
                weights=weights,
                force=force,
            )
        )
        typer.echo(f"Written to {made.folder}. In that folder:")
        for command in made.about["commands"]:
            typer.echo(f"  {command}")
    raise typer.Exit(OK)
