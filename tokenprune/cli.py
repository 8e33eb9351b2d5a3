"""The command line: the methods themselves here, each experiment in its `command.py`.

What takes long to import is imported by the command that needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import tokenprune
from tokenprune import experiments
from tokenprune.console import FAILED, OK, app, as_exit_status, new_table, progress, quiet
from tokenprune.errors import UserError
from tokenprune.experiments.common.options import Plugin
from tokenprune.plugins import import_plugins, own_class

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
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    method: Annotated[
        str | None, typer.Argument(help="Show this method's card and options instead.")
    ] = None,
    plugin: Plugin = None,
) -> None:
    """List methods and models.

    Verified methods choose the same tokens as the authors' own code.
    """
    from tokenprune.models import testbed
    from tokenprune.registry import adapters, strategies

    with as_exit_status():
        import_plugins(plugin)
    if method is not None:
        with as_exit_status():
            _show_card(strategies.get(method))
        raise typer.Exit(OK)
    table = new_table("method", "acts", "looks at", "paper", "verified", title="Methods")
    for name in strategies.names():
        cls = strategies.get(name)
        paper = f"{cls.card.paper}, arXiv {cls.card.arxiv}" if cls.card.arxiv else cls.card.paper
        verified = "yes" if cls.card.verified else "no" if cls.card.code else "-"
        table.add_row(name, _PLACES.get(cls.stage, cls.stage), _needs(name), paper, verified)
    console = Console()
    console.print(table, "")

    table = new_table("model", "adapter", "model class", title="Models")
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


@app.command()
def audit(
    method: Annotated[
        str,
        typer.Argument(
            help="A registered method with options (fastv:layer=3), or package.module:Class, "
            "whose module is executed."
        ),
    ],
    retention: Annotated[
        float, typer.Option("--retention", "-r", help="Share of patch tokens to keep.")
    ] = 0.4,
    plugin: Plugin = None,
) -> None:
    """Check a method of anyone's against the contract, in tiny models of every family.

    Prints a line for every check, with a counter-example if it fails: an inverted ranking, tokens
    out of order or repeated, a budget that is exceeded, dependence on batch neighbours, on padding,
    on positions or on global random numbers, and more.

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
    """The method to be checked.  Raises `UserError` if there is none of that name."""
    from tokenprune.spec import parse

    own = own_class(method)
    return parse(method, retention=retention) if own is None else own(retention=retention)


def _refuse_without_host(compressor: Compressor) -> None:
    """Raise `UserError` if no tiny model has what the method needs."""
    from tokenprune.testing.host import hosts, refusal

    refusals = [refusal(host, compressor) for host in hosts(["llama"])]
    if all(refusals):
        raise UserError(f"there is no tiny model to check it in: {refusals[0]}")


def _audit(compressor: Compressor) -> int:
    """Run every check and show how it went; how many failed."""
    from tokenprune.errors import RetentionWarning
    from tokenprune.testing.host import hosts
    from tokenprune.testing.runner import CHECKS, run

    console = Console()
    label = compressor.label if compressor.name else type(compressor).__name__
    table = new_table("check", "", "what it means, or a counter-example", title=f"Audit of {label}")
    failed = 0
    with progress() as report:
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


def _discover() -> None:
    """Import the ``command.py`` of every experiment, which adds its commands to the app."""
    for found in pkgutil.iter_modules(experiments.__path__):
        name = f"{experiments.__name__}.{found.name}.command"
        if found.ispkg and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)


_discover()
