"""The command line.  What takes long to import is imported by the command that needs it."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

import tokenprune
from tokenprune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.compressor import Compressor
    from tokenprune.experiments.compare import Outcome, Report, Request

__all__ = ["app", "main"]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_KINDS_PER_TABLE = 5

app = typer.Typer(
    help="Run and compare visual-token compression methods inside vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


def main() -> None:
    """Entry point of the console script."""
    app()


class _ManyValues(TyperCommand):
    """A command whose list options take several values: ``--retention 0.5 0.25``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, {"--methods", "-m", "--retention", "-r"}))


def spread(args: Sequence[str], options: set[str]) -> list[str]:
    """Repeat each of ``options`` in front of every value that follows it.

    >>> spread(["-m", "uniform", "fastv", "--seed", "1"], {"-m"})
    ['-m', 'uniform', '-m', 'fastv', '--seed', '1']
    """
    result: list[str] = []
    current = ""  # the option whose values we are among
    for before, arg in zip(["", *args], args, strict=False):
        if arg.startswith("-") and before not in options:
            current = arg.partition("=")[0] if arg.partition("=")[0] in options else ""
        elif current and before not in options:
            result.append(current)
        result.append(arg)
    return result


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(tokenprune.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command(cls=_ManyValues)
def compare(
    model: Annotated[
        str, typer.Option(help="Embedded testbed, Hugging Face Hub id or local folder.")
    ] = "testbed-next",
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            metavar="SPEC...",
            help="Methods with options, e.g. globalcom2:alpha=0.3,tau=5 fastv:layer=3, or all. "
            "One before and one inside the language model: 'globalcom2@0.5 + fastv@0.5'. "
            "[default: uniform random fastv globalcom2]",
        ),
    ] = None,
    retention: Annotated[
        list[str] | None,
        typer.Option(
            "--retention",
            "-r",
            metavar="R...",
            help="Shares of patch tokens to keep, in (0, 1]. [default: 1 0.5 0.25 0.1]",
        ),
    ] = None,
    questions: Annotated[
        int | None,
        typer.Option(help="How many questions. [default: 500 of the testbed, or all of --data]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own questions, JSON lines with image (or images, or the frames of a "
            "video), question, answer and optionally kind and id; paths are relative to the file.",
        ),
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(
            metavar="image|video|multi-image",
            help="What the questions are about. [default: image, or all of --data]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Questions answered at once. [default: 50 on a testbed, otherwise 4]"),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Draws the testbed's questions and the bootstrap samples.")
    ] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: cuda if there is one]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the run. The same command takes up an unfinished run in it. "
            "[default: one in runs/, named after what is asked]",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 8,
) -> None:
    """Compare methods side by side on one model and one set of questions.

    Prints accuracy, agreement with the uncompressed model and cost, and writes every answer, a
    summary and plots to a folder. Ctrl-C keeps what was computed; the same command goes on.

    Exit status: 0 done, 1 a method failed, 2 bad input, 130 interrupted.
    """
    with _as_exit_status():
        asked: dict[str, Any] = {
            "model": model,
            "questions": questions,
            "modality": modality,
            "data": data,
            "batch_size": batch_size,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "out": out,
            "max_new_tokens": max_new_tokens,
        }
        if methods:
            asked["methods"] = tuple(split_specs(methods))
        if retention:
            asked["retention"] = tuple(map(_ratio, split_specs(retention)))

        from tokenprune.experiments.compare import Request

        status = _compare(Request(**asked))
    raise typer.Exit(status)


@app.command("list")
def list_(
    method: Annotated[
        str | None, typer.Argument(help="Show this method's card and options instead.")
    ] = None,
) -> None:
    """List methods and models.

    Verified methods choose the same tokens as the authors' own code.
    """
    from tokenprune.models import testbed
    from tokenprune.registry import adapters, strategies

    if method is not None:
        with _as_exit_status():
            _show_card(strategies.get(method))
        raise typer.Exit(OK)
    table = _table("method", "acts", "looks at", "paper", "verified", title="Methods")
    for name in strategies.names():
        cls = strategies.get(name)
        paper = f"{cls.card.paper}, arXiv {cls.card.arxiv}" if cls.card.arxiv else cls.card.paper
        verified = "yes" if cls.card.verified else "no" if cls.card.code else "-"
        table.add_row(name, _PLACES.get(cls.stage, cls.stage), _needs(name), paper, verified)
    console = Console()
    console.print(table, "")

    table = _table("model", "adapter", "model class", title="Models")
    embedded = {name: _architecture(testbed.path(name)) for name in testbed.names()}
    for name in adapters.names():
        adapter = adapters.get(name)
        for own, host in embedded.items():
            if host in adapter.hosts:
                table.add_row(own, name, host)
        if adapter.has_language_model:
            table.add_row("any Hub id or local folder", name, "\n".join(adapter.hosts))
        else:
            table.add_row("timm/<any ViT>", name, "vision only: encode and choose")
    console.print(table)
    raise typer.Exit(OK)


def _show_card(cls: type[Compressor]) -> None:
    """Where a method comes from, what differs, and its options with their defaults."""
    card = cls.card
    typer.echo(f"{inspect.getdoc(cls)}\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    verified = f"tests/data/golden/{card.verified}" if card.verified else ""
    for what, value in {
        "paper": f"{card.paper}{f', arXiv {card.arxiv}' if card.arxiv else ''}",
        "code": card.code,
        "vectors": verified,
        "acts": _PLACES.get(cls.stage, cls.stage),
        "options": ", ".join(
            f"{item.name}={getattr(example, item.name)}"
            for example in [tokenprune.create(cls.name, retention=0.25)]
            for item in fields(cls)
            if item.name != "retention"
        ),
    }.items():
        if value:
            table.add_row(what, escape(value))
    for index, deviation in enumerate(card.deviations):
        table.add_row("" if index else "differs", escape(deviation))
    Console(highlight=False).print(table)


_PLACES = {"encoder": "in encoder", "pre_llm": "before LLM", "llm": "inside LLM"}


def _needs(name: str) -> str:
    """What the strategy looks at with its default options."""
    signals = sorted(tokenprune.create(name, retention=0.5).needs, key=repr)
    return ", ".join(dict.fromkeys(item.name for item in signals)) or "-"


def _architecture(folder: Path) -> str:
    """Name of the model class, without loading anything."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


# --- reading what was typed -----------------------------------------------------------------------


def split_specs(values: Sequence[str]) -> Iterator[str]:
    """Specs that may be separated by commas, although their options are as well.

    >>> list(split_specs(["globalcom2:alpha=0.3,tau=5,fastv", "uniform"]))
    ['globalcom2:alpha=0.3,tau=5', 'fastv', 'uniform']
    """
    for value in values:
        for spec in re.split(r",(?!\s*\w+\s*=)", value):
            if spec.strip():
                yield spec.strip()


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(
            f"retention must be a number larger than 0 and at most 1, got {text!r}."
        ) from None


@contextmanager
def _as_exit_status() -> Iterator[None]:
    """Bad input and Ctrl-C end with a sentence and a status, not with a traceback."""
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def audit(
    method: Annotated[
        str,
        typer.Argument(
            help="A registered method with options (fastv:layer=3), or package.module:Class."
        ),
    ],
    retention: Annotated[
        float, typer.Option("--retention", "-r", help="Share of patch tokens to keep.")
    ] = 0.4,
) -> None:
    """Check a method of anyone's against the contract, in tiny models of every family.

    Prints a line for every check, with a counter-example if it fails: an inverted ranking, tokens
    out of order or repeated, a budget that is exceeded, dependence on batch neighbours, on padding,
    on positions or on global random numbers, and more.

    Exit status: 0 all passed, 1 a check failed, 2 bad input.
    """
    with _as_exit_status():
        import transformers

        transformers.logging.set_verbosity_error()
        compressor = _auditee(method, retention)
        failed = _audit(compressor)
    raise typer.Exit(FAILED if failed else OK)


def _auditee(method: str, retention: float) -> Compressor:
    """The method to be checked.  Raises `UserError` if there is none of that name."""
    from tokenprune.compressor import Compressor, parse

    module, colon, name = method.partition(":")
    if not colon or "=" in name or not module.replace(".", "").isidentifier():
        return parse(method, retention=retention)
    sys.path.insert(0, "")  # a file in the working directory is a module, too
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UserError(
            f"cannot import {module!r}: {error}. Give package.module:Class, or a registered method "
            "(see tokenprune list)."
        ) from error
    finally:
        sys.path.pop(0)
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise UserError(f"{name!r} of {module!r} is not a class derived from Compressor.")
    return found(retention=retention)


def _audit(compressor: Compressor) -> int:
    """Run every check and show how it went; how many failed."""
    from tokenprune.errors import RetentionWarning
    from tokenprune.testing import CHECKS, hosts, run

    console = Console()
    label = compressor.label if compressor.name else type(compressor).__name__
    table = _table("check", "", "what it means, or a counter-example", title=f"Audit of {label}")
    failed = 0
    with _progress() as report:
        for index, check in enumerate(CHECKS):
            name = check.__name__.removeprefix("check_").replace("_", " ")
            report(index, len(CHECKS), name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RetentionWarning)
                    run(check, compressor, hosts(["llama"]))
            except Exception as error:
                failed += 1
                said = str(error) or "it does not hold"
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                table.add_row(name, "FAIL", escape(f"{kind}{said}"), style="red")
            else:
                table.add_row(name, "ok", escape((check.__doc__ or "").strip().splitlines()[0]))
        report(len(CHECKS), len(CHECKS), "")
    console.print(table)
    passed = len(CHECKS) - failed
    console.print(f"{passed} of {len(CHECKS)} checks passed", highlight=False)
    return failed


# --- running and showing --------------------------------------------------------------------------


def _compare(request: Request) -> int:
    """Run the comparison, show it, and return the exit status."""
    import transformers

    from tokenprune.experiments.compare import compare

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # A scheduler that takes the machine away asks politely first; treat it as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    started = time.monotonic()
    with _progress() as report:
        outcome = compare(request, report)
    seconds = time.monotonic() - started

    folder, console = outcome.folder, Console()
    if outcome.status == "interrupted":
        console.print(
            f"Interrupted: {outcome.answered} of {outcome.wanted} answers are kept in "
            f"{folder}; the same command goes on from there.",
            soft_wrap=True, highlight=False, markup=False,
        )  # fmt: skip
        return INTERRUPTED
    for table in tables(outcome.summary):
        console.print(table, "")
    for name, why in outcome.skipped.items():
        console.print(f"SKIPPED {name}: {why}", soft_wrap=True, highlight=False, markup=False)
    for cell, failure in outcome.failures.items():
        console.print(f"FAILED {cell}: {failure.error}", soft_wrap=True, markup=False)
    console.print(_closing_words(outcome, seconds), soft_wrap=True, highlight=False, markup=False)
    return FAILED if outcome.failures else OK


def _closing_words(outcome: Outcome, seconds: float) -> str:
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    if not outcome.new and not outcome.failures:
        first = "Every answer was there already; nothing was computed again."
    else:
        first = f"{outcome.new} answers in {took}."
    words = f"{first}\nWritten to {outcome.folder}: answers.parquet, summary.csv, plots/"
    if outcome.failures:
        words += "\nTracebacks are in manifest.json; the same command tries the failed cells again."
    return words


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar on standard error, which warnings do not tear apart."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("starting", total=None)

    def report(done: int, total: int, doing: str) -> None:
        bar.update(task, completed=done, total=total or None, description=escape(doing))

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(f"warning: {message}", soft_wrap=True, highlight=False, markup=False)

    usual = warnings.showwarning
    warnings.showwarning = show
    try:
        with bar:
            yield report
    finally:
        warnings.showwarning = usual


def tables(summary: pd.DataFrame) -> Iterator[Table]:
    """The comparison as tables of at most 80 columns: overall, then by kind of question."""
    from tokenprune.experiments.intervals import OVERALL

    # At R = 1 all methods are the uncompressed model, which has a row of its own.
    rows = summary[(summary["retention"] < 1) | (summary["method"] == "uncompressed")]
    rows = rows.sort_values("retention", ascending=False, kind="stable")
    overall = rows[rows["kind"] == OVERALL]
    unit, scale = _flops_unit(overall["uncompressed_flops"].max())

    table = _table(
        title="All questions",
        caption="Accuracy in % with its 95 % confidence interval; ↑ ↓ better or worse than uniform "
        "at the same retention (exact McNemar test on the same questions, p < 0.05). Same: answers "
        "in % that equal the uncompressed model's. Tokens: visual ones with separators, mean over "
        "decoder layers. FLOPs: prefill of the decoder, selection included.",
    )
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    for name in ("accuracy", "", "same", "tokens", unit, "of all"):
        table.add_column(name, justify="right", no_wrap=True)
    for retention, group in overall.groupby("retention", sort=False):
        for position, (_, row) in enumerate(group.iterrows()):
            figures = ["FAILED", "", "", "", "", ""]
            if row["status"] == "ok":
                share = row["flops"] / row["uncompressed_flops"]
                figures = [
                    _accuracy(row, decimals=1),
                    _verdict(row),
                    f"{100 * row['agreement']:.1f}",
                    f"{row['layer_average']:.1f}",
                    f"{row['flops'] / scale:.3g}",
                    _percent(share, 0),
                ]
            keep = "" if position else _percent(float(str(retention)), None)
            table.add_row(
                keep, _label(row["label"]), *figures, end_section=position + 1 == len(group)
            )
    yield table

    kinds = [kind for kind in summary["kind"].unique() if kind != OVERALL]
    for start in range(0, len(kinds), _KINDS_PER_TABLE):
        yield _kinds_table(rows, kinds[start : start + _KINDS_PER_TABLE])


def _kinds_table(rows: pd.DataFrame, kinds: list[str]) -> Table:
    table = _table(title="Accuracy in % by kind of question")
    table.add_column("keep", justify="right")
    table.add_column("method", overflow="fold")
    for kind in kinds:
        table.add_column(escape(kind), justify="right")
    for retention, group in rows[rows["kind"].isin(kinds)].groupby("retention", sort=False):
        methods = list(group.groupby("label", sort=False))
        for position, (label, cell) in enumerate(methods):
            by_kind = cell.set_index("kind")
            texts = [_accuracy(by_kind.loc[kind], decimals=0) for kind in kinds]
            keep = "" if position else _percent(float(str(retention)), None)
            table.add_row(
                keep, _label(str(label)), *texts, end_section=position + 1 == len(methods)
            )
    return table


def _table(*columns: str, **options: Any) -> Table:
    return Table(
        *columns,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
        **options,
    )


def _label(label: str) -> str:
    """A method's label, its options in lines of their own if it is long."""
    if len(label) > 14:
        label = label.replace(":", ":\n ", 1).replace(",", ",\n ")
    return escape(label)


def _accuracy(row: pd.Series, decimals: int) -> str:
    """Accuracy in percent and its interval."""
    if row["status"] != "ok":
        return "FAILED"
    value, low, high = (
        f"{100 * row[name]:.{decimals}f}" for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    return f"{value} ({low}–{high})" if decimals else f"{value} {low}–{high}"


def _verdict(row: pd.Series) -> str:
    """An arrow where the method and `uniform` at the same retention are not equally right."""
    if not row["vs_uniform_p"] < 0.05:  # or missing
        return ""
    return "↑" if row["vs_uniform"] > 0 else "↓"


def _percent(share: float, decimals: int | None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def _flops_unit(largest: float) -> tuple[str, float]:
    for unit, scale in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if largest >= 0.1 * scale:
            return unit, scale
    return "MFLOPs", 1e6
