"""``tokenprune crop-importance``: what the thumbnail says of the crops, and what each is worth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.console import app, as_exit_status, new_table, progress, quiet
from tokenprune.experiments.common import options
from tokenprune.experiments.common.formatting import difference, p_value

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "crop_importance",
    "table",
]


@app.command("crop-importance")
def crop_importance(
    model: options.Model = "testbed-next",
    score: Annotated[
        str,
        typer.Option(
            metavar="SIGNAL",
            help="What the thumbnail is scored by: saliency, cls_logits, cls_attention, received "
            "or head_attention.",
        ),
    ] = "saliency",
    layer: Annotated[int, typer.Option(help="Encoder layer of the score.")] = -1,
    seeds: Annotated[int, typer.Option(help="How many random crops to drop in turn.")] = 1,
    questions: options.Questions = None,
    data: options.Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = None,
    max_new_tokens: options.MaxNewTokens = 8,
) -> None:
    """Drop the highest-, the lowest- or a random crop by the thumbnail's mean score there.

    Prints what each costs, kind of question by kind of question, and separately where the object
    asked about lies in the dropped crop (known on the testbed, or from "place" in --data).

    Exit status: 0 done, 1 a part failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        from tokenprune.experiments.common.setting import Request
        from tokenprune.experiments.crop_importance.run import crop_importance

        request = Request(
            model=model,
            questions=questions,
            data=data,
            batch_size=batch_size,
            seed=seed,
            seeds=seeds,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            out=out,
            max_new_tokens=max_new_tokens,
        )
        quiet()
        started = options.stoppable()
        with progress() as report:
            result = crop_importance(request, report, score=score, layer=layer)
        if len(result.table):
            Console().print(table(result.table), "")
        if result.uneven:
            typer.echo(
                f"In {result.uneven} of {result.crops['image_id'].nunique()} images the crops' "
                "regions of the thumbnail differ in size: crops are ranked by the mean over theirs."
            )
        if result.left_out:
            typer.echo(f"{result.left_out} questions were left out: fewer than two crops.")
        files = "crop_importance.csv, crops.csv, objects.csv, answers.parquet, plots/"
        status = options.closing(result.outcome, started, files)
    raise typer.Exit(status)


def table(found: pd.DataFrame) -> Table:
    """At most 80 columns; ``found`` is as `experiments.crop_importance.drops` returns it."""
    made = new_table(
        title="Accuracy lost without a crop",
        caption="Loss in points with its 95 % interval, against the whole image and against "
        "dropping a random crop (whole images resampled); p of McNemar's exact test, on the same "
        "questions, - with several seeds.",
    )
    made.add_column("questions")
    made.add_column("n", justify="right")
    made.add_column("dropped")
    for name in ("loss", "p", "beyond random", "p"):
        made.add_column(name, justify="right", no_wrap=True)
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
