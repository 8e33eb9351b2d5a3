"""Files, functions and classes stay small enough to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = ("tokenprune", "strategies", "models", "experiments", "docs", "tests")
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, METHODS_OF_A_CLASS = 600, 60, 25

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout, not the wheel"
)


def _files() -> list[Path]:
    return [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def too_long(source: str) -> Iterator[str]:
    """Name and size of everything in ``source`` that is above a limit."""
    lines = len(source.splitlines())
    if lines > LINES_OF_A_FILE:
        yield f"the file has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LINES_OF_A_FUNCTION:
                yield f"{node.name} has {lines} lines"
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(one, ast.FunctionDef) for one in node.body)
            if methods > METHODS_OF_A_CLASS:
                yield f"{node.name} has {methods} methods"


def test_nothing_is_too_long() -> None:
    files = _files()
    assert len(files) > 200
    found = {
        f"{path.relative_to(ROOT)}: {what}"
        for path in files
        for what in too_long(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_what_is_too_long_is_found() -> None:
    body = "    x = 1\n"
    assert list(too_long("def f():\n" + 59 * body)) == []
    assert list(too_long("def f():\n" + 60 * body)) == ["f has 61 lines"]
    methods = "".join(f"    def f{index}(self): ...\n" for index in range(26))
    assert list(too_long("class A:\n" + methods)) == ["A has 26 methods"]
    assert list(too_long("x = 1\n" * 601)) == ["the file has 601 lines"]
