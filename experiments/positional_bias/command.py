"""``tokenprune positional-bias``: content or place, on the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tokenprune.console import (
    FAILED,
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
from tokenprune.spec import method_specs, ratios, split_specs
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.positional_bias.run import Outcome, Request

__all__ = [
    "positional_bias",
    "tables",
]


@app.command("positional-bias", cls=ManyValues)
def positional_bias(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="Your own images, in front of the options. [default: the testbed's]",
        ),
    ] = None,
    model: options.Model = "testbed-next",
    methods: Annotated[
        list[str] | None,
        options.methods("As for compare.", "uniform random last fastv globalcom2"),
    ] = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("0.25")] = None,
    images: Annotated[
        int | None,
        typer.Option(help="How many images. [default: 60 of the testbed, or all of your own]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own questions, JSON lines as for compare; each image or video is used once.",
        ),
    ] = None,
    max_image_pixels: options.MaxImagePixels = None,
    modality: Annotated[
        str | None,
        typer.Option(metavar="image|video", help="[default: image, or all of --data]"),
    ] = None,
    conditions: Annotated[
        list[str] | None,
        typer.Option(
            "--conditions",
            metavar="C...",
            help="Of reversed-crops, reversed-frames, flip-lr, flip-tb, exchanged-crops (under an "
            "unchanged thumbnail). [default: all but the last]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts run at once. [default: 50 on a testbed, otherwise 4]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Draws the testbed's images and the bootstrap samples.")
    ] = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    out: options.Out = None,
) -> None:
    """Test whether methods choose tokens by what they show or by where they lie.

    Shows every method the same content at other places: crops (or frames) in reversed order,
    flipped images. Prints how the share kept changes as the same content moves along the sequence,
    and what the choice follows; writes tables and plots to a folder. Ctrl-C keeps what was
    computed; the same command goes on.

    Exit status: 0 done, 1 a method failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        asked: dict[str, Any] = {
            "model": model,
            "paths": tuple(paths or ()),
            "data": data,
            "images": images,
            "modality": modality,
            "batch_size": batch_size,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "out": out,
        }
        if methods:
            asked["methods"] = tuple(method_specs(methods))
        if retention:
            asked["retention"] = ratios(retention)
        if conditions:
            asked["conditions"] = tuple(split_specs(conditions))

        from tokenprune.experiments.positional_bias.run import Request

        status = _run(Request(**asked))
    raise typer.Exit(status)


def _run(request: Request) -> int:
    """Run the analysis, show it, and return the exit status."""
    from tokenprune.experiments.positional_bias.run import run

    quiet()
    started = options.stoppable()
    with progress() as report:
        outcome = run(request, report)
    console = Console()
    for table in tables(outcome.result.statistics):
        console.print(table, "")
    for line in _remarks(outcome):
        typer.echo(line)
    seconds = time.monotonic() - started
    typer.echo(
        f"{seconds:.0f} s. Written to {outcome.folder}: tokens.parquet, statistics.csv, "
        "profiles.csv, plots/"
    )
    return FAILED if outcome.result.failures else OK


def _remarks(outcome: Outcome) -> Iterator[str]:
    for (condition, level, why), count in outcome.result.skipped.items():
        where = "" if condition == "all" else f" {condition} ({level})"
        yield f"SKIPPED{where}: {count} image{'s' * (count != 1)} with {why}."
    for name, why in outcome.left_out.items():
        yield f"SKIPPED {name}: {why}"
    for (method, retention), failure in outcome.result.failures.items():
        yield f"FAILED {method} at {retention:g}: {failure.error}"


def tables(statistics: pd.DataFrame) -> Iterator[Table]:
    """The findings as tables of at most 80 columns: in short, then condition by condition."""
    from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL

    for modality, part in statistics.groupby("modality", sort=False, observed=True):
        yield _overview(part, str(modality))
        conditions = [name for name in part["condition"].unique() if name not in (NORMAL, ALL)]
        for first in range(0, len(conditions), 3):  # more would not fit
            yield _by_condition(part, conditions[first : first + 3])


def _overview(statistics: pd.DataFrame, modality: str) -> Table:
    from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL

    slot = "frame" if modality == "video" else "crop"
    turned = "reversed-frames" if modality == "video" else "reversed-crops"
    table = new_table(
        title=f"Positional bias, {statistics['images'].max():.0f} {modality}s",
        caption="Slope: change of the keep probability as the same content moves from the start of "
        "the sequence to its end (selector, reversed order; linear), 95 % interval. p: of a slope "
        "of 0. Follows: 1 content, ½ neither, 0 place; selector/pipeline, all conditions. First "
        f"and last {slot}: share kept in %, normal → reversed order.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    for name in ("slope (95 %)", "p", "follows", "first", "last"):
        table.add_column(name, justify="right", no_wrap=True)
    for retention, method, rows in _cells(statistics):
        normal = _row(rows, NORMAL, NORMAL)
        reversed_ = _row(rows, turned, "selector")
        both = [_row(rows, ALL, level) for level in ("selector", "pipeline")]
        table.add_row(
            percent(retention, None),
            method_label(method),
            _slope(reversed_),
            _p_value(reversed_["p"]),
            "/".join(_number(one["equivariance"]) for one in both),
            *(f"{_share(normal[end])} → {_share(reversed_[end])}" for end in ("first", "last")),
        )
    return table


def _by_condition(statistics: pd.DataFrame, conditions: Sequence[str]) -> Table:
    table = new_table(
        title="What the choice follows, by condition",
        caption="Selector/pipeline: 1 content, ½ neither, 0 place, - cannot be told. Then by how "
        "much the keep probability changes as the same content moves from the start of the "
        "sequence to its end, from left to right, from top to bottom (selector; linear; "
        "* p < 0.05, ** p < 1e-6).",
    )
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    for name in conditions:
        table.add_column(name, justify="right", no_wrap=True)
    for retention, method, rows in _cells(statistics):
        figures = []
        for name in conditions:
            selector, pipeline = (_row(rows, name, level) for level in ("selector", "pipeline"))
            mark = "**" if selector["p"] < 1e-6 else "*" if selector["p"] < 0.05 else ""
            figures.append(
                f"{_number(selector['equivariance'])}/{_number(pipeline['equivariance'])} "
                f"{_signed(selector['paired_slope'])}{mark:<2}"
            )
        table.add_row(percent(retention, None), method_label(method), *figures)
    return table


def _cells(statistics: pd.DataFrame) -> Iterator[tuple[float, str, pd.DataFrame]]:
    for (retention, method), rows in statistics.groupby(
        ["retention", "method"], sort=False, observed=True
    ):
        yield float(retention), str(method), rows


def _row(rows: pd.DataFrame, condition: str, level: str) -> pd.Series:
    """The row of a condition, or missing values."""
    import pandas as pd

    found = rows[(rows["condition"] == condition) & (rows["level"] == level)]
    return found.iloc[0] if len(found) else pd.Series(float("nan"), index=rows.columns)


def _missing(value: float) -> bool:
    return value != value


def _signed(value: float) -> str:
    return "-" if _missing(value) else f"{value:+.2f}".replace("-", "−")


def _slope(row: pd.Series) -> str:
    value, low, high = (_signed(row[f"paired_slope{end}"]) for end in ("", "_low", "_high"))
    return value if _missing(row["paired_slope_low"]) else f"{value} [{low}, {high}]"


def _number(value: float) -> str:
    return "-" if _missing(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "-" if _missing(value) else f"{100 * value:.0f}"


def _p_value(value: float) -> str:
    if _missing(value):
        return "-"
    return f"{value:.0e}" if value < 0.001 else f"{value:.3f}"
