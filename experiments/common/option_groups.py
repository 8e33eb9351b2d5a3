"""Groups of options: a parameter of a command whose type is one of these classes stands for all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from tokenprune.experiments.common import options

__all__ = [
    "LOADING",
    "WORDING",
    "LoadingOptions",
    "WordingOptions",
    "grouped",
]


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a model is loaded; the fields are those of `ModelRequest`."""

    device: options.Device = None
    device_map: options.DeviceMap = None
    dtype: options.Dtype = "auto"
    attn: options.Attn = None
    quantize: options.Quantize = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False


LOADING = LoadingOptions()


@dataclass(frozen=True, kw_only=True)
class WordingOptions:
    """Where questions come from, and how they are asked; fields of `QuestionRequest`."""

    benchmark: options.Benchmark = None
    root: options.Root = None
    split: options.Split = None
    template: options.Template = None
    suffix: options.Suffix = None
    system: options.System = None


WORDING = WordingOptions()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with one option for every field of its parameters that are groups."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter)
            continue
        groups[parameter.name] = kind
        hints = get_type_hints(kind, include_extras=True)
        parameters += [
            parameter.replace(name=item.name, annotation=hints[item.name], default=item.default)
            for item in fields(kind)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{item.name: given.pop(item.name) for item in fields(kind)})
        command(**given)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
