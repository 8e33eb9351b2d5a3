"""Parts shared by all commands: the app, list options, progress, tables and exit status."""

from __future__ import annotations

import itertools
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperCommand, TyperGroup

from tokenprune import catalogue
from tokenprune.errors import UserError
from tokenprune.grammar import lines
from tokenprune.progress import ProgressCallback, logged, silent
from tokenprune.tables import FittedTable
from tokenprune.texts import is_whole, printable

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "INTERRUPTED",
    "OK",
    "ManyValues",
    "Plugin",
    "app",
    "as_exit_status",
    "complete_method",
    "complete_word",
    "method_label",
    "new_table",
    "progress",
    "quiet",
    "spread",
]


OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


_COMMANDS = (
    "list", "compare", "pairs", "table", "report", "choose", "merge", "published", "validity",
    "import-lmms", "masks", "demo", "positional-bias", "complementarity", "crop-importance",
    "ablation", "efficiency", "convert", "export", "serving-check", "audit", "benchmark",
)  # fmt: skip


_FIRST = (
    "config", "model", "methods", "retention", "data", "questions", "benchmark", "root", "split",
    "images", "modality", "prompt", "template", "suffix", "system",
)  # fmt: skip


_LAST = (
    "out", "force", "seeds", "seed", "batch_size", "max_new_tokens", "device", "device_map",
    "dtype", "attn", "quantize", "revision", "timeout_per_batch", "ray", "workers",
    "gpus_per_worker", "log_file", "max_image_pixels",
    "plugin", "trust_remote_code",
)  # fmt: skip


def _by_use(option: Any) -> tuple[int, int]:
    """The place of an option in ``--help``: arguments, what to run, details, how to run it."""
    if option.param_type_name == "argument":
        return 0, 0
    if option.name in _FIRST:
        return 1, _FIRST.index(option.name)
    return (3, _LAST.index(option.name)) if option.name in _LAST else (2, 0)


class Commands(TyperGroup):
    """The commands.  Those of the experiments are imported when one of them is requested.

    ``--help`` shows commands and their options in the order of use.

    Attributes:
        load: Imports the modules that add the other commands to `app`.
    """

    load: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def list_commands(self, ctx: Any) -> list[str]:
        self._complete()
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: (*_COMMANDS, name).index(name))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._complete()
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            command.params.sort(key=_by_use)
        return command

    def _complete(self) -> None:
        type(self).load()
        group: Any = typer.main.get_command(app)
        self.commands.update(group.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the first sentence about every command, without shortening it."""
        rows = []
        for name in self.list_commands(ctx):
            first, _, _ = str(self.get_command(ctx, name).help).partition("\n\n")
            rows.append((name, " ".join(first.split())))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

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
)


_OPEN = "tokenprune.open"  # the list option that takes the next value, in the context of a command


_ALONE = {"--ray": "local"}  # options that may stand without their value


class ManyValues(TyperCommand):
    """A command whose list options take several values: ``--retention 0.5 0.25``.

    The value of ``--ray`` may be left out.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name: option for option in self.params if option.multiple for name in option.opts}
        known = {name for option in self.params for name in option.opts}
        args = filled(args, {name: value for name, value in _ALONE.items() if name in known})
        for name, value in pairwise(args):
            # Typer would read the next option as the value.  Only a number may start with '-'.
            if name in lists and re.match(r"-[^\d.]", value) and not ctx.resilient_parsing:
                ctx.fail(f"{name} needs at least one value, got the option {value}.")
        repeated = spread(args, set(lists))
        ctx.meta[_OPEN] = lists.get(repeated[-2]) if len(repeated) > 1 else None
        return super().parse_args(ctx, repeated)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete a further value of a list option, or as every command does."""
        option = None if incomplete.startswith("-") else ctx.meta.get(_OPEN)
        if option is not None:
            return option.shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)


def filled(args: Sequence[str], alone: Mapping[str, str]) -> list[str]:
    """Give each option in ``alone`` that has no value the value there.

    >>> filled(["--ray", "--seed", "1"], {"--ray": "local"})
    ['--ray', 'local', '--seed', '1']
    """
    result: list[str] = []
    for arg, after in itertools.pairwise([*args, "-"]):
        result.append(arg)
        if arg in alone and after.startswith("-"):
            result.append(alone[arg])
    return result


def spread(args: Sequence[str], options: set[str]) -> list[str]:
    """Repeat each of ``options`` in front of every value that follows it.

    >>> spread(["-m", "uniform", "fastv", "--seed", "1"], {"-m"})
    ['-m', 'uniform', '-m', 'fastv', '--seed', '1']
    """
    result: list[str] = []
    current = ""  # the option whose values follow
    for before, arg in zip(["", *args], args, strict=False):
        if arg.startswith("-") and before not in options:
            current = arg.partition("=")[0] if arg.partition("=")[0] in options else ""
        elif current and before not in options:
            result.append(current)
        result.append(arg)
    return result


# --- completion in the shell ----------------------------------------------------------------------


def complete_method(incomplete: str) -> list[tuple[str, str]]:
    """Names of methods that begin with ``incomplete``, each with its paper."""
    return [(one.name, one.paper) for one in catalogue.methods() if one.name.startswith(incomplete)]


def complete_word(*words: str) -> Callable[[str], list[str]]:
    """A function that completes one of ``words``."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


# --- options and output ---------------------------------------------------------------------------

Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE...",
        help="Import a module that registers methods. Its code is executed.",
    ),
]
"""The option ``--plugin``."""


@contextmanager
def as_exit_status() -> Iterator[None]:
    """Turn bad input and Ctrl-C into a message and an exit status, without a traceback."""
    try:
        yield
    except UserError as error:
        typer.echo(printable(f"error: {error}"), err=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as stop:
        typer.echo(printable(str(stop)) or "interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def quiet() -> None:
    """Switch off the progress bars and notices of transformers and of the Hub's client."""
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def progress(log: Path | None = None) -> Iterator[ProgressCallback]:
    """A progress bar on standard error, or one line a minute if that is no terminal.

    Warnings are printed above the bar.

    Args:
        log: File to which a line a minute is appended, with the time, and every warning.

    Raises:
        UserError: The file cannot be written.
    """
    console = Console(stderr=True)
    if log is not None:
        _append(log, f"started: {' '.join(sys.argv[1:])}")

    def write(line: str) -> None:
        console.print(printable(line), soft_wrap=True, highlight=False, markup=False)

    def note(line: str) -> None:
        with suppress(UserError):  # a full disk ends no computation
            _append(log, line)

    def log_lines() -> AbstractContextManager[ProgressCallback]:
        return nullcontext(silent) if log is None else logged(note)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        # Notices of libraries to their users' programmers; ours reach Python users.
        if not issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
            write(f"warning: {message}")
            note(f"warning: {message}")

    usual = warnings.showwarning
    warnings.showwarning = show
    try:
        with _bar(console) if console.is_terminal else logged(write) as report, log_lines() as tell:

            def both(done: int, total: int, doing: str) -> None:
                report(done, total, doing)
                tell(done, total, doing)

            yield both
        note("ended")
    except BaseException as error:
        note(f"stopped: {type(error).__name__}: {error}".rstrip(": "))
        raise
    finally:
        warnings.showwarning = usual


def _append(log: Path | None, line: str) -> None:
    """Append a line with the time to a file, if there is one.  Raises `UserError`."""
    if log is None:
        return
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{now} {printable(line)}\n")
    except OSError as error:
        raise UserError(
            f"cannot write the log {str(log)!r} ({error.strerror}); give --log-file a file in a "
            "folder that exists."
        ) from error


@contextmanager
def _bar(console: Console) -> Iterator[ProgressCallback]:
    """A progress bar."""
    bar = Progress(
        TextColumn("{task.description}", justify="left"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("starting", total=None)

    def report(done: int, total: int, doing: str) -> None:
        bar.update(task, completed=done, total=total or None, description=escape(printable(doing)))

    with bar:
        yield report


def new_table(*columns: str, **options: Any) -> FittedTable:
    """An empty table in the style of all commands; arguments as of `FittedTable`."""
    return FittedTable(
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
    """A method's label for a cell of a table.  A long one has one option per line."""
    if len(label) > 14:
        label = "\n ".join(lines(label))
    return escape(label)
