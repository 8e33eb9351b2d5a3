"""Pages of the API reference: one for every module that users and authors of plug-ins import."""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import tokenprune as tp

GROUPS = {
    "Running a model": (
        "models.loading",
        "pipeline",
        "engine.session",
        "engine.trace",
        "catalogue",
    ),
    "Serving": (  # not the modules that only vLLM imports
        *("serving.embeds", "serving.specs", "serving.clients", "serving.counting", "serving.keys"),
        "serving.vllm_video",
    ),
    "Costs": ("cost.ledger", "cost.arithmetic", "forecast"),
    "Writing a method": (
        *("compressor", "encoder", "tokens", "layout", "signals", "budget", "allocators"),
        *("ops", "spec", "grammar", "registry", "catalogue"),
    ),
    "Writing an adapter": ("adapter", "facts", "compatibility"),
    "Testing": ("testing.runner", "testing.host", "synthetic"),
    "Errors": ("errors",),
}


@cache
def modules() -> dict[str, list[str]]:
    """Dotted names of the documented modules by group; a package stands for its modules."""
    return {
        group: [module for name in names for module in _expanded(f"{tp.__name__}.{name}")]
        for group, names in GROUPS.items()
    }


def _expanded(name: str) -> list[str]:
    path = getattr(import_module(name), "__path__", None)
    return [name] if path is None else [f"{name}.{found.name}" for found in iter_modules(path)]


def pages() -> dict[str, str]:
    """Name and Markdown of the page of every module."""
    return {
        _short(
            module
        ): f"# {module}\n\n::: {module}\n    options:\n      show_root_heading: false\n"
        for names in modules().values()
        for module in names
    }


def _short(module: str) -> str:
    return module.removeprefix(f"{tp.__name__}.")


def table(_: str = "") -> str:
    """The documented modules by group, with the first line of each."""
    rows = ["| module | content |", "|---|---|"]
    for group, names in modules().items():
        rows.append(f"| **{group}** | |")
        rows += [
            f"| [`{name}`]({_short(name)}.md) | {_first(import_module(name))} |" for name in names
        ]
    return "\n".join(rows)


def public_names(_: str = "") -> str:
    """The names in ``tokenprune`` itself, with links to where they are documented."""
    documented = {name for names in modules().values() for name in names}
    rows = ["| name | meaning |", "|---|---|"]
    for name in sorted(tp.__all__, key=str.lower):
        thing = getattr(tp, name)
        home = f"{thing.__module__}.{thing.__qualname__}"
        shown = f"[`tp.{name}`][{home}]" if thing.__module__ in documented else f"`tp.{name}`"
        rows.append(f"| {shown} | {_first(thing)} |")
    return "\n".join(rows)


def _first(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
