"""The layering rules: which module may import which.  Imports are read, not run.

Imports under ``TYPE_CHECKING`` and inside functions count too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache

import pytest
from places import ROOT

checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout, not the wheel"
)

LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"errors", "units", "progress", "texts", "precision", "pictures", "grammar", "display"},
            {"deprecated"},
            {"registry", "offload", "attention"},
            {"layout", "signals", "tokens", "synthetic", "untouched", "drawing"},
            {"ops"},
            {"budget", "allocators"},
            {"fields", "compressor", "staged", "encoder"},
            {"plugins", "spec", "unwrap", "prompts"},
            {"facts", "parts", "inputs", "adapter", "native", "compatibility", "catalogue"},
            {"cost"},
            {"engine"},
            {"pipeline", "forecast"},
            {"serving"},
            {"testing"},
            {"cli", "console", "tables", "__main__"},
        ),
    )
)
"""Modules and packages of the core, lowest first.  Each imports its own layer and those below."""

STRATEGIES_MAY = {
    *(
        "layout",
        "signals",
        "tokens",
        "ops",
        "budget",
        "allocators",
        "compressor",
        "staged",
        "encoder",
    ),
    *("registry", "errors"),
}
TERMINAL = {"typer", "rich"}


def imports(source: str, module: str) -> Iterator[str]:
    """Full names of what ``source`` imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def sources() -> dict[str, str]:
    """Module name to source, of everything that is installed."""
    found = {}
    for folder in ("tokenprune", "strategies", "models", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            if any(parent.is_symlink() for parent in path.parents):
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "tokenprune" else ("tokenprune", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


def graph(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """Module to the modules it imports; names of other packages stay as they are."""
    found: dict[str, set[str]] = {}
    for module, source in modules.items():
        found[module] = set()
        for name in imports(source, module):
            while name not in modules and "." in name and name.startswith("tokenprune"):
                name = name.rpartition(".")[0]
            if name != module:
                found[module].add(name)
    return found


def layer_of(module: str) -> int | None:
    """Index of the layer of a module of the core, None for other modules."""
    _, _, inside = module.partition(".")
    top = inside.partition(".")[0]
    if not top or top in ("strategies", "models", "experiments"):
        return None
    for index, names in enumerate(LAYERS):
        if top in names:
            return index
    raise AssertionError(f"{module} is in no layer; add it to LAYERS")


def breaches(modules: Mapping[str, str]) -> list[str]:
    """Every import that breaks a rule, as a sentence."""
    found = []
    for module, targets in graph(modules).items():
        for target in sorted(targets):
            reason = _reason(module, target)
            if reason:
                found.append(f"{module} imports {target}: {reason}")
    return found


def _reason(module: str, target: str) -> str:
    _, _, inside = module.partition(".")
    _, _, wanted = target.partition(".")
    area, other = inside.partition(".")[0], wanted.partition(".")[0]
    if target.partition(".")[0] in TERMINAL:
        allowed = area in ("cli", "console", "tables") or module.endswith(
            (".command", ".tables", ".__main__")
        )
        allowed = allowed or inside in ("experiments.common.options",)
        scripts = ("experiments.checks.", "experiments.training.")
        allowed = allowed or inside.startswith(scripts)
        return (
            ""
            if allowed
            else "only console, cli, tables and command.py files write to the terminal"
        )
    if not target.startswith("tokenprune") or not inside:
        return ""  # the package itself is the facade: it lists where public names live
    mine = layer_of(module)
    if area == "strategies":
        return _strategy(module, other, target)
    if mine is not None:
        if other in ("strategies", "models", "experiments"):
            return "" if area == "cli" else "the core imports no method, model or experiment"
        theirs = layer_of(target)
        return "" if theirs is None or theirs <= mine else "it is in a higher layer"
    if area == "models":
        if other == "experiments":
            return "models import no experiment"
        highest = layer_of("tokenprune.adapter")
        theirs = layer_of(target)
        if theirs is None or highest is None or theirs <= highest:
            return ""
        return "" if inside == "models.loading" and other == "pipeline" else "models end at adapter"
    return _experiment(inside, wanted)


def _strategy(module: str, other: str, target: str) -> str:
    if module.startswith("tokenprune.strategies._golden"):
        return ""
    if target.startswith("tokenprune.strategies"):
        return ""
    return "" if other in STRATEGIES_MAY else "strategies do not import it"


def _experiment(inside: str, wanted: str) -> str:
    mine, theirs = inside.split("."), wanted.split(".")
    if theirs[:1] != ["experiments"] or len(theirs) < 2 or len(mine) < 2:
        return ""
    if mine[1] == theirs[1] or theirs[1] in ("common", "metrics", "datasets"):
        return ""
    if mine[1] == "common":
        return "common imports no experiment"
    if mine[1] == "checks":
        return ""  # scripts that use every experiment
    return "" if theirs[2:] == ["run"] else "experiments meet through their run only"


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import each other, directly or not."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        left = [start]
        while left:
            for target in edges.get(left.pop(), ()):
                if target in edges and target not in seen:
                    seen.add(target)
                    left.append(target)
        reach[start] = seen
    groups = {
        frozenset({one, *(other for other in reach[one] if one in reach[other])})
        for one in edges
        if one in reach[one]
    }
    return [set(group) for group in groups]


@checkout
def test_no_import_breaks_a_rule() -> None:
    assert breaches(sources()) == []


@checkout
def test_no_modules_import_each_other() -> None:
    edges = graph(sources())
    edges.pop("tokenprune")  # the facade
    assert circles(edges) == []


@checkout
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tokenprune.errors", "from tokenprune.layout import TokenLayout"),
        ("tokenprune.budget", "from tokenprune.compressor import Compressor"),
        ("tokenprune.compressor", "def f():\n    from tokenprune.spec import parse"),
        ("tokenprune.adapter", "if TYPE_CHECKING:\n    from tokenprune.engine import session"),
        ("tokenprune.cost.ledger", "from tokenprune.engine.session import compress"),
        ("tokenprune.engine.session", "from tokenprune.pipeline import Pipeline"),
        ("tokenprune.engine.session", "import tokenprune.testing.runner"),
        ("tokenprune.engine.session", "from tokenprune.strategies.uniform import Uniform"),
        ("tokenprune.registry", "from tokenprune import models"),
        ("tokenprune.strategies.uniform", "from tokenprune.adapter import Adapter"),
        ("tokenprune.strategies.uniform", "def f():\n    from tokenprune import engine"),
        ("tokenprune.models.llava_next", "from tokenprune.engine.session import compress"),
        ("tokenprune.models.llava_next", "from tokenprune.experiments.common import grid"),
        ("tokenprune.experiments.common.grid", "from tokenprune.experiments.compare import run"),
        ("tokenprune.experiments.masks.run", "from tokenprune.experiments.compare import loop"),
        ("tokenprune.experiments.masks.run", "from rich.table import Table"),
        ("tokenprune.engine.session", "import typer"),
    ],
)
def test_a_breach_is_found(module: str, line: str) -> None:
    known = dict.fromkeys(sources(), "")
    assert module in known
    assert breaches({**known, module: line})


def test_a_cycle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


@checkout
def test_strategies_do_not_know_transformers() -> None:
    for module, targets in graph(sources()).items():
        if module.startswith("tokenprune.strategies"):
            assert not any(name.startswith("transformers") for name in targets), module
