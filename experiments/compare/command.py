"""``tokenprune compare``: compare methods side by side."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tokenprune.console import (
    FAILED,
    OK,
    ManyValues,
    app,
    as_exit_status,
    complete_word,
    progress,
    quiet,
)
from tokenprune.experiments.common import options
from tokenprune.experiments.common.option_groups import (
    DRAWING,
    JOB,
    LOADING,
    WORDING,
    DrawingOptions,
    JobOptions,
    LoadingOptions,
    WordingOptions,
    grouped,
)
from tokenprune.experiments.common.published_models import published_model
from tokenprune.experiments.compare.tables import (
    beside_table,
    matched_table,
    misses,
    realised_shares,
    spreads,
    tables,
    times_table,
)
from tokenprune.plugins import import_plugins
from tokenprune.spec import method_specs, ratios

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.common.outcome import Outcome
    from tokenprune.experiments.common.request import CompareRequest

__all__ = ["compare"]


_Methods = Annotated[
    list[str] | None,
    options.methods(
        "Methods with options, e.g. globalcom2:alpha=0.3,tau=5 fastv:layer=3, or all; your own "
        "class: my_module:Mine, whose module is executed; a chain of methods: "
        "'globalcom2@0.5 + fastv@0.5'.",
        default="uniform random fastv globalcom2",
    ),
]


_Data = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="File of questions (JSON lines, .csv, .tsv or .parquet): image (or images, or video, "
        "a list of frames), question, and answer or answers; or a folder with such a file, with "
        "images in subfolders named after their answers, or of the package datasets.",
    ),
]


_Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Only check that every question can be asked: its images, frames and placeholders. "
        "Needs no weights.",
    ),
]


_Seeds = Annotated[int, typer.Option(help="Number of seeds for random methods.")]


_Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Time limit of each step, such as a method on a batch of questions. A step that "
        "exceeds it is stopped and reported as failed. [default: no limit]",
    ),
]


_Match = Annotated[
    str | None,
    typer.Option(
        metavar="tokens|flops|prefill-ms",
        help="Give every method the retention ratio at which it costs as much as uniform: "
        "tokens per layer, FLOPs of the prefill, or its measured time.",
        autocompletion=complete_word("tokens", "flops", "prefill-ms"),
    ),
]


_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Run folder. An earlier run in it is resumed, or gets further methods, retention "
        "ratios and questions; options that are not given are as in that run. [default: a folder "
        "in runs/, named after the options]",
    ),
]


_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also measure time and memory of every method on this device, for tokenprune choose.",
    ),
]


@app.command(cls=ManyValues)
@grouped
def compare(
    ctx: typer.Context,
    model: options.Model = "testbed-next",
    methods: _Methods = None,
    plugin: options.Plugin = None,
    retention: Annotated[list[str] | None, options.retention("1 0.5 0.25 0.1")] = None,
    questions: options.Questions = None,
    data: _Data = None,
    max_image_pixels: options.MaxImagePixels = None,
    modality: options.Modality = None,
    check: _Check = False,
    batch_size: options.BatchSize = None,
    seed: options.Seed = 0,
    seeds: _Seeds = 1,
    wording: WordingOptions = WORDING,
    loading: LoadingOptions = LOADING,
    out: _Out = None,
    drawing: DrawingOptions = DRAWING,
    job: JobOptions = JOB,
    max_new_tokens: options.MaxNewTokens = 8,
    metric: options.Metric = None,
    timeout_per_batch: _Timeout = None,
    match: _Match = None,
    measure: _Measure = False,
) -> None:
    """Compare methods side by side on one model and one set of questions.

    Prints accuracy, agreement with and divergence from the uncompressed model, and cost, also of
    the model without the image and with the thumbnail alone. Writes every answer, a summary and
    plots to a folder. Ctrl-C keeps all answers; the same command resumes the run.

    Exit status: 0 done, 1 a method failed, 2 bad input, 130 interrupted.
    """
    with as_exit_status(), options.image_limit(max_image_pixels):
        import_plugins(plugin)
        request = _request(
            methods,
            retention,
            model=model,
            questions=questions,
            data=data,
            modality=modality,
            batch_size=batch_size,
            seed=seed,
            seeds=seeds,
            **vars(wording),
            **vars(loading),
            out=out,
            figures=drawing.figures,
            max_new_tokens=max_new_tokens,
            metric=metric,
            timeout_per_batch=timeout_per_batch,
            match=match,
            measure=measure,
        )
        request = replace(_in_folder(request, ctx), cluster=job.cluster)
        status = _run(request, check, job.log_file, again=max_image_pixels is None)
    raise typer.Exit(status)


def _run(request: CompareRequest, check: bool, log: Path | None, *, again: bool) -> int:
    """Check the questions or run the comparison; ``log`` and ``again`` are as for `_compare`."""
    # With another limit of pixels, other images may be refused.
    return _check(request, log) if check else _compare(request, log, again=again)


def _request(
    methods: list[str] | None, retention: list[str] | None, **others: Any
) -> CompareRequest:
    """The request with the methods and retention ratios that were given, and ``others``."""
    from tokenprune.experiments.common.request import CompareRequest

    if methods:
        others["methods"] = tuple(method_specs(methods))
    if retention:
        others["retention"] = ratios(retention)
    return CompareRequest(**others)


def _in_folder(request: CompareRequest, ctx: typer.Context) -> CompareRequest:
    """``request``, in which options that were not given are those of the run in its folder."""
    from tokenprune.experiments.compare.finished import as_in_run

    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, one in sources.items() if one is not None and one.name != "DEFAULT"}
    return as_in_run(request, given)


def _check(request: CompareRequest, log: Path | None) -> int:
    """Print what can be asked, and return the exit status."""
    from tokenprune.experiments.common.setting import check

    quiet()
    with progress(log) as bar:
        questions = check(request, bar)
    pictures = {picture.id for item in questions for picture in item.images}
    typer.echo(
        f"Questions: {len(questions)}, images and frames: {len(pictures)}. All can be asked of "
        f"{request.model}; nothing was computed."
    )
    return OK


def _compare(request: CompareRequest, log: Path | None = None, *, again: bool = True) -> int:
    """Run the comparison, show it, and return the exit status.

    Args:
        request: What to compare.
        log: As for `console.progress`.
        again: Whether a run that has all answers may be shown without loading the model.
    """
    from tokenprune.experiments.compare.finished import finished

    started = options.stoppable()
    with progress(log) as bar:
        outcome = finished(request, bar) if again else None
        if outcome is None:
            from tokenprune.experiments.compare.run import run

            quiet()
            outcome = run(request, bar)
    seconds = time.monotonic() - started
    if outcome.status == "interrupted":
        return options.interrupted(outcome)
    console = Console()
    for table in tables(outcome.summary):
        console.print(table, "")
    if published_model(request.model):
        _show_published(outcome.summary, request.model, console)
    if request.match:
        _show_match(outcome.folder, console)
    if "prefill_ms" in outcome.summary:
        console.print(times_table(outcome.summary), "")
    for words in (*realised_shares(outcome.summary), *spreads(outcome.summary)):
        typer.echo(words)
    for words in options.gaps(outcome):
        typer.echo(words)
    typer.echo(_closing_words(outcome, seconds))
    return FAILED if outcome.failures or outcome.missing else OK


def _show_published(summary: pd.DataFrame, model: str, console: Console) -> None:
    """What papers state about these methods on this model."""
    from tokenprune.experiments.common.published import beside

    found = beside(summary, model)
    if found is not None:
        console.print(beside_table(found), "")


def _show_match(folder: Path, console: Console) -> None:
    """How closely costs are matched."""
    from tokenprune.experiments.common.answers import read_answers
    from tokenprune.experiments.compare.matching import realised

    found = realised(read_answers(folder))
    if len(found):
        console.print(matched_table(found), "")
    for words in misses(found):
        typer.echo(words)


def _closing_words(outcome: Outcome, seconds: float) -> str:
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    if not (outcome.new or outcome.failures or outcome.missing):
        first = "All answers already exist; nothing was computed again."
    else:
        first = f"{outcome.new} answers in {took}."
    words = f"{first}\n{options.written(outcome)}"
    if outcome.failures:
        words += "\nTracebacks are in manifest.json; the same command tries the failed cells again."
    if outcome.missing:
        words += "\nWhy answers are missing is in manifest.json, tracebacks in answers.jsonl; the "
        words += "same command tries them again."
    return words
