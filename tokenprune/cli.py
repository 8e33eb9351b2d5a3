"""The command line: the commands ``list`` and ``audit``; experiments add theirs in ``command.py``.

Slow imports are inside the command that needs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tokenprune
from tokenprune import experiments
from tokenprune.catalogue import families, families_by_method, methods
from tokenprune.console import (
    FAILED,
    OK,
    Commands,
    Plugin,
    app,
    as_exit_status,
    complete_method,
    new_table,
    progress,
    quiet,
)
from tokenprune.errors import UserError
from tokenprune.models import testbed
from tokenprune.plugins import import_plugins, own_class
from tokenprune.registry import strategies
from tokenprune.texts import printable

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(tokenprune.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    method: Annotated[
        str | None,
        typer.Argument(
            help="Show only the card and the options of this method.",
            autocompletion=complete_method,
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--models", help="Show which method runs on which model family.")
    ] = False,
    plugin: Plugin = None,
) -> None:
    """List methods and models.

    A verified method selects the same tokens as the authors' code.
    """
    with as_exit_status():
        import_plugins(plugin)
        if method is not None:
            _show_card(strategies.get(method))
            raise typer.Exit(OK)
        console = Console()
        if models:
            console.print(_families())
            raise typer.Exit(OK)
        console.print(_methods(), "")
        console.print(_models())
    raise typer.Exit(OK)


_PLACES = {"encoder": "in encoder", "pre_llm": "before LLM", "llm": "inside LLM"}


def _methods() -> Table:
    table = new_table("method", title="Methods")
    table.add_column("acts", value=2)
    table.add_column("signals", value=1, prose=True)
    table.add_column("paper", prose=True)
    table.add_column("verified", value=3)
    for method in methods():
        table.add_row(
            method.name,
            _PLACES.get(method.stage, method.stage),
            ", ".join(method.needs) or "-",
            f"{method.paper}, arXiv {method.arxiv}" if method.arxiv else method.paper,
            "yes" if method.verified else "no" if method.code else "-",
        )
    return table


def _models() -> Table:
    table = new_table(title="Models")
    table.add_column("model", prose=True)
    table.add_column("adapter", value=1)
    table.add_column("model class", prose=True)
    embedded = {name: _architecture(testbed.path(name)) for name in testbed.names()}
    for family in families():
        for name, host in embedded.items():
            if host in family.hosts:
                table.add_row(name, family.name, host)
        if family.has_language_model:
            table.add_row("any Hub id or local folder", family.name, "\n".join(family.hosts))
        else:
            table.add_row("timm/<any ViT>", family.name, "vision only: encode and select")
    return table


def _families() -> Table:
    speaking = families_by_method()
    lacking = sorted({what for family in speaking for what in family.refuses.values()})
    marks = {what: str(number) for number, what in enumerate(lacking, 1)}
    table = new_table(
        "method",
        *(family.name for family in speaking),
        title="Methods on model families",
        caption="With default options and the family's usual vision encoder. Needs "
        + ", ".join(f"{mark}: {what}" for what, mark in marks.items()),
    )
    table.columns[0].no_wrap = True
    for method in methods():
        found = [family.refuses.get(method.name) for family in speaking]
        cells = ["runs" if what is None else f"needs {marks[what]}" for what in found]
        table.add_row(method.name, *cells)
    return table


def _show_card(cls: type[Compressor]) -> None:
    """Print a method's docstring, its card, and its options with their defaults."""
    card = cls.card
    typer.echo(f"{inspect.getdoc(cls)}\n")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    example = tokenprune.create(cls.name, retention=0.25)
    rows = {
        "paper": f"{card.paper}, arXiv {card.arxiv}" if card.arxiv else card.paper,
        "code": card.code,
        "vectors": f"tests/data/golden/{card.verified}" if card.verified else "",
        "acts": _PLACES.get(cls.stage, cls.stage),
        "options": ", ".join(
            f"{item.name}={getattr(example, item.name)}"
            for item in fields(cls)
            if item.name != "retention"
        ),
    }
    for what, value in rows.items():
        if value:
            table.add_row(what, escape(value))
    for index, deviation in enumerate(card.deviations):
        table.add_row("" if index else "differs", escape(deviation))
    Console(highlight=False).print(table)


def _architecture(folder: Path) -> str:
    """Name of the model class, read from the configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config["architectures"][0])


@app.command()
def audit(
    method: Annotated[
        str,
        typer.Argument(
            help="A registered method with options (fastv:layer=3), or package.module:Class, "
            "whose module is executed.",
            autocompletion=complete_method,
        ),
    ],
    retention: Annotated[
        float,
        typer.Option("--retention", "-r", help="Retention ratio: share of patch tokens to keep."),
    ] = 0.4,
    plugin: Plugin = None,
) -> None:
    """Check a method against the contract, in tiny models of every family.

    Prints one line per check, with a counter-example if it fails: an inverted ranking, unsorted or
    repeated tokens, an exceeded budget, dependence on other rows of the batch, on padding, on
    position ids or on global random numbers, and more.

    Exit status: 0 all passed, 1 a check failed, 2 bad input.
    """
    with as_exit_status():
        import_plugins(plugin)
        quiet()
        compressor = _auditee(method, retention)
        _refuse_without_host(compressor)
        failed = _audit(compressor)
    raise typer.Exit(FAILED if failed else OK)


def _auditee(method: str, retention: float) -> Compressor:
    """The method to check.  Raises `UserError` if there is no such method."""
    from tokenprune.spec import parse

    own = own_class(method)
    return parse(method, retention=retention) if own is None else own(retention=retention)


def _refuse_without_host(compressor: Compressor) -> None:
    """Raise `UserError` if no tiny model has the signals that the method needs."""
    from tokenprune.testing.host import hosts, refusal

    refusals = [refusal(host, compressor) for host in hosts(["llama"])]
    if all(refusals):
        raise UserError(f"there is no tiny model to check it in: {refusals[0]}")


def _audit(compressor: Compressor) -> int:
    """Run every check and print a table.  Returns the number of failures."""
    from tokenprune.testing.auditing import audit
    from tokenprune.testing.host import hosts

    console = Console()
    label = compressor.label if compressor.name else type(compressor).__name__
    with progress() as report:
        findings = audit(compressor, hosts(["llama"]), report)
    table = new_table(title=f"Audit of {escape(label)}")
    table.add_column("check", prose=True)
    table.add_column("")
    table.add_column("meaning, or a counter-example", prose=True)
    for finding in findings:
        name, others = finding.checks[0], len(finding.checks) - 1
        more = f" and {others} more check{'s' if others > 1 else ''}" if others else ""
        verdict, style = ("FAIL", "red") if finding.failed else ("ok", "")
        table.add_row(f"{name}{more}", verdict, escape(printable(finding.about)), style=style)
    console.print(table)
    total = sum(len(finding.checks) for finding in findings)
    failed = sum(len(finding.checks) for finding in findings if finding.failed)
    console.print(f"{total - failed} of {total} checks passed", highlight=False)
    return failed


def _load_experiments() -> None:
    """Import the ``command.py`` of every experiment, which adds its commands to the app."""
    for found in pkgutil.iter_modules(experiments.__path__):
        name = f"{experiments.__name__}.{found.name}.command"
        if found.ispkg and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


Commands.load = staticmethod(_load_experiments)
