"""Removes names of users and machines and absolute paths from texts that are shared."""

import getpass
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "anonymous",
]


_POSIX = re.compile(r"(?<![\w.:/~-])(?:file://)?/(?:[^\s/'\"<>|;,()]+/)+([^\s/'\"<>|;,():]*)")


_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:[\\/](?:[^\\/\s'\"<>|]+[\\/])*([^\\/\s'\"<>|:]*)")


_QUOTED = re.compile(r"(['\"])(?:file://)?(?:/|[A-Za-z]:[\\/])[^'\"\n]*?([^'\"\n/\\]*)[/\\]?\1")


_WHOLE = re.compile(r"(?:file://)?(?:/[^\n/]+/|[A-Za-z]:[\\/])[^\n]*?([^\n/\\]*)[/\\]?")


_OPTION = re.compile(r"(--?[\w-]+=)(.*)")


_HOMES = re.compile(r"(?:/home/|/Users/|[\\/]Users[\\/])([^/\\\s'\"]+)")


_NOBODY = {"root", "user", "home", "localhost", ""}


def anonymous(value: Any) -> Any:
    """``value`` without absolute paths and the names of users and of this machine.

    The last part of a path stays.  Names are those of the current user and machine, and those of
    home folders in ``value``.

    Args:
        value: A JSON value; keys are not changed.
    """
    names = {getpass.getuser(): "user", Path.home().name: "user"}
    host = socket.gethostname()
    names |= {host: "host", host.partition(".")[0]: "host"}
    names |= {name: "user" for text in _texts(value) for name in _HOMES.findall(text)}
    words = sorted((name for name in names if name not in _NOBODY), key=len, reverse=True)
    word = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words)) or '(?!)'})(?!\w)")

    def clean(text: str) -> str:
        option, path = m.groups() if (m := _OPTION.fullmatch(text)) else ("", text)
        if whole := _WHOLE.fullmatch(path):
            text = option + whole[1]
        text = _QUOTED.sub(r"\1\2\1", text)
        text = _WINDOWS.sub(r"\1", _POSIX.sub(r"\1", text))
        return word.sub(lambda found: names[found[0]], text)

    def walk(one: Any) -> Any:
        if isinstance(one, str):
            return clean(one)
        if isinstance(one, Mapping):
            return {key: walk(held) for key, held in one.items()}
        if isinstance(one, list | tuple):
            return [walk(held) for held in one]
        return one

    return walk(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for held in value.values() for text in _texts(held))
    elif isinstance(value, list | tuple):
        yield from (text for held in value for text in _texts(held))
