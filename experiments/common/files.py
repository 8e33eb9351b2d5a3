"""Files that are there whole or not at all, whatever happens while they are written."""

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
    """Say in one sentence that writing ``path`` failed.

    Raises:
        WriteError: In the place of an `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {str(path)!r} ({error.strerror or error}); what was written before is "
            "kept. Make room or choose another place, then give the same command again."
        ) from error


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


def check_file(path: Path) -> None:
    """Raise `UserError` unless a file can be written to ``path``."""
    if path.is_dir():
        raise UserError(f"cannot write to {str(path)!r}: it is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the file {str(path)!r} ({error.strerror}); choose another with --out."
        ) from error


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes ``path`` at the end of the block, if nothing went wrong.

    Readers see the old file or the new one, never half of it, even after a power cut.  What killed
    processes have left in the folder is removed.

    Raises:
        WriteError: The file cannot be written; the old one is as it was.
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
    """Let what was created or renamed in ``folder`` survive a power cut, where systems can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, *, below: bool = False) -> None:
    """Remove the temporary files in ``folder`` that no process is writing any more.

    Args:
        folder: Where.
        below: Also in all folders below it.
    """
    pattern = f"{_TEMPORARY}*"
    for path in list(folder.rglob(pattern) if below else folder.glob(pattern)):
        with suppress(OSError):
            if path.is_file():
                with path.open("rb") as file:
                    if try_lock(file.fileno()):
                        path.unlink()


def try_lock(handle: int) -> bool:
    """Hold an open file or folder for this process until it is closed.

    Returns:
        False if another process holds it; True also where there are no such locks.
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
