"""Modules of a model on a second device that is simulated."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import tokenprune as tp
from tokenprune.compressor import Chain, Compressor
from tokenprune.experiments.benchmarks.second_device import put
from tokenprune.spec import create, parse
from tokenprune.testing.host import Host, refusal


class _Align(ModelHook):
    """What accelerate does for a module on a device: move the inputs, inside ``forward``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def move(value: Any) -> Any:
            return value.to(self.device) if isinstance(value, Tensor) else value

        return tree_map(move, args), {
            name: value if name in ("cache", "past_key_values") else tree_map(move, value)
            for name, value in kwargs.items()
        }


def place(module: nn.Module, device: torch.device) -> None:
    """Put a module's weights on a device and have its inputs moved there."""
    for weight in [*module.parameters(), *module.buffers()]:
        put(weight, device)
    add_hook_to_module(module, _Align(device))


METHODS = [
    *tp.list_methods(),
    "cdpruner:relevance=text",
    "uniform:position_ids=original",
    "fastv:layer=1,position_ids=compact",
    "fastv:layer=3",
    "fastv:layer=2,allocator=globalcom2",
    "globalcom2 + fastv",
    "pact + fastv",
]


def chosen_method(spec: str, host: Host) -> Compressor:
    """The method of a spec, or skip what the model does not offer."""
    method = _method(spec)
    if refusal(host, method):
        pytest.skip(refusal(host, method))
    return method


def _method(spec: str) -> Compressor:
    if "@" in spec:
        return parse(spec)
    if " + " in spec:
        return Chain.of(*(parse(part, retention=0.6) for part in spec.split(" + ")))
    return parse(spec, retention=0.4) if ":" in spec else create(spec, retention=0.4)


def drawn(hosts: list[Host], *axis: Any) -> list[tuple[Any, ...]]:
    """Every one of `METHODS` with the name of a model that offers it and a value of the axis.

    They are drawn with a fixed seed; every model and every value occurs.
    """
    return [
        (spec, *random.Random(spec).choice(list(itertools.product(names, axis))))
        for spec in METHODS
        if (names := [host.name for host in hosts if not refusal(host, _method(spec))])
    ]
