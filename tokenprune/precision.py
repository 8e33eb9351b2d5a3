"""``torch.autocast`` applies to the model, not to the selection.

Under autocast, products of float32 tensors are computed in half precision, and different scores
become ties.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocasts", "like_now", "without_autocast"]


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for ``device``."""
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off for ``device``."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def like_now(
    module: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """``module`` of the model, wrapped in the current autocast of ``device``."""
    dtype = torch.get_autocast_dtype(device.type)

    def call(states: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return module(states)

    return call
