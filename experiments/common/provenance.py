"""What a result depends on: hashes of files, versions, and the state of the source."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import tokenprune

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = [
    "DECISIVE",
    "ENGINE",
    "Files",
    "answer_files",
    "code_files",
    "code_roots",
    "compiled",
    "digests",
    "environment",
    "functions_in",
    "git_state",
    "model_files",
    "split_code",
]


Files = dict[str, str]
"""Maps the name of a file to its SHA-256."""


DECISIVE = ("torch", "torchvision", "transformers", "tokenizers", "pillow")
"""Packages whose versions can change an answer."""


# Modules of tokenprune that cannot change an answer, although modules that can import them: they
# print, write files, draw and count.  The compressors that they make are part of the experiment.
_NOT_DECISIVE = {
    *("tokenprune.cli", "tokenprune.console", "tokenprune.testing", "tokenprune.testing.golden"),
    "tokenprune.engine.rankings",
    *(
        f"tokenprune.experiments.common.{name}"
        for name in (
            *("answers", "bench", "cells", "conversion", "csv_files", "files", "glyphs"),
            "journal",
            *("patch_boxes", "plots", "prompt", "provenance", "reading", "run_folder"),
            *("intervals", "summary", "times", "timing"),
        )
    ),
    *(
        f"tokenprune.experiments.{name}"
        for name in (
            *("compare.figures", "compare.growing", "compare.matching", "compare.measuring"),
            *("efficiency.figures", "efficiency.run"),
            *("positional_bias.figures", "positional_bias.estimates"),
        )
    ),
}


_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


_CONFIGS = {"config.json", "generation_config.json"}


_PROCESSOR = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


_NO_DATA = {".py", ".pyc", ".pyi", ".md", ".rst"}


_RUN = ("manifest.json", "answers.jsonl")


_PLAIN = (bool, int, float, str, tuple)  # constants that code without a file may use


ENGINE = "tokenprune.engine.session"
"""A module that every answer needs; it is loaded on first use, so no import leads to it."""


def answer_files(
    model: Path | None,
    compressors: Iterable[Compressor],
    others: Iterable[type | str] = ("tokenprune.experiments.compare.run",),
) -> dict[str, Files]:
    """Every file that can change an answer, in groups.

    Args:
        model: Folder of the model; None if there is none.
        compressors: Of the experiment.
        others: Further code: classes, such as the adapter's, and names of modules.

    Returns:
        The groups ``weights``, ``processor`` and ``code``.
    """
    return {**model_files(model), "code": code_files(compressors, {*others, ENGINE})}


def digests(files: Mapping[str, Files]) -> dict[str, str | None]:
    """The SHA-256 of names and contents of each group; None for a group without files."""
    return {
        group: hashlib.sha256(json.dumps(sorted(named.items())).encode()).hexdigest()
        if named
        else None
        for group, named in files.items()
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the model ------------------------------------------------------------------------------------


def model_files(folder: Path | None) -> dict[str, Files]:
    """The files that `from_pretrained` may read: ``weights`` with config, and ``processor``."""
    found: dict[str, Files] = {"weights": {}, "processor": {}}
    for path, name in _below(folder) if folder is not None else ():
        whole = path.name in _CONFIGS or path.name.endswith(".index.json")
        if whole or path.suffix in _WEIGHTS:
            found["weights"][name] = _digest(path)
        elif path.suffix in _PROCESSOR:
            found["processor"][name] = _digest(path)
    return found


def _below(folder: Path) -> Iterator[tuple[Path, str]]:
    """The files below ``folder``, with their relative names; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            yield path, "/".join(parts)


# --- the code -------------------------------------------------------------------------------------


def code_files(compressors: Iterable[Compressor], others: Iterable[type | str] = ()) -> Files:
    """Source and data files that selections and answers depend on.

    For every class of a method, of its bases and of its option values: the module, and all modules
    of the same package, or next to a single module, that it imports directly or indirectly.  For
    other packages than tokenprune also all data files of the package; for a single module, the
    files next to it that its source names.  For a class of a notebook or a prompt, which has no
    file: its compiled code, and that of the functions and classes there that it uses.

    Args:
        compressors: The compressors.
        others: Further classes, and names of modules.
    """
    core, own = split_code({"": list(compressors)}, others)
    return dict(sorted({**core, **own[""]}.items()))


def split_code(
    methods: Mapping[str, Iterable[Compressor]], others: Iterable[type | str] = ()
) -> tuple[Files, dict[str, Files]]:
    """The `code_files` of all answers, and of each method those that it needs besides.

    Args:
        methods: Name to the compressors of a method.
        others: Code that every answer depends on, as for `code_files`.

    Returns:
        The files of ``others``, and for each name its further files.
    """
    core: dict[str, Path] = {}
    seen = set(_NOT_DECISIVE)
    for name in code_roots([], others):
        _follow(name, core, seen)
    found: dict[str, Files] = {}
    known: dict[tuple[str, ...], Files] = {}
    for label, some in methods.items():
        compressors = list(some)
        roots = tuple(code_roots(compressors))
        if roots not in known:
            paths: dict[str, Path] = {}
            finished = set(seen)
            for name in roots:
                _follow(name, paths, finished)
            known[roots] = _digests_of(paths)
        kinds = {kind for one in compressors for part in one.parts() for kind in _kinds(part)}
        typed = [kind for kind in kinds if _home(kind.__module__.partition(".")[0]) is None]
        found[label] = known[roots] | compiled(
            [kind for kind in typed if kind.__module__ in sys.modules]
        )
    return _digests_of(core), found


def _digests_of(paths: Mapping[str, Path]) -> Files:
    return {name: _digest(path) for name, path in sorted(paths.items())}


def functions_in(files: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of a source file to the checksums of its functions, by qualified name.

    The rest of the file, outside functions, has an empty name.  A difference of two files is named
    with them; `code_files` decides whether there is one.

    Args:
        files: As `code_files` names them.
    """
    found = {}
    for name in files:
        home = _home(name.partition("/")[0].removesuffix(".py"))
        path = home / name if home is not None else Path()
        if path.suffix == ".py" and path.is_file():
            found[name] = _checksums(path, path.stat().st_mtime_ns)
    return found


@lru_cache(maxsize=1024)
def _checksums(path: Path, _modified: int) -> dict[str, str]:
    source = path.read_bytes()
    lines = source.splitlines()
    found: dict[str, str] = {}
    pending: list[tuple[str, ast.stmt]] = [("", one) for one in ast.parse(source).body]
    rest = set(range(len(lines)))
    while pending:
        prefix, node = pending.pop()
        if isinstance(node, ast.ClassDef):
            pending += [(f"{prefix}{node.name}.", one) for one in node.body]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
            span = range(first, node.end_lineno or node.lineno)
            rest -= set(span)
            found[f"{prefix}{node.name}"] = _checksum(lines[at] for at in span)
    return found | {"": _checksum(lines[at] for at in sorted(rest))}


def _checksum(lines: Iterable[bytes]) -> str:
    return f"{zlib.crc32(b''.join(line.rstrip() + b' ' for line in lines)):08x}"


def code_roots(compressors: Iterable[Compressor], others: Iterable[type | str] = ()) -> list[str]:
    """The sorted names of the modules that `code_files` starts from."""
    classes = {kind for one in compressors for part in one.parts() for kind in _kinds(part)}
    names = {other for other in others if isinstance(other, str)}
    classes |= {base for other in others if isinstance(other, type) for base in other.__mro__}
    names |= {kind.__module__ for kind in classes}
    aside = sys.stdlib_module_names | {"torch"}
    return sorted(name for name in names if name.partition(".")[0] not in aside)


def _kinds(value: Any) -> Iterator[type]:
    """The classes of an option's value and of its fields, with their bases."""
    yield from type(value).__mro__
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _kinds(getattr(value, item.name))


def _follow(name: str, found: dict[str, Path], seen: set[str]) -> None:
    """Add a module, and all that it imports from its package or neighbours, to ``found``.

    Args:
        name: Of the module.
        found: Name of a file to its path.
        seen: Names of modules that are finished.
    """
    top = name.partition(".")[0]
    home = _home(top)
    if home is None:  # defined interactively
        return
    alone = home in {Path(sysconfig.get_path(which)) for which in ("purelib", "platlib")}
    pending = [name]
    while pending:
        name = pending.pop()
        other = name.partition(".")[0] != top
        if name in seen or (alone and other):  # another distribution, recorded by its version
            continue
        path = _file(name, home, loaded=not other)
        if path is None:
            continue
        seen.add(name)
        inside = name.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        found[inside] = path
        tree = ast.parse(path.read_bytes())
        pending += _imported(tree, name, path)
        pending += [name.rpartition(".")[0]]
        if top != "tokenprune":
            found |= _data(tree, inside, path)


def compiled(objects: Iterable[Any]) -> Files:
    """The digests of functions and classes without a file, by name, as `code_files` explains."""
    found: Files = {}
    pending = list(objects)
    while pending:
        value = pending.pop()
        name = f"{value.__module__}.{value.__qualname__}"
        if name in found or value.__module__ in sys.stdlib_module_names - {"__main__"}:
            continue
        functions = [value] if inspect.isfunction(value) else list(_functions(value))
        parts = [part for function in functions for part in _parts(function.__code__)]
        parts += [repr((one.__defaults__, one.__kwdefaults__)) for one in functions]
        used = {} if inspect.isfunction(value) else dict(vars(value))
        for function in functions:
            words = _words(function.__code__)
            used |= {word: function.__globals__.get(word) for word in words}
        parts += [
            f"{word}={held!r}"
            for word, held in sorted(used.items())
            if isinstance(held, _PLAIN) and not word.startswith("__")
        ]
        found[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        pending += [
            one
            for one in used.values()
            if (inspect.isfunction(one) or isinstance(one, type))
            and one.__module__ == value.__module__
        ]
    return dict(sorted(found.items()))


def _functions(kind: type) -> Iterator[FunctionType]:
    """The functions that a class defines, also those of its properties and static methods."""
    for held in vars(kind).values():
        wrapped = [getattr(held, name, None) for name in ("fget", "fset", "__func__", "func")]
        yield from (one for one in (held, *wrapped) if inspect.isfunction(one))


def _parts(code: CodeType) -> Iterator[str]:
    """What a code object computes, without its file and line numbers."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)
        elif isinstance(constant, frozenset):  # has no order
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _words(code: CodeType) -> Iterator[str]:
    """The names that a code object looks up, also those of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)


def _home(top: str) -> Path | None:
    """The parent folder of a package or single module; None if it has no file."""
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    paths = list(getattr(module, "__path__", ())) or ([file] if file else [])
    return Path(paths[0]).absolute().parent if paths else None


def _file(name: str, home: Path, *, loaded: bool) -> Path | None:
    """The source of a module below ``home``, or the file that it was ``loaded`` from."""
    stem = home.joinpath(*name.split("."))
    where = getattr(sys.modules.get(name), "__file__", None) if loaded else None
    for path in (stem.with_suffix(".py"), stem / "__init__.py", Path(where or "")):
        if path.suffix == ".py" and path.is_file():
            return path
    return None


def _imported(tree: ast.AST, name: str, path: Path) -> Iterator[str]:
    """The full names that a module imports, except those for type checking only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and _for_types(node.test):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _for_types(test: ast.expr) -> bool:
    """Whether a condition is ``TYPE_CHECKING`` or ``typing.TYPE_CHECKING``."""
    return getattr(test, "id", getattr(test, "attr", "")) == "TYPE_CHECKING"


def _data(tree: ast.AST, inside: str, path: Path) -> dict[str, Path]:
    """The data and template files that may belong to a module, by name.

    Args:
        tree: The module.
        inside: Path of its file, relative to the parent folder of its package.
        path: Its file.
    """
    top, *below = inside.split("/")
    if below:
        folder = path.parents[len(below) - 1]
        return {f"{top}/{name}": file for file, name in _below(folder) if _is_data(file, folder)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = [text for text in texts if isinstance(text, str) and re.fullmatch(r"[\w. /-]+", text)]
    named = {name: path.parent / name for name in names if len(name) < 256}
    return {
        name: file for name, file in named.items() if file.is_file() and _is_data(file, path.parent)
    }


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file is neither source, nor of tests, nor of a run folder, which grows."""
    above = [parent for parent in file.parents if parent.is_relative_to(folder)]
    return (
        file.suffix not in _NO_DATA
        and not {"tests", "__pycache__"}.intersection(file.relative_to(folder).parts)
        and not any((parent / mark).exists() for parent in above for mark in _RUN)
    )


# --- versions and platform ------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Versions of packages and of Python, the platform, and the state of the source."""
    packages = ("tokenprune", *DECISIVE, "accelerate", "numpy", "pandas", "scipy")
    extra = ("safetensors", "scikit-learn", "timm")
    return {
        "versions": {name: _version(name) for name in (*packages, *extra)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git_state(Path(tokenprune.__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout whose files are in ``folder``, and whether it has changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # The folder may be inside a repository that does not track it.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
