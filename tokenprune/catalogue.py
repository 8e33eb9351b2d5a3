"""Methods and model families as data, without importing PyTorch.

Imports are slow, and `tokenprune list` should be fast.  The folders ``strategies`` and ``models``
therefore contain an index of their files, `INDEX`.  Only new files, plug-ins and entry points are
imported.  After a change to a card, ``python -m tokenprune.catalogue`` rewrites the index; a test
compares it with the registry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

from tokenprune.errors import UserError
from tokenprune.registry import Registry, adapters, strategies

__all__ = [
    "Family",
    "Method",
    "families",
    "families_by_method",
    "list_methods",
    "list_models",
    "methods",
    "write",
]

INDEX = "_index.json"
STAGES = ("encoder", "pre_llm", "llm")


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: Its name.
        stage: Where it acts: ``encoder``, ``pre_llm`` or ``llm``.
        needs: Names of the signals that it needs with its default options, sorted.
        paper, arxiv, code: As in its `Card`.
        verified: Whether it reproduces golden vectors of the official code.
    """

    name: str
    stage: str
    needs: tuple[str, ...]
    paper: str
    arxiv: str
    code: str
    verified: bool


@dataclass(frozen=True)
class Family:
    """A registered model family.

    Attributes:
        name: Its name.
        hosts: Names of the model classes.
        has_language_model: False for a vision encoder alone.
        refuses: Name of a method that cannot run with its default options to what the family's
            usual model lacks, such as ``a CLS token``.  Empty without a language model, because
            then it depends on the encoder.
    """

    name: str
    hosts: tuple[str, ...]
    has_language_model: bool
    refuses: Mapping[str, str] = field(default_factory=dict)

    def verdict(self, method: str) -> str:
        """``runs``, or what the method needs."""
        return f"needs {self.refuses[method]}" if method in self.refuses else "runs"


Entry = TypeVar("Entry", Method, Family)


def methods() -> list[Method]:
    """All methods, sorted by name."""
    return _entries(strategies, _method, Method)


def families() -> list[Family]:
    """All model families, sorted by name."""
    return _entries(adapters, _family, Family)


def families_by_method() -> list[Family]:
    """All model families with a language model, whose `Family.refuses` covers all methods.

    The index knows the methods of the package.  With methods of plug-ins, tiny models are built to
    ask them, which takes seconds.
    """
    speaking = [family for family in families() if family.has_language_model]
    if not strategies.beyond(_read(_folder(strategies) / INDEX)):
        return speaking
    return [_family(family.name, adapters.get(family.name)) for family in speaking]


def list_methods(
    pattern: str = "*",
    *,
    stage: Literal["encoder", "pre_llm", "llm"] | None = None,
    verified: bool | None = None,
    needs: str | None = None,
) -> list[str]:
    """Names of the registered methods, sorted.

    Args:
        pattern: Shell pattern of the name, such as ``*prune*``.
        stage: Only methods of this stage.
        verified: True for verified methods only, False for the others only.
        needs: Only methods that need a signal of this name (a shell pattern, such as ``llm_*``);
            empty for methods that need only features and layout.

    Raises:
        UserError: No such stage.

    >>> list_methods("*prune*", stage="llm")
    ['fitprune']
    """
    if stage is not None and stage not in STAGES:
        raise UserError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}.")
    return [
        method.name
        for method in methods()
        if fnmatchcase(method.name, pattern)
        and stage in (None, method.stage)
        and verified in (None, method.verified)
        and (needs is None or _needs(method, needs))
    ]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the model families that have an adapter, sorted.

    Args:
        pattern: Shell pattern of the name, such as ``LLaVA*``.
    """
    return [family.name for family in families() if fnmatchcase(family.name, pattern)]


def _needs(method: Method, pattern: str) -> bool:
    if not pattern:
        return not method.needs
    return any(fnmatchcase(name, pattern) for name in method.needs)


def _method(name: str, cls: Any) -> Method:
    needs = cls(retention=0.5).needs
    card = cls.card
    return Method(
        name=name,
        stage=str(cls.stage),
        needs=tuple(sorted({signal.name for signal in needs})),
        paper=card.paper,
        arxiv=card.arxiv,
        code=card.code,
        verified=bool(card.verified),
    )


def _family(name: str, cls: Any) -> Family:
    from tokenprune.compatibility import lacking
    from tokenprune.spec import create

    refuses: dict[str, str] = {}
    if cls.has_language_model:
        facts = cls(cls.tiny()).facts
        found = {one: lacking(facts, create(one, retention=0.5)) for one in strategies.names()}
        refuses = {method: what for method, what in found.items() if what}
    return Family(name, tuple(cls.hosts), bool(cls.has_language_model), refuses)


def _entries(
    registry: Registry[Any], describe: Callable[[str, Any], Entry], kind: type[Entry]
) -> list[Entry]:
    """The entries of the index, and entries for every class outside the index."""
    indexed = {} if registry.discovered else _read(_folder(registry) / INDEX)
    found = {}
    for entries in indexed.values():
        for entry in entries:
            values = {name: _frozen(value) for name, value in entry.items()}
            found[entry["name"]] = kind(**values)
    for name, cls in registry.beyond(indexed).items():
        found[name] = describe(name, cls)
    return [found[name] for name in sorted(found)]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _folder(registry: Registry[Any]) -> Path:
    spec = find_spec(registry.package)
    if spec is None or spec.origin is None:
        raise UserError(f"the package {registry.package} is missing; install tokenprune again.")
    return Path(spec.origin).parent


def _read(index: Path) -> dict[str, list[dict[str, Any]]]:
    """Entries by the file (without ``.py``) that registers them; none if there is no index."""
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(index.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    present = {path.stem for path in index.parent.glob("*.py")}
    return {module: entries for module, entries in found.items() if module in present}


def fresh(registry: Registry[Any], describe: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The index that a folder should have: every file, including files that register nothing."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in registry.modules()}
    for name in registry.names():
        cls = registry.get(name)
        package, _, module = cls.__module__.rpartition(".")
        if package == registry.package:
            found[module].append(asdict(describe(name, cls)))
    return dict(sorted(found.items()))


def write() -> Iterable[Path]:
    """Rewrite both indices.  Returns their paths."""
    described: list[tuple[Registry[Any], Callable[[str, Any], Any]]]
    described = [(strategies, _method), (adapters, _family)]
    for registry, describe in described:
        path = _folder(registry) / INDEX
        text = json.dumps(fresh(registry, describe), indent=1, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        yield path


if __name__ == "__main__":
    from tokenprune.catalogue import write as _write  # the registry of the package, not of __main__

    for _path in _write():
        print(_path)
