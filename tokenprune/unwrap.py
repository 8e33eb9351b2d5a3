"""Finds the Hugging Face model inside the wrappers of training and serving libraries."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from tokenprune.errors import UserError

__all__ = ["unwrapped"]


def unwrapped(model: Any, hosts: Container[str]) -> nn.Module:
    """``model`` without the wrappers of ``torch.compile``, PEFT, PyTorch and Accelerate.

    Calling the wrapper still runs the inner model with its hooks.

    Args:
        model: A model, wrapped any number of times.
        hosts: Names of the model classes that have an adapter.

    Raises:
        UserError: ``model`` is not a module, a `torch.nn.DataParallel` on several devices, or an
            unknown wrapper around a model of one of these classes.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"compress runs in a model or an adapter, got {type(model).__name__}; give the model "
            "itself (of a pipeline or a trainer, its attribute model)."
        )
    outer: Any = None
    while model is not outer:
        outer = model
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise UserError(
                "DataParallel copies the model onto several devices for every forward, and the "
                "copies are not compressed; use one process for each device "
                "(DistributedDataParallel), or compress its attribute module and run that."
            )
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
    if not _is_host(model, hosts):
        for path, inner in model.named_modules():
            if path and _is_host(inner, hosts):
                raise UserError(
                    f"{type(model).__name__} is no model class with an adapter, but has a "
                    f"{type(inner).__name__} at .{path}; pass that one to compress, and call the "
                    "outer model as before."
                )
    found: nn.Module = model
    return found


def _is_host(module: nn.Module, hosts: Container[str]) -> bool:
    return any(parent.__name__ in hosts for parent in type(module).__mro__)
