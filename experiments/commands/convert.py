"""``tokenprune convert``: one method's retention in the terms of the others."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tokenprune.experiments.commands.efficiency import describe
from tokenprune.terminal import OK, app, as_exit_status, new_table, percent, quiet

__all__ = ["convert"]


@app.command()
def convert(
    method: Annotated[
        str,
        typer.Argument(
            help="A method with its retention, fastv:layer=2,retention=0.25 or fastv@0.25; or "
            "without one, if a target is given."
        ),
    ],
    config: Annotated[
        str, typer.Option("--config", "--model", help="As for efficiency.")
    ] = "llava-v1.6-vicuna-7b",
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="As for efficiency."),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="As for efficiency.")] = 0,
    tokens: Annotated[
        float | None,
        typer.Option(help="Find the retention with this many visual tokens a layer on average."),
    ] = None,
    flops: Annotated[
        float | None,
        typer.Option(help="Find the retention that takes this share of the prefill's FLOPs."),
    ] = None,
    equivalent: Annotated[
        float | None,
        typer.Option(
            help="Find the retention whose layer average is that of a method in front of the "
            "language model that keeps this share."
        ),
    ] = None,
) -> None:
    """Translate between retention, tokens a layer, FLOPs and the equivalent pre-LLM retention.

    Tokens are visual ones with separators that enter a decoder layer, averaged over all layers;
    merged tokens count. Text is left out of them.

    Exit status: 0 done, 2 bad input or a target that cannot be met.
    """
    with as_exit_status():
        from tokenprune.compressor import parse
        from tokenprune.errors import UserError
        from tokenprune.experiments import efficiency as experiment
        from tokenprune.experiments.translation import MEASURES, solve, translate

        quiet()
        size = None if image_size is None else experiment.read_size(image_size)
        targets = {"tokens": tokens, "flops": flops, "equivalent": equivalent}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join('--' + name for name in given)}.")
        own = experiment.says_retention(method)
        if own == bool(given):
            raise UserError(
                f"{method!r} needs a retention (fastv@0.25) or a target (--tokens, --flops or "
                "--equivalent), and not both."
            )
        prompt = experiment.prompt_of(config, size, text=text_tokens)
        found = parse(method) if own else parse(method, retention=0.5)
        prompt.adapter.check(found)
        for name, value in given.items():
            found = solve(prompt, found, value, next(m for m in MEASURES if m == name)).method
        terms = translate(prompt, found)
        mark = prompt.forecast(found).mark
    table = new_table("", "", show_header=False)
    table.add_row("method", found.label)
    table.add_row("retention", f"{found.retention:g}")
    table.add_row("patch tokens at the end", f"{mark}{terms['kept_patches']:.0f}")
    table.add_row("separators at the end", f"{terms['kept_separators']:.0f}")
    table.add_row("tokens a layer, mean over layers", f"{mark}{terms['tokens']:.2f}")
    table.add_row("  with text", f"{mark}{terms['tokens_with_text']:.2f}")
    table.add_row("FLOPs of the prefill", f"{mark}{percent(terms['flops'], 2)}")
    table.add_row("equivalent pre-LLM retention", f"{mark}{terms['equivalent']:.4f}")
    console = Console(highlight=False)
    console.print(describe(config, prompt), soft_wrap=True, markup=False)
    console.print(table)
    raise typer.Exit(OK)
