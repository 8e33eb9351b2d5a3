"""Atomic writes: a file is complete or unchanged, whatever happens meanwhile."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenprune.errors import UserError

__all__ = [
    "WriteError",
    "check_file",
    "check_writable",
    "replace_file",
    "sweep",
    "sync_folder",
    "try_lock",
    "writing",
]


_TEMPORARY = ".tokenprune-"


class WriteError(UserError):
    """A file could not be written: the disk or a quota is full, or the place cannot be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report in one sentence that writing ``path`` failed.

    Raises:
        WriteError: Instead of an `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {str(path)!r} ({error.strerror or error}); what was written before is "
            "kept. Make room or choose another place, then give the same command again."
        ) from error


def check_writable(path: Path) -> None:
    """Raise `UserError` unless ``path`` is, or can be made, a folder we can write files to.

    Nothing is made, so that a command that refuses its input leaves no empty folder.
    """
    try:
        _try_writing(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise UserError(
            f"cannot write to the output folder {str(path)!r} "
            f"({getattr(error, 'strerror', None) or error}); choose another with --out."
        ) from error


def _try_writing(folder: Path) -> None:
    """Write a temporary file to ``folder``, or to the folder that it would be made in."""
    place = folder
    while True:
        try:
            place.stat()
            break
        except FileNotFoundError:
            if place.is_symlink() or place.parent == place:
                raise
            place = place.parent
    with tempfile.TemporaryFile(dir=place):
        pass


def check_file(path: Path, *, new: bool = False) -> None:
    """Raise `UserError` unless a file can be written to ``path``.

    Args:
        path: The file.
        new: Whether it must not exist yet.
    """
    if os.path.isdir(path):  # os.path: no error for a name that is too long
        raise UserError(f"cannot write to {str(path)!r}: it is a folder; name a file.")
    if new and os.path.lexists(path):
        raise UserError(
            f"{str(path)!r} already exists; choose another --out, or give --force to replace it."
        )
    try:
        _try_writing(path.parent)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot write to the file {str(path)!r} "
            f"({getattr(error, 'strerror', None) or error}); choose another with --out."
        ) from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` at the end of the block, unless it raises.

    Readers see the old file or the new one, never a part, even after a power cut.  Temporary
    files of killed processes in the folder are removed.

    Raises:
        WriteError: The file cannot be written; the old one is unchanged.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
        temporary = Path(name)
        try:
            try_lock(handle)  # so that no other process deletes it
            yield temporary
            os.fsync(handle)
            temporary.chmod(0o644)  # mkstemp makes it private
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            os.close(handle)
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in ``folder`` survive a power cut, if the system supports it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without support
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, *, below: bool = False) -> None:
    """Remove the temporary files in ``folder`` that no process is writing.

    Args:
        folder: The folder.
        below: Whether to include all folders below it.
    """
    pattern = f"{_TEMPORARY}*"
    for path in list(folder.rglob(pattern) if below else folder.glob(pattern)):
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    if try_lock(file.fileno()):
                        path.unlink()


def try_lock(handle: int) -> bool:
    """Lock an open file or folder for this process until it is closed.

    Returns:
        False if another process holds the lock; True also on systems without locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return True
    return True
