"""What a compression really cost: tokens, FLOPs, KV bytes, and what the selector takes.

Conventions, the same everywhere (engine, forecast, translator, tables):

* a *visual token* is an entry of the packed sequence, patch token or separator; ``retention`` is of
  patch tokens alone;
* a layer's tokens are those that **enter** it: a selection in front of layer K counts from layer K
  on, layers 0 .. K-1 count in full;
* merged tokens are tokens; a token that stands for dropped ones counts once;
* an average over layers is the plain mean of what enters each of them, without text unless the name
  says so;
* the KV cache of a layer has one entry for every token that entered it, text included;
* a multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenprune.cost.arithmetic import DecoderShape, prefill_flops

if TYPE_CHECKING:
    from tokenprune.layout import TokenLayout

__all__ = [
    "FIGURES",
    "WHOLE_FIGURES",
    "Ledger",
    "settle",
]


@dataclass(frozen=True)
class Ledger:
    """The account of one prompt's prefill.

    Attributes:
        requested: R as asked for.
        patch_tokens, kept_patches: Patch tokens before compression, and entering the last layer.
        separators, kept_separators: The same for separators.
        entered_patches, entered_separators: What enters the language model, its first layer: what
            a ``pre_llm`` method left.
        patches_per_view, kept_per_view: For every image, the patch tokens of each of its views,
            before compression and at the end.
        text_tokens: Tokens of the prompt that are not visual.
        visual_per_layer: Visual tokens (separators included) that each decoder layer processed.
        kv_bytes: Size of the KV cache when decoding begins, `kv_entries` in all.
        flops: Prefill FLOPs of the decoder, layer by layer, plus `selector_flops`.
        selector_flops: What choosing cost: attention rows and the strategy's own arithmetic.
        uncompressed_flops: Prefill FLOPs of the decoder on the full prompt.
        vision_flops: FLOPs of the vision tower's layers on all views, as many tokens in each as
            really ran (`encoder_flops`); not part of `flops`.
        uncompressed_vision_flops: The same on full views.
        selector_bytes: The most memory that choosing takes at one moment, told by formulas, beyond
            what the uncompressed model holds: while the tower's signals are computed
            (`signal_bytes`) or its tokens merged (`merging_bytes`), while attention rows are
            (`DecoderShape.row_bytes`), while a strategy selects: what it is shown (`held_bytes`)
            and what it holds itself (`cost.measuring`), or while what is left is packed: copies
            of it, and where tokens were merged one of everything (`copied_bytes`).
        kv_before: Entries that earlier turns had left in each layer's KV cache; empty for a first
            turn.  FLOPs of attending to them are not counted.
    """

    requested: float
    patch_tokens: int
    kept_patches: int
    separators: int
    kept_separators: int
    patches_per_view: tuple[tuple[int, ...], ...]
    kept_per_view: tuple[tuple[int, ...], ...]
    text_tokens: int
    visual_per_layer: tuple[int, ...]
    kv_bytes: int
    flops: float
    selector_flops: float
    uncompressed_flops: float
    vision_flops: float
    uncompressed_vision_flops: float
    entered_patches: int
    entered_separators: int
    selector_bytes: int
    kv_before: tuple[int, ...] = ()

    @property
    def realised(self) -> float:
        """Kept patch tokens / patch tokens (1 without an image)."""
        return self.kept_patches / self.patch_tokens if self.patch_tokens else 1.0

    @property
    def layer_average(self) -> float:
        """Visual tokens processed by a decoder layer on average."""
        return sum(self.visual_per_layer) / len(self.visual_per_layer)

    @property
    def tokens_per_layer(self) -> tuple[int, ...]:
        """All tokens that each decoder layer processed, text included."""
        return tuple(self.text_tokens + visual for visual in self.visual_per_layer)

    @property
    def layer_average_with_text(self) -> float:
        """All tokens processed by a decoder layer on average."""
        return self.text_tokens + self.layer_average

    @property
    def kv_per_layer(self) -> tuple[int, ...]:
        """Entries of each layer's KV cache when decoding begins, text included, padding not."""
        before = self.kv_before or (0,) * len(self.visual_per_layer)
        return tuple(a + b for a, b in zip(before, self.tokens_per_layer, strict=True))

    @property
    def kv_entries(self) -> int:
        """`kv_per_layer` of all layers together."""
        return sum(self.kv_per_layer)

    @property
    def figures(self) -> dict[str, float]:
        """All single numbers of the account that were not asked for, by name: `FIGURES`."""
        return {name: getattr(self, name) for name in FIGURES}


def _fields(kind: str) -> tuple[str, ...]:
    return tuple(item.name for item in fields(Ledger) if item.type == kind)


WHOLE_FIGURES = (*_fields("int"), "kv_entries")
"""Names of the figures that count something."""


FIGURES = (
    *(*WHOLE_FIGURES, "layer_average", "layer_average_with_text"),
    *(name for name in _fields("float") if name != "requested"),
)
"""Names of `Ledger.figures`, as tables show them."""


def settle(
    *,
    shape: DecoderShape,
    size: int,
    requested: float,
    before: Sequence[TokenLayout],
    entered: Sequence[TokenLayout],
    after: Sequence[TokenLayout],
    text: int,
    visual_per_layer: Sequence[int],
    selector_flops: float,
    selector_bytes: int,
    vision_flops: float,
    uncompressed_vision_flops: float,
    merged_bytes: int = 0,
    kv_before: Sequence[int] = (),
) -> Ledger:
    """The `Ledger` of one prompt.

    Args:
        shape: Of the decoder.
        size: Bytes of a number in the KV cache.
        requested: R as asked for.
        before, entered, after: Layouts of the prompt's images and videos: in full, in front of the
            first decoder layer, in front of the last one.
        text: Tokens that are not visual.
        visual_per_layer: As in the ledger.
        selector_flops, selector_bytes, vision_flops, uncompressed_vision_flops, kv_before: As in
            the ledger; packing is added to the bytes here.
        merged_bytes: Of the copies that merged tokens are put in (`copied_bytes`).
    """
    tokens = [text + visual for visual in visual_per_layer]
    full = text + sum(map(len, before))
    left = max((new for old, new in pairwise([full, *tokens]) if new < old), default=0)
    # The visual ones twice: in the prompt, and in what is known of the image.
    packing = (left + max(left - text, 0)) * shape.hidden * size + merged_bytes
    return Ledger(
        requested=requested,
        patch_tokens=_patches(before),
        kept_patches=_patches(after),
        separators=_separators(before),
        kept_separators=_separators(after),
        patches_per_view=tuple(layout.view_sizes for layout in before),
        kept_per_view=tuple(layout.view_sizes for layout in after),
        text_tokens=text,
        visual_per_layer=tuple(visual_per_layer),
        kv_bytes=(sum(tokens) + sum(kv_before)) * shape.kv_bytes(size),
        flops=prefill_flops(tokens, shape) + selector_flops,
        selector_flops=selector_flops,
        uncompressed_flops=prefill_flops([full] * shape.layers, shape),
        entered_patches=_patches(entered),
        entered_separators=_separators(entered),
        selector_bytes=max(selector_bytes, packing),
        kv_before=tuple(kv_before),
        vision_flops=vision_flops,
        uncompressed_vision_flops=uncompressed_vision_flops,
    )


def _patches(layouts: Sequence[TokenLayout]) -> int:
    return sum(len(layout.patches) for layout in layouts)


def _separators(layouts: Sequence[TokenLayout]) -> int:
    return sum(len(layout) - len(layout.patches) for layout in layouts)
