"""Pages of the API reference: one for every module of the core that states what is public."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import tokenprune as tp

_OTHERS = ("strategies", "models", "experiments")  # have pages of their own, or none


@cache
def modules() -> list[str]:
    """Dotted names of the modules with an ``__all__``, sorted."""
    root = Path(tp.__file__).parent
    return sorted(_found(root, tp.__name__))


def _found(folder: Path, package: str) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" and path.stem != "__main__" and _has_public_names(path):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            if name != tp.__name__:
                yield name
        elif path.is_dir() and path.name not in _OTHERS and (path / "__init__.py").is_file():
            yield from _found(path, f"{package}.{path.name}")


def _has_public_names(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(
        isinstance(one, ast.Assign)
        and any(isinstance(name, ast.Name) and name.id == "__all__" for name in one.targets)
        for one in body
    )


def pages() -> dict[str, str]:
    """Name and Markdown of the page of every module."""
    return {
        name.removeprefix(f"{tp.__name__}."): f"# {name}\n\n::: {name}\n    options:\n"
        "      show_root_heading: false\n"
        for name in modules()
    }


def names(_: str = "") -> str:
    """A table of the names in ``tokenprune`` itself, with links to where they are documented."""
    rows = []
    for name in sorted(tp.__all__, key=str.lower):
        thing = getattr(tp, name)
        home = f"{thing.__module__}.{thing.__qualname__}"
        first = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
        shown = f"[`tp.{name}`][{home}]" if thing.__module__ in modules() else f"`tp.{name}`"
        rows.append(f"| {shown} | {first} |")
    return "\n".join(["| name | meaning |", "|---|---|", *rows])
