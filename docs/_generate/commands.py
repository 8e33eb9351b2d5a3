"""Pages about the commands, made from the command line's own help."""

from __future__ import annotations

import os
import shlex
import tempfile
from contextlib import chdir
from functools import cache
from inspect import cleandoc

from typer.testing import CliRunner

from tokenprune.cli import app

COLUMNS = "100"


@cache
def summaries() -> dict[str, str]:
    """The first sentence of every command's help, by its name."""
    found = {}
    for command in app.registered_commands:
        if command.callback is not None:
            name = command.name or command.callback.__name__.strip("_").replace("_", "-")
            text = command.help or command.callback.__doc__ or ""
            found[name] = cleandoc(text).split("\n\n")[0].replace("\n", " ")
    return dict(sorted(found.items()))


def pages() -> dict[str, str]:
    """Name and Markdown of a page for every command; a written page takes its place."""
    return {
        name: f"# tokenprune {name}\n\n{text}\n\n{options_of(name)}"
        for name, text in summaries().items()
    }


def table(_: str = "") -> str:
    """A Markdown table of all commands."""
    rows = [f"| [`{name}`]({name}.md) | {text} |" for name, text in summaries().items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def options_of(name: str) -> str:
    """The help of a command."""
    return output_of(f"tokenprune {name} --help")


@cache
def output_of(line: str) -> str:
    """What ``line``, a command with its arguments, prints.  Raises if the command fails."""
    words = shlex.split(line)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        environment = {**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1", "TERM": "dumb"}
        found = CliRunner().invoke(app, words[1:], env=environment, prog_name=words[0])
    if found.exit_code:
        raise RuntimeError(f"{line} ends with exit status {found.exit_code}: {found.output}")
    printed = "\n".join(part.rstrip() for part in found.stdout.strip("\n").splitlines())
    return f"```text\n$ {line}\n{printed}\n```"
