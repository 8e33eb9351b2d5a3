"""The location of each entry of a packed sequence: view, row and column, and on the canvas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Kind",
    "TokenLayout",
    "listed",
    "moved",
    "unpadded_box",
]


class Kind(IntEnum):
    """What an entry of the packed sequence is."""

    THUMBNAIL = 0
    CROP = 1
    FRAME = 2
    SEPARATOR = 3


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Geometry of the N entries of a packed sequence, which follows from the image size alone.

    Attributes:
        kind: (N,) `Kind` of the entry.
        view: (N,) index of its view; 0 is the thumbnail, if there is one; -1 for a separator.
        row, col: (N,) location in its view; -1 for a separator.
        canvas_row, canvas_col: (N,) location on the canvas; -1 where there is none.  A separator
            has the canvas row that it ends.
        grid: (rows, columns) of the crop grid, (0, 0) without crops.
        view_shape: (rows, columns) of patches in a view.
        canvas_shape: (rows, columns) of the canvas, the crops without padding and resampled if the
            model does so; (0, 0) without crops.
        native: Whether a view is the image, or two successive frames of the video, in its own size.
    """

    kind: Tensor
    view: Tensor
    row: Tensor
    col: Tensor
    canvas_row: Tensor
    canvas_col: Tensor
    grid: tuple[int, int]
    view_shape: tuple[int, int]
    canvas_shape: tuple[int, int]
    native: bool = False

    @classmethod
    def anyres(
        cls,
        grid: tuple[int, int],
        view_shape: tuple[int, int],
        box: tuple[int, int, int, int],
        *,
        newlines: bool = True,
        canvas: tuple[int, int] | None = None,
    ) -> TokenLayout:
        """Thumbnail patches, then the canvas row by row, with a separator after each row.

        Args:
            grid: (rows, columns) of crops.
            view_shape: (rows, columns) of patches in every view.
            box: (top, bottom, left, right) of the canvas in the crop grid, in patches, ends
                exclusive.
            newlines: Whether a separator ends each canvas row.
            canvas: (rows, columns) that the canvas is resampled to, or None.  A token of a
                resampled canvas belongs to the patch that contains its centre,
                ``floor((i + 0.5) * in / out)``.
        """
        height, width = view_shape
        top, bottom, left, right = box
        full = bottom - top, right - left
        rows, cols = canvas or full
        thumb = torch.arange(height * width, device="cpu")
        stride = cols + int(newlines)
        index = torch.arange(rows * stride, device="cpu")
        canvas_row, canvas_col = index // max(stride, 1), index % max(stride, 1)
        separator = canvas_col == cols
        # The patch that contains a token's centre.  Without resampling it is the token's own patch.
        y = ((2 * canvas_row + 1) * full[0]).div(2 * max(rows, 1), rounding_mode="floor") + top
        x = ((2 * canvas_col + 1) * full[1]).div(2 * max(cols, 1), rounding_mode="floor") + left
        none = torch.full_like(thumb, -1)

        def patches_only(values: Tensor) -> Tensor:
            return values.masked_fill(separator, -1)

        return cls(
            kind=torch.cat(
                [
                    torch.full_like(thumb, Kind.THUMBNAIL),
                    torch.where(separator, int(Kind.SEPARATOR), int(Kind.CROP)),
                ]
            ),
            view=torch.cat(
                [torch.zeros_like(thumb), patches_only(1 + (y // height) * grid[1] + x // width)]
            ),
            row=torch.cat([thumb // width, patches_only(y % height)]),
            col=torch.cat([thumb % width, patches_only(x % width)]),
            canvas_row=torch.cat([none, canvas_row]),
            canvas_col=torch.cat([none, patches_only(canvas_col)]),
            grid=grid,
            view_shape=view_shape,
            canvas_shape=(rows, cols),
        )

    @classmethod
    def single(
        cls, view_shape: tuple[int, int], *, newline: bool = True, native: bool = False
    ) -> TokenLayout:
        """One view without crops, row by row, and one separator at the end."""
        height, width = view_shape
        index = torch.arange(height * width + int(newline), device="cpu")
        separator = index == height * width
        none = torch.full_like(index, -1)
        return cls(
            kind=torch.where(separator, int(Kind.SEPARATOR), int(Kind.THUMBNAIL)),
            view=torch.zeros_like(index).masked_fill(separator, -1),
            row=(index // width).masked_fill(separator, -1),
            col=(index % width).masked_fill(separator, -1),
            canvas_row=none,
            canvas_col=none,
            grid=(0, 0),
            view_shape=view_shape,
            canvas_shape=(0, 0),
            native=native,
        )

    @classmethod
    def tiled(cls, grid: tuple[int, int], view_shape: tuple[int, int]) -> TokenLayout:
        """Crops one after the other, then the thumbnail; no separators.

        The image is stretched to the crop grid, so that there is no canvas padding.  The thumbnail
        is view 0, as in other layouts.

        Args:
            grid: (rows, columns) of crops.
            view_shape: (rows, columns) of patches in every view.
        """
        box = 0, grid[0] * view_shape[0], 0, grid[1] * view_shape[1]
        canvas = cls.anyres(grid, view_shape, box, newlines=False)
        last = torch.where(canvas.view == 0, canvas.views, canvas.view)
        return canvas.take(last.argsort(stable=True))  # rows of a crop are in order on the canvas

    @classmethod
    def video(
        cls,
        frames: int,
        view_shape: tuple[int, int],
        *,
        newline: bool = True,
        native: bool = False,
    ) -> TokenLayout:
        """Frames of ``view_shape`` tokens one after the other, and one separator at the end."""
        height, width = view_shape
        size = frames * height * width
        index = torch.arange(size + int(newline), device="cpu")
        separator = index == size
        none = torch.full_like(index, -1)
        return cls(
            kind=torch.where(separator, int(Kind.SEPARATOR), int(Kind.FRAME)),
            view=(index // (height * width)).masked_fill(separator, -1),
            row=(index // width % height).masked_fill(separator, -1),
            col=(index % width).masked_fill(separator, -1),
            canvas_row=none,
            canvas_col=none,
            grid=(0, 0),
            view_shape=view_shape,
            canvas_shape=(0, 0),
            native=native,
        )

    def __len__(self) -> int:
        return len(self.kind)

    @cached_property
    def host(self) -> TokenLayout:
        """The same layout on the CPU, where listing and counting need no synchronisation."""
        return self if self.kind.device.type == "cpu" else self._on(torch.device("cpu"))

    @cached_property
    def modality(self) -> str:
        """``video`` or ``image``."""
        if self.host is not self:
            return self.host.modality
        return "video" if bool((self.host.kind == Kind.FRAME).any()) else "image"

    @cached_property
    def is_separator(self) -> Tensor:
        """(N,) bool."""
        return self.kind == Kind.SEPARATOR

    @cached_property
    def patches(self) -> Tensor:
        """(P,) indices of the patch tokens."""
        return moved(listed(~self.host.is_separator), self.kind.device)

    @cached_property
    def places(self) -> dict[Kind, Tensor]:
        """Indices of the entries of each kind."""
        kinds, device = self.host.kind, self.kind.device
        return {kind: moved(listed(kinds == kind), device) for kind in Kind}

    @property
    def separators(self) -> Tensor:
        """(S,) indices of the separators."""
        return self.places[Kind.SEPARATOR]

    @property
    def views(self) -> int:
        """Number of views of the image, including views without a kept token."""
        return 1 + self.grid[0] * self.grid[1] if self.grid != (0, 0) else self.frames

    @cached_property
    def frames(self) -> int:
        """Number of views of an image without a crop grid, or of a video."""
        if self.host is not self:
            return self.host.frames
        return int(self.view.max()) + 1 if len(self) else 0

    @cached_property
    def view_sizes(self) -> tuple[int, ...]:
        """Patch tokens of each view."""
        view = self.host.view[self.host.patches]
        return tuple(torch.bincount(view, minlength=self.views).tolist())

    def take(self, index: Tensor) -> TokenLayout:
        """The layout of the entries at ``index`` (M,); grid, shapes and frames do not change.

        Indices on the CPU need no synchronisation.
        """
        at = moved(index, self.kind.device)
        taken = self._each(lambda values: values[at])
        taken.__dict__.update(frames=self.frames, modality=self.modality)
        if self.host is not self:
            taken.__dict__["host"] = self.host.take(index.cpu())
        return taken

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on ``device``."""
        device = torch.device(device)
        if self.kind.device == device:
            return self
        return self.host if device.type == "cpu" else self._on(device)

    def _on(self, device: torch.device) -> TokenLayout:
        copy = self._each(lambda values: moved(values, device))
        if device.type != "cpu":
            copy.__dict__["host"] = self.host
        return copy

    def _each(self, change: Callable[[Tensor], Tensor]) -> TokenLayout:
        """The layout with ``change`` applied to every (N,) tensor."""
        names = [item.name for item in fields(self) if item.type == "Tensor"]
        made: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **made)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, from the CPU to a CUDA device without synchronisation."""
    # Towards the CPU the values must arrive before they are read; other backends do not support it.
    to_cuda = values.device.type == "cpu" and device.type == "cuda"
    return values.to(device, non_blocking=to_cuda)


def listed(mask: Tensor) -> Tensor:
    """(M,) sorted indices at which ``mask`` (N,) is set, on the CPU.

    It takes one synchronisation.  Indexing by the mask takes one too, but does not give the CPU the
    indices.
    """
    return mask.cpu().nonzero().squeeze(1)


def unpadded_box(
    image_size: tuple[int, int],
    canvas: tuple[int, int],
    rule: Literal["hf", "llava"] = "hf",
) -> tuple[int, int, int, int]:
    """The part of the crop grid that the image covers, without the canvas padding.

    Args:
        image_size: (height, width) of the original image in pixels.
        canvas: (rows, columns) of patches of all crops together.
        rule: How the covered extent becomes an integer.  ``hf`` truncates after rounding to seven
            digits (``unpad_image`` of LLaVA-NeXT in ``transformers``, and its processor);
            ``llava`` truncates only (``llava_arch.py`` of LLaVA).  The results differ by two rows
            or columns if the product is an integer up to float error.

    Returns:
        (top, bottom, left, right) in patches, ends exclusive.
    """
    (height, width), (rows, cols) = image_size, canvas
    digits = 7 if rule == "hf" else None

    def extent(value: float) -> int:
        return int(round(value, digits) if digits is not None else value)

    if width / height > cols / rows:
        pad = (rows - extent(height * (cols / width))) // 2
        return pad, rows - pad, 0, cols
    pad = (cols - extent(width * (rows / height))) // 2
    return 0, rows, pad, cols - pad
