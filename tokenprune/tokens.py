"""What a strategy sees: one image's packed visual sequence and its geometry."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.errors import UserError

__all__ = ["Encoding", "Kind", "Signal", "TokenLayout", "VisualTokens", "unpadded_box"]


class Kind(IntEnum):
    """What an entry of the packed sequence is."""

    THUMBNAIL = 0
    CROP = 1
    FRAME = 2
    SEPARATOR = 3


@dataclass(frozen=True)
class Signal:
    """Something a strategy needs to see besides the features.

    Attributes:
        name: ``cls_logits`` (scaled query-key products of the vision tower's CLS token, mean over
            heads, before the softmax), ``cls_attention`` (the same after the softmax over all
            keys), ``received`` (mean attention a patch receives from all queries; needs no CLS),
            ``head_attention`` (attention of the tower's pooling head, softmaxed, mean over heads;
            SigLIP where the checkpoint kept the head), ``saliency`` (whichever the tower has:
            ``cls_logits`` with a CLS token, otherwise ``received``), or ``llm_attention`` (row of
            the last prompt token in a decoder layer, softmaxed, mean over heads).  ``cls_joint`` is
            the CLS row over all heads as one: products of the whole projections over the root of
            their width, softmaxed.  A vector per token are ``keys`` (of an encoder layer, mean over
            heads), ``joint_keys`` (all heads, one behind the other) and ``unprojected`` (what the
            projector receives).  ``llm_ahead`` is ``llm_attention`` of the very layer that a
            selection stands in front of, computed ahead of it; ``llm_keys`` are the rotated keys of
            a decoder layer, all heads, and ``llm_states`` the hidden states in front of the
            selection, behind the final norm: both vectors.  ``llm_text`` is (N, T), the attention
            that each of the T text tokens behind the image pays to the entries, softmaxed, mean
            over heads, in the layer that ran just before the selection; ``llm_text_heads``,
            (N, T, heads), is the same of every head, and ``llm_text_rotary``, (N, T), what rotary
            positions alone make of all-one queries and keys there (`rotary_product`);
            ``llm_cross`` (N,) is the mean over these text tokens, and ``llm_self`` (N,) over the
            image's patch tokens, of the largest attention of any head there.  ``llm_keys_ahead``
            are the keys of the layer that the selection stands in front of, and ``llm_global`` is
            the attention that the mean of all states up to the image's last token pays there to
            them, without rotation, softmaxed over the same, mean over heads.  ``llm_inputs`` asks
            for `VisualTokens.inputs`.  Of the prompt's text alone, hence in
            `VisualTokens.text`, are ``llm_prompt``, the input embeddings (T, D) of the text behind
            the image, known in front of the language model too, and ``clip_text``, the embeddings
            (M, E) of the question in CLIP's joint space, to which ``clip_patches`` (N, E) belong;
            no model here provides these two, the caller may (``given`` of `tokenprune.compress`).
        layer: Index of the encoder or decoder layer; negative counts from the end.  Of no meaning
            for ``head_attention`` and ``unprojected``, which come behind all layers.
    """

    name: Literal[
        "cls_logits",
        "cls_attention",
        "cls_joint",
        "received",
        "head_attention",
        "saliency",
        "keys",
        "joint_keys",
        "unprojected",
        "llm_attention",
        "llm_ahead",
        "llm_keys",
        "llm_states",
        "llm_text",
        "llm_text_heads",
        "llm_text_rotary",
        "llm_self",
        "llm_cross",
        "llm_global",
        "llm_keys_ahead",
        "llm_inputs",
        "llm_prompt",
        "clip_patches",
        "clip_text",
    ]
    layer: int = -1

    @property
    def in_llm(self) -> bool:
        """Whether the language model provides it (otherwise the vision tower does)."""
        return self.name.startswith("llm")

    @property
    def needs_cls(self) -> bool:
        """Whether the vision tower must have a CLS token."""
        return self.name.startswith("cls")

    @property
    def is_vector(self) -> bool:
        """Whether it is (N, C), a vector per token, and not (N,)."""
        return self.name in (
            "keys",
            "joint_keys",
            "unprojected",
            "llm_keys",
            "llm_keys_ahead",
            "llm_states",
            "llm_text",
            "llm_text_heads",
            "llm_text_rotary",
            "clip_patches",
        )

    @property
    def is_aligned(self) -> bool:
        """Whether it has a value for each of the N entries; otherwise it is of the text alone."""
        return self.name not in ("llm_inputs", "llm_prompt", "clip_text")

    @property
    def needs_text_tower(self) -> bool:
        """Whether there must be a text tower that shares a space with the vision tower."""
        return self.name.startswith("clip")

    @property
    def needs_head(self) -> bool:
        """Whether the vision tower must have an attention pooling head."""
        return self.name == "head_attention"

    def resolve(self, has_cls: bool) -> Signal:
        """What ``saliency`` stands for in a tower; every other signal is itself."""
        if self.name != "saliency":
            return self
        return replace(self, name="cls_logits" if has_cls else "received")


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Geometry of each of the N entries of a packed sequence, known from the image size alone.

    Attributes:
        kind: (N,) `Kind` of the entry.
        view: (N,) view it belongs to, 0 is the first (the thumbnail where there is one); -1 for a
            separator.
        row, col: (N,) place in its view; -1 for a separator.
        canvas_row, canvas_col: (N,) place on the unpadded (and, where the model does so,
            resampled) crop canvas; -1 where there is none.  A separator carries the canvas row it
            ends.
        grid: (rows, columns) of the crop grid, (0, 0) without crops.
        view_shape: (rows, columns) of patches in a view.
        canvas_shape: (rows, columns) of the unpadded crop canvas, (0, 0) without crops.
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
        """Thumbnail patches, then the unpadded canvas row by row, a separator after each row.

        Args:
            grid: (rows, columns) of crops.
            view_shape: (rows, columns) of patches in every view.
            box: (top, bottom, left, right) of the unpadded canvas in patches, ends exclusive.
            newlines: Whether a separator ends each canvas row.
            canvas: (rows, columns) that the unpadded canvas is resampled to, if it is.  A token
                then belongs to the patch in which its centre lies, ``floor((i + 0.5) * in / out)``.
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
        # The patch that a token's centre lies in; its own where the canvas is not resampled.
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
    def single(cls, view_shape: tuple[int, int], *, newline: bool = True) -> TokenLayout:
        """One view without crops, row by row, and one separator at the very end."""
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
        )

    @classmethod
    def video(cls, frames: int, view_shape: tuple[int, int]) -> TokenLayout:
        """Frames of ``view_shape`` tokens one after the other, one separator at the very end."""
        height, width = view_shape
        index = torch.arange(frames * height * width + 1, device="cpu")
        separator = index == len(index) - 1
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
        )

    def __len__(self) -> int:
        return len(self.kind)

    @cached_property
    def host(self) -> TokenLayout:
        """The same layout on the CPU, where listing and counting wait for no device."""
        return self if self.kind.device.type == "cpu" else self._on(torch.device("cpu"))

    @cached_property
    def modality(self) -> str:
        """``video`` or ``image``."""
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
        """How many views the image was cut into, also those without a token left."""
        return 1 + self.grid[0] * self.grid[1] if self.grid != (0, 0) else self.frames

    @cached_property
    def frames(self) -> int:
        """How many views there are when there is no crop grid."""
        return int(self.host.view.max()) + 1 if len(self) else 0

    @cached_property
    def view_sizes(self) -> tuple[int, ...]:
        """Patch tokens of each view."""
        view = self.host.view[self.host.patches]
        return tuple(torch.bincount(view, minlength=self.views).tolist())

    def take(self, index: Tensor) -> TokenLayout:
        """The layout of the entries at ``index`` (M,); grid, shapes and frames stay.

        With indices on the CPU nothing waits for the device.
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
        """The layout with everything that there is of every entry changed."""
        names = [item.name for item in fields(self) if item.type == "Tensor"]
        made: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **made)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; what comes from the CPU does not wait for what runs there."""
    # Back from a device the host must wait for the numbers, and not all backends can do without.
    to_cuda = values.device.type == "cpu" and device.type == "cuda"
    return values.to(device, non_blocking=to_cuda)


def listed(mask: Tensor) -> Tensor:
    """(M,) sorted indices at which ``mask`` (N,) is set, on the CPU.

    One wait for the device of the mask, which has to be done with it; to index by the mask itself
    would wait as well, and the host would not know what it got.
    """
    return mask.cpu().nonzero().squeeze(1)


def told(values: Tensor, flag: Tensor) -> tuple[Tensor, bool]:
    """``values`` (M,) on the CPU and what ``flag`` () says; one wait where both are on a device."""
    if values.device != flag.device:
        return values.cpu(), bool(flag)
    both = torch.cat([values, flag[None].to(values.dtype)]).cpu()
    return both[:-1], bool(both[-1])


@dataclass(frozen=True)
class Encoding:
    """How the vision tower ran on each view of an image, where a method acted inside it.

    Attributes:
        by: Representation of the method.
        attended, processed: Entries (CLS token included) that the attention and the MLP of each
            layer saw.
        key_width: Width of the keys that were compared.
    """

    by: str
    attended: tuple[int, ...]
    processed: tuple[int, ...]
    key_width: int


@dataclass(frozen=True, eq=False)
class VisualTokens:
    """ONE image's (or video's) packed visual sequence of N entries, and what is known of each.

    Attributes:
        layout: Geometry of the N entries.
        features: (N, D) what the language model receives.
        signals: Whatever the strategy declared in `Compressor.needs`; each (N,), or (N, C) where
            `Signal.is_vector`, NaN at separators where the signal exists for patches only.
        fingerprint: Some of the image's pixels, from which `seed` derives.
        projector: Maps ``unprojected`` vectors to features; there where that signal is.
        entered: Inside the language model, how many patch tokens of the image entered it.
        text: Vector signals (T, C) of the prompt's text tokens behind the image or video, up to
            the last one of the prompt; those of the language model's layers inside it only.
        inputs: Inside the language model, for strategies that need ``llm_inputs``: what entered
            it, (P, D) for all patch tokens of the image and (T, D) for the text tokens behind it.
            The same at every cut.
        clusters: Where a method acted inside the vision tower, (N,) which entries share a vector of
            it, on the CPU; -1 at separators and where it was dropped.
        encoding: How the tower ran then.
    """

    layout: TokenLayout
    features: Tensor
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    fingerprint: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    entered: int | None = None
    text: Mapping[Signal, Tensor] = field(default_factory=dict)
    inputs: tuple[Tensor, Tensor] | None = None
    clusters: Tensor | None = None
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        aligned: dict[Any, Tensor] = {"features": self.features, **self.signals}
        for name, value in aligned.items():
            if len(value) != len(self.layout):
                raise UserError(
                    f"{name} has {len(value)} entries but the layout has {len(self.layout)}; "
                    "all signals are aligned to the packed sequence."
                )

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, signal: Signal) -> Tensor:
        """(N,) or (N, C) the signal, on the device of the features."""
        signal = self.found_as(signal)
        if signal not in self.signals:
            raise UserError(
                f"{signal} was not provided. Name it in the strategy's `needs`; provided here: "
                f"{', '.join(map(str, self.signals)) or 'none'}."
            )
        return self.signals[signal].to(self.features.device)

    def found_as(self, signal: Signal) -> Signal:
        """Under what name ``signal`` lies here: ``saliency`` also under what it stands for."""
        if signal not in self.signals and signal.name == "saliency":
            both = signal.resolve(has_cls=True), signal.resolve(has_cls=False)
            return next((one for one in both if one in self.signals), signal)
        return signal

    def of_text(self, signal: Signal) -> Tensor:
        """(T, C) the signal of the prompt's text, on the device of the features."""
        if signal not in self.text:
            raise UserError(
                f"{signal} was not provided: it is a signal of the prompt's text, which is known "
                "inside tokenprune.compress, not where images are encoded by themselves."
            )
        return self.text[signal].to(self.features.device)

    def project(self, vectors: Tensor) -> Tensor:
        """Features (M, D) that the model makes of vectors (M, C) changed before its projector.

        Raises:
            UserError: The strategy did not name ``unprojected`` in its `needs`.
        """
        found = [value for signal, value in self.signals.items() if signal.name == "unprojected"]
        if self.projector is None or not found:
            raise UserError("the projector is there for strategies that need 'unprojected' only.")
        with torch.no_grad():
            made = self.projector(vectors.to(found[0]))
        return made.to(self.features)

    @property
    def seed(self) -> int:
        """Seed of this image for strategies that draw at random.

        It depends on the pixels alone, so it is the same in every batch and for every beam.
        """
        if self.fingerprint is None:
            return 0
        return zlib.crc32(self.fingerprint.float().cpu().contiguous().numpy().tobytes())

    def take(self, index: Tensor) -> VisualTokens:
        """The entries at ``index`` (M,), best on the CPU (`TokenLayout.take`)."""
        return replace(
            self,
            layout=self.layout.take(index),
            features=_at(self.features, index),
            signals={name: _at(value, index) for name, value in self.signals.items()},
            clusters=None if self.clusters is None else _at(self.clusters, index),
        )


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values[moved(index, values.device)]


def unpadded_box(
    image_size: tuple[int, int],
    canvas: tuple[int, int],
    rule: Literal["hf", "llava"] = "hf",
) -> tuple[int, int, int, int]:
    """Part of the padded canvas that the image covers.

    Args:
        image_size: (height, width) of the original image in pixels.
        canvas: (rows, columns) of patches of all crops together.
        rule: How the covered extent becomes an integer.  ``hf`` truncates after rounding to seven
            digits (``unpad_image`` of ``transformers``' LLaVA-NeXT, which the processor counts
            with too); ``llava`` truncates only (``llava_arch.py`` of LLaVA).  They differ by two
            rows or columns where the product is an integer up to float error.

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
