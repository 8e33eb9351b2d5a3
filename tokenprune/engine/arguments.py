"""Reads the arguments of a hooked forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "Kwargs",
    "argument",
    "arguments",
    "asked",
]


Kwargs = dict[str, Any]


def asked(kwargs: Kwargs, name: str, config: Any) -> bool:
    """Whether an option of a forward is on: in its arguments, or else in the configuration."""
    given = kwargs.get(name)
    return bool(getattr(config, name, False) if given is None else given)


def arguments(module: nn.Module, args: Any, kwargs: Kwargs) -> Kwargs:
    """All arguments of a forward by name."""
    names = (_names(module.forward) or _names(type(module).forward)[1:]) if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def argument(module: nn.Module, args: Any, kwargs: Kwargs, name: str) -> Any:
    """The argument ``name`` of a forward, passed by position or by name."""
    if name in kwargs or not args:
        return kwargs.get(name)
    # A replaced forward often takes *args only; then the names come from the class's forward.
    names = _names(module.forward) or _names(type(module).forward)[1:]
    return dict(zip(names, args, strict=False)).get(name)


def _names(forward: Callable[..., Any]) -> list[str]:
    """Names of the arguments that can be passed by position."""
    return [
        parameter.name
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY)
    ]
