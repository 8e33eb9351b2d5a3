"""Faults at write events: the process is killed, or the disk is full."""

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

__all__ = ["Fault", "Kind"]

_Strike = Callable[[Callable[[], object]], None]
Kind = Literal["none", "kill", "full", "once"]
"""What happens: nothing, the process is killed, the disk stays full, or one event fails."""


class Fault:
    """Counts the write events below a folder and injects a fault at one of them.

    Events are the creation of a file, a write (half of which still succeeds), a sync and a rename.
    `install` replaces functions of the process permanently: use it in a separate process only.

    Attributes:
        events: Number of events so far.
    """

    def __init__(self, folder: Path, kind: Kind, at: int = 0) -> None:
        self.folder, self.kind, self.at = str(folder), kind, at
        self.events = 0

    def install(self) -> None:
        """Count the events of this process from now on."""
        opened, made, synced, renamed = io.open, os.open, os.fsync, os.replace

        def open_file(file: Any, mode: str = "r", size: int = -1, *rest: Any, **more: Any) -> Any:
            size = more.pop("buffering", size)
            reads = isinstance(file, int) or not set(mode) & set("wax+")
            if reads or not self._mine(file) or more.get("opener"):  # it uses `os.open`
                return opened(file, mode, size, *rest, **more)
            self._strike(lambda: None)
            raw = _Raw(file, mode.replace("b", "").replace("t", ""), self._strike)
            if size == 0:
                return raw
            whole: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return whole if "b" in mode else io.TextIOWrapper(whole, *rest, **more)

        def make(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & os.O_CREAT and not isinstance(path, int) and self._mine(path):
                self._strike(lambda: None)
            return made(path, flags, *rest, **more)

        def sync(handle: int) -> None:
            self._strike(lambda: None)
            synced(handle)

        def rename(source: Any, target: Any, **more: Any) -> None:
            self._strike(lambda: None)
            renamed(source, target, **more)

        builtins.open = io.open = open_file  # type: ignore[assignment]
        os.open, os.fsync, os.replace = make, sync, rename  # type: ignore[assignment]

    def _mine(self, file: Any) -> bool:
        return str(os.path.abspath(file)).startswith(self.folder)

    def _strike(self, before: Callable[[], object]) -> None:
        """Count an event; if it is the faulty one, call ``before`` and fail."""
        number, self.events = self.events, self.events + 1
        if number == self.at or (self.kind == "full" and number > self.at):
            if self.kind == "kill":
                before()
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.kind != "none":
                before()
                code = errno.ENOSPC if self.kind == "full" else errno.EIO
                raise OSError(code, os.strerror(code))


class _Raw(io.FileIO):
    """A file that reports its writes.

    Args:
        file: Its path.
        mode: As of `io.FileIO`.
        strike: `Fault._strike`.
    """

    def __init__(
        self, file: Any, mode: str, strike: Callable[[Callable[[], object]], None]
    ) -> None:
        super().__init__(file, mode)
        self._strike = strike

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._strike(lambda: super(_Raw, self).write(content[: len(content) // 2]))
        return super().write(content)
