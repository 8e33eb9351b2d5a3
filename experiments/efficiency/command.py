"""``tokenprune efficiency`` and ``convert``: what methods cost, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from tokenprune.spec import method_specs, ratios
from tokenprune.units import bytes_unit, flops_unit, percent

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.efficiency.convert import Converted

__all__ = [
    "convert",
    "efficiency",
]


_RETENTION = ("1", "0.75", "0.5", "0.25", "0.1")


_Dtype = Annotated[
    str, typer.Option(help="Data type of weights and KV cache: bfloat16, float16 or float32.")
]


_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also measure time and memory on this device, with random weights of real shapes.",
    ),
]


_Layers = Annotated[
    int | None,
    typer.Option(
        help="With --measure: build only this many decoder layers and extrapolate to all."
    ),
]


_BatchSize = Annotated[int, typer.Option(help="With --measure: prompts per batch.")]


_Repeats = Annotated[int, typer.Option(help="With --measure: timed runs of each part.")]


_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Folder for tables and plots. [default: a folder in runs/]"
    ),
]


@app.command(cls=ManyValues)
def efficiency(
    config: options.Config = "llava-v1.6-vicuna-7b",
    methods: Annotated[list[str] | None, options.methods("As for compare.", "uniform")] = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("1 0.75 0.5 0.25 0.1")] = None,
    image_size: options.ImageSize = None,
    patches: options.Patches = None,
    text_tokens: options.TextTokens = 0,
    dtype: _Dtype = "bfloat16",
    measure: _Measure = False,
    layers: _Layers = None,
    batch_size: _BatchSize = 1,
    repeats: _Repeats = 5,
    device: options.Device = None,
    out: _Out = None,
    force: options.Force = False,
    formats: options.Formats = None,
    width: options.Width = "page",
    no_title: options.NoTitle = False,
) -> None:
    """Print what methods cost: tokens, FLOPs, KV cache, memory, and when they pay off.

    Needs no weights: the methods run on synthetic tokens of the model's shapes. "≈" marks counts
    that depend on the image.

    Exit status: 0 done, 2 bad input, 130 interrupted.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.experiments.efficiency.run import EfficiencyRequest, run

        quiet()
        request = EfficiencyRequest(
            model=config,
            methods=tuple(method_specs(methods)) if methods else ("uniform",),
            retention=ratios(retention or _RETENTION),
            image_size=image_size,
            patches=patches,
            text_tokens=text_tokens,
            dtype=dtype,
            measure=measure,
            layers=layers,
            batch_size=batch_size,
            repeats=repeats,
            device=device,
            out=out,
            force=force,
            figures=options.figures(formats, width, no_title),
        )
        with progress() as bar:
            outcome = run(request, bar)
        console = Console(highlight=False)
        console.print(_table(outcome.tables["costs"], outcome.about["prompt"]), "")
        if "measured" in outcome.tables:
            console.print(_measured(outcome.tables["measured"], outcome.about["measured"]), "")
        for words in (*outcome.notes, *options.gaps(outcome), options.written(outcome)):
            typer.echo(words)
    raise typer.Exit(OK)


def _table(costs: pd.DataFrame, title: str) -> Table:
    flops, whole = flops_unit(costs["uncompressed_flops"].max())
    chosen, part = flops_unit(min(costs["selector_flops"].max(), 1e10))  # never in TFLOPs
    units = {
        name: bytes_unit(costs[name].max())
        for name in ("kv_bytes", "selector_bytes", "memory_bytes")
    }
    table = new_table(
        title=title,
        caption="Tokens: layer average of visual tokens, with separators. "
        f"{flops}: prefill of the decoder, selection included. KV: cache after the prefill. "
        "Select: the selection alone, its FLOPs and its peak memory. Peak: weights, KV "
        "cache and the larger of activations and selector, without the encoder's activations. "
        "Pays: number of visual tokens from which on fewer FLOPs are needed than uncompressed.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    names = ["KV", "select", "peak"]
    memory = [f"{name}\n{unit}" for name, (unit, _) in zip(names, units.values(), strict=True)]
    headers = ("tokens", flops, "of all", memory[0], f"select\n{chosen}", *memory[1:], "pays")
    for name, value in zip(headers, (7, 5, None, 4, 2, 1, 6, 3), strict=True):
        table.add_column(name, justify="right", value=value)
    rows = costs[(costs["retention"] < 1) | (costs["method"] == "uncompressed")]
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
    table.add_column("method")
    headers = ("vision", "selector", "prefill", "decode", f"peak {unit}", "pays")
    for name, value in zip(headers, (2, 3, None, 5, 4, 1), strict=True):
        table.add_column(name, justify="right", value=value)
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


_Method = Annotated[
    str,
    typer.Argument(
        help="A method with a retention ratio (fastv:layer=2,retention=0.25 or fastv@0.25), or "
        "without one if a target is given."
    ),
]


_Tokens = Annotated[
    float | None,
    typer.Option(help="Find the retention ratio with this layer average of visual tokens."),
]


_Flops = Annotated[
    float | None,
    typer.Option(help="Find the retention ratio with this share of the prefill's FLOPs."),
]


_Equivalent = Annotated[
    float | None,
    typer.Option(
        help="Find the retention ratio whose layer average is that of a method in front of the "
        "language model with this retention ratio."
    ),
]


@app.command()
def convert(
    method: _Method,
    plugin: options.Plugin = None,
    config: options.Config = "llava-v1.6-vicuna-7b",
    image_size: options.ImageSize = None,
    patches: options.Patches = None,
    text_tokens: options.TextTokens = 0,
    tokens: _Tokens = None,
    flops: _Flops = None,
    equivalent: _Equivalent = None,
) -> None:
    """Convert between retention ratio, layer average, FLOPs and equivalent pre-LLM retention.

    The layer average is the number of visual tokens, with separators, that a decoder layer
    processes on average; a merged token counts as one. FLOPs are in % of those of the uncompressed
    model: of the decoder, with the selection, or of the vision encoder where a method acts there.

    Exit status: 0 done, 2 bad input or a target that cannot be met.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.experiments.common.conversion import MEASURES
        from tokenprune.experiments.efficiency.convert import ConvertRequest, convert
        from tokenprune.experiments.efficiency.run import describe

        quiet()
        targets = {"tokens": tokens, "flops": flops, "equivalent": equivalent}
        request = ConvertRequest(
            method=method,
            targets={name: value for name in MEASURES if (value := targets[name]) is not None},
            model=config,
            image_size=image_size,
            patches=patches,
            text_tokens=text_tokens,
        )
        found = convert(request)
        typer.echo(describe(config, found.prompt))
        Console(highlight=False).print(_terms(found))
        for words in found.notes:
            typer.echo(words)
    raise typer.Exit(OK)


def _terms(found: Converted) -> Table:
    terms, mark = found.terms, found.mark
    table = new_table(show_header=False)
    table.add_column("", prose=True)
    table.add_column("")
    table.add_row("method", method_label(found.method.label))
    table.add_row("retention", f"{found.method.retention:g}")
    table.add_row("patch tokens at the end", f"{mark}{terms['kept_patches']:.0f}")
    table.add_row("separators at the end", f"{terms['kept_separators']:.0f}")
    table.add_row("tokens per layer, mean over layers", f"{mark}{terms['tokens']:.2f}")
    table.add_row("  with text", f"{mark}{terms['tokens_with_text']:.2f}")
    table.add_row("FLOPs of the prefill", f"{mark}{percent(terms['flops'], 2)}")
    table.add_row("  of which for the selection", f"{mark}{percent(terms['selector_flops'], None)}")
    if terms["vision_flops"] != 1:
        table.add_row("FLOPs of the vision encoder", percent(terms["vision_flops"], 2))
    table.add_row("equivalent pre-LLM retention", f"{mark}{terms['equivalent']:.4f}")
    return table
