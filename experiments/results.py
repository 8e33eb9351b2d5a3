"""One run, one folder: a manifest, an append-only journal, and tables made from the journal.

``manifest.json``    what was asked, with what, and how it ended; written first, with a backup
``answers.jsonl``    the journal, one line per answer or failure, appended as they come
``answers.parquet``  tidy: one row per model, method, parameters, retention and question
``summary.csv``      one row per method, retention and question kind (`intervals.summarise`)
``plots/``

The journal is the truth: whatever else is in the folder can be made again from it.
"""

import dataclasses
import errno
import json
import math
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pandas as pd

from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.csv_files import write_csv
from tokenprune.experiments.data import Question, normalise
from tokenprune.experiments.files import (
    WriteError,
    check_writable,
    replace_file,
    sweep,
    sync_folder,
    try_lock,
    writing,
)
from tokenprune.experiments.fingerprints import environment, git_state
from tokenprune.ledger import FIGURES, WHOLE_FIGURES

__all__ = [
    "IMAGE_FREE",
    "THUMBNAIL_ONLY",
    "UNCOMPRESSED",
    "Cell",
    "Failure",
    "Journal",
    "Matched",
    "RunFolder",
    "WriteError",
    "answers_frame",
    "asked_for",
    "check_writable",
    "environment",
    "git_state",
    "manifests",
    "read_answers",
    "replace_file",
    "without_seed",
]

UNCOMPRESSED, THUMBNAIL_ONLY, IMAGE_FREE = "uncompressed", "thumbnail-only", "image-free"


@dataclass(frozen=True)
class Matched:
    """Why a cell has its retention: it was solved for, so that the cell costs what another does.

    Attributes:
        kind: Which cost (`matching.KINDS`).
        asked: Retention of `uniform`, whose cost is the target.
        target: That cost, on a representative prompt.
        cost: What the cell costs there.
    """

    kind: str
    asked: float
    target: float
    cost: float


@dataclass(frozen=True)
class Cell:
    """One column of a comparison: a method at a retention, or a reference it stands beside.

    Attributes:
        compressor: None for the uncompressed model.
        name: Of a reference whose tokens are no share R of all, such as ``thumbnail-only``; empty
            for a method and for the uncompressed model.
        blind: Whether the question is asked without its images.
        pooled: Whether the method is one of several that differ in their `seed` alone and are
            reported together, under the label without the seed.
    """

    compressor: Compressor | None = None
    name: str = ""
    blind: bool = False
    pooled: bool = False
    matched: Matched | None = None

    @property
    def key(self) -> str:
        """What the journal files answers under.

        Every method at R = 1 is the uncompressed model, so these cells share their answers.
        """
        if self.blind:
            return self.name
        if self.compressor is None or self.compressor.retention == 1:
            return UNCOMPRESSED
        return repr(self.compressor)

    @property
    def method(self) -> str:
        return self.name or (UNCOMPRESSED if self.compressor is None else self.compressor.name)

    @property
    def label(self) -> str:
        """Method and the options that differ from its defaults."""
        if self.name or self.compressor is None:
            return self.name or UNCOMPRESSED
        shown = without_seed(self.compressor) if self.pooled else self.compressor
        return shown.label

    @property
    def retention(self) -> float:
        """R; NaN for a reference that has none."""
        if self.name:
            return math.nan
        return 1.0 if self.compressor is None else self.compressor.retention

    @property
    def asked(self) -> float:
        """The retention that was asked for; not the cell's own where that was solved for."""
        return self.retention if self.matched is None else self.matched.asked

    @property
    def parameters(self) -> str:
        """Every option but the retention, as ``name=value`` pairs."""
        if self.compressor is None:
            return ""
        return ", ".join(
            f"{item.name}={getattr(self.compressor, item.name)!r}"
            for item in dataclasses.fields(self.compressor)
            if item.name != "retention"
        )

    def __str__(self) -> str:
        if self.name or self.compressor is None:
            return self.label
        return f"{self.compressor.label} at {self.retention:g}"


def without_seed(compressor: Compressor) -> Compressor:
    """The method with the seed it has by default; itself if it has no `seed`."""
    plain = {item.name: item.default for item in dataclasses.fields(compressor)}
    if "seed" not in plain:
        return compressor
    changes: dict[str, Any] = {"seed": plain["seed"]}
    return dataclasses.replace(compressor, **changes)


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be finished: the error in one line, and the whole traceback."""

    error: str
    traceback: str

    @classmethod
    def of(cls, error: BaseException, about: str = "") -> "Failure":
        """What ``error`` says, even if it cannot be printed, and ``about`` what it came up."""
        name = type(error).__name__
        try:
            message = str(error).strip().splitlines()
        except Exception:
            message = ["(its message cannot be printed)"]
        try:
            trace = "".join(map(_from_roots, traceback.format_exception(error)))
        except Exception:
            trace = f"{''.join(traceback.format_tb(error.__traceback__))}{name}\n"
        said = f"{name}: {message[0]}" if message else name
        return cls(f"{said} ({about})" if about else said, trace)


def _from_roots(line: str) -> str:
    """A line of a traceback with its file from where modules are looked for."""
    roots = {str(Path.cwd()), *filter(None, sys.path)}
    for root in sorted(roots, key=len, reverse=True):
        line = line.replace(f'File "{root}{os.sep}', 'File "')
    return line


# --- the journal ----------------------------------------------------------------------------------


class Journal:
    """Answers and failures by cell key, kept in a file that is only ever appended to.

    A line that a crash cut short is passed over when the file is read, so its answer is missing
    and computed again, and cut off before anything is appended.  If an answer stands in the file
    twice, the first one counts.

    Attributes:
        answers: (cell key, question id) to the answer's record.
        failures: Cell key to the failure, of cells whose last entry is one.
        unreadable: How many lines are no entries.
        missing: (cell key, question id) to why the cell could not answer that question, which it
            failed on alone.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path``, if it is there.  Raises `UserError` if it cannot be read."""
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
        # Names, cells and most figures recur a hundred thousand times: each is kept once.
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

    def __enter__(self) -> "Journal":
        with writing(self.path):
            there = self.path.exists()
            # Unbuffered: what one `write` hands over is in the file when it returns, whole.
            self._file = self.path.open("ab", buffering=0)
            if not there:
                sync_folder(self.path.parent)
            self._mend(self._file)
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
        """Whether the file is as long as what was found and appended; else read it again."""
        with suppress(FileNotFoundError):
            return self.path.stat().st_size == self._size
        return False

    def add(self, cell: str, records: Mapping[str, dict[str, Any]]) -> None:
        """Append the answers of ``cell``, question id to record, unless they are there already."""
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
        """Write lines.  Raises `WriteError`; lines that were written whole then stay."""
        if self._file is None:
            raise RuntimeError("the journal is not open; write to it inside `with journal:`")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        view = memoryview(text.encode("utf-8", "backslashreplace"))
        with writing(self.path):
            try:
                while view:  # a full disk or a pipe may take a part only
                    written = self._file.write(view)
                    if not written:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    view = view[written:]
                    self._size += written
            except BaseException:
                with suppress(OSError):  # else the next start does it
                    self._mend(self._file)
                raise

    def _mend(self, file: BinaryIO) -> None:
        """Cut off a line that is half-written; end one that lacks nothing but its end."""
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


def _entry(line: bytes, known: dict[Any, tuple[str, Any]]) -> dict[str, Any] | None:
    """What a line of the journal holds; None if it is torn or no answer and no failure.

    Args:
        line: Of the file.
        known: Names and values that lines before it had, which are used again; is added to.
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
    return type(value) is int and -(2**63) <= value < 2**63  # what a column can hold


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_count(value)


def _are_numbers(value: Any) -> bool:
    return type(value) is list and all(map(_is_number, value))


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("cell", "question", "answer", "error", "traceback"), _is_text),
    **dict.fromkeys(("kl", *FIGURES), _is_number),
    **dict.fromkeys(WHOLE_FIGURES, _is_count),
    "visual_per_layer": _are_numbers,
}


# --- the folder -----------------------------------------------------------------------------------

_MANIFESTS = ("manifest.json", "manifest.backup.json")
_NAMED = 10  # files named in a refusal


@dataclass
class RunFolder:
    """A run's folder, new or taken up again.

    Attributes:
        path: The folder.
        manifest: What ``manifest.json`` holds.
    """

    path: Path
    manifest: dict[str, Any]
    _lock: int | None = None
    _started: float = field(default_factory=time.monotonic, repr=False)

    @classmethod
    def open(
        cls, path: Path, experiment: Mapping[str, Any], details: Mapping[str, Any]
    ) -> "RunFolder":
        """Create the folder of ``experiment``, or take up the one that holds it.

        The folder is then this process's own until `close`.

        Args:
            experiment: All that the answers depend on; JSON-serialisable.
            details: What else the manifest should tell, e.g. versions and command line; in
                ``files`` what fingerprints are made of (`fingerprints.answer_files`).

        Raises:
            UserError: The folder cannot be written, holds another experiment or files that are not
                a run's, or another process is working in it.
        """
        check_writable(path)
        lock = _lock(path)
        try:
            manifest = _manifest(path)
            experiment = json.loads(json.dumps(experiment))  # as it will be when it is read back
            differences = list(
                _differences(
                    manifest.get("experiment", experiment),
                    experiment,
                    manifest.get("files"),
                    details.get("files"),
                )
            )
            if differences:
                raise UserError(
                    f"{path} holds another experiment ({'; '.join(differences)}); choose another "
                    "--out, or ask for the same again to resume it."
                )
            sweep(path, below=True)
            _end_killed(manifest, path)
            manifest |= {"status": "running", "experiment": experiment, **details}
            manifest.setdefault("sessions", []).append({"started": _now(), "status": "running"})
            folder = cls(path, manifest, lock)
            folder.write_manifest()
        except BaseException:
            _unlock(lock)
            raise
        return folder

    @property
    def journal(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def seconds(self) -> float:
        """Wall time of all sessions together."""
        took = (session.get("seconds") for session in self.manifest["sessions"])
        return float(sum(seconds for seconds in took if isinstance(seconds, int | float)))

    def write_manifest(self) -> None:
        """Write ``manifest.json`` and its backup, each in one step."""
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str) + "\n"
        for name in _MANIFESTS:
            with replace_file(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_tables(self, answers: pd.DataFrame, summary: pd.DataFrame) -> None:
        """Write ``answers.parquet`` and ``summary.csv``, each in one step."""
        answers = answers.copy(deep=False)
        if self.journal.exists():  # tells readers whether the journal has grown since
            answers.attrs["journal"] = self.journal.stat().st_size
        with replace_file(self.path / "answers.parquet") as temporary:
            temporary.write_bytes(answers.to_parquet(index=False))
        with replace_file(self.path / "summary.csv") as temporary:
            write_csv(summary, temporary)

    def close(self, status: str, failures: Sequence[Mapping[str, Any]] = ()) -> None:
        """Enter into the manifest how this session ended, and let go of the folder."""
        seconds = round(time.monotonic() - self._started, 3)
        self.manifest["sessions"][-1] |= {"ended": _now(), "seconds": seconds, "status": status}
        self.manifest |= {"status": status, "seconds": round(self.seconds, 3)}
        self.manifest["failures"] = list(failures)
        try:
            self.write_manifest()
        finally:
            _unlock(self._lock)


def _lock(folder: Path) -> int | None:
    """Hold ``folder`` for this process until `_unlock` or the process's end.

    None where the system has no such locks.
    """
    if os.name == "nt":
        return None
    handle = os.open(folder, os.O_RDONLY)
    if not try_lock(handle):
        os.close(handle)
        raise UserError(
            f"another process is writing to {folder}; wait until it ends or choose another --out."
        )
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def manifests(folder: Path) -> Iterator[dict[str, Any]]:
    """The manifest of a run and its backup, those of them that are not torn or gone."""
    for name in _MANIFESTS:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("experiment"), dict):
            yield found


def _manifest(path: Path) -> dict[str, Any]:
    """That of a folder to be written to; empty if the folder is."""
    for manifest in manifests(path):
        if isinstance(manifest.get("sessions"), list):
            manifest["sessions"] = [one for one in manifest["sessions"] if isinstance(one, dict)]
            return manifest
    if (path / _MANIFESTS[0]).exists():
        file = path / _MANIFESTS[0]
        raise UserError(f"{file} is not the manifest of a run; choose another --out.")
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(
            f"{path} holds files but no manifest.json, so it is not the folder of a run; "
            "choose another --out."
        )
    return {}


def _end_killed(manifest: dict[str, Any], path: Path) -> None:
    """Enter how long the last session took that was killed: until the last result it kept."""
    last = (manifest.get("sessions") or [{}])[-1]
    if not isinstance(last, dict) or "started" not in last or "seconds" in last:
        return
    kept = [path / "answers.jsonl", *path.glob("*/*.parquet")]
    with suppress(TypeError, ValueError):
        started = datetime.fromisoformat(last["started"]).timestamp()
        ended = max([started, *(file.stat().st_mtime for file in kept if file.is_file())])
        last |= {"seconds": round(ended - started, 3), "status": "killed"}


def asked_for(request: Any, folder: Path) -> dict[str, Any]:
    """The command line and the request, a dataclass, as a manifest tells them.

    Paths are relative where they can be: in the request to the run's ``folder``, of what lies with
    it in the working directory or beside it, so that both can move; in the command to the working
    directory.
    """
    here, home = Path.cwd(), Path(os.path.abspath(folder))

    def told(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [told(one) for one in value]
        if not isinstance(value, Path):
            return value
        whole = os.path.abspath(value)
        shared = Path(os.path.commonpath([whole, home]))
        if shared.is_relative_to(here) or shared.is_relative_to(home.parent):
            return Path(os.path.relpath(whole, home)).as_posix()
        return whole

    words = [
        Path(sys.argv[0]).name,
        *(word.replace(f"{here}{os.sep}", "") for word in sys.argv[1:]),
    ]
    asked = {name: told(value) for name, value in dataclasses.asdict(request).items()}
    return {"command": words, "request": asked}


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], *files: Mapping[str, Any] | None
) -> Iterator[str]:
    """Say field by field what differs; of fingerprints which of the ``files`` there and here."""
    for name in [*here, *(name for name in there if name not in here)]:
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            if isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64:
                named = [one.get(name) if isinstance(one, dict) else None for one in files]
                yield f"other {name}{_which(*named)}"
            else:
                yield f"{name}: {_say(old)} there, {_say(new)} here"


def _which(there: Any = None, here: Any = None) -> str:
    """Name the files whose digests differ, the first few of them."""
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f": {', '.join(names[:_NAMED])}{more}" if names else ""


def _say(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- the tidy table -------------------------------------------------------------------------------


_COLUMNS = [
    *("model", "method", "label", "parameters", "retention"),
    *("asked_retention", "match", "match_target", "match_cost"),
    *("question_id", "image_id", "kind", "question", "truth"),
    *("answer", "correct", "agrees", "kl", "easy", "status", *FIGURES, "visual_per_layer"),
]


_TEXTS = (
    *("model", "method", "label", "parameters", "question_id", "image_id", "kind"),
    *("question", "truth", "answer", "status"),
)
_TYPES: dict[str, Any] = {
    "retention": "float64",
    **dict.fromkeys(("correct", "agrees", "easy"), "boolean"),
    **dict.fromkeys(("kl", "match_target", "match_cost", *FIGURES), "Float64"),
    **dict.fromkeys(WHOLE_FIGURES, "Int64"),
}
_NEEDED = {*_TEXTS, "retention", "correct", "agrees"}  # older runs lack the others


def answers_frame(
    model: str, cells: Sequence[Cell], questions: Sequence[Question], journal: Journal
) -> pd.DataFrame:
    """One row per cell and question that has an answer, or that has none because of a failure.

    ``status`` is "ok", "failed" where the cell failed as a whole, or "missing" where it failed on
    that question alone.

    ``correct`` and ``agrees`` (the same answer as the uncompressed model's) compare normalised
    texts and are missing where there is no answer to compare.  ``kl`` is the divergence of the
    first answer token's distribution from the uncompressed model's, in nats.  ``easy`` tells
    questions that are answered rightly without the image or from the thumbnail alone; it is the
    same for all cells, and missing where nobody asked.
    """
    little = {cell.name: cell.key for cell in cells if cell.name in (IMAGE_FREE, THUMBNAIL_ONLY)}
    easy = {item.id: _easy(item, little, journal) for item in questions}
    full = {item.id: journal.answers.get((UNCOMPRESSED, item.id), {}) for item in questions}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for cell in cells:
        key = cell.key
        failed = key in journal.failures
        unanswered = "failed" if failed else "missing"
        there = [(item, journal.answers.get((key, item.id))) for item in questions]
        shown = [
            (item, record or {})
            for item, record in there
            if failed or record is not None or (key, item.id) in journal.missing
        ]
        answers = [_plain(record.get("answer")) for _, record in shown]
        truths = [_plain(item.answer) for item, _ in shown]
        fulls = [_plain(full[item.id].get("answer")) for item, _ in shown]
        matched = cell.matched
        made = {
            "model": model,
            "method": cell.method,
            "label": cell.label,
            "parameters": cell.parameters,
            "retention": cell.retention,
            "asked_retention": cell.asked,
            "match": None if matched is None else matched.kind,
            "match_target": None if matched is None else matched.target,
            "match_cost": None if matched is None else matched.cost,
            "question_id": [item.id for item, _ in shown],
            "image_id": [item.image_id for item, _ in shown],
            "kind": [item.kind for item, _ in shown],
            "question": [item.question for item, _ in shown],
            "truth": [item.answer for item, _ in shown],
            "correct": list(map(_same, answers, truths)),
            "agrees": list(map(_same, answers, fulls)),
            "easy": [easy[item.id] for item, _ in shown],
            "status": ["ok" if record else unanswered for _, record in shown],
        }
        for name, column in columns.items():
            if name not in made:
                column += [record.get(name) for _, record in shown]
            else:
                value = made[name]
                column += value if isinstance(value, list) else [value] * len(shown)
    return pd.DataFrame(columns, columns=_COLUMNS).astype(_TYPES)


@lru_cache(maxsize=4096)
def _plain(answer: str | None) -> str | None:
    """As answers are compared; None if there is none."""
    return None if answer is None else normalise(answer)


def _same(one: str | None, other: str | None) -> bool | None:
    return None if one is None or other is None else one == other


def _easy(item: Question, little: Mapping[str, str], journal: Journal) -> bool | None:
    """Whether ``item`` is answered rightly by a model that sees little or nothing of the image.

    Args:
        item: The question.
        little: Name to cell key of the references that see so little.
        journal: With their answers.
    """
    said = {name: journal.answers.get((key, item.id)) for name, key in little.items()}
    if not said or None in said.values():
        return None
    # Where an image has no crops, its thumbnail is all of it and tells nothing about difficulty.
    return any(
        name == IMAGE_FREE or record.get("kept_patches", 0) < record.get("patch_tokens", 0)
        for name, record in said.items()
        if record is not None and _plain(record["answer"]) == _plain(item.answer)
    )


def read_answers(folder: Path) -> pd.DataFrame:
    """``answers.parquet`` of a run.

    Raises:
        UserError: The folder holds none, or it is damaged.
    """
    path = folder / "answers.parquet"
    if not os.path.isfile(path):  # unlike Path.is_file it takes names that no file can have
        raise UserError(
            f"{folder} holds no answers.parquet; give the folder of a run, as tokenprune compare "
            "prints it at its end."
        )
    try:
        table = pd.read_parquet(path)
        texts = table[[name for name in _TEXTS if name in table or name in _NEEDED]]
        if wrong := [name for name in texts if not _all_text(texts[name])]:
            raise TypeError(f"the column {wrong[0]!r} is not text")
        types = {name: kind for name, kind in _TYPES.items() if name in table or name in _NEEDED}
        return table.astype(types)
    except Exception as error:  # whatever damage does to a Parquet file
        raise UserError(
            f"{path} is damaged ({error}); the command that made the folder makes it again."
        ) from error


def _all_text(column: pd.Series) -> bool:
    return pd.api.types.infer_dtype(column, skipna=True) in ("string", "empty")
