"""Replays golden vectors, recorded from the methods' official code, through the methods here.

A folder of vectors contains ``cases.json`` (a list of ``{id, file, params, tensors}``) and one
safetensors file per case.  Its name is that of the method.  ``tensors`` gives each tensor the role
``input`` or ``expected``; a verdict names the expected tensors that the replay does not read.  For
each method, one function decorated with `@replay` maps the parameters of its vectors to the API.
It is in a separate file in ``strategies/_golden/`` or, for a method of another package, in any
module that the package imports.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenprune.errors import UserError, unknown
from tokenprune.registry import strategies

__all__ = [
    "Case",
    "Verdict",
    "read",
    "replay",
    "replay_folder",
    "verdict_of",
]


@dataclass(frozen=True)
class Case:
    """One golden vector: inputs and outputs of the official code.

    Attributes:
        method: Name of the method.
        id: Name of the vector.
        params: Parameters of the official code.
        tensors: Inputs and expected outputs by name.
        expected: Names of the tensors with the role ``expected``.
    """

    method: str
    id: str
    params: dict[str, Any]
    tensors: Mapping[str, Tensor]
    expected: frozenset[str] = frozenset()


@dataclass
class Verdict:
    """The result of a replay, collected with `same`, `close`, `order` and `with_defects`.

    Attributes:
        mismatch: The first difference; empty if there is none.
        reordered: Whether a documented defect of the official code changes the order.
        skipped: Why the case was not replayed; empty if it was.
        compared: Names of the comparisons.
        defects: Names of the comparisons that reproduce a documented defect.
        unread: Expected tensors that the replay did not read.
    """

    mismatch: str = ""
    reordered: bool = False
    skipped: str = ""
    compared: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def same(self, what: str, got: Tensor, expected: Tensor) -> None:
        """``got`` must equal ``expected`` exactly."""
        self._compare(what, got, expected, lambda a, b: a == b)

    def close(self, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
        """``got`` must be within ``tolerance * (1 + |expected|)`` of ``expected``."""
        got, expected = got.double(), expected.double()
        self._compare(what, got, expected, lambda a, b: (a - b).abs() <= tolerance * (1 + b.abs()))

    def order(self, what: str, got: Tensor, expected: Tensor, with_defects: Tensor) -> None:
        """``got`` may differ from ``expected`` in order if the documented defects explain it.

        Args:
            what: Name for the report.
            got: The order of the method here.
            expected: The order of the official code.
            with_defects: The selection of the method here, ordered as in the official code.
        """
        if not torch.equal(got, expected):
            self.reordered = True
            self.same(f"{what} with the documented defects", with_defects, expected)

    def with_defects(self, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
        """As `close`, for values that agree only if the documented defects are reproduced."""
        self.defects.append(what)
        self.close(what, got, expected, tolerance)

    def _compare(
        self, what: str, got: Tensor, expected: Tensor, agree: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.compared.append(what)
        if self.mismatch:
            return
        if got.shape != expected.shape:
            self.mismatch = f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
            return
        wrong = (~agree(got, expected)).flatten().nonzero().squeeze(1)
        if len(wrong):
            at = int(wrong[0])
            values = got.flatten()[at].item(), expected.flatten()[at].item()
            self.mismatch = (
                f"{what}: entry {at} is {values[0]}, expected {values[1]} "
                f"({len(wrong)} of {got.numel()} differ)"
            )

    def __str__(self) -> str:
        if self.skipped:
            return f"skipped: {self.skipped}"
        if self.mismatch:
            return f"MISMATCH  {self.mismatch}"
        said = "same set, order differs by documented defect" if self.reordered else "exact"
        if self.defects:
            said += f", with the documented defects: {', '.join(self.defects)}"
        return said + (f"; NOT COMPARED: {', '.join(self.unread)}" if self.unread else "")


class _Watched(dict[str, Tensor]):
    """Tensors by name; `read` has the names of those that were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


Replay = Callable[[Case], Verdict]


_replays: dict[str, Replay] = {}


def replay(method: str) -> Callable[[Replay], Replay]:
    """Function decorator: register the replay of the golden vectors of ``method``."""

    def decorate(function: Replay) -> Replay:
        _replays[method] = function
        return function

    return decorate


def _discover() -> None:
    """Import every replay, including those of other packages."""
    strategies.names()
    package = importlib.import_module("tokenprune.strategies._golden")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")


def read(folder: Path, method: str) -> list[Case]:
    """The cases of one folder, all of one method.

    Raises:
        UserError: ``cases.json``, or a file that it names, is missing or cannot be read.
    """
    try:
        listed = json.loads((folder / "cases.json").read_text())
        return [
            Case(
                method,
                item["id"],
                item["params"],
                load_file(folder / item["file"]),
                _expected(item.get("tensors", {})),
            )
            for item in listed
        ]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise UserError(
            f"cannot read the vectors in {folder}: {type(error).__name__}: {error}. Expected "
            "cases.json, a list of objects with id, file and params, and the files it names."
        ) from error


def _expected(tensors: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(name for name, about in tensors.items() if about.get("role") == "expected")


def verdict_of(case: Case) -> Verdict:
    """Replay one case.  The verdict lists the expected tensors that the replay did not read."""
    known = _replays.get(case.method)
    if known is None:
        return Verdict(skipped=f"no method here replays {case.method!r}")
    watched = _Watched(case.tensors)
    verdict = known(replace(case, tensors=watched))
    if not (verdict.skipped or verdict.mismatch):
        verdict.unread = sorted(case.expected - watched.read)
    return verdict


def replay_folder(folder: Path, method: str | None = None) -> list[tuple[Case, Verdict]]:
    """Replay the cases in ``folder`` or, if it has no ``cases.json``, in its subfolders.

    Args:
        folder: The folder of the vectors.
        method: Replay only the vectors of this method.

    Raises:
        UserError: There are no vectors, they cannot be read, or ``method`` has no replay.
    """
    _discover()
    if method is not None and method not in _replays:
        raise unknown("method with a replay", method, _replays)
    if (folder / "cases.json").is_file():
        found = [folder]
    else:
        found = sorted(path.parent for path in folder.glob("*/cases.json"))
        found = [one for one in found if method in (None, one.name)]
    if not found:
        what = f"vectors of {method!r}" if method else "cases.json"
        raise UserError(f"no {what} in {folder} or the folders below it.")
    results = []
    for one in found:
        cases = read(one, method or one.resolve().name)
        results += [(case, verdict_of(case)) for case in cases]
    return results
