"""The grammar of methods: ``name:field=value@retention + ...``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokenprune.errors import UserError, unknown
from tokenprune.registry import strategies

if TYPE_CHECKING:
    from tokenprune.compressor import Compressor

__all__ = [
    "create",
    "method_specs",
    "parse",
    "ratio",
    "ratios",
    "registered",
    "says_retention",
    "split_specs",
]


_LONGEST = 10_000  # characters of a spec


def create(name: str, /, **fields: Any) -> Compressor:
    """Build a registered strategy; values may be strings, as from a command line.

    Raises:
        UnknownNameError: No such strategy or field (with the nearest names).
        UserError: A value is not of the field's type or outside its range.
    """
    cls: type[Compressor] = strategies.get(name)
    known = [item.name for item in dataclasses.fields(cls)]
    for given in fields:
        if given not in known:
            raise unknown(f"option of {name}", given, known)
    if "retention" not in fields:
        raise UserError(f"{name} needs a retention in (0, 1], e.g. retention=0.25.")
    return cls(**fields)


def parse(spec: str, /, **fields: Any) -> Compressor:
    """Build a strategy from ``name`` or ``name:field=value,field=value``, or a chain of them.

    Several values of one field are joined by ``/``: ``pyramiddrop:depths=0.3/0.6``.

    ``name@0.5`` carries its own retention.  Strategies joined by `` + `` become a `Chain`, and each
    of them must: ``globalcom2@0.5 + fastv:layer=3@0.5``.

    Raises:
        UserError: As `create` and `Chain.of`, the text is not of that form or far too long, or a
            field is given twice.
    """
    from tokenprune.compressor import Chain

    if len(spec) > _LONGEST:
        raise UserError(
            f"a method of {len(spec)} characters, {spec[:40]!r} and so on, is too long; write at "
            f"most {_LONGEST}."
        )
    parts = [part.strip() for part in re.split(r"\s\+\s", spec)]
    if len(parts) > 1:
        if fields:
            raise UserError(f"the parts of {spec!r} say themselves what they keep; got {fields}.")
        for part in parts:
            if "@" not in part:
                raise UserError(
                    f"{part!r} in {spec!r} needs a retention of its own; write for instance "
                    f"{' + '.join(f'{one}@0.5' for one in parts)}."
                )
        return Chain.of(*map(parse, parts))
    spec, at, retention = spec.partition("@")
    if at and "retention" in fields:
        raise UserError(f"{spec!r} has the retention {retention} and {fields['retention']}.")
    name, _, options = spec.partition(":")
    given: dict[str, Any] = {"retention": retention.strip()} if at else {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(
                f"cannot read {option!r} in {spec!r}; write name:field=value,field=value."
            )
        if key.strip() in given:
            raise UserError(f"{key.strip()!r} is given twice in {spec!r}; write it once.")
        given[key.strip()] = value.strip()
    return create(name.strip(), **{**fields, **given})


def split_specs(values: Sequence[str]) -> Iterator[str]:
    """Specs that may be separated by commas, although their options are as well.

    >>> list(split_specs(["globalcom2:alpha=0.3,tau=5,fastv", "uniform"]))
    ['globalcom2:alpha=0.3,tau=5', 'fastv', 'uniform']
    """
    for value in values:
        for spec in re.split(r",(?!\s*\w+\s*=)", value):
            if spec.strip():
                yield spec.strip()


def method_specs(values: Sequence[str]) -> list[str]:
    """`split_specs`, each `registered`.  Raises `UserError` as that, or if there is none."""
    specs = list(split_specs(values))
    if not specs:
        raise UserError("--methods needs at least one value.")
    return [registered(spec) for spec in specs]


def registered(spec: str) -> str:
    """``spec``; a class of your own in it, ``module:Class``, is imported and called by its name.

    Raises:
        UserError: As `plugins.own_class`, or the class is not registered.
    """
    from tokenprune.plugins import own_class

    parts = []
    for part in spec.split(" + "):
        path, at, retention = part.strip().partition("@")
        own = own_class(path)
        if own is not None and not own.name:
            raise UserError(f'{path} has no name yet; write @register("name") above the class.')
        parts.append(part if own is None else f"{own.name}{at}{retention}")
    return " + ".join(parts)


def ratios(values: Sequence[str]) -> tuple[float, ...]:
    """Retentions, each a value of its own or several with commas between them.

    Raises:
        UserError: As `ratio`, or there is none.
    """
    found = tuple(map(ratio, split_specs(values)))
    if not found:
        raise UserError("--retention needs at least one value.")
    return found


def ratio(text: str) -> float:
    """The retention that ``text`` says; whether it is in (0, 1] is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        share = re.fullmatch(r"(\d*\.?\d+)\s*%", text.strip())
        hint = f"; write {float(share[1]) / 100:g}" if share else ""
        raise UserError(
            f"retention must be a number larger than 0 and at most 1, got {text!r}{hint}."
        ) from None


def says_retention(spec: str) -> bool:
    """Whether ``spec`` says itself what it keeps: ``@0.5``, ``retention=0.5``, or a chain.

    >>> [says_retention(spec) for spec in ("fastv", "fastv@0.5", "uniform:pattern=retention")]
    [False, True, False]
    """
    return "@" in spec or " + " in spec or bool(re.search(r"\bretention\s*=", spec))
