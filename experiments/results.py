"""One run, one folder: a manifest, an append-only journal, and tables made from the journal.

``manifest.json``    what was asked, with what, and how it ended; written first
``answers.jsonl``    the journal, one line per answer or failure, appended as they come
``answers.parquet``  tidy: one row per model, method, parameters, retention and question
``summary.csv``      one row per method, retention and question kind (`intervals.summarise`)
``plots/``

The journal is the truth: whatever else is in the folder can be made again from it.
"""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pandas as pd

import tokenprune
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.csv_files import write_csv
from tokenprune.experiments.data import Question, normalise
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
    "answers_frame",
    "check_writable",
    "code_fingerprint",
    "environment",
    "files_fingerprint",
    "git_state",
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
            trace = "".join(traceback.format_exception(error))
        except Exception:
            trace = f"{''.join(traceback.format_tb(error.__traceback__))}{name}\n"
        said = f"{name}: {message[0]}" if message else name
        return cls(f"{said} ({about})" if about else said, trace)


# --- the journal ----------------------------------------------------------------------------------


class Journal:
    """Answers and failures by cell key, kept in a file that is only ever appended to.

    A line that a crash cut short is passed over when the file is read, so its answer is missing
    and computed again.  If an answer stands in the file twice, the first one counts.

    Attributes:
        answers: (cell key, question id) to the answer's record.
        failures: Cell key to the failure, of cells whose last entry is one.
        missing: (cell key, question id) to why the cell could not answer that question, which it
            failed on alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}
        self.failures: dict[str, Failure] = {}
        self.missing: dict[tuple[str, str], Failure] = {}
        self._file: BinaryIO | None = None
        self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                cell = record.pop("cell")
                if "error" in record:
                    failure = Failure(record["error"], record["traceback"])
                    if "question" in record:
                        self.missing[cell, record["question"]] = failure
                    else:
                        self.failures[cell] = failure
                else:
                    row = cell, record.pop("question")
                    self.answers.setdefault(row, record)
                    self.failures.pop(cell, None)
                    self.missing.pop(row, None)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def __enter__(self) -> "Journal":
        # Unbuffered: what one `write` hands over is in the file when it returns, whole.
        self._file = self.path.open("ab", buffering=0)
        if self._file.tell() and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # so that the next line does not continue a torn one
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

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
        if self._file is None:
            raise RuntimeError("the journal is not open; write to it inside `with journal:`")
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        view = memoryview(text.encode("utf-8", "backslashreplace"))
        while view:  # a full disk or a pipe may take a part only
            view = view[self._file.write(view) or 0 :]


# --- the folder -----------------------------------------------------------------------------------


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
            details: What else the manifest should tell, e.g. versions and command line.

        Raises:
            UserError: The folder cannot be written, holds another experiment or files that are not
                a run's, or another process is working in it.
        """
        check_writable(path)
        lock = _lock(path)
        try:
            manifest = _read_manifest(path)
            experiment = json.loads(json.dumps(experiment))  # as it will be when it is read back
            differences = list(_differences(manifest.get("experiment", experiment), experiment))
            if differences:
                raise UserError(
                    f"{path} holds another experiment ({'; '.join(differences)}); choose another "
                    "--out, or ask for the same again to resume it."
                )
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
        return float(sum(session.get("seconds", 0.0) for session in self.manifest["sessions"]))

    def write_manifest(self) -> None:
        """Write ``manifest.json`` in one step."""
        with replace_file(self.path / "manifest.json") as temporary:
            text = json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str)
            temporary.write_text(text + "\n", encoding="utf-8")

    def write_tables(self, answers: pd.DataFrame, summary: pd.DataFrame) -> None:
        """Write ``answers.parquet`` and ``summary.csv``, each in one step."""
        with replace_file(self.path / "answers.parquet") as temporary:
            answers.to_parquet(temporary, index=False)
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


def check_writable(path: Path) -> None:
    """Raise `UserError` unless ``path`` is, or can be made, a folder we can write files to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {str(path)!r} ({error.strerror}); choose another "
            "with --out."
        ) from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` at the end of the block, if nothing went wrong.

    Readers see the old file or the new one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _lock(folder: Path) -> int | None:
    """Hold ``folder`` for this process until `_unlock` or the process's end.

    None where the system or the file system has no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another process is writing to {folder}; wait until it ends or choose another --out."
        ) from None
    except OSError:
        os.close(handle)
        return None
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.exists():
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UserError(
                f"{path} holds files but no manifest.json, so it is not the folder of a run; "
                "choose another --out."
            )
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if (
        not isinstance(manifest, dict)
        or not isinstance(manifest.get("experiment"), dict)
        or not isinstance(manifest.get("sessions"), list)
    ):
        raise UserError(f"{file} is not the manifest of a run; choose another --out.")
    return manifest


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Say field by field what differs; fingerprints only that they do."""
    for name in [*here, *(name for name in there if name not in here)]:
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            if isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64:
                yield f"other {name}"
            else:
                yield f"{name}: {_say(old)} there, {_say(new)} here"


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
    easy = {item.id: _easy(item, cells, journal) for item in questions}
    rows = []
    for cell in cells:
        shared = {
            "model": model,
            "method": cell.method,
            "label": cell.label,
            "parameters": cell.parameters,
            "retention": cell.retention,
            "asked_retention": cell.asked,
            "match": None if cell.matched is None else cell.matched.kind,
            "match_target": None if cell.matched is None else cell.matched.target,
            "match_cost": None if cell.matched is None else cell.matched.cost,
        }
        failed = cell.key in journal.failures
        for item in questions:
            record = journal.answers.get((cell.key, item.id))
            status = "ok" if record is not None else "failed" if failed else "missing"
            if status == "missing" and (cell.key, item.id) not in journal.missing:
                continue  # not asked yet
            full = journal.answers.get((UNCOMPRESSED, item.id))
            answer = None if record is None else normalise(record["answer"])
            rows.append(
                {
                    **shared,
                    "question_id": item.id,
                    "image_id": item.image_id,
                    "kind": item.kind,
                    "question": item.question,
                    "truth": item.answer,
                    "answer": None,
                    "correct": None if answer is None else answer == normalise(item.answer),
                    "agrees": None
                    if answer is None or full is None
                    else answer == normalise(full["answer"]),
                    "kl": None,
                    "easy": easy[item.id],
                    "status": status,
                    **dict.fromkeys([*FIGURES, "visual_per_layer"]),
                    **(record or {}),
                }
            )
    types = dict.fromkeys(("correct", "agrees", "easy"), "boolean")
    types |= dict.fromkeys(("kl", *FIGURES), "Float64") | dict.fromkeys(WHOLE_FIGURES, "Int64")
    types |= {"match_target": "Float64", "match_cost": "Float64"}
    return pd.DataFrame(rows, columns=_COLUMNS).astype(types)


def _easy(item: Question, cells: Iterable[Cell], journal: Journal) -> bool | None:
    """Whether ``item`` is answered rightly by a model that sees little or nothing of the image."""
    keys = {cell.name: cell.key for cell in cells if cell.name in (IMAGE_FREE, THUMBNAIL_ONLY)}
    said = {name: journal.answers.get((key, item.id)) for name, key in keys.items()}
    if not said or None in said.values():
        return None
    # Where an image has no crops, its thumbnail is all of it and tells nothing about difficulty.
    return any(
        record["kept_patches"] < record["patch_tokens"] or name == IMAGE_FREE
        for name, record in said.items()
        if record is not None and normalise(record["answer"]) == normalise(item.answer)
    )


def read_answers(folder: Path) -> pd.DataFrame:
    """``answers.parquet`` of a run.  Raises `UserError` if the folder holds none."""
    path = folder / "answers.parquet"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no answers.parquet; give the folder of a run, as tokenprune compare "
            "prints it at its end."
        )
    return pd.read_parquet(path)


# --- what a result depends on ---------------------------------------------------------------------

_PROCESSOR = ("*processor*.json", "tokenizer*", "vocab*", "merges*", "*tokens*.json", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin", "config.json", "generation_config.json")


def files_fingerprint(folder: Path | None) -> dict[str, str | None]:
    """SHA-256 of a model's weights and config, and of its processor's files (None: no folder)."""
    return {
        "weights": _hash_files(folder, _WEIGHTS),
        "processor": _hash_files(folder, _PROCESSOR),
    }


def _hash_files(folder: Path | None, patterns: Iterable[str]) -> str | None:
    if folder is None:
        return None
    total = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        total.update(path.name.encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def code_fingerprint(compressors: Iterable[Compressor], others: Iterable[Path] = ()) -> str:
    """SHA-256 of the source the answers depend on: core, adapters, these methods and ``others``."""
    root = Path(tokenprune.__file__).parent
    files = {*root.glob("[!_]*.py"), *(root / "models").glob("*.py")} - {
        root / "cli.py",
        root / "terminal.py",
    }
    files |= {root / "experiments" / "compare.py", root / "experiments" / "sharing.py", *others}
    for compressor in compressors:
        for part in compressor.stages():
            try:
                files.add(Path(inspect.getsourcefile(type(part)) or ""))
            except TypeError:  # defined at a prompt
                continue
    total = hashlib.sha256()
    for content in sorted(file.read_bytes() for file in files if file.is_file()):
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def environment() -> dict[str, Any]:
    """Versions of everything that could matter, the platform and the state of the source."""
    packages = ("tokenprune", "torch", "torchvision", "transformers", "accelerate", "numpy")
    extra = ("pandas", "scipy", "pillow", "safetensors", "scikit-learn", "timm")
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
        git("ls-files", "--error-unmatch", "__init__.py")  # not merely below some repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None
