"""``tokenprune masks``: draw what each method keeps of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

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
from tokenprune.experiments.common.option_groups import LOADING, LoadingOptions, grouped
from tokenprune.plugins import import_plugins
from tokenprune.spec import method_specs, ratios
from tokenprune.texts import printable
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from tokenprune.experiments.common.outcome import Outcome

__all__ = [
    "masks",
    "table",
]


_Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE... QUESTION",
        help="Image files and, last, a question about them. A folder, or a quoted pattern such as "
        "'photos/*.jpg', gives one figure for every image. With --video, the frames, a folder of "
        "frames, or an animated GIF. [default: an example of the testbed]",
    ),
]


_Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help="The question, instead of the last word; in a data file, of lines without one.",
    ),
]


_Data = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="File or folder of questions, as for compare; one figure each. Answers may be "
        "left out.",
    ),
]


_Images = Annotated[
    int | None,
    typer.Option(help="Number of figures of a folder, a pattern or --data. [default: all]"),
]


_Model = Annotated[
    str | None,
    typer.Option(
        help="As for compare, or timm/NAME. [default: testbed-next, or testbed-onevision for "
        "several images and videos]",
        callback=options.resolved,
    ),
]


_Methods = Annotated[
    list[str] | None,
    options.methods("As for compare.", "globalcom2 fastv; globalcom2 without a question"),
]


_Video = Annotated[bool, typer.Option("--video", help="Treat the images as the frames of a video.")]


_Frames = Annotated[
    int, typer.Option(help="Maximum number of frames; a longer video is sampled evenly.")
]


_Cuts = Annotated[
    bool,
    typer.Option("--cuts", help="Show what is kept after every cut, not only after the last one."),
]


_Pretrained = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Weights of a timm model. [default: random]"),
]


_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder for the figures. [default: a folder in runs/, named after the image]",
    ),
]


@app.command(cls=ManyValues)
@grouped
def masks(
    words: _Words = None,
    prompt: _Prompt = None,
    data: _Data = None,
    images: _Images = None,
    model: _Model = None,
    methods: _Methods = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("0.25")] = None,
    video: _Video = False,
    frames: _Frames = 8,
    max_image_pixels: options.MaxImagePixels = None,
    cuts: _Cuts = False,
    pretrained: _Pretrained = None,
    seed: Annotated[int, typer.Option(help="Seed of the example.")] = 0,
    loading: LoadingOptions = LOADING,
    max_new_tokens: options.MaxNewTokens = 8,
    out: _Out = None,
    force: options.Force = False,
    formats: options.Formats = None,
    width: options.Width = "page",
    no_title: options.NoTitle = False,
) -> None:
    """Draw what each method keeps of an image, and heat maps of scores, with the model's answers.

    Exit status: 0 done, 2 bad input.
    """
    quiet()
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        from tokenprune.experiments.masks.run import MasksRequest, run

        request = MasksRequest(
            words=tuple(words or ()),
            prompt=prompt,
            data=data,
            images=images,
            model=model or "",
            methods=tuple(method_specs(methods)) if methods else None,
            retention=ratios(retention or ["0.25"]),
            video=video,
            frames=frames,
            cuts=cuts,
            pretrained=pretrained,
            seed=seed,
            **vars(loading),
            max_new_tokens=max_new_tokens,
            out=out,
            force=force,
            figures=options.figures(formats, width, no_title),
        )
        with progress() as bar:
            outcome = run(request, bar)
    _show(outcome)
    raise typer.Exit(OK)


def _show(outcome: Outcome) -> None:
    """Print the table, what was left out, and where the files are."""
    Console().print(table(outcome), "")
    for line in (*options.gaps(outcome), options.written(outcome)):
        typer.echo(line)


def table(outcome: Outcome) -> Table:
    """What is kept of each view, and the answers; means where there are several prompts."""
    rows = outcome.tables["kept"]
    if "prompt" in rows:
        return _means(rows)
    made = new_table(title=escape(printable(outcome.about.get("question") or "No question")))
    made.add_column("keep", justify="right")
    made.add_column("method")
    made.add_column("answer", prose=True)
    made.add_column("tokens", justify="right", value=1)
    made.add_column("of each view", prose=True, value=2)
    for _, group in rows.groupby(["method", "retention", "acts"], sort=False):
        first = group.iloc[0]
        made.add_row(
            percent(first["retention"], None),
            method_label(first["method"]),
            escape(printable(first["answer"] or "-")),
            str(group["kept"].sum()),
            _shares(group["share"].tolist()),
        )
    if "truth" in outcome.about:
        made.caption = f"True answer: {escape(outcome.about['truth'])}"
    return made


def _means(rows: pd.DataFrame) -> Table:
    """Tokens and shares of every method, averaged over prompts."""
    count = rows["prompt"].nunique()
    made = new_table(
        title=f"Kept of {count} prompts",
        caption="Means over the prompts; thumbnail and crops, or frames: the share of their tokens "
        "that is kept. Every prompt is in kept.csv.",
    )
    kinds = list(rows["kind"].unique())
    made.add_column("keep", justify="right")
    made.add_column("method")
    for name in ("tokens", *(f"{kind}s" for kind in kinds)):
        made.add_column(name, justify="right")
    for _, group in rows.groupby(["method", "retention", "acts"], sort=False):
        first = group.iloc[0]
        sums = group.groupby("kind")[["kept", "tokens"]].sum()
        made.add_row(
            percent(first["retention"], None),
            method_label(first["method"]),
            f"{group['kept'].sum() / count:.1f}",
            *(f"{100 * sums.loc[kind, 'kept'] / sums.loc[kind, 'tokens']:.0f} %" for kind in kinds),
        )
    return made


def _shares(shares: Sequence[float]) -> str:
    # A crop of padding alone has no tokens.
    shown = ["-" if math.isnan(share) else f"{100 * share:.0f}" for share in shares[:10]]
    return f"{' '.join(shown)}{' …' if len(shares) > 10 else ''} %"
