"""``tokenprune efficiency``: what methods cost, with or without a model at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

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
from tokenprune.spec import method_specs, ratios, registered, says_retention
from tokenprune.units import bytes_unit, flops_unit, percent

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.compressor import Compressor
    from tokenprune.experiments.common.prompt import Prompt

__all__ = [
    "convert",
    "describe",
    "efficiency",
    "prompt_asked",
    "stand_in",
]


_RETENTION = ("1", "0.75", "0.5", "0.25", "0.1")


@app.command(cls=ManyValues)
def efficiency(
    config: options.Config = "llava-v1.6-vicuna-7b",
    methods: Annotated[
        list[str] | None,
        options.methods("As for compare.", "uniform"),
    ] = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("1 0.75 0.5 0.25 0.1")] = None,
    image_size: options.ImageSize = None,
    patches: options.Patches = None,
    text_tokens: options.TextTokens = 0,
    dtype: Annotated[
        str, typer.Option(help="Of weights and KV cache: bfloat16, float16 or float32.")
    ] = "bfloat16",
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time and weigh the real shapes on this device, with random weights.",
        ),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            help="With --measure: build this many decoder layers only and extrapolate to all."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --measure: prompts at once.")] = 1,
    repeats: Annotated[int, typer.Option(help="With --measure: timed runs of each part.")] = 5,
    device: options.Device = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where tables and plots go. [default: one in runs/]"),
    ] = None,
) -> None:
    """Tell what methods cost: tokens, FLOPs, KV cache, memory, and from when on they pay.

    Needs no weights: the methods' own code runs on made-up tokens of the model's shapes. "≈" marks
    counts that depend on what is in the picture.

    Exit status: 0 done, 2 bad input, 130 interrupted.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.errors import UserError
        from tokenprune.experiments.common import files, grid, plots, provenance
        from tokenprune.experiments.common.limits import check_number
        from tokenprune.experiments.efficiency import figures
        from tokenprune.experiments.efficiency import run as experiment
        from tokenprune.models.checkpoints import device_of

        quiet()
        if device is not None:
            device_of(device)
        for name, value in (("layers", layers), ("batch_size", batch_size), ("repeats", repeats)):
            check_number(name, value)
        if layers is not None and not measure:
            raise UserError("--layers says how many layers are measured; add --measure.")
        folder = out or Path("runs") / f"efficiency_{Path(config).name}"
        files.check_writable(folder)
        specs = method_specs(methods) if methods else ["uniform"]
        shares = ratios(retention or _RETENTION)
        grid.chosen([spec for spec in specs if spec != grid.ALL], shares)  # early
        prompt = prompt_asked(config, image_size, patches, text_tokens, dtype)
        runs, skipped = grid.expanded(specs, prompt.adapter.check)
        asked = grid.chosen(runs, shares)
        for method in asked:
            prompt.adapter.check(method)
        with progress() as report:
            report(0, 0, "forecast")
            told = experiment.costs(prompt, asked)
            told["pays_from"] = [
                None if method is None else experiment.analytic_break_even(prompt, method)
                for method in (None, *asked)
            ]
            by_layer = experiment.layers(prompt, asked)
        tables = {"costs": told, "layers": by_layer}
        console = Console(highlight=False)
        console.print(_table(told, describe(config, prompt)), "")
        if measure:
            from tokenprune.experiments.efficiency.measured import measure as measure_times

            with progress() as report:
                measured = measure_times(
                    config,
                    prompt,
                    asked,
                    layers=layers,
                    batch_size=batch_size,
                    repeats=repeats,
                    device=device,
                    report=report,
                )
            tables |= {"measured": measured.table}
            console.print(_measured(measured.table, measured.words), "")
        size = prompt.image_size
        details: dict[str, Any] = {
            "model": config,
            "methods": specs,
            "retention": shares,
            "image_size": None if size is None else {"height": size[0], "width": size[1]},
            "patches": patches,
            "text_tokens": text_tokens,
            "dtype": dtype,
            "measure": measure,
            "layers": layers,
            "batch_size": batch_size,
            **provenance.environment(),
        }
        experiment.write(folder, tables, details)
        title = f"What methods cost on {Path(config).name}"
        plots.save(figures.cost_by_retention(told, title, _what(prompt)), folder / "plots" / "cost")
        figure = figures.tokens_by_layer(by_layer, "Where tokens are processed", _what(prompt))
        plots.save(figure, folder / "plots" / "layers")
        for remark in stand_in(prompt, asked):
            typer.echo(remark)
        for name, why in skipped.items():
            typer.echo(f"SKIPPED {name}: {why}")
        names = ", ".join(f"{name}.csv" for name in tables)
        typer.echo(f"Written to {folder}: {names}, plots/")
    raise typer.Exit(OK)


def prompt_asked(
    config: str, image_size: str | None, patches: str | None, text: int, dtype: str = "bfloat16"
) -> Prompt:
    """The prompt that options describe.  Raises `UserError` as `efficiency.prompt_of`."""
    from tokenprune.experiments.common.prompt import prompt_of, read_size

    size, grid = (None if given is None else read_size(given) for given in (image_size, patches))
    return prompt_of(config, size, patches=grid, text=text, dtype=dtype)


def stand_in(prompt: Prompt, methods: Sequence[Compressor]) -> Iterator[str]:
    """A sentence, if a method looks at a question and there is none."""
    from tokenprune.experiments.common.prompt import asks

    if not prompt.text and any(asks(prompt, method) for method in methods):
        yield (
            f"No text is counted; where a method looks at the question, {prompt.asking} tokens "
            "stand in for it (--text-tokens gives and counts others)."
        )


def _what(prompt: Prompt) -> str:
    separators = prompt.visual - prompt.patches
    parts = [f"{prompt.patches} patch tokens"]
    parts += [f"{separators} separators"] if separators else ["no separators"]
    return ", ".join([*parts, f"{prompt.text} of text" if prompt.text else "no text"])


def describe(name: str, prompt: Prompt) -> str:
    """Model and prompt in a line."""
    image = ""
    if prompt.image_size is not None:
        height, width = prompt.image_size
        image = f"image {height} high x {width} wide, "
    return f"{Path(name).name}: {image}{_what(prompt)}"


def _table(told: pd.DataFrame, title: str) -> Table:
    flops, whole = flops_unit(told["uncompressed_flops"].max())
    chosen, part = flops_unit(min(told["selector_flops"].max(), 1e10))  # never in TFLOPs
    units = {
        name: bytes_unit(told[name].max())
        for name in ("kv_bytes", "selector_bytes", "memory_bytes")
    }
    table = new_table(
        title=title,
        caption="Tokens: visual ones with separators that enter a decoder layer, mean over layers. "
        f"{flops}: prefill of the decoder, selection included. KV: cache after the prefill. "
        "Select: what choosing alone takes, in all and of memory at one moment. Peak: weights, KV "
        "cache and the larger of activations and selector, without the tower's activations. Pays: "
        "from how many visual tokens on the whole takes fewer FLOPs than the plain prefill.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    names = ["KV", "select", "peak"]
    memory = [f"{name}\n{unit}" for name, (unit, _) in zip(names, units.values(), strict=True)]
    for name in ("tokens", flops, "of all", memory[0], f"select\n{chosen}", *memory[1:], "pays"):
        table.add_column(name, justify="right")
    rows = told[(told["retention"] < 1) | (told["method"] == "uncompressed")]
    for keep, group in rows.groupby("retention", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            plain = row["method"] == "uncompressed"
            kv, held, most = (f"{row[name] / scale:.3g}" for name, (_, scale) in units.items())
            table.add_row(
                "" if position else percent(float(str(keep)), None),
                method_label(row["label"]),
                f"{'≈' if row['estimate'] else ''}{row['layer_average']:.1f}",
                f"{row['flops'] / whole:.1f}" if whole > 1e9 else f"{row['flops'] / whole:.3g}",
                percent(row["flops_share"], 0),
                kv,
                "" if plain else f"{row['selector_flops'] / part:.3g}",
                "" if plain else held,
                most,
                "" if plain else _length(row["pays_from"]),
                end_section=position + 1 == len(group),
            )
    return table


def _length(tokens: float | None) -> str:
    return "never" if tokens is None or tokens != tokens else f"{tokens:.0f}"


def _measured(measured: pd.DataFrame, words: str) -> Table:
    unit, scale = bytes_unit(measured["peak_bytes"].max())
    table = new_table(title="Measured, in milliseconds", caption=words)
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    for name in ("vision", "selector", "prefill", "decode", f"peak {unit}", "pays"):
        table.add_column(name, justify="right")
    for _, row in measured.iterrows():
        plain = row["method"] == "uncompressed"
        if row["status"] != "ok":
            table.add_row(percent(row["retention"], None), method_label(row["label"]), "skipped")
            continue
        table.add_row(
            percent(row["retention"], None),
            method_label(row["label"]),
            *(
                f"{1000 * row[name]:.3g} ±{500 * row[f'{name}_spread']:.1g}"
                for name in ("vision", "selector", "prefill", "decode")
            ),
            f"{row['peak_bytes'] / scale:.3g}",
            "" if plain else _length(row["pays_from"]),
        )
    return table


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
        from tokenprune.errors import UserError
        from tokenprune.experiments.common.conversion import MEASURES, WORDS, solve, translate
        from tokenprune.spec import parse

        quiet()
        method = registered(method)
        targets = {"tokens": tokens, "flops": flops, "equivalent": equivalent}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join('--' + name for name in given)}.")
        own = says_retention(method)
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
