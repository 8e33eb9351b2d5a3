"""Modules of a model on a second device that is simulated."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokenprune.experiments.benchmarks.second_device import put


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
