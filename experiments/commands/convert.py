"""``tokenprune convert``: one method's retention in the terms of the others."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tokenprune.experiments.commands import _options as options
from tokenprune.experiments.commands.efficiency import describe, prompt_asked, stand_in
from tokenprune.plugins import import_plugins
from tokenprune.terminal import OK, app, as_exit_status, new_table, percent, quiet, registered

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
    plugin: options.Plugin = None,
    config: options.Config = "llava-v1.6-vicuna-7b",
    image_size: options.ImageSize = None,
    patches: options.Patches = None,
    text_tokens: options.TextTokens = 0,
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
    merged tokens count. Text is left out of them. FLOPs are in % of the uncompressed model's, of
    the decoder with choosing, or of the vision tower where a method acts there.

    Exit status: 0 done, 2 bad input or a target that cannot be met.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.compressor import parse
        from tokenprune.errors import UserError
        from tokenprune.experiments import efficiency as experiment
        from tokenprune.experiments.translation import MEASURES, WORDS, solve, translate

        quiet()
        method = registered(method)
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
        prompt = prompt_asked(config, image_size, patches, text_tokens)
        found = parse(method) if own else parse(method, retention=0.5)
        prompt.adapter.check(found)
        remarks = []
        for name in MEASURES:
            if name in given:
                solution = solve(prompt, found, given[name], name)
                found = solution.method
                if solution.coarse:
                    remarks.append(
                        f"No retention gives {solution.target:g} {WORDS[name]}: {found.label} goes "
                        f"in larger steps, the nearest of which is {solution.cost:.4g}."
                    )
        remarks += stand_in(prompt, [found])
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
    table.add_row("  of which for choosing", f"{mark}{percent(terms['selector_flops'], None)}")
    if terms["vision_flops"] != 1:
        table.add_row("FLOPs of the vision tower", percent(terms["vision_flops"], 2))
    table.add_row("equivalent pre-LLM retention", f"{mark}{terms['equivalent']:.4f}")
    console = Console(highlight=False)
    typer.echo(describe(config, prompt))
    console.print(table)
    for remark in remarks:
        typer.echo(remark)
    raise typer.Exit(OK)
