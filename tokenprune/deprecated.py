"""Old names.  Each works for one release, with a warning that gives the new name.

To drop old names, remove them from these tables:

- `MODULES`: removed modules, and the modules that have their names now;
- `MOVED`: names that moved out of a module that still exists;
- `ATTRIBUTES`, `OPTIONS`: renamed attributes and options of a compressor.

Renamed arguments are declared at their function, with `renamed_arguments`.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "CallableTuple",
    "RenamedAttribute",
    "RenamesOptions",
    "install",
    "moved_names",
    "rename_attributes",
    "renamed_arguments",
    "renamed_options",
    "warn",
]

P = ParamSpec("P")
R = TypeVar("R")

MODULES: dict[str, tuple[str, ...]] = {
    "cache": ("engine.cache",),
    "golden": ("testing.golden",),
    "guard": ("engine.guard",),
    "hand_tower": ("testing.reference_tower",),
    "ledger": ("cost.ledger", "cost.arithmetic"),
    "llama": ("testing.llama",),
    "llm_signals": ("engine.decoder",),
    "models.adapter": ("adapter", "models.loading"),
    "models.configs": ("models.published", "models.loading"),
    "models.inputs": ("prompts",),
    "observe": ("engine.vision",),
    "passes": ("engine.forward",),
    "prefix": ("engine.prefix",),
    "primitives": ("ops.ranking", "ops.spatial", "ops.diversity", "ops.clustering", "ops.merging"),
    "terminal": ("console", "spec", "units", "progress"),
}
"""Removed modules of the package; a name is in the first of the listed modules that has it."""

MOVED: dict[str, dict[str, str]] = {
    "budget": {
        name: f"allocators.{name}"
        for name in (
            *("ALLOCATORS", "SALIENCY", "Allocator", "Proportional", "ThumbnailCommand"),
            *("ThumbnailPeak", "TopK", "allocator"),
        )
    },
    "compressor": {"create": "spec.create", "parse": "spec.parse"},
    "engine": {
        "Chosen": "engine.trace.SelectionRecord",
        "Trace": "engine.trace.Trace",
        "adapter_of": "adapter.adapter_of",
        "compress": "engine.session.compress",
    },
    "spec": {"says_retention": "spec.has_retention", "split_specs": "spec.split"},
    "tokens": {
        "Kind": "layout.Kind",
        "Signal": "signals.Signal",
        "TokenLayout": "layout.TokenLayout",
        "listed": "layout.listed",
        "moved": "layout.moved",
        "unpadded_box": "layout.unpadded_box",
    },
}
"""Module to its moved names, with their new modules."""

ATTRIBUTES = {"positional": "location_aware", "positions": "position_ids", "stages": "parts"}
OPTIONS = {"positions": "position_ids"}


_INSIDE = {"tokenprune", "abc", "contextlib", "dataclasses", "functools", "importlib"}


def _is_inside(module: str) -> bool:
    """Whether the code of ``module`` only passes a call on to tokenprune."""
    return module.partition(".")[0] in _INSIDE


def warn(old: str, new: str) -> None:
    """Warn that ``old`` is now ``new``, at the line outside of tokenprune that uses it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        # `warnings` does not count the frames of the import system either.
        level += "importlib._bootstrap" not in frame.f_code.co_filename
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next release.",
        DeprecationWarning,
        stacklevel=level,
    )


# --- modules --------------------------------------------------------------------------------------


class OldModules:
    """Finds the modules of `MODULES`, after every other finder failed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != "tokenprune" or module not in MODULES:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]  # duck-typed, as importlib allows

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = MODULES[module.__name__.partition(".")[2]]

        def get(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            homes = [importlib.import_module(f"tokenprune.{place}") for place in new]
            for home in homes:
                if name in home.__all__:  # not a name that a module merely imports
                    warn(f"{module.__name__}.{name}", f"{home.__name__}.{name}")
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """Make the modules of `MODULES` importable."""
    if not any(type(finder).__name__ == OldModules.__name__ for finder in sys.meta_path):
        sys.meta_path.append(OldModules())


def moved_names(module: str) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that names of `MOVED` have left."""
    table = MOVED[module.partition(".")[2]]

    def get(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        place, _, new = table[name].rpartition(".")
        warn(f"{module}.{name}", f"tokenprune.{table[name]}")
        return getattr(importlib.import_module(f"tokenprune.{place}"), new)

    return get


# --- arguments ------------------------------------------------------------------------------------


def _renamed(given: Mapping[str, Any], names: Mapping[str, str], what: str) -> dict[str, Any]:
    found = dict(given)
    for old, new in names.items():
        if old in found:  # `dataclasses.replace` also passes the new one
            warn(f"{what}{old}=", f"{new}=")
            found[new] = found.pop(old)
    return found


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a function also takes arguments by their old names, given as ``old="new"``.

    A function that is written with the old name, such as a method of a third-party adapter, also
    takes the new one.
    """

    import inspect  # slow to import

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function).parameters
        to_old = {new: old for old, new in names.items() if old in own}
        for new, old in to_old.items():
            warn(f"the argument {old} of {function.__qualname__}", new)
        to_new = {old: new for old, new in names.items() if old not in own}

        @functools.wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            fields = _renamed(given, to_new, f"{function.__name__}: ")
            fields = {to_old.get(name, name): value for name, value in fields.items()}
            return function(*args, **fields)

        return call

    return decorate


def renamed_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a compressor by their new names."""
    return _renamed(given, OPTIONS, "")


# --- attributes -----------------------------------------------------------------------------------


class RenamedAttribute:
    """An old name of an attribute, for a class and its instances."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        warn(f"{owner.__name__}.{self.old}", f"{owner.__name__}.{self.new}")
        return getattr(owner if instance is None else instance, self.new)


def rename_attributes(cls: type) -> None:
    """Rename the attributes that the body of ``cls`` defines under an old name of `ATTRIBUTES`."""
    for old, new in ATTRIBUTES.items():
        if old in vars(cls):
            warn(f"{cls.__name__}.{old}", f"{cls.__name__}.{new}")
            setattr(cls, new, vars(cls)[old])
            delattr(cls, old)
        annotations = vars(cls).get("__annotations__", {})
        if old in annotations:
            annotations[new] = annotations.pop(old)


class RenamesOptions(ABCMeta):
    """Metaclass: a class also takes options by their old names."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **_renamed(options, OPTIONS, f"{cls.__name__}: "))


class CallableTuple(tuple[Any, ...]):
    """A former tuple that is now a method.  Using it as a tuple warns.

    Attributes:
        method: The method that a call runs.
        old, new: Names for the warning.
    """

    method: Callable[[], Iterator[Any]]
    old: str
    new: str

    @classmethod
    def of(
        cls, values: tuple[Any, ...], method: Callable[[], Iterator[Any]], old: str, new: str
    ) -> CallableTuple:
        made = cls(values)
        made.method, made.old, made.new = method, old, new
        return made

    def __call__(self) -> Iterator[Any]:
        return self.method()

    def __iter__(self) -> Iterator[Any]:
        warn(self.old, self.new)
        return super().__iter__()

    def __len__(self) -> int:
        warn(self.old, self.new)
        return super().__len__()

    def __getitem__(self, index: Any) -> Any:
        warn(self.old, self.new)
        return super().__getitem__(index)
