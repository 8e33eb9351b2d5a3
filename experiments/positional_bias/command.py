"""``tokenprune positional-bias``: test whether methods follow content or location."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from tokenprune.experiments.common.option_groups import (
    DRAWING,
    JOB,
    LOADING,
    DrawingOptions,
    JobOptions,
    LoadingOptions,
    grouped,
)
from tokenprune.plugins import import_plugins
from tokenprune.spec import method_specs, ratios, split
from tokenprune.units import percent

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.positional_bias.run import PositionalBiasRequest

__all__ = [
    "positional_bias",
    "tables",
]


_Images = Annotated[
    int | None,
    typer.Option(help="Number of images. [default: 60 of the testbed, or all given ones]"),
]


_Data = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="File or folder of questions, as for compare; each image or video is used once. "
        "Answers may be left out.",
    ),
]


_Modality = Annotated[
    str | None,
    typer.Option(metavar="image|video", help="[default: image, or all of --data]"),
]


_Conditions = Annotated[
    list[str] | None,
    typer.Option(
        "--conditions",
        metavar="C...",
        help="Which of reversed-crops, reversed-frames, flip-lr, flip-tb, exchanged-crops (under "
        "an unchanged thumbnail). [default: all but the last]",
    ),
]


_BatchSize = Annotated[
    int | None,
    typer.Option(help="Prompts run at once. [default: 50 on a testbed, otherwise 4]"),
]


_Seed = Annotated[int, typer.Option(help="Draws the testbed's images and the bootstrap samples.")]


@app.command("positional-bias", cls=ManyValues)
@grouped
def positional_bias(
    paths: options.Images = None,
    prompt: options.Prompt = None,
    model: options.Model = "testbed-next",
    methods: Annotated[
        list[str] | None,
        options.methods("As for compare.", "uniform random last fastv globalcom2"),
    ] = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("0.25")] = None,
    images: _Images = None,
    data: _Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    modality: _Modality = None,
    conditions: _Conditions = None,
    batch_size: _BatchSize = None,
    seed: _Seed = 0,
    loading: LoadingOptions = LOADING,
    out: options.Out = None,
    drawing: DrawingOptions = DRAWING,
    job: JobOptions = JOB,
) -> None:
    """Test whether methods select tokens by content or by location.

    Shows every method the same content at other locations: crops or frames in reversed order, and
    flipped images. Prints how the keep probability changes as the same content moves along the
    sequence, and what the selection follows. Writes tables and plots to a folder. Ctrl-C keeps the
    finished results; the same command resumes the run.

    Exit status: 0 done, 1 a method failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        from tokenprune.experiments.positional_bias.rearrange import DEFAULT
        from tokenprune.experiments.positional_bias.run import METHODS, PositionalBiasRequest

        request = PositionalBiasRequest(
            cluster=job.cluster,
            paths=tuple(paths or ()),
            prompt=prompt,
            model=model,
            methods=tuple(method_specs(methods)) if methods else METHODS,
            retention=ratios(retention or ["0.25"]),
            images=images,
            data=data,
            modality=modality,  # type: ignore[arg-type]  # checked with the rest
            conditions=tuple(split(conditions)) if conditions else DEFAULT,  # type: ignore[arg-type]
            batch_size=batch_size,
            seed=seed,
            **vars(loading),
            out=out,
            figures=drawing.figures,
        )
        status = _run(request, job.log_file)
    raise typer.Exit(status)


def _run(request: PositionalBiasRequest, log: Path | None) -> int:
    """Run the analysis, show it, and return the exit status."""
    from tokenprune.experiments.positional_bias.run import run

    quiet()
    started = options.stoppable()
    with progress(log) as bar:
        outcome = run(request, bar)
    if outcome.status == "interrupted":
        return options.interrupted(outcome, "selections (an image by a method)")
    console = Console()
    for table in tables(outcome.tables["statistics"]):
        console.print(table, "")
    for line in (*outcome.notes, *options.gaps(outcome)):
        typer.echo(line)
    seconds = time.monotonic() - started
    typer.echo(f"{seconds:.0f} s. {options.written(outcome)}")
    return FAILED if outcome.failures else OK


def tables(statistics: pd.DataFrame) -> Iterator[Table]:
    """The results as tables of at most 80 columns: an overview, then by condition."""
    from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL

    for modality, part in statistics.groupby("modality", sort=False, observed=True):
        yield _overview(part, str(modality))
        conditions = [name for name in part["condition"].unique() if name not in (NORMAL, ALL)]
        if conditions:
            yield _by_condition(part, conditions)


def _overview(statistics: pd.DataFrame, modality: str) -> Table:
    from tokenprune.experiments.positional_bias.estimates import ALL, NORMAL

    slot = "frame" if modality == "video" else "crop"
    turned = "reversed-frames" if modality == "video" else "reversed-crops"
    table = new_table(
        title=f"Positional bias, {statistics['images'].max():.0f} {modality}s",
        caption="Slope: change of the keep probability as the same content moves from the start of "
        "the sequence to its end (selector, reversed order; linear), 95 % interval. p: of a slope "
        "of 0. Follows: 1 content, ½ neither, 0 location; selector/pipeline, all conditions. First "
        f"and last {slot}: share kept in %, normal/reversed order.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    table.add_column("slope (95 %)", justify="right")
    for name, value in {"p": 3, "follows": 4, "first": 1, "last": 2}.items():
        table.add_column(name, justify="right", value=value)
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
            *(f"{_share(normal[end])}/{_share(reversed_[end])}" for end in ("first", "last")),
        )
    return table


def _by_condition(statistics: pd.DataFrame, conditions: Sequence[str]) -> Table:
    table = new_table(
        title="What the selection follows, by condition",
        continued=True,
        caption="Selector/pipeline: 1 content, ½ neither, 0 location, - unknown. Then the "
        "change of the keep probability as the same content moves from the start of the "
        "sequence to its end, from left to right, from top to bottom (selector; linear; "
        "* p < 0.05, ** p < 1e-6).",
    )
    table.add_column("keep", justify="right")
    table.add_column("method")
    for name in conditions:
        table.add_column(name, justify="right", value=0)
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
    """The row of a condition and level, or missing values."""
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
