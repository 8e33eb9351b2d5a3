"""``tokenprune masks``: what each method keeps of a picture, on the command line."""

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
from tokenprune.plugins import import_plugins
from tokenprune.spec import method_specs, ratios
from tokenprune.texts import printable
from tokenprune.units import percent

if TYPE_CHECKING:
    from rich.table import Table

    from tokenprune.experiments.masks.look import Seen

__all__ = [
    "masks",
    "table",
]


@app.command(cls=ManyValues)
def masks(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION",
            help="Image files and, last, what to ask about them. With --video the frames, or a "
            "folder of them, or an animated GIF. [default: an example of the testbed]",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="As of compare, or timm/NAME. [default: testbed-next, or testbed-onevision for "
            "several images and videos]"
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        options.methods("As for compare.", "globalcom2 fastv; globalcom2 without a question"),
    ] = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("0.25")] = None,
    video: Annotated[
        bool, typer.Option("--video", help="The images are a video's frames.")
    ] = False,
    frames: Annotated[
        int, typer.Option(help="Of a longer video, take so many frames, evenly spaced.")
    ] = 8,
    max_image_pixels: options.MaxImagePixels = None,
    cuts: Annotated[
        bool, typer.Option("--cuts", help="Show what is left after every cut, not only at last.")
    ] = False,
    pretrained: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Weights of a timm model; without, they are random."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the example.")] = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: options.MaxNewTokens = 8,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="[default: one in runs/, named after the picture]"),
    ] = None,
) -> None:
    """Draw what each method keeps of a picture, and what the model then answers.

    Writes masks (dropped patches pale, the share kept in the corner of every crop) and heat (the
    vision tower's saliency, and the scores of methods that score) as PNG and PDF, and kept.csv.

    Exit status: 0 done, 2 bad input.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        from tokenprune.experiments.masks.run import Request, render

        quiet()
        request = Request(
            words=tuple(words or ()),
            model=model,
            methods=tuple(method_specs(methods)) if methods else None,
            retention=ratios(retention or ["0.25"]),
            video=video,
            frames=frames,
            cuts=cuts,
            pretrained=pretrained,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            out=out,
        )
        with progress() as report:
            seen, folder, files, skipped = render(request, report)
        console = Console()
        console.print(table(seen), "")
        for name, why in skipped.items():
            typer.echo(f"SKIPPED {name}: {why}")
        typer.echo(f"Written to {folder}: {', '.join(files)}")
    raise typer.Exit(OK)


def table(seen: Seen) -> Table:
    """What was kept of each view, and the answers."""
    made = new_table(title=escape(printable(seen.question or "No question")))
    made.add_column("keep", justify="right")
    made.add_column("method", overflow="fold")
    made.add_column("answer", overflow="fold")
    made.add_column("tokens", justify="right")
    made.add_column("of each view", overflow="fold")
    rows = seen.table()
    for _, group in rows.groupby(["method", "retention", "acts"], sort=False):
        first = group.iloc[0]
        made.add_row(
            percent(first["retention"], None),
            method_label(first["method"]),
            escape(printable(first["answer"] or "-")),
            str(group["kept"].sum()),
            _shares(group["share"].tolist()),
        )
    if seen.truth is not None:
        made.caption = f"True answer: {escape(seen.truth)}"
    return made


def _shares(shares: Sequence[float]) -> str:
    # A crop that is padding all over has no tokens.
    shown = ["-" if math.isnan(share) else f"{100 * share:.0f}" for share in shares[:10]]
    return f"{' '.join(shown)}{' …' if len(shares) > 10 else ''} %"
