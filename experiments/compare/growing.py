"""Adds methods, retention ratios and questions to the run in a folder.

All cells of the run and of the request answer all questions of both.  Answers that exist stay,
except those of methods whose code has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell, CellRecord, ordered
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.provenance import Files
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.common.reading import joined
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.request import questions_for
from tokenprune.experiments.common.run_folder import UNCOMPRESSED, manifests
from tokenprune.experiments.compare.finished import stored_request, stored_requests

__all__ = [
    "Earlier",
    "check_known",
    "portions",
]


_ASIDE = {"out", "figures", "batch_size", "timeout_per_batch", "measure", "metric"}
"""Fields of a request that change neither cells nor questions."""


@dataclass(frozen=True)
class Earlier:
    """The run in a folder, to which a request adds.

    Attributes:
        path: The folder.
        manifest: Its manifest.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path | None) -> Earlier | None:
        """The comparison in ``path``; None if there is none, or one of another command."""
        for manifest in manifests(path) if path is not None else ():
            if "name" not in manifest["experiment"] and manifest.get("cells"):
                return cls(Path(str(path)), manifest)
        return None

    @cached_property
    def records(self) -> list[CellRecord]:
        """The cells of the run."""
        try:
            return [CellRecord.read(cell) for cell in self.manifest["cells"]]
        except (TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the manifest of {self.path} is damaged (its cells cannot be read); choose "
                "another --out, or restore manifest.json."
            ) from error

    def requests(self, request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The stored requests of the run, and ``request`` unless it equals one of them."""

        def decisive(one: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in _ASIDE}

        found = list(stored_requests(self.manifest))
        if decisive(request) not in map(decisive, found):
            found.append(request)
        return found

    # -- questions ---------------------------------------------------------------------------------

    def questions(self, asked: list[Question]) -> list[Question]:
        """The questions of the run and those ``asked``, each once.

        Raises:
            UserError: The questions of the run cannot be read again, or a question has changed.
        """
        experiment = self.manifest["experiment"]
        data, count = experiment["data"], experiment["questions"]
        if data in (fingerprint(asked), fingerprint(asked[:count])):
            return asked
        known = {item.id: item for item in self._own_questions()}
        shared = [item for item in asked if item.id in known]
        for item in shared:
            if fingerprint([item]) != fingerprint([known[item.id]]):
                raise UserError(
                    f"{self.path} holds another experiment (other data: the question {item.id!r} "
                    "differs in its text, answer or image); choose another --out."
                )
        return joined(list(known.values()), asked)

    def _own_questions(self) -> list[Question]:
        found: list[Question] = []
        for stored in stored_requests(self.manifest):
            request = stored_request(self.path, stored)
            found = joined(found, questions_for(request, keep_faulty=True))
        if fingerprint(found) == self.manifest["experiment"]["data"]:
            return found
        raise UserError(
            f"{self.path} holds another experiment (other data: the questions or images of the run "
            "have changed since); choose another --out, or restore them."
        )

    # -- cells -------------------------------------------------------------------------------------

    def columns(self, asked: Sequence[Cell]) -> list[Cell | CellRecord]:
        """The cells of the run and those ``asked``, each once, as one request would order them.

        A cell of the run whose method is not registered here is returned as its record.

        Raises:
            UserError: Their costs are matched in different ways.
        """
        mine: dict[CellRecord, Cell] = {CellRecord.of(cell): cell for cell in asked}
        self._check_match(mine)
        if mine.keys() >= set(self.records):
            return list(asked)
        found: dict[CellRecord, Cell | CellRecord] = {
            record: mine.get(record) or _rebuilt(record) or record for record in self.records
        }
        for record, cell in mine.items():
            found.setdefault(record, cell)
        return [found[one] for one in ordered(found)]

    def _check_match(self, asked: Mapping[CellRecord, Cell]) -> None:
        def targets(cells: Sequence[CellRecord]) -> dict[float, Any]:
            methods = [one for one in cells if not one.name and one.method != UNCOMPRESSED]
            return {
                one.asked or 0: one.matched and (one.matched.kind, one.matched.target)
                for one in methods
            }

        old, new = targets(self.records), targets(list(asked))
        for ratio in old.keys() | new.keys():
            there, here = old.get(ratio), new.get(ratio)
            both = ratio in old and ratio in new
            kinds = {found and found[0] for found in (*old.values(), *new.values())}
            if len(kinds) > 1 or (both and there != here):
                raise UserError(
                    f"{self.path} holds another experiment (match: at retention {ratio:g} "
                    f"{_said(there)} there, {_said(here)} here); choose another --out."
                )

    def changed(self, own: Mapping[str, Files]) -> set[str]:
        """Keys of the cells whose answers were made by other code.

        Args:
            own: Label to the files of the method (`provenance.split_code`).
        """
        files = (self.manifest.get("files") or {}).get("code") or {}
        before = self.manifest.get("own_code") or {}
        found = set()
        for record in self.records:
            now = own.get(record.label)
            if now is None or record.key == UNCOMPRESSED:
                continue
            same = all(files.get(name) == digest for name, digest in now.items())
            if not same or set(before.get(record.label, now)) != set(now):
                found.add(record.key)
        return found

    def carried(self, columns: Sequence[Cell | CellRecord]) -> tuple[dict[str, list[str]], Files]:
        """The own files of the methods that are not registered here, by label, and their digests.

        Args:
            columns: As `columns` returns them.
        """
        files = (self.manifest.get("files") or {}).get("code") or {}
        before = self.manifest.get("own_code") or {}
        labels = {one.label for one in columns if isinstance(one, CellRecord)}
        own = {label: list(before.get(label, ())) for label in sorted(labels)}
        return own, {name: files[name] for some in own.values() for name in some if name in files}


def _said(target: Any) -> str:
    return "none" if target is None else f"{target[0]} {target[1]:.6g}"


def _rebuilt(record: CellRecord) -> Cell | None:
    """The cell of ``record``; None if its method is not registered here."""
    for cell in (Cell(), *references({"image"})):
        if CellRecord.of(cell) == record:
            return cell
    seed = re.search(r"\bseed=(\d+)", record.parameters)
    for given in ({"retention": record.retention}, {}):
        with suppress(UserError):
            method = tp.parse(record.label, **given)
            found = [Cell(method), Cell(method, pooled=True)]
            if seed and "seed" in {item.name for item in fields(method)}:
                changes: dict[str, Any] = {"seed": int(seed[1])}
                found.append(Cell(replace(method, **changes), pooled=True))
            for cell in found:
                matched = replace(cell, matched=record.matched)
                if CellRecord.of(matched) == record:
                    return matched
    return None


def portions(
    columns: Sequence[Cell | CellRecord],
    questions: Sequence[Question],
    journal: Journal,
    *,
    grown: bool,
) -> Iterator[tuple[list[Cell], list[Question]]]:
    """Cells and the questions that they have to answer.

    A run that did not grow is one portion, so that its batches are the same whether it was
    interrupted or not.  In a run that grew, what is complete is left out.  The uncompressed model
    is in every portion, since divergences are from it.

    Raises:
        UserError: A method that lacks answers is not registered here.
    """
    if not grown:
        yield [cell for cell in columns if isinstance(cell, Cell)], list(questions)
        return
    groups: dict[frozenset[str], dict[str, Cell]] = {}
    for cell in columns:
        lacking = frozenset(q.id for q in questions if (cell.key, q.id) not in journal.answers)
        if lacking and isinstance(cell, Cell):
            groups.setdefault(lacking, {}).setdefault(cell.key, cell)
    for ids, cells in groups.items():
        both = {UNCOMPRESSED: Cell(), **cells}
        yield list(both.values()), [item for item in questions if item.id in ids]


def check_known(
    path: Path, columns: Sequence[Cell | CellRecord], questions: Sequence[Question]
) -> None:
    """Raise `UserError` if a method that has to answer further questions is not registered here."""
    unknown = [one for one in columns if isinstance(one, CellRecord)]
    if not unknown:
        return
    journal = Journal(path / "answers.jsonl")
    for record in unknown:
        if any((record.key, item.id) not in journal.answers for item in questions):
            raise UserError(
                f"{path} has answers of {record.label}, which is not registered here and lacks "
                "answers to further questions; name its module with --plugin, or choose another "
                "--out."
            )
