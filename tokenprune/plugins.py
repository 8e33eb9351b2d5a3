"""The user's code on the command line: ``module:Class``, ``module:function``, ``--plugin MODULE``.

Importing a module executes it.  ``--plugin`` requests the import.  ``module:Class`` may also be a
method with a misspelt option.  The source of the module is therefore read first, and executed only
if it defines a class of that name that derives from `Compressor`.
"""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import decode_source
from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.errors import UserError

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = ["import_plugins", "own_class", "own_object"]


def import_plugins(modules: Iterable[str] | None) -> None:
    """Import ``modules``, which register methods.

    Raises:
        UserError: There is no module of that name, or its import fails.
    """
    for module in modules or ():
        with _working_directory():
            if module not in sys.modules and not (_is_dotted(module) and _spec(module)):
                raise UserError(
                    f"--plugin: there is no module {module!r}; give a name as import takes it, "
                    "my_module for the file my_module.py here."
                )
            _import(module)


def own_class(path: str) -> type[Compressor] | None:
    """The class at ``package.module:Class``; None for a spec such as ``fastv:layer=3``.

    Its module is executed only if its source defines such a class.

    Raises:
        UserError: There is no such module, or it has no compressor of that name.
    """
    module, _, name = path.partition(":")
    if not (name.isidentifier() and _is_dotted(module)):
        return None
    from tokenprune.compressor import Compressor
    from tokenprune.registry import strategies

    if module in strategies.names():  # a spec with malformed options
        return None
    with _working_directory():
        if module not in sys.modules:
            _check_source(module, name)
            _import(module)
    found = getattr(sys.modules[module], name, None)
    if not (isinstance(found, type) and issubclass(found, Compressor)):
        raise UserError(f"{name!r} of {module!r} is not a class derived from Compressor.")
    return found


def own_object(path: str) -> object:
    """The object at ``package.module:name``, after the import of the module.

    Raises:
        UserError: ``path`` is not of this form, or there is no such module or name.
    """
    module, _, name = path.partition(":")
    if not (name.isidentifier() and _is_dotted(module)):
        raise UserError(f"cannot read {path!r}; give package.module:name.")
    with _working_directory():
        if module not in sys.modules and _spec(module) is None:
            raise UserError(f"there is no module {module!r} for {path!r}; check its name.")
        _import(module)
    if not hasattr(sys.modules[module], name):
        raise UserError(f"the module {module!r} has no {name!r}; check the name.")
    found: object = getattr(sys.modules[module], name)
    return found


def _is_dotted(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))


@contextmanager
def _working_directory() -> Iterator[None]:
    """While open, files of the working directory can be imported."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise _not_found(module, str(error)) from error
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = "; ".join(str(error).splitlines()[:1])
        raise UserError(
            f"importing {module!r} failed: {type(error).__name__}: {said} ({last.filename}, line "
            f"{last.lineno})."
        ) from error


def _not_found(module: str, why: str) -> UserError:
    return UserError(
        f"cannot import {module!r}: {why}. Give package.module:Class, or a registered method (see "
        "tokenprune list) with options, name:option=value."
    )


# --- reading the source ---------------------------------------------------------------------------


def _check_source(module: str, name: str) -> None:
    """Raise `UserError` unless the source of ``module`` defines a compressor ``name``."""
    spec = _spec(module)
    if spec is None:
        raise _not_found(module, f"No module named {module!r}")
    try:
        found = _derives(module, name, ())
    except SyntaxError as error:
        raise UserError(
            f"cannot import {module!r}: {error.msg} ({error.filename or spec.origin}, line "
            f"{error.lineno})."
        ) from error
    if not found:
        raise UserError(
            f"{name!r} of {module!r} is not a class derived from Compressor in the source "
            f"{spec.origin or 'of the module'}, which was not executed. If the module makes "
            f"methods when it is imported, give --plugin {module}; if {module!r} should be a "
            "method, see tokenprune list."
        )


def _spec(module: str) -> ModuleSpec | None:
    """The import spec of ``module``, without importing its parent packages."""
    path: Sequence[str] | None = None
    spec = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        finders = (finder.find_spec for finder in sys.meta_path)
        found = (find(".".join(parts[:end]), path) for find in finders)
        spec = next((one for one in found if one is not None), None)
        if spec is None or (spec.submodule_search_locations is None and end < len(parts)):
            return None
        path = spec.submodule_search_locations
    return spec


def _derives(module: str, name: str, seen: tuple[tuple[str, str], ...]) -> bool:
    """Whether ``name`` of ``module`` is a class that derives from `Compressor`."""
    from tokenprune.compressor import Compressor

    if (module, name) in seen:
        return False
    if module in sys.modules:
        found = getattr(sys.modules[module], name, None)
        return isinstance(found, type) and issubclass(found, Compressor)
    spec = _spec(module)
    if spec is None or not str(spec.origin).endswith(".py"):
        return False
    source = decode_source(Path(str(spec.origin)).read_bytes())
    package = module if spec.submodule_search_locations is not None else module.rpartition(".")[0]
    body = list(_statements(ast.parse(source, str(spec.origin)).body))
    seen = (*seen, (module, name))
    for statement in body:
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            named = (_reference(base, body, module, package) for base in statement.bases)
            return any(_derives(*place, seen) for place in named if place is not None)
    return any(_derives(*place, seen) for place in _imported(name, body, package))


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run on import, including those in ``if``, ``try`` and ``with``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, ()))


def _imported(name: str, body: list[ast.stmt], package: str) -> Iterator[tuple[str, str]]:
    """(module, name there) from which ``name`` may be imported."""
    for statement in body:
        if not isinstance(statement, ast.ImportFrom):
            continue
        above = package.split(".")[: len(package.split(".")) - statement.level + 1]
        base = [*(above if statement.level else ()), *([statement.module or ""])]
        source = ".".join(part for part in base if part)
        for alias in statement.names:
            if alias.name == "*" or (alias.asname or alias.name) == name:
                yield source, name if alias.name == "*" else alias.name


def _reference(
    base: ast.expr, body: list[ast.stmt], module: str, package: str
) -> tuple[str, str] | None:
    """(module, name there) of a base class written as ``Name`` or ``module.Name``."""
    if isinstance(base, ast.Subscript):  # Generic[T]
        base = base.value
    if isinstance(base, ast.Name):
        return module, base.id
    if not isinstance(base, ast.Attribute):
        return None
    prefix, name = ast.unparse(base.value), base.attr
    for statement in body:
        for alias in statement.names if isinstance(statement, ast.Import) else ():
            if alias.asname == prefix or (alias.asname is None and alias.name == prefix):
                return alias.name, name
    for source, inner in _imported(prefix, body, package):
        return f"{source}.{inner}", name
    return None
