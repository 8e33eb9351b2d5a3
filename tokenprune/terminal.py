"""What all commands share: the app they join, how they read lists, show progress and end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

from tokenprune.errors import UserError
from tokenprune.texts import is_whole, printable

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "INTERRUPTED",
    "OK",
    "ManyValues",
    "Report",
    "app",
    "as_exit_status",
    "bytes_unit",
    "flops_unit",
    "method_label",
    "method_specs",
    "new_table",
    "percent",
    "progress",
    "quiet",
    "ratio",
    "ratios",
    "registered",
    "split_specs",
    "spread",
]

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

Report = Callable[[int, int, str], None]
"""Called with how much is done, how much there is (0: not known yet), and what is being done."""


class Commands(TyperGroup):
    """The commands; what they are given can be written to their manifests."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for value in args:
            if not is_whole(value):
                ctx.fail(
                    f"the argument {value!r} is not UTF-8 (it has a lone surrogate); type the text "
                    "again, or rename the file."
                )
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Commands,
    help="Run and compare visual-token compression methods inside vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


class ManyValues(TyperCommand):
    """A command whose list options take several values: ``--retention 0.5 0.25``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for option in self.params if option.multiple for name in option.opts}
        for name, value in pairwise(args):
            # Typer would take the next option for the value; no value but a number starts so.
            if name in lists and re.match(r"-[^\d.]", value):
                ctx.fail(f"{name} needs at least one value, got the option {value}.")
        return super().parse_args(ctx, spread(args, lists))


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


def split_specs(values: Sequence[str]) -> Iterator[str]:
    """Specs that may be separated by commas, although their options are as well.

    >>> list(split_specs(["globalcom2:alpha=0.3,tau=5,fastv", "uniform"]))
    ['globalcom2:alpha=0.3,tau=5', 'fastv', 'uniform']
    """
    for value in values:
        for spec in re.split(r",(?!\s*\w+\s*=)", value):
            if spec.strip():
                yield spec.strip()


def method_specs(values: Sequence[str]) -> list[str]:
    """`split_specs`, each `registered`.  Raises `UserError` as that, or if there is none."""
    specs = list(split_specs(values))
    if not specs:
        raise UserError("--methods needs at least one value.")
    return [registered(spec) for spec in specs]


def registered(spec: str) -> str:
    """``spec``; a class of your own in it, ``module:Class``, is imported and called by its name.

    Raises:
        UserError: As `plugins.own_class`, or the class is not registered.
    """
    from tokenprune.plugins import own_class

    parts = []
    for part in spec.split(" + "):
        path, at, retention = part.strip().partition("@")
        own = own_class(path)
        if own is not None and not own.name:
            raise UserError(f'{path} has no name yet; write @register("name") above the class.')
        parts.append(part if own is None else f"{own.name}{at}{retention}")
    return " + ".join(parts)


def ratios(values: Sequence[str]) -> tuple[float, ...]:
    """Retentions, each a value of its own or several with commas between them.

    Raises:
        UserError: As `ratio`, or there is none.
    """
    found = tuple(map(ratio, split_specs(values)))
    if not found:
        raise UserError("--retention needs at least one value.")
    return found


def ratio(text: str) -> float:
    """The retention that ``text`` says; whether it is in (0, 1] is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        share = re.fullmatch(r"(\d*\.?\d+)\s*%", text.strip())
        hint = f"; write {float(share[1]) / 100:g}" if share else ""
        raise UserError(
            f"retention must be a number larger than 0 and at most 1, got {text!r}{hint}."
        ) from None


@contextmanager
def as_exit_status() -> Iterator[None]:
    """Bad input and Ctrl-C end with a sentence and a status, not with a traceback."""
    try:
        yield
    except UserError as error:
        typer.echo(printable(f"error: {error}"), err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as stop:
        typer.echo(printable(str(stop)) or "interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def quiet() -> None:
    """Keep transformers' own progress bars and notices off the terminal."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress() -> Iterator[Report]:
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
        bar.update(task, completed=done, total=total or None, description=escape(printable(doing)))

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(
            printable(f"warning: {message}"), soft_wrap=True, highlight=False, markup=False
        )

    usual = warnings.showwarning
    warnings.showwarning = show
    try:
        with bar:
            yield report
    finally:
        warnings.showwarning = usual


def new_table(*columns: str, **options: Any) -> Table:
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


def method_label(label: str) -> str:
    """A method's label, its options in lines of their own if it is long."""
    if len(label) > 14:
        label = label.replace(":", ":\n ", 1).replace(",", ",\n ")
    return escape(label)


def percent(share: float, decimals: int | None) -> str:
    number = f"{100 * share:.3g}" if decimals is None else f"{100 * share:.{decimals}f}"
    return f"{number} %"


def flops_unit(largest: float) -> tuple[str, float]:
    for unit, scale in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if largest >= 0.1 * scale:
            return unit, scale
    return "MFLOPs", 1e6


def bytes_unit(largest: float) -> tuple[str, float]:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if largest >= scale:
            return unit, scale
    return "KiB", 2**10
