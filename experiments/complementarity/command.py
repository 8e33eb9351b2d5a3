"""``tokenprune complementarity``: thumbnail, crops or both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tokenprune.console import ManyValues, app, as_exit_status, new_table, progress, quiet
from tokenprune.experiments.common import options
from tokenprune.experiments.common.formatting import difference, p_value
from tokenprune.experiments.common.option_groups import (
    LOADING,
    WORDING,
    LoadingOptions,
    WordingOptions,
    grouped,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "complementarity",
    "table",
]


@app.command(cls=ManyValues)
@grouped
def complementarity(
    paths: options.Images = None,
    model: options.Model = "testbed-next",
    questions: options.Questions = None,
    data: options.Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    wording: WordingOptions = WORDING,
    loading: LoadingOptions = LOADING,
    out: options.Out = None,
    formats: options.Formats = None,
    width: options.Width = "page",
    no_title: options.NoTitle = False,
    max_new_tokens: options.MaxNewTokens = 8,
) -> None:
    """Answer questions from the thumbnail, from the crops, and from both.

    Prints the accuracy relative to the whole image for every kind of question. For images of your
    own without true answers, it is the agreement with the answer from the whole image. Single
    images only: videos and prompts of several images have no crops.

    Exit status: 0 done, 1 a part failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        from tokenprune.experiments.complementarity.run import ComplementarityRequest, run

        request = ComplementarityRequest(
            paths=tuple(paths or ()),
            model=model,
            questions=questions,
            data=data,
            batch_size=batch_size,
            seed=seed,
            **vars(wording),
            **vars(loading),
            out=out,
            figures=options.figures(formats, width, no_title),
            max_new_tokens=max_new_tokens,
        )
        quiet()
        started = options.stoppable()
        with progress() as bar:
            outcome = run(request, bar)
        found = outcome.tables.get("complementarity")
        if found is not None and len(found):
            Console().print(table(found), "")
        status = options.closing(outcome, started)
    raise typer.Exit(status)


def table(found: pd.DataFrame) -> Table:
    """At most 80 columns; ``found`` is as `complementarity.run.relative` returns it."""
    if "agreement" in found:
        return _agreement(found)
    made = new_table(
        title="Accuracy from one kind of view alone",
        caption="Relative: to the accuracy with thumbnail and crops, with its 95 % interval, in %. "
        "Difference in points with its interval (whole images resampled), p of McNemar's exact "
        "test, on the same questions.",
    )
    made.add_column("kind")
    made.add_column("seen")
    made.add_column("accuracy", justify="right")
    for name, value in {"relative": 2, "difference": 3, "p": 1}.items():
        made.add_column(name, justify="right", value=value)
    for kind, group in found.groupby("kind", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            whole = not position
            ends = [f"{100 * row[f'relative_{end}']:.0f}" for end in ("low", "high")]
            made.add_row(
                escape(str(kind)) if whole else "",
                row["shown"].removesuffix(" only"),
                f"{100 * row['accuracy']:.1f}",
                "" if whole else f"{100 * row['relative']:.1f} {'–'.join(ends)}",
                "" if whole else difference(row["difference"], row["low"], row["high"]),
                "" if whole else p_value(row["p"]),
                end_section=position + 1 == len(group),
            )
    return made


def _agreement(found: pd.DataFrame) -> Table:
    """The table where no true answer is known."""
    made = new_table(
        title="Agreement with the whole image from one kind of view alone",
        caption="Agreement: the share of answers that equal those from thumbnail and crops, with "
        "its 95 % interval, in %. Divergence of the first answer token from the whole image, in "
        "nats.",
    )
    for name in ("kind", "seen"):
        made.add_column(name)
    for name in ("n", "agreement", "divergence"):
        made.add_column(name, justify="right", no_wrap=True)
    for kind, group in found.groupby("kind", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            low, high = (f"{100 * row[f'relative_{end}']:.0f}" for end in ("low", "high"))
            made.add_row(
                "" if position else escape(str(kind)),
                row["shown"].removesuffix(" only"),
                str(row["n"]),
                f"{100 * row['agreement']:.1f}" + (f" {low}–{high}" if position else ""),
                f"{row['kl']:.3f}" if position else "",
                end_section=position + 1 == len(group),
            )
    return made
