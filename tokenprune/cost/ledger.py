"""The cost of a compressed prefill: tokens, FLOPs, KV bytes and the selector cost.

Conventions of the engine, the forecast, the translator and all tables:

* a *visual token* is an entry of the packed sequence, patch token or separator, but the retention
  ratio counts patch tokens only;
* a layer's tokens are those that **enter** it: a selection in front of layer K counts from layer K
  on, and layers 0 .. K-1 count in full;
* a merged token counts once, whatever its size;
* an average over layers is the mean number of tokens that enter each of them, without text unless
  the name includes it;
* the KV cache of a layer has one entry for every token that entered it, text included;
* a multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

from tokenprune.cost.arithmetic import DecoderShape, prefill_flops
from tokenprune.display import html_table
from tokenprune.units import bytes_unit, flops_unit, percent

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.layout import TokenLayout

__all__ = [
    "FIGURES",
    "WHOLE_FIGURES",
    "Ledger",
    "settle",
]


@dataclass(frozen=True)
class Ledger:
    """The cost of one prompt's prefill.

    Attributes:
        requested: The requested retention ratio.
        patch_tokens, kept_patches: Number of patch tokens before compression, and of those that
            enter the last layer.
        separators, kept_separators: The same for separators.
        entered_patches, entered_separators: Number of patch tokens and separators that enter the
            first decoder layer.
        patches_per_view, kept_per_view: For every image, the number of patch tokens of each of its
            views, before compression and in front of the last layer.
        text_tokens: Number of text tokens of the prompt.
        visual_per_layer: Number of visual tokens, separators included, that each decoder layer
            processed.
        kv_bytes: Bytes of the KV cache, with its `kv_entries` entries, at the first decode step.
        flops: Prefill FLOPs of the decoder, layer by layer, plus `selector_flops`.
        selector_flops: FLOPs of selecting: attention rows and the method's own arithmetic.
        uncompressed_flops: Prefill FLOPs of the decoder on the full prompt.
        vision_flops: FLOPs of the vision encoder's layers on all views, for the tokens that each
            layer processed (`encoder_flops`); not part of `flops`.
        uncompressed_vision_flops: The same on full views.
        selector_bytes: Peak memory of selecting beyond the memory of the uncompressed model,
            estimated analytically.  It is the maximum over the steps of the prefill.  The vision
            encoder computes signals (`signal_bytes`) or merges tokens (`merging_bytes`).  Attention
            rows are computed (`DecoderShape.row_bytes`).  A method selects, with its inputs
            (`held_bytes`) and its working memory (`cost.measuring`).  The kept tokens are packed:
            they are copied, and after a merge the whole prompt is (`copied_bytes`).
        kv_before: Entries of earlier turns in each layer's KV cache; empty for a first turn.  The
            FLOPs of attending to them are not counted.
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
        """Kept patch tokens divided by patch tokens; 1 without an image."""
        return self.kept_patches / self.patch_tokens if self.patch_tokens else 1.0

    @property
    def misses(self) -> bool:
        """Whether `kept_patches` differs from the requested number by more than one token."""
        return abs(self.kept_patches - self.requested * self.patch_tokens) > 1

    @property
    def layer_average(self) -> float:
        """Number of visual tokens that a decoder layer processes on average."""
        return sum(self.visual_per_layer) / len(self.visual_per_layer)

    @property
    def tokens_per_layer(self) -> tuple[int, ...]:
        """Number of tokens that each decoder layer processed, text included."""
        return tuple(self.text_tokens + visual for visual in self.visual_per_layer)

    @property
    def layer_average_with_text(self) -> float:
        """Number of tokens that a decoder layer processes on average, text included."""
        return self.text_tokens + self.layer_average

    @property
    def kv_per_layer(self) -> tuple[int, ...]:
        """Entries of each layer's KV cache at the first decode step, text included, no padding."""
        before = self.kv_before or (0,) * len(self.visual_per_layer)
        return tuple(a + b for a, b in zip(before, self.tokens_per_layer, strict=True))

    @property
    def kv_entries(self) -> int:
        """Sum of `kv_per_layer`."""
        return sum(self.kv_per_layer)

    @property
    def figures(self) -> dict[str, float]:
        """All single numbers of the ledger except `requested`, by name (`FIGURES`)."""
        return {name: getattr(self, name) for name in FIGURES}

    def to_frame(self) -> pd.DataFrame:
        """One row: ``requested``, ``realised`` and all `figures`."""
        import pandas as pd

        row = {"requested": self.requested, "realised": self.realised, **self.figures}
        return pd.DataFrame([row])

    def _shown(self) -> dict[str, str]:
        """The main figures with their units."""
        unit, scale = flops_unit(self.uncompressed_flops)
        kv_unit, kv_scale = bytes_unit(self.kv_bytes)
        patches = f"{self.kept_patches} of {self.patch_tokens}"
        if self.misses:
            patches += f" ({percent(self.realised, 1)}, {percent(self.requested, None)} requested)"
        return {
            "patch tokens": patches,
            "visual tokens per layer": f"{self.layer_average:.1f}",
            "prefill": (
                f"{self.flops / scale:.3g} of {self.uncompressed_flops / scale:.3g} {unit} "
                f"({percent(self.flops / (self.uncompressed_flops or 1), 1)})"
            ),
            "KV cache": f"{self.kv_bytes / kv_scale:.3g} {kv_unit}",
        }

    def __repr__(self) -> str:
        return f"Ledger({', '.join(f'{name}: {text}' for name, text in self._shown().items())})"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        title = f"Ledger: retention {self.requested:g} requested, {self.realised:.3g} realised"
        return html_table(title, self._shown())


def _fields(kind: str) -> tuple[str, ...]:
    return tuple(item.name for item in fields(Ledger) if item.type == kind)


WHOLE_FIGURES = (*_fields("int"), "kv_entries")
"""Names of the figures that are whole numbers."""


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
        shape: Sizes of the decoder.
        size: Bytes of a number in the KV cache.
        requested: The requested retention ratio.
        before, entered, after: Layouts of the prompt's images and videos: in full, in front of the
            first decoder layer, and in front of the last one.
        text: Number of text tokens.
        visual_per_layer, selector_flops, vision_flops, uncompressed_vision_flops, kv_before: As in
            the ledger.
        selector_bytes: As in the ledger, but without packing, which is added here.
        merged_bytes: Bytes of the copies that receive merged tokens (`copied_bytes`).
    """
    tokens = [text + visual for visual in visual_per_layer]
    full = text + sum(map(len, before))
    left = max((new for old, new in pairwise([full, *tokens]) if new < old), default=0)
    # Visual tokens are copied twice: in the prompt and in `VisualTokens`.
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
