"""``torch.autocast`` is for the model: what is chosen is computed in the precision that is written.

Inside an autocast products of float32 tensors are taken in half precision, and scores tie that
should not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocasts", "like_now", "without_autocast"]


def autocasts(device: torch.device) -> bool:
    """Whether an autocast for ``device`` is in force."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """While open, no autocast for ``device`` is in force."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def like_now(
    module: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """``module``, a part of the model, under the autocast for ``device`` that is in force."""
    dtype = torch.get_autocast_dtype(device.type)

    def call(states: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return module(states)

    return call
