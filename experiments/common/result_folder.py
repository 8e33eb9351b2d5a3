"""The folder of results that a command makes in one go, without a journal.

The folder holds the files of one request.  A marker, a JSON file, lists them; it is written last.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.common.files import check_writable, replace_file

__all__ = [
    "ResultFolder",
    "free_path",
]


@dataclass(frozen=True)
class ResultFolder:
    """A folder for new results.  It is made when the first file is written.

    Attributes:
        path: The folder.
        marker: The name of the marker.
        earlier: Names of the files of an earlier result, which the new one replaces.
    """

    path: Path
    marker: str
    earlier: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, out: Path | None, default: str, *, marker: str, force: bool = False
    ) -> "ResultFolder":
        """Choose the folder, and check that it can be written and that nothing is overwritten.

        Args:
            out: The folder; None for ``runs/<default>``, with a number if that exists.
            default: Name of a folder.
            marker: Name of the marker, different for different commands.
            force: Whether the result of an earlier call in ``out`` may be replaced.

        Raises:
            UserError: ``out`` cannot be written, holds other files, or holds an earlier result and
                ``force`` is not set.
        """
        path = free_path(Path("runs") / default) if out is None else out
        check_writable(path)
        there = _visible(path)
        if not there:
            return cls(path, marker)
        earlier = _listed(path / marker)
        if earlier is None:
            raise UserError(
                f"{str(path)!r} holds files that this command did not write ({_few(there)}); "
                "choose another --out."
            )
        if not force:
            raise UserError(
                f"{str(path)!r} holds an earlier result; choose another --out, or give --force to "
                "replace it."
            )
        return cls(path, marker, tuple(earlier))

    def finish(self, about: Mapping[str, Any], files: Sequence[str]) -> None:
        """Write the marker, and remove the files of the earlier result that were not replaced.

        Args:
            about: The content of the marker.
            files: Names of the files that were written, without the marker.
        """
        inside = self.path.resolve()
        for name in set(self.earlier) - set(files):
            old = (inside / name).resolve()
            if old.is_file() and old.is_relative_to(inside):  # a marker can name any file
                old.unlink()
        text = json.dumps(
            {**about, "files": list(files)}, indent=2, ensure_ascii=False, default=str
        )
        with replace_file(self.path / self.marker) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def free_path(path: Path) -> Path:
    """``path``, or ``path`` with the first number for which nothing exists there."""
    found, number = path, 2
    while os.path.lexists(found):
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return found


def _visible(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(one.name for one in folder.iterdir() if not one.name.startswith("."))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _listed(marker: Path) -> list[str] | None:
    """The files that a marker lists; None if there is no such marker."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    files = found.get("files") if isinstance(found, dict) and "experiment" not in found else None
    names = isinstance(files, list) and all(isinstance(name, str) for name in files)
    return files if names else None
