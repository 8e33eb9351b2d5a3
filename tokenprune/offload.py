"""Access to weights that accelerate offloads.

Accelerate loads them only for the ``forward`` of their module.  Outside it they are on the ``meta``
device and cannot be read.  Code that uses a module outside its ``forward`` calls these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["applied", "execution_device", "replaced_forward", "resident"]


@contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """While open, the weights of these modules are loaded.

    The weights of submodules are loaded only if one hook manages all of them
    (``preload_module_classes``).  Otherwise a submodule loads its weights when it is called.
    """
    with ExitStack() as stack:
        for module in modules:
            together = any(getattr(hook, "place_submodules", False) for hook in _hooks(module))
            # The weights of a running module are loaded already, and its hook unloads them.
            if any(weight.is_meta for weight in module.parameters(recurse=together)):
                for hook in _hooks(module):
                    hook.pre_forward(module)
                    stack.callback(hook.post_forward, module, None)
        yield


def applied(module: nn.Module, states: Tensor) -> Tensor:
    """The output of ``module`` for ``states``, on the device of the module."""
    device = next(module.parameters()).device
    # If the weights are offloaded, the module's hook moves its input.
    result: Tensor = module(states if device.type == "meta" else states.to(device))
    return result


def execution_device(model: nn.Module) -> torch.device:
    """The device that computes with the first weights of ``model``, also if they are offloaded.

    It is ``meta`` for a model without weights.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for hook in (hook for module in model.modules() for hook in _hooks(module)):
        if (found := getattr(hook, "execution_device", None)) is not None:
            return torch.device(found)
    return device


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, this module instance runs ``forward``.

    The hook that places its inputs and weights still runs around it.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"  # what that hook calls
    before = module.__dict__.get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        module.__dict__.pop(name, None)
        if before is not None:
            setattr(module, name, before)


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks that accelerate runs around the forward of ``module``, in order."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))
