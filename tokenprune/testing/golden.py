"""Replays numerical vectors made with the methods' official code through our strategies.

A folder of vectors holds ``cases.json`` (a list of ``{id, file, params, tensors}``) beside one
safetensors file per case; the folder's name is the method's.  ``tensors`` says of each tensor
whether it is an ``input`` or ``expected``; a verdict names the expected ones that the replay never
looked at.  How the parameters of a method's vectors map to our API is written once per method with
`@replay`, in a file of its own in ``strategies/_golden/`` or, for a strategy of another package,
wherever its module imports it.
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
    """One vector: the official code's inputs and what it made of them.

    Attributes:
        method: Whose vectors they are.
        id: Name of the vector.
        params: What the official code was run with.
        tensors: Inputs and what is expected, by name.
        expected: Names of what is expected, where the vectors say so.
    """

    method: str
    id: str
    params: dict[str, Any]
    tensors: Mapping[str, Tensor]
    expected: frozenset[str] = frozenset()


@dataclass
class Verdict:
    """What a replay found, collected with `same`, `close`, `order` and `with_defects`."""

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
        """``got`` must lie within ``tolerance`` (absolute, and relative to 1) of ``expected``."""
        got, expected = got.double(), expected.double()
        self._compare(what, got, expected, lambda a, b: (a - b).abs() <= tolerance * (1 + b.abs()))

    def order(self, what: str, got: Tensor, expected: Tensor, with_defects: Tensor) -> None:
        """``got`` may differ from ``expected`` in order if the documented defects explain it.

        Args:
            what: Name for the report.
            got: Our sequence.
            expected: The official one.
            with_defects: Our choice, put into order as the official code does.
        """
        if not torch.equal(got, expected):
            self.reordered = True
            self.same(f"{what} with the documented defects", with_defects, expected)

    def with_defects(self, what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
        """As `close`, for values that ours equal once the documented defects are put in."""
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
    """Tensors that note which of them were looked at."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


Replay = Callable[[Case], Verdict]


_replays: dict[str, Replay] = {}


def replay(method: str) -> Callable[[Replay], Replay]:
    """Function decorator: this is how vectors of ``method`` go through our API."""

    def decorate(function: Replay) -> Replay:
        _replays[method] = function
        return function

    return decorate


def _discover() -> None:
    """Import every replay: ours, and those that come with strategies of other packages."""
    strategies.names()
    package = importlib.import_module("tokenprune.strategies._golden")
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{found.name}")


def read(folder: Path, method: str) -> list[Case]:
    """The cases of one folder, all of one method.

    Raises:
        UserError: ``cases.json`` or a file it names is missing or cannot be read.
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
    """Replay one case.  What it expects and the replay did not look at is in the verdict."""
    known = _replays.get(case.method)
    if known is None:
        return Verdict(skipped=f"no strategy here replays {case.method!r}")
    watched = _Watched(case.tensors)
    verdict = known(replace(case, tensors=watched))
    if not (verdict.skipped or verdict.mismatch):
        verdict.unread = sorted(case.expected - watched.read)
    return verdict


def replay_folder(folder: Path, method: str | None = None) -> list[tuple[Case, Verdict]]:
    """Replay the cases in ``folder`` or, where it has no ``cases.json``, in the folders below.

    Args:
        folder: Where the vectors are.
        method: Only this method's.  Raises `UserError` if nothing can replay it.
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
