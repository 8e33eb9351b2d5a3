"""Builds compressors from specs, and specs from compressors (`tokenprune.grammar`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.deprecated import moved_names, renamed_options
from tokenprune.errors import UserError, unknown
from tokenprune.grammar import Part, chained, has_retention, parts, read, shortest, split
from tokenprune.registry import strategies

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = [
    "create",
    "format",
    "has_retention",
    "method_specs",
    "parse",
    "ratio",
    "ratios",
    "registered",
    "split",
]


def create(name: str, /, **fields: Any) -> Compressor:
    """Build a registered method.

    Args:
        name: Name of the method.
        **fields: Its options and its retention; values may be text, as on a command line.

    Raises:
        UnknownNameError: There is no such method or option; the message suggests names.
        UserError: A value has the wrong type or is out of range, or the retention is missing.
    """
    cls: type[Compressor] = strategies.get(name)
    fields = renamed_options(fields)
    known = [item.name for item in dataclasses.fields(cls)]
    for given in fields:
        if given not in known:
            raise unknown(f"option of {name}", given, known)
    if "retention" not in fields:
        raise UserError(f"{name} needs a retention in (0, 1], e.g. retention=0.25.")
    return cls(**fields)


def parse(spec: str, /, **fields: Any) -> Compressor:
    """Build the method, or the `Chain` of methods, that ``spec`` names.

    Args:
        spec: A spec such as ``fastv:layer=3`` or ``globalcom2@0.5 + fastv@0.5``
            (`tokenprune.grammar`).
        **fields: Options and retention of a single method.  An option in ``spec`` has priority.

    Raises:
        UserError: As `create` and `Chain.of`; or the text is not a spec, ``fields`` repeat a
            retention given with ``@``, or there are ``fields`` for a chain.
    """
    from tokenprune.compressor import Chain

    found = read(spec)
    if len(found) > 1:
        if fields:
            raise UserError(
                f"every part of {spec!r} has its own retention and options; got {fields}."
            )
        return Chain.of(*map(_built, found))
    part = found[0]
    if part.retention and "retention" in fields:
        raise UserError(
            f"{part.name!r} has the retention {part.retention} in its spec and "
            f"{fields['retention']} as an argument; give one."
        )
    return _built(part, **fields)


def _built(part: Part, **fields: Any) -> Compressor:
    own = {"retention": part.retention} if part.retention else {}
    return create(part.name, **{**fields, **part.options, **own})


def format(compressor: Compressor) -> str:
    """The spec that `parse` turns into ``compressor``: its label, and its retention.

    >>> format(parse("fastv:layer=3", retention=0.25))
    'fastv:layer=3@0.25'
    """
    label = compressor.label
    return label if has_retention(label) else f"{label}@{shortest(compressor.retention)}"


def method_specs(values: Sequence[str]) -> list[str]:
    """The specs in ``values`` (`split`), each `registered`.

    Raises:
        UserError: As `registered`, or there is no spec.
    """
    specs = list(split(values))
    if not specs:
        raise UserError("--methods needs at least one value.")
    return [registered(spec) for spec in specs]


def registered(spec: str) -> str:
    """``spec`` with every ``module:Class`` replaced by the registered name of the class.

    Raises:
        UserError: As `plugins.own_class`, or the class is not registered.
    """
    from tokenprune.plugins import own_class

    found = []
    for part in parts(spec):
        path, at, retention = part.partition("@")
        own = own_class(path)
        if own is not None and not own.name:
            raise UserError(f'{path} has no name yet; write @register("name") above the class.')
        found.append(part if own is None else f"{own.name}{at}{retention}")
    return chained(found)


def ratios(values: Sequence[str]) -> tuple[float, ...]:
    """The retention ratios in ``values``, which commas may separate.

    Raises:
        UserError: As `ratio`, or there is no value.
    """
    found = tuple(map(ratio, _ratio_texts(values)))
    if not found:
        raise UserError("--retention needs at least one value.")
    return found


def _ratio_texts(values: Sequence[str]) -> Iterator[str]:
    for value in values:
        yield from filter(None, map(str.strip, value.split(",")))


def ratio(text: str) -> float:
    """``text`` as a number.  The compressor checks its range.

    Raises:
        UserError: It is not a number.
    """
    try:
        return float(text)
    except ValueError:
        share = re.fullmatch(r"(\d*\.?\d+)\s*%", text.strip())
        hint = f"; write {float(share[1]) / 100:g}" if share else ""
        raise UserError(
            f"retention must be a number larger than 0 and at most 1, got {text!r}{hint}."
        ) from None


__getattr__ = moved_names(__name__)
