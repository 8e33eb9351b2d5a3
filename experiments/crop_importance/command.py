"""``tokenprune crop-importance``: the accuracy lost by dropping a crop."""

from __future__ import annotations

import math
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

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "crop_importance",
    "table",
]


_Score = Annotated[
    str,
    typer.Option(
        metavar="SIGNAL",
        help="Signal that scores the thumbnail: saliency, cls_logits, cls_attention, received "
        "or head_attention.",
    ),
]


@app.command("crop-importance", cls=ManyValues)
@grouped
def crop_importance(
    paths: options.Images = None,
    model: options.Model = "testbed-next",
    score: _Score = "saliency",
    layer: Annotated[
        int, typer.Option(help="Layer of the vision encoder that gives the signal.")
    ] = -1,
    seeds: Annotated[int, typer.Option(help="Number of random draws of the dropped crop.")] = 1,
    questions: options.Questions = None,
    data: options.Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    wording: WordingOptions = WORDING,
    loading: LoadingOptions = LOADING,
    out: options.Out = None,
    drawing: DrawingOptions = DRAWING,
    job: JobOptions = JOB,
    max_new_tokens: options.MaxNewTokens = 8,
) -> None:
    """Drop the highest-scored, the lowest-scored or a random crop, by the thumbnail's mean score.

    Prints the loss of accuracy for each, by kind of question, and separately for questions whose
    object is in the dropped crop (known on the testbed, or from "place" in --data). For images of
    your own without true answers, it is the share of answers that change.

    Exit status: 0 done, 1 a part failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        from tokenprune.experiments.crop_importance.run import CropImportanceRequest, run

        request = CropImportanceRequest(
            cluster=job.cluster,
            paths=tuple(paths or ()),
            model=model,
            score=score,
            layer=layer,
            seeds=seeds,
            questions=questions,
            data=data,
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
        if len(found := outcome.tables.get("crop_importance", ())):
            Console().print(table(found), "")
        status = options.closing(outcome, started)
    raise typer.Exit(status)


def table(found: pd.DataFrame) -> Table:
    """At most 80 columns; ``found`` is as `crop_importance.run.drops` returns it."""
    known = "accuracy" in found
    what = "Loss" if known else "Answers that change,"
    made = new_table(
        title="Accuracy lost without a crop" if known else "Answers that change without a crop",
        caption=f"{what} in points with its 95 % interval, against the whole image and against "
        "dropping a random crop (whole images resampled); p of McNemar's exact test, on the same "
        f"questions, - with several seeds{'' if known else ' or without true answers'}.",
    )
    made.add_column("questions")
    made.add_column("n", justify="right", value=1)
    made.add_column("dropped")
    made.add_column("loss" if known else "changed", justify="right")
    for name, value in {"p": 3, "beyond random": 4, "its p": 2}.items():
        made.add_column(name, justify="right", value=value)
    for group, part in found.groupby("group", sort=False):
        for position, (_, row) in enumerate(part.iterrows()):
            beyond = [-row[f"vs_random{end}"] for end in ("", "_high", "_low")]
            alone = math.isnan(beyond[0])
            made.add_row(
                "" if position else escape(str(group)),
                str(row["n"]),
                row["dropped"],
                difference(row["drop"], row["low"], row["high"], decimals=0),
                p_value(row["p"]),
                "" if alone else difference(*beyond, decimals=0),
                "" if alone else p_value(row["vs_random_p"]),
                end_section=position + 1 == len(part),
            )
    return made
