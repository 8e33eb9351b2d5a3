"""The record of a prefill inside a `compress` context: its selections and its ledgers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor

from tokenprune.compressor import Stage
from tokenprune.cost.ledger import Ledger
from tokenprune.drawing import Fit, draw_kept
from tokenprune.errors import UserError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.pictures import frames, picture

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Prefill",
    "SelectionRecord",
    "Trace",
]


@dataclass(frozen=True, eq=False)
class SelectionRecord:
    """One selection.

    Attributes:
        row: Row of the batch.
        image: Index of the image or video in that row.
        stage: Where the compressor acts.
        layer: Decoder layer in front of which it selects; None outside the language model.
        layout: Geometry of the full packed sequence of N entries, on the CPU.
        keep: (M,) int64 indices of the kept entries, on the CPU.
    """

    row: int
    image: int
    stage: Stage
    layer: int | None
    layout: TokenLayout
    keep: Tensor

    @property
    def kept_patches(self) -> int:
        """Number of kept patch tokens."""
        return int((~self.layout.is_separator[self.keep]).sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per entry of the full packed sequence.

        Columns: ``kind``, ``view``, ``row``, ``col``, ``canvas_row``, ``canvas_col`` as in
        `TokenLayout`, and ``kept``.
        """
        import pandas as pd

        columns = ("view", "row", "col", "canvas_row", "canvas_col")
        frame = pd.DataFrame({name: getattr(self.layout, name).numpy() for name in columns})
        frame.insert(0, "kind", [Kind(kind).name.lower() for kind in self.layout.kind.tolist()])
        frame["kept"] = frame.index.isin(self.keep.tolist())
        return frame

    def show(self, image: Any, fit: Fit = "stretch") -> Image.Image:
        """Draw which patches are kept (`draw_kept`).

        Args:
            image: The image as `tokenprune.pictures.picture` takes it, or for a video its sampled
                frames as `tokenprune.pictures.frames` takes them.
            fit: How the processor makes a square view of an image without crops (`Adapter.fit`).

        Raises:
            UserError: The image cannot be read, or the video has another number of frames.
        """
        if self.layout.modality == "image":
            return draw_kept(self.layout, self.keep, [picture(image)], fit)
        shown = [Image.fromarray(frame) for frame in frames(image)]
        if self.layout.native:  # a view is two frames, of which the first is drawn
            shown = shown[::2]
        if len(shown) != self.layout.views:
            raise UserError(
                f"the model saw {self.layout.views} frames of this video, got {len(shown)}; give "
                "the frames that were sampled."
            )
        return draw_kept(self.layout, self.keep, shown, fit)

    def _place(self) -> str:
        return self.stage if self.layer is None else f"{self.stage} layer {self.layer}"

    def __repr__(self) -> str:
        return (
            f"SelectionRecord(row {self.row}, image {self.image}, {self._place()}: "
            f"{self.kept_patches} of {len(self.layout.patches)} patch tokens)"
        )

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        return str(_summary([self]).to_html(index=False))


class Prefill(NamedTuple):
    """One prefill.

    Attributes:
        selections: The selections, in order.
        has_images: Whether the prompts have images or videos.
        account: Computes the ledger of every row.
    """

    selections: list[SelectionRecord]
    has_images: bool
    account: Callable[[], list[Ledger]]


class Trace:
    """The latest prefill with images inside a `compress` context.

    Selections and ledgers always belong to the same forward.  A prefill without images is recorded
    only before the first one with images, so that the text-only forward of ``guidance_scale`` does
    not replace it.  If several threads run the model, each reads its own latest prefill; a thread
    without one reads the latest of all threads.

    Attributes:
        around: Returns the context in which every selection runs, including its signals inside the
            language model and packing.  Replace it to time the selections.
        fit: How the processor makes a square view of an image without crops (`Adapter.fit`).
    """

    def __init__(self, fit: Fit = "stretch") -> None:
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.fit: Fit = fit
        self._latest = Prefill([], False, list)
        self._own = threading.local()

    @property
    def prefill(self) -> Prefill:
        """The latest prefill of this thread."""
        own: Prefill = getattr(self._own, "prefill", self._latest)
        return own

    @prefill.setter
    def prefill(self, prefill: Prefill) -> None:
        self._latest = self._own.prefill = prefill

    @property
    def selections(self) -> list[SelectionRecord]:
        """Every selection, in order."""
        return self.prefill.selections

    @property
    def has_images(self) -> bool:
        """Whether the prefill has images."""
        return self.prefill.has_images

    @property
    def ledgers(self) -> list[Ledger]:
        """The ledger of every row of the batch."""
        return self.prefill.account()

    @property
    def ledger(self) -> Ledger:
        """The ledger of the only prompt.  Raises `UserError` unless there is exactly one."""
        found = self.ledgers
        if len(found) != 1:
            raise UserError(
                f"the latest prefill had {len(found)} prompts; use trace.ledgers, one per row."
            )
        return found[0]

    def to_frame(self) -> pd.DataFrame:
        """One row per selection.

        Columns: ``row``, ``image``, ``stage``, ``layer``; ``patch_tokens`` and ``kept_patches``;
        and their quotient ``realised``.
        """
        return _summary(self.selections)

    def show(self, image: Any, *, row: int = 0, index: int = 0) -> Image.Image:
        """Draw which patches of an image remain after the last selection.

        Args:
            image: As for `SelectionRecord.show`.
            row: Row of the batch.
            index: Index of the image or video in that row.

        Raises:
            UserError: There is no selection of this image, or as `SelectionRecord.show`.
        """
        found = [one for one in self.selections if (one.row, one.image) == (row, index)]
        if not found:
            raise UserError(
                f"there is no selection of image {index} in row {row}; run the model inside "
                "tokenprune.compress first, with a retention below 1."
            )
        return found[-1].show(image, self.fit)

    def __repr__(self) -> str:
        made = len(self.selections)
        return f"Trace({made} selection{'s' * (made != 1)})"

    def _repr_html_(self) -> str:
        """The selections as a table, then the ledger of every row, for notebooks."""
        ledgers = "".join(ledger._repr_html_() for ledger in self.ledgers)
        return f"{self.to_frame().to_html(index=False)}{ledgers}"


def _summary(records: list[SelectionRecord]) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "row": record.row,
            "image": record.image,
            "stage": str(record.stage),
            "layer": record.layer,
            "patch_tokens": len(record.layout.patches),
            "kept_patches": record.kept_patches,
        }
        for record in records
    ]
    columns = ["row", "image", "stage", "layer", "patch_tokens", "kept_patches"]
    frame = pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})
    return frame.assign(realised=frame["kept_patches"] / frame["patch_tokens"])
