"""The journal: every answer, appended as it is given."""

import dataclasses
import errno
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from tokenprune.cost.ledger import FIGURES, WHOLE_FIGURES
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.files import sync_folder, writing

__all__ = [
    "Journal",
    "Sheet",
    "Tally",
    "lines",
]


# --- the journal ----------------------------------------------------------------------------------


class Journal:
    """Answers and failures by cell key, in an append-only file.

    A line that a crash cut short is ignored when the file is read, so its answer is computed again;
    it is cut off before anything is appended.  If an answer is in the file twice, the first one
    counts.

    Attributes:
        answers: (cell key, question id) to the answer's record.
        failures: Cell key to the failure, of cells whose last entry is one.
        unreadable: Number of lines that are not entries.
        missing: (cell key, question id) to why the cell failed on that question alone.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``, if it exists.  Raises `UserError` if it cannot be read."""
        self.path = path
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}
        self.failures: dict[str, Failure] = {}
        self.unreadable = 0
        self.missing: dict[tuple[str, str], Failure] = {}
        self._file: BinaryIO | None = None
        self._size = 0
        try:
            with path.open("rb") as file:
                self._read(file)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(
                f"cannot read the journal {str(path)!r} ({error.strerror}); give the folder of a "
                "run."
            ) from error

    def _read(self, lines: Iterable[bytes]) -> None:
        # Names, cells and most figures occur a hundred thousand times: each is stored once.
        known: dict[Any, tuple[str, Any]] = {}
        for line in lines:
            record = _entry(line, known)
            if record is None:
                self.unreadable += 1
                continue
            cell = record.pop("cell")
            row = cell, record.pop("question", "")
            if "error" in record:
                failure = Failure(record["error"], record["traceback"])
                if row[1]:
                    self.missing[row] = failure
                else:
                    self.failures[cell] = failure
            else:
                self.answers.setdefault(row, record)
                self.failures.pop(cell, None)
                self.missing.pop(row, None)

    def __enter__(self) -> Self:
        with writing(self.path):
            there = self.path.exists()
            # Unbuffered: when `write` returns, everything that it wrote is in the file.
            self._file = self.path.open("ab", buffering=0)
            if not there:
                sync_folder(self.path.parent)
            self._repair_end(self._file)
            self._size = self.path.stat().st_size
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        file, self._file = self._file, None
        if file is not None:
            with writing(self.path), file:
                os.fsync(file.fileno())

    @property
    def whole(self) -> bool:
        """Whether the file is as long as what was read and appended; else read it again."""
        with suppress(FileNotFoundError):
            return self.path.stat().st_size == self._size
        return False

    def add(self, cell: str, records: Mapping[str, dict[str, Any]]) -> None:
        """Append the answers of ``cell``, question id to record, except existing ones."""
        new = {q: r for q, r in records.items() if (cell, q) not in self.answers}
        self._append({"cell": cell, "question": q, **r} for q, r in new.items())
        self.answers.update({(cell, q): r for q, r in new.items()})
        self.failures.pop(cell, None)
        for question in new:
            self.missing.pop((cell, question), None)

    def fail(self, cell: str, failure: Failure, question: str | None = None) -> None:
        """Append that ``cell`` failed, on all questions or on one."""
        about = {"cell": cell} if question is None else {"cell": cell, "question": question}
        self._append([{**about, **dataclasses.asdict(failure)}])
        if question is None:
            self.failures[cell] = failure
        else:
            self.missing[cell, question] = failure

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        self.append(lines(records))

    def append(self, text: bytes) -> None:
        """Write `lines` of answers.  Raises `WriteError`; lines that were written stay."""
        if self._file is None:
            raise RuntimeError("the journal is not open; write to it inside `with journal:`")
        view = memoryview(text)
        with writing(self.path):
            try:
                while view:  # a full disk or a pipe may accept only a part
                    written = self._file.write(view)
                    if not written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    view = view[written:]
                    self._size += written
            except BaseException:
                with suppress(OSError):  # otherwise the next run does it
                    self._repair_end(self._file)
                raise

    def _repair_end(self, file: BinaryIO) -> None:
        """Cut off an incomplete last line; end one that lacks only its line break."""
        size = os.fstat(file.fileno()).st_size
        if not size:
            return
        with (
            self.path.open("rb") as reader,
            mmap.mmap(reader.fileno(), size, access=mmap.ACCESS_READ) as content,
        ):
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if tail and _entry(tail, {}) is None:
            file.truncate(start)
        elif tail:
            file.write(b"\n")


class Sheet(Journal):
    """A journal in memory, of answers that are entered elsewhere."""

    def __init__(
        self, answered: Iterable[tuple[str, str]], missing: Mapping[tuple[str, str], Failure]
    ) -> None:
        """Begin with the rows that are ``answered`` and those that are ``missing``."""
        self.path = Path(os.devnull)
        self.answers = {row: {} for row in answered}
        self.missing = dict(missing)
        self.failures, self.unreadable = {}, 0
        self.added: dict[str, dict[str, dict[str, Any]]] = {}
        """Cell key to the new answers: question id to record."""

    def add(self, cell: str, records: Mapping[str, dict[str, Any]]) -> None:
        new = {q: r for q, r in records.items() if (cell, q) not in self.answers}
        self.added.setdefault(cell, {}).update(new)
        super().add(cell, records)

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        """Nothing: whoever asked for the answers enters them."""


class Tally(Journal):
    """A journal that remembers which rows it holds, a byte each, instead of the answers.

    Attributes:
        rows: Cell key to (Q,) bool, whether each question is answered.
    """

    def __init__(self, path: Path, keys: Iterable[str], questions: Iterable[str]) -> None:
        """Read ``path``, if it exists; rows of other ``keys`` or ``questions`` are not counted."""
        self._places = {name: place for place, name in enumerate(questions)}
        self.rows = {key: np.zeros(len(self._places), dtype=bool) for key in keys}
        super().__init__(path)

    @property
    def done(self) -> int:
        """Number of answers."""
        return sum(int(row.sum()) for row in self.rows.values())

    def answered(self, questions: Sequence[str]) -> frozenset[tuple[str, str]]:
        """The rows of some questions that are answered."""
        here = [self._places[name] for name in questions]
        return frozenset(
            (key, questions[place])
            for key, row in self.rows.items()
            for place in row[here].nonzero()[0].tolist()
        )

    def enter(self, key: str, questions: Sequence[str], text: bytes) -> None:
        """Append the answers of cell ``key`` to ``questions``, as `lines` wrote them."""
        self.append(text)
        self._mark(key, questions)

    def _mark(self, key: str, questions: Iterable[str]) -> None:
        self.rows[key][[self._places[name] for name in questions]] = True
        self.failures.pop(key, None)
        for name in questions if self.missing else ():
            self.missing.pop((key, name), None)

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            record = _entry(line, {})
            if record is None:
                self.unreadable += 1
                continue
            key, question = record["cell"], record.get("question", "")
            if "error" not in record:
                if key in self.rows and question in self._places:
                    self._mark(key, [question])
            elif question:
                self.missing[key, question] = Failure(record["error"], record["traceback"])
            else:
                self.failures[key] = Failure(record["error"], record["traceback"])


def lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """The lines of a journal that hold ``records``."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode("utf-8", "backslashreplace")


def _entry(line: bytes, known: dict[Any, tuple[str, Any]]) -> dict[str, Any] | None:
    """The content of a line; None if it is incomplete, or neither an answer nor a failure.

    Args:
        line: Of the file.
        known: Names and values of earlier lines, which are reused; new ones are added.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    kind = ("error", "traceback") if "error" in record else ("question", "answer")
    if not all(name in record for name in ("cell", *kind)):
        return None
    found = {}
    for name, value in record.items():
        plain = type(value) is not list and type(value) is not dict
        key = name, type(value), value if plain else repr(value)
        same = known.get(key)
        if same is None:
            if name in _FITS and not _FITS[name](value):
                return None
            same = known[key] = sys.intern(name), value
        found[same[0]] = same[1]
    return found


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63  # the range of a column


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_count(value)


def _are_numbers(value: Any) -> bool:
    return type(value) is list and all(map(_is_number, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("cell", "question", "answer", "metric", "error", "traceback"), _is_text),
    **dict.fromkeys(("kl", "score", *FIGURES), _is_number),
    **dict.fromkeys(WHOLE_FIGURES, _is_count),
    "visual_per_layer": _are_numbers,
}
