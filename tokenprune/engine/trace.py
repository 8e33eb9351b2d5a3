"""What a `compress` context reports about a prefill."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tokenprune.compressor import Stage
from tokenprune.cost.ledger import Ledger
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout

__all__ = [
    "Prefill",
    "SelectionRecord",
    "Trace",
]


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """One selection that was made.

    Attributes:
        row: Row of the batch.
        image: How many images and videos come before in that row.
        stage: Where.
        layer: Decoder layer in front of which it was made, or None.
        layout: Geometry of the image's full packed sequence, on the CPU.
        keep: (M,) indices into it, on the CPU.
    """

    row: int
    image: int
    stage: Stage
    layer: int | None
    layout: TokenLayout
    keep: Tensor


class Prefill(NamedTuple):
    """What a trace tells of one prefill."""

    selections: list[SelectionRecord]
    has_images: bool
    account: Callable[[], list[Ledger]]


class Trace:
    """What the latest prefill with images inside a `compress` context did.

    Where several threads run the model, each is told of its own latest prefill; one that had none
    is told of the latest of all.

    Selections and account are always of the same forward.  A prompt without images is told about
    only as long as none with images was seen, so that the text-only pass of ``guidance_scale``
    changes nothing.

    Attributes:
        around: Makes the context that every selection runs in, attention rows and packing
            included; put a stopwatch there to time what choosing takes.
    """

    def __init__(self) -> None:
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._latest = Prefill([], False, list)
        self._own = threading.local()

    def _tell(self, told: Prefill) -> None:
        self._latest = self._own.told = told

    @property
    def _told(self) -> Prefill:
        told: Prefill = getattr(self._own, "told", self._latest)
        return told

    @property
    def selections(self) -> list[SelectionRecord]:
        """Every selection, in the order made."""
        return self._told.selections

    @property
    def has_images(self) -> bool:
        """Whether that prefill had images."""
        return self._told.has_images

    @property
    def ledgers(self) -> list[Ledger]:
        """The account of every row of the batch."""
        return self._told.account()

    @property
    def ledger(self) -> Ledger:
        """The account of the only prompt.  Raises `UserError` unless there was exactly one."""
        found = self.ledgers
        if len(found) != 1:
            raise UserError(
                f"the latest prefill had {len(found)} prompts; use trace.ledgers, one per row."
            )
        return found[0]
