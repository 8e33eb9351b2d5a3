"""SparseVLM: words that look at the image rate its tokens; some of what is dropped is recycled.

Paper:  https://arxiv.org/abs/2410.04417 (ICML 2025)
Code:   https://github.com/Gumpest/SparseVLMs, llava/model/language_model/ (91fb6d9, 26a5f48)
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.compressor import Selection
from tokenprune.errors import UserError
from tokenprune.ops.clustering import density_peaks, recycling
from tokenprune.ops.merging import group_means
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.staged import Depths, StagedCompressor
from tokenprune.tokens import VisualTokens

ROWS, INPUTS = Signal("llm_text"), Signal("llm_inputs")
HEADS, ROTARY = Signal("llm_text_heads"), Signal("llm_text_rotary")


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedCompressor):
    """Rank by the attention of the raters, the text tokens most related to the image.

    Raters have more than the mean of ``mean_v softmax_t(x_v . x_t)``, with ``x`` what enters the
    language model.  Some dropped tokens are clustered (`recycling`, `density_peaks`); the mean of a
    cluster takes the place of its centre.  At cut ``i`` of ``n``, ``floor(R^(i/n) * P)`` of the
    ``P`` tokens that entered are left, merged ones included.

    Version 2.0 (SparseVLM+) divides attention by what rotary positions alone make of it
    (`rotary_product`), asks only the heads in which the raters look most at the image, and merges
    nothing.

    Args:
        version: 1.0 or 2.0.
        heads: How many heads rate in version 2.0.  Official: 14, whatever the model.
        depths: Cuts as shares of the decoder's depth.  Official: behind layers 2, 6 and 15 of 32.
        recycle: Share of the dropped tokens that is merged.  Official: 0.3, none in version 2.0.
        position_ids: ``auto`` renumbers what is left in version 1.0 only.
        cut: Which of the cuts this one is, counted from 1; 0 is the last.
    """

    version: Literal["1.0", "2.0"] = "1.0"
    heads: Annotated[int, Field(ge=1)] = 14
    depths: Depths = (3 / 32, 7 / 32, 16 / 32)
    recycle: Annotated[float, Field(ge=0, le=1)] | None = None

    card = Card(
        paper="SparseVLM",
        arxiv="2410.04417",
        code="https://github.com/Gumpest/SparseVLMs (91fb6d9, 26a5f48)",
        verified="sparsevlm",
        deviations=(
            "R decides how many are left; officially lists, or the rank of the attention.",
            "A merged token lies where its centre lay; officially behind all kept ones.",
            "Equally dense tokens rank by attention; officially random noise decides.",
            "Every image and row is rated by itself; officially batches of one image.",
            "Where no text stands out as rater, all of it rates; officially the result is NaN.",
            "Version 2.0 divides by a term that may be near zero, as the official formula does.",
        ),
    )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({INPUTS, *({ROWS} if self.version == "1.0" else {HEADS, ROTARY})})

    @property
    def keeps_positions(self) -> bool:
        return self.version == "2.0" if self.position_ids == "auto" else super().keeps_positions

    def raters(self, tokens: VisualTokens) -> Tensor:
        """(T,) bool, which of the text tokens behind the image rate."""
        if tokens.inputs is None or not len(tokens.inputs[1]):
            raise UserError("sparsevlm needs text behind the image, whose tokens rate it.")
        visual, text = (part.float() for part in tokens.inputs)
        related = (visual @ text.T).softmax(1).mean(0)
        raters = related > related.mean()
        return raters | ~raters.any()

    def rows(self, tokens: VisualTokens) -> Tensor:
        """(P, T) attention that the patch tokens get of the raters, 0 of other text, float32."""
        # A mask instead of an index: nothing waits for the device to learn how many rate.
        patches, others = tokens.layout.patches, ~self.raters(tokens).to(tokens.features.device)
        if self.version == "1.0":
            return tokens[ROWS][patches].float().masked_fill(others, 0)
        rows = tokens[HEADS][patches].float() / tokens[ROTARY][patches].float()[..., None]
        rows = rows.masked_fill(others[:, None], 0)
        return rows[..., keenest(rows, self.heads)].mean(-1)

    def most_kept(self, tokens: VisualTokens, rows: Tensor) -> int:
        """How many tokens are kept unmerged at most, given their `rows`."""
        return self.limit(tokens)

    def select(self, tokens: VisualTokens) -> Selection:
        patches, rows = tokens.layout.patches, self.rows(tokens)
        scores = rows.sum(1)
        order = patches[scores.argsort(descending=True, stable=True)]
        share = (0.3 if self.version == "1.0" else 0.0) if self.recycle is None else self.recycle
        most = self.most_kept(tokens, rows), self.limit(tokens)
        kept, recycled, clusters = recycling(len(patches), *most, share)
        best, rest = order[:kept], order[kept : kept + recycled]
        if not clusters:
            return Selection(best.sort().values, scores=scores)
        vectors = tokens.features[rest].float()
        centres, cluster = density_peaks(vectors, clusters)
        merged = group_means(vectors, cluster, clusters).to(tokens.features)
        keep, order = torch.cat([best, rest[centres]]).sort()
        return Selection(keep, torch.cat([tokens.features[best], merged])[order], scores=scores)


def keenest(rows: Tensor, count: int) -> Tensor:
    """The ``count`` heads of the rows (P, T, H) that look most at the image, in falling order."""
    return rows.sum((0, 1)).argsort(descending=True, stable=True)[:count]
