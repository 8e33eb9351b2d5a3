"""Registers methods and model families by name.  Files in ``strategies`` and ``models`` use it.

Other packages register through entry points, for example in their ``pyproject.toml``::

    [project.entry-points."tokenprune.strategies"]
    mine = "my_package.mine:Mine"
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from tokenprune.display import html_table
from tokenprune.errors import UserError, unknown

__all__ = ["Card", "Registry", "adapters", "register", "register_adapter", "strategies"]

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Card:
    """Where a method comes from and how it differs from the authors' code.

    Attributes:
        paper: Title of the paper; a name followed by ``(unpublished)`` or ``(baseline)`` if there
            is none.
        arxiv: Identifier such as ``2501.05179``; empty if there is none.
        code: Repository and commit of the official code.
        deviations: Differences from the official code, one sentence each, with the reason.
        verified: Folder of the golden vectors from the official code that the method reproduces;
            empty if there are none.
    """

    paper: str = ""
    arxiv: str = ""
    code: str = ""
    deviations: tuple[str, ...] = ()
    verified: str = ""

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        link = f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""
        return html_table(
            self.paper,
            {
                "paper": link,
                "code": self.code,
                "golden vectors": self.verified or "none",
                "deviations": "\n".join(self.deviations),
            },
        )


class Registry(Generic[T]):
    """Names to classes.

    Args:
        what: The noun for error messages, such as ``method``.
        package: Package whose modules are imported on first use.
        group: Entry-point group for other packages.
    """

    def __init__(self, what: str, package: str, group: str) -> None:
        self.what, self.package, self.group = what, package, group
        self._classes: dict[str, type[T]] = {}
        self._discovered = False

    def add(self, name: str, cls: type[T]) -> None:
        """Register ``cls``.  A notebook cell that runs again replaces its class.

        Raises:
            UserError: Another class has the name.
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

    def modules(self) -> list[str]:
        """Names of the modules that may register classes, without the name of the package."""
        package = importlib.import_module(self.package)
        return [
            found.name
            for found in pkgutil.iter_modules(package.__path__)
            if not found.name.startswith("_") and not found.ispkg
        ]

    @property
    def discovered(self) -> bool:
        """Whether all modules of the package have been imported."""
        return self._discovered

    def beyond(self, modules: Container[str]) -> dict[str, type[T]]:
        """Every class by its name, except those of ``modules`` of the package.

        These modules are not imported; all others and the entry points are.
        """
        self._load(modules)
        inside = f"{self.package}."
        return {
            name: cls
            for name, cls in self._classes.items()
            if not (cls.__module__.startswith(inside) and cls.__module__[len(inside) :] in modules)
        }

    def _discover(self) -> None:
        # Set before the imports, because a module may look up a name while it is imported.
        if not self._discovered:
            self._discovered = True
            self._load(())

    def _load(self, known: Container[str]) -> None:
        """Import the modules of the package that are not ``known``, and the entry points."""
        for name in self.modules():
            if name not in known:
                importlib.import_module(f"{self.package}.{name}")
        for entry in entry_points(group=self.group):
            self._join(entry)

    def _join(self, entry: EntryPoint) -> None:
        """Add an entry point.  If it fails, warn, so that the others remain available."""
        if entry.name in self._classes:
            return
        try:
            cls = entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist is not None else "an unknown package"
            warnings.warn(
                f"the {self.what} {entry.name!r} of {package} cannot be loaded and is skipped: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            return
        if entry.name not in self._classes:  # its import may have registered it
            self.add(entry.name, cls)
            if not getattr(cls, "name", ""):
                cls.name = entry.name


def _origin(cls: type) -> str:
    try:
        return f"{cls.__qualname__} ({inspect.getfile(cls)})"
    except (TypeError, OSError):  # defined in a notebook or at a prompt
        return f"{cls.__qualname__} ({cls.__module__})"


strategies: Registry[Any] = Registry("method", "tokenprune.strategies", "tokenprune.strategies")
adapters: Registry[Any] = Registry("model adapter", "tokenprune.models", "tokenprune.models")


def register(name: str) -> Callable[[C], C]:
    """Class decorator: register a `Compressor` as ``name``.

    Raises:
        UserError: Another class has the name.
    """

    def decorate(cls: C) -> C:
        strategies.add(name, cls)
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return decorate


def register_adapter(name: str) -> Callable[[C], C]:
    """Class decorator: register an `Adapter` as ``name``, for the model classes in its ``hosts``.

    Raises:
        UserError: Another class has the name.
    """

    def decorate(cls: C) -> C:
        adapters.add(name, cls)
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return decorate
