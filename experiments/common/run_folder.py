"""The folder of a run: a manifest, an append-only journal, and tables made from the journal.

``manifest.json``    what ran, with which versions, and how it ended; written first, has a backup
``answers.jsonl``    the journal, one line per answer or failure, appended at once
``answers.parquet``  tidy: one row per model, method, parameters, retention and question
``summary.csv``      one row per method, retention and question kind (`summary.summarise`)
``plots/``
``answers-before.jsonl``  entries of methods whose code has changed since; only in a run that grew

Everything else in the folder can be made again from the journal.
"""

import dataclasses
import hashlib
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import (
    check_writable,
    replace_file,
    sweep,
    try_lock,
    writing,
)

__all__ = [
    "BEFORE",
    "IMAGE_FREE",
    "THUMBNAIL_ONLY",
    "UNCOMPRESSED",
    "Growth",
    "RunFolder",
    "asked_for",
    "core_code",
    "disagreements",
    "folder_name",
    "manifests",
    "named_files",
    "stored_path",
]


UNCOMPRESSED, THUMBNAIL_ONLY, IMAGE_FREE = "uncompressed", "thumbnail-only", "image-free"


# --- the folder -----------------------------------------------------------------------------------

_MANIFESTS = ("manifest.json", "manifest.backup.json")


BEFORE = "answers-before.jsonl"


_NAMED = 10  # number of files that an error names


_SAID = 60  # characters of a value that an error quotes


_FUNCTIONS = 3  # number of functions of a file that an error names


_DIFFERENCES = 4  # number of differences between two experiments that an error names


_GROWS = ("methods", "retention", "references", "questions", "modality", "data", "match", "code")
"""What may differ between an experiment and the run that it is added to.

The code that all answers depend on may not (`core_code`).
"""


@dataclass(frozen=True)
class Growth:
    """What an experiment adds to the run in its folder.

    Attributes:
        earlier: The experiment in the folder, to which the new one adds.
        changed: Keys of the cells whose answers no longer count.
    """

    earlier: Mapping[str, Any]
    changed: Collection[str] = ()


@dataclass
class RunFolder:
    """A run's folder, new or resumed.

    Attributes:
        path: The folder.
        manifest: The content of ``manifest.json``.
    """

    path: Path
    manifest: dict[str, Any]
    _lock: int | None = None
    _started: float = field(default_factory=time.monotonic, repr=False)

    @classmethod
    def open(
        cls,
        path: Path,
        experiment: Mapping[str, Any],
        details: Mapping[str, Any],
        growth: Growth | None = None,
    ) -> "RunFolder":
        """Create the folder of ``experiment``, or open the one that holds it.

        No other process can open the folder until `close`.

        Args:
            path: The folder.
            experiment: Everything that the answers depend on; JSON-serialisable.
            details: More entries of the manifest, e.g. versions and command line; ``files`` holds
                what fingerprints are made of (`provenance.answer_files`).
            growth: What ``experiment``, which includes the one in the folder, adds to it.

        Raises:
            UserError: The folder cannot be written, holds another experiment or files that are not
                a run's, or another process is working in it.
        """
        check_writable(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            manifest = _manifest(path)
            experiment = json.loads(json.dumps(experiment))  # as it is when read back
            there = {"experiment": experiment, **manifest}
            if growth is not None and there["experiment"] != growth.earlier:
                raise UserError(f"{path} has changed in the meantime; give the command again.")
            here = {**details, "experiment": experiment}
            differences = disagreements(there, here, growing=growth is not None)
            if differences:
                raise UserError(
                    f"{path} holds another experiment ({differences}); choose another --out, or "
                    "ask for the same again to resume it."
                )
            sweep(path, below=True)
            if growth is not None and growth.changed:  # the old manifest still tells that they are
                _set_aside(path, growth.changed)
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
        """Write ``manifest.json`` and its backup, each atomically."""
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False, default=str) + "\n"
        for name in _MANIFESTS:
            with replace_file(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def write_tables(self, answers: pd.DataFrame, summary: pd.DataFrame) -> None:
        """Write ``answers.parquet`` and ``summary.csv``, each atomically."""
        answers = answers.copy(deep=False)
        if self.journal.exists():  # so that readers can detect whether the journal has grown
            answers.attrs["journal"] = self.journal.stat().st_size
        with replace_file(self.path / "answers.parquet") as temporary:
            temporary.write_bytes(answers.to_parquet(index=False))
        with replace_file(self.path / "summary.csv") as temporary:
            write_csv(summary, temporary)

    def close(self, status: str, failures: Sequence[Mapping[str, Any]] = ()) -> None:
        """Record in the manifest how this session ended, and release the folder."""
        seconds = round(time.monotonic() - self._started, 3)
        self.manifest["sessions"][-1] |= {"ended": _now(), "seconds": seconds, "status": status}
        self.manifest |= {"status": status, "seconds": round(self.seconds, 3)}
        self.manifest["failures"] = list(failures)
        try:
            self.write_manifest()
        finally:
            _unlock(self._lock)


def disagreements(
    there: Mapping[str, Any], here: Mapping[str, Any], *, growing: bool = False
) -> str:
    """What differs between the experiments of two manifests, in words; empty if nothing.

    Args:
        there, here: The manifests; ``files`` and ``functions`` name what differs in fingerprints.
        growing: Whether the one adds to the other, so that `_GROWS` may differ.
    """
    old, new = there["experiment"], here["experiment"]
    if growing:
        old, new = ({k: v for k, v in one.items() if k not in _GROWS} for one in (old, new))
        if core_code(there) != core_code(here):
            old, new = old | {"code": "0" * 64}, new | {"code": "1" * 64}
        there, here = _of_core(there), _of_core(here)
    found = list(_differences(old, new, there, here))
    more = len(found) - _DIFFERENCES
    if more > 0:
        found[_DIFFERENCES:] = [f"and {more} more differences"]
    return "; ".join(found)


def core_code(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The digests of the code that all answers of a run depend on, without that of its methods."""
    files: dict[str, str] = (manifest.get("files") or {}).get("code") or {}
    own = manifest.get("own_code")
    if own is None:  # an older run
        methods = {name for name in files if name.startswith("tokenprune/strategies/")}
    else:
        methods = {name for named in own.values() for name in named}
    return {name: digest for name, digest in files.items() if name not in methods}


def _of_core(manifest: Mapping[str, Any]) -> dict[str, Any]:
    files = manifest.get("files") or {}
    return {**manifest, "files": {**files, "code": core_code(manifest)}}


def _set_aside(folder: Path, keys: Collection[str]) -> None:
    """Move the entries of the cells ``keys`` from the journal to ``answers-before.jsonl``."""
    journal = folder / "answers.jsonl"
    if not journal.exists():
        return
    with (
        journal.open("rb") as lines,
        replace_file(journal) as temporary,
        temporary.open("wb") as kept,
        (folder / BEFORE).open("ab") as aside,
    ):
        for line in lines:
            try:
                old = json.loads(line)["cell"] in keys
            except (ValueError, KeyError, TypeError, RecursionError):
                old = False
            (aside if old else kept).write(line)
        aside.flush()
        os.fsync(aside.fileno())  # before the journal is replaced


def _lock(folder: Path) -> int | None:
    """Lock ``folder`` for this process until `_unlock` or the end of the process.

    None if the system has no such locks.
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
    """The manifest of a run and its backup, if they are complete."""
    for name in _MANIFESTS:
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("experiment"), dict):
            yield found


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of an output folder; empty if the folder is empty."""
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
    """Record the duration of a killed session, until its last stored result."""
    last = (manifest.get("sessions") or [{}])[-1]
    if not isinstance(last, dict) or "started" not in last or "seconds" in last:
        return
    kept = [path / "answers.jsonl", *path.glob("*/*.parquet")]
    with suppress(TypeError, ValueError):
        started = datetime.fromisoformat(last["started"]).timestamp()
        ended = max([started, *(file.stat().st_mtime for file in kept if file.is_file())])
        last |= {"seconds": round(ended - started, 3), "status": "killed"}


def folder_name(experiment: Mapping[str, Any]) -> str:
    """A readable name, different for different experiments."""
    methods = experiment.get("name") or "+".join(experiment["methods"])
    if len(methods) > 60:
        methods = f"{len(experiment['methods'])}-methods"
    parts = [Path(experiment["model"]).name, methods, f"{experiment['questions']}-questions"]
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^\w.+=-]+", "-", "_".join([*parts, digest[:8]]))


def asked_for(request: Any, folder: Path) -> dict[str, Any]:
    """The command line and the request, a dataclass, as entries of a manifest.

    Paths of the request are stored as by `stored_path`.  In the command, paths are relative to the
    working directory.
    """

    def entry(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [entry(one) for one in value]
        return stored_path(value, folder) if isinstance(value, Path) else value

    here = Path.cwd()
    words = [
        Path(sys.argv[0]).name,
        *(word.replace(f"{here}{os.sep}", "") for word in sys.argv[1:]),
    ]
    asked = {name: entry(value) for name, value in dataclasses.asdict(request).items()}
    asked.pop("cluster", None)  # where answers are computed does not change them
    return {"command": words, "request": asked}


def stored_path(path: Path, folder: Path) -> str:
    """``path`` as the manifest of the run in ``folder`` stores it.

    Paths in the working directory or beside the folder are relative to the folder, so that both can
    move; others are absolute.  Symbolic links on the way are followed, since ``..`` leads out of
    their target.
    """
    whole, home, here = _followed(path), os.path.realpath(folder), os.path.realpath(".")
    shared = Path(os.path.commonpath([whole, home]))
    if shared.is_relative_to(here) or shared.is_relative_to(os.path.dirname(home)):
        return Path(os.path.relpath(whole, home)).as_posix()
    return whole


def _followed(path: Path) -> str:
    """The absolute path of ``path`` whose folder, but not itself, is without symbolic links."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def _differences(
    there: Mapping[str, Any], here: Mapping[str, Any], *manifests: Mapping[str, Any]
) -> Iterator[str]:
    """The fields that differ; of fingerprints, the files and functions that differ."""
    for name in [*here, *(name for name in there if name not in here)]:
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new)
        elif old != new:
            if isinstance(old, str) and isinstance(new, str) and len(old) == len(new) == 64:
                yield f"other {name}{_differing_files(name, *manifests)}"
            else:
                yield f"{name}: {_say(old)} there, {_say(new)} here"


def _differing_files(group: str, *manifests: Mapping[str, Any]) -> str:
    """Name the files whose digests differ, the first few of them, and their functions."""
    found: list[Any] = [(one.get("files") or {}).get(group) for one in manifests]
    if len(found) != 2 or not all(isinstance(one, dict) for one in found):
        return ""
    there, here = found
    names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    return f": {named_files(names, *manifests)}" if names else ""


def named_files(names: Sequence[str], *manifests: Mapping[str, Any]) -> str:
    """The first few of the files ``names``, each with its functions that differ."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    words = []
    for name in names[:_NAMED]:
        both: list[Any] = [(one.get("functions") or {}).get(name) for one in manifests]
        if not all(isinstance(one, dict) for one in both):
            words.append(name)
            continue
        old, new = both
        parts = [one for one in sorted({*old, *new}) if one and old.get(one) != new.get(one)]
        few = ", ".join(parts[:_FUNCTIONS]) + (", …" if len(parts) > _FUNCTIONS else "")
        words.append(f"{name} ({few or 'outside functions'})")
    return f"{', '.join(words)}{more}"


def _say(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return f"{len(value)} entries"
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return textwrap.shorten(words, _SAID, placeholder=" …") or words[:_SAID]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
