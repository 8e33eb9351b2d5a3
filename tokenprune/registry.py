"""Names for strategies and models, filled by discovery: a file in the folder is enough.

Third-party packages join through entry points, e.g. in their ``pyproject.toml``::

    [project.entry-points."tokenprune.strategies"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tokenprune.errors import UserError, unknown

__all__ = ["Card", "Registry", "adapters", "register", "register_adapter", "strategies"]

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Card:
    """Where a method comes from and how far it is the authors' own.

    Attributes:
        paper: Title.
        arxiv: Identifier such as ``2501.05179``, empty where there is none.
        code: Official repository and commit.
        deviations: What differs from the official code and why, one sentence each.
        verified: Folder of golden vectors from the official code that the strategy reproduces.
    """

    paper: str = ""
    arxiv: str = ""
    code: str = ""
    deviations: tuple[str, ...] = ()
    verified: str = ""


class Registry(Generic[T]):
    """Names to classes.

    Args:
        what: The noun for error messages, e.g. ``strategy``.
        package: Every module of this package is imported on first use.
        group: Entry-point group through which other packages join.
    """

    def __init__(self, what: str, package: str, group: str) -> None:
        self.what, self.package, self.group = what, package, group
        self._classes: dict[str, type[T]] = {}
        self._discovered = False

    def add(self, name: str, cls: type[T]) -> None:
        """Register ``cls``.  Raises `UserError` if another class has the name.

        Running the same notebook cell again replaces the earlier definition.
        """
        old = self._classes.get(name)
        same = old is not None and (old.__module__, old.__qualname__) == (
            cls.__module__,
            cls.__qualname__,
        )
        if old is not None and not same:
            raise UserError(
                f"the {self.what} name {name!r} is taken: {_origin(old)} registered it before "
                f"{_origin(cls)}. Choose another name."
            )
        self._classes[name] = cls

    def names(self) -> list[str]:
        """All names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class registered as ``name``.  Raises `UnknownNameError` with suggestions."""
        self._discover()
        if name not in self._classes:
            raise unknown(self.what, name, self._classes)
        return self._classes[name]

    def _discover(self) -> None:
        # Before the imports: a module may look a name up while it is being imported.
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for found in pkgutil.iter_modules(package.__path__):
            if not found.name.startswith("_") and not found.ispkg:
                importlib.import_module(f"{self.package}.{found.name}")
        for entry in entry_points(group=self.group):
            self._join(entry)

    def _join(self, entry: EntryPoint) -> None:
        """Add what another package brings, or warn: a broken one must not take ours down."""
        if entry.name in self._classes:
            return
        try:
            cls = entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            warnings.warn(
                f"the {self.what} {entry.name!r} of {package} cannot be loaded and is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        if entry.name not in self._classes:  # unless it registered itself while it was imported
            self.add(entry.name, cls)
            if not getattr(cls, "name", ""):
                cls.name = entry.name


def _origin(cls: type) -> str:
    try:
        return f"{cls.__qualname__} ({inspect.getfile(cls)})"
    except (TypeError, OSError):  # defined in a notebook or at a prompt
        return f"{cls.__qualname__} ({cls.__module__})"


strategies: Registry[Any] = Registry("strategy", "tokenprune.strategies", "tokenprune.strategies")
adapters: Registry[Any] = Registry("model adapter", "tokenprune.models", "tokenprune.models")


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a `Compressor` available as ``name`` everywhere."""

    def decorate(cls: C) -> C:
        strategies.add(name, cls)
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return decorate


def register_adapter(name: str) -> Callable[[C], C]:
    """Class decorator: make an `Adapter` available for the model classes it names."""

    def decorate(cls: C) -> C:
        adapters.add(name, cls)
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return decorate
