"""Checks the fields of a compressor, which are its options, and writes them as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tokenprune import allocators
from tokenprune.errors import UserError, shown
from tokenprune.grammar import value_text

__all__ = ["LARGEST", "option_text", "validated"]

LARGEST = 2**31 - 1
"""The largest absolute value of an option: PyTorch takes it in every dtype used here."""


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    names = [item.name for item in dataclasses.fields(cls)]
    plain = ConfigDict(arbitrary_types_allowed=True)
    result = {}
    for name in names:
        try:
            result[name] = TypeAdapter(hints[name], config=plain)
        except PydanticUserError:  # a model or dataclass brings its own configuration
            result[name] = TypeAdapter(hints[name])
    return result


def validated(cls: type, name: str, value: Any) -> Any:
    """``value`` in the type of the field ``name`` of ``cls``; it may be text, as in a spec.

    Raises:
        UserError: It does not fit the type and its bounds, or a number is NaN or above `LARGEST`.
    """
    if name == "allocator" and isinstance(value, str):
        return allocators.allocator(value)
    try:
        made = _adapters(cls)[name].validate_python(value)
    except ValidationError as error:
        if isinstance(value, str) and error.errors()[0]["type"] == "tuple_type":
            return validated(cls, name, tuple(value.split("/")))
        said = "; ".join(item["msg"] for item in error.errors())
    else:
        # NaN fails the comparison too.  `check_retention` has a better message for the retention.
        if name == "retention" or all(abs(number) <= LARGEST for number in _numbers(made)):
            return made
        said = f"a number must be between -{LARGEST} and {LARGEST}"
    called = getattr(cls, "name", "") or cls.__name__
    raise UserError(f"{called}: {name}={shown(value)} is not valid: {said}.") from None


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a field."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)


def option_text(value: Any) -> str:
    """``value`` as a spec gives it; an allocator by its name."""
    named = {cls: name for name, cls in allocators.ALLOCATORS.items()}
    return named.get(type(value)) or value_text(value)
