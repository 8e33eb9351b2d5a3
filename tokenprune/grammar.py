"""The text of a spec: ``name:option=value,option=value@retention``, chained by `` + ``.

This module reads and writes the text.  `tokenprune.spec` builds compressors from it.

====================================  ==============================================
``fastv``                             a method with its defaults
``fastv:layer=3``                     with an option; ``,`` separates several options
``pyramiddrop:depths=0.3/0.6``        an option with several values
``fastv@0.25``                        with a retention ratio
``globalcom2@0.5 + fastv@0.5``        a chain, in the order in which its parts act
====================================  ==============================================
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune.errors import UserError

__all__ = [
    "Part",
    "chained",
    "has_retention",
    "lines",
    "names",
    "options",
    "parts",
    "read",
    "shortest",
    "split",
    "value_text",
]

LONGEST = 10_000
"""Maximum number of characters of a spec."""

_CHAIN = re.compile(r"\s\+\s")
_RETENTION = "retention"


@dataclass(frozen=True)
class Part:
    """One method of a spec, as text.

    Attributes:
        name: Name of the method.
        options: Values by name, in the order of the text.
        retention: The text after ``@``; empty without one.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    retention: str = ""

    def __str__(self) -> str:
        """The text that `read` turns into this part."""
        written = ",".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"{self.name}{':' * bool(written)}{written}{'@' * bool(self.retention)}{self.retention}"
        )


def read(spec: str) -> tuple[Part, ...]:
    """The methods that ``spec`` names, in order; more than one form a chain.

    Raises:
        UserError: The text is too long or not of the form above, an option is given twice, or a
            part of a chain has no retention.
    """
    if len(spec) > LONGEST:
        raise UserError(
            f"a spec of {len(spec)} characters, {spec[:40]!r} and so on, is too long; write at "
            f"most {LONGEST}."
        )
    pieces = parts(spec)
    for piece in pieces if len(pieces) > 1 else ():
        if not has_retention(piece):
            raise UserError(
                f"{piece!r} in {spec!r} needs its own retention; write for instance "
                f"{chained(one if has_retention(one) else f'{one}@0.5' for one in pieces)}."
            )
    return tuple(map(_part, pieces))


def _part(text: str) -> Part:
    head, at, retention = text.partition("@")
    name, _, written = head.partition(":")
    found: dict[str, str] = {}
    for option in filter(None, written.split(",")):
        key, equals, value = (piece.strip() for piece in option.partition("="))
        if not equals:
            raise UserError(
                f"cannot read {option!r} in {head!r}; write name:option=value,option=value."
            )
        if key in found or (at and key == _RETENTION):
            raise UserError(f"{key!r} is given twice in {text!r}; write it once.")
        found[key] = value
    if at and not retention.strip():
        raise UserError(f"{text!r} has no retention after '@'; write for instance {head}@0.5.")
    return Part(name.strip(), found, retention.strip())


def parts(spec: str) -> list[str]:
    """The text of every method in ``spec``."""
    return [piece.strip() for piece in _CHAIN.split(spec)]


def chained(pieces: Iterable[object]) -> str:
    """The spec of a chain of ``pieces``."""
    return " + ".join(map(str, pieces))


def names(spec: str) -> list[str]:
    """The methods that ``spec`` names, without their options.

    >>> names("globalcom2:tau=5@0.5 + fastv@0.5")
    ['globalcom2', 'fastv']
    """
    return [piece.partition("@")[0].partition(":")[0].strip() for piece in parts(spec)]


def has_retention(spec: str) -> bool:
    """Whether ``spec`` contains a retention: ``@0.5``, ``retention=0.5``, or a chain.

    >>> [has_retention(spec) for spec in ("fastv", "fastv@0.5", "uniform:pattern=retention")]
    [False, True, False]
    """
    written = spec.partition(":")[2].split(",")
    named = (option.partition("=") for option in written)
    return (
        "@" in spec
        or len(parts(spec)) > 1
        or any(name.strip() == _RETENTION and equals for name, equals, _ in named)
    )


def split(values: Sequence[str]) -> Iterator[str]:
    """The specs in ``values``, which commas may separate.  A comma before ``name=`` does not.

    >>> list(split(["globalcom2:alpha=0.3,tau=5,fastv", "uniform"]))
    ['globalcom2:alpha=0.3,tau=5', 'fastv', 'uniform']
    """
    for value in values:
        for spec in re.split(r",(?!\s*\w+\s*=)", value):
            if spec.strip():
                yield spec.strip()


def options(text: str, separators: str = ",") -> Iterator[tuple[str, str]]:
    """(name, value) of each option in ``text``, where a value may contain a separator.

    A separator in front of ``name=`` begins an option.  Without ``=`` its value is empty.

    >>> list(options("alpha=0,0.5;tau=1,score=received", ",;"))
    [('alpha', '0,0.5'), ('tau', '1'), ('score', 'received')]
    """
    for option in re.split(rf"[{re.escape(separators)}](?=\s*\w+\s*=)", text):
        name, _, value = option.partition("=")
        yield name.strip(), value.strip()


def lines(spec: str) -> list[str]:
    """``spec`` over several lines: one for every part of a chain and for every option.

    >>> lines("globalcom2:alpha=0,tau=5@0.5 + fastv@0.5")
    ['globalcom2:', 'alpha=0,', 'tau=5@0.5 +', 'fastv@0.5']
    """
    found = []
    pieces = parts(spec)
    for index, piece in enumerate(pieces):
        more = " +" if index < len(pieces) - 1 else ""
        name, colon, written = piece.partition(":")
        listed = written.split(",") if colon else []
        found += [f"{name}:"] * bool(listed) + [f"{option}," for option in listed[:-1]]
        found.append((listed[-1] if listed else name) + more)
    return found


def value_text(value: Any) -> str:
    """``value`` of an option as text in a spec; ``/`` joins several values."""
    if isinstance(value, tuple):
        return "/".join(map(value_text, value))
    return str(value)


def shortest(number: float) -> str:
    """The shortest text that converts back to ``number``."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)
