"""SparseVLM: the text tokens most related to the image rank its tokens; some dropped ones merge.

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

    With ``x`` the inputs of the language model, a text token ``t`` after the image is related to it
    by ``mean_v softmax_t(x_v . x_t)``.  Raters are the text tokens above the mean of this value.
    Some dropped tokens are clustered (`recycling`, `density_peaks`), and the mean of a cluster
    takes the place of its centre.  At cut ``i`` of ``n``, ``floor(R^(i/n) * P)`` of the ``P``
    tokens that entered are left, merged ones included.

    Version 2.0 (SparseVLM+) divides the attention by the part that rotary position ids alone cause
    (`rotary_product`), uses only the heads in which the raters attend most to the image, and merges
    nothing.

    Args:
        version: 1.0 or 2.0.
        heads: Number of heads that version 2.0 uses.  Official: 14, whatever the model.
        depths: Cuts as shares of the decoder's depth.  Official: after layers 2, 6 and 15 of 32.
        recycle: Share of the dropped tokens that is merged.  Official: 0.3; none in version 2.0.
        position_ids: ``auto`` is ``compact`` in version 1.0 and ``original`` in version 2.0.
        cut: Which of the cuts this one is, counted from 1; 0 stands for the last.
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
            "R decides how many tokens are left; officially lists, or the rank of the attention.",
            "A merged token takes the place of its centre; officially it follows all kept tokens.",
            "Equally dense tokens rank by attention; officially random noise decides.",
            "Every image and row is ranked separately; officially a batch has one image.",
            "If no text token is above the mean, all are raters; officially the result is NaN.",
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
        """(T,) bool, which of the text tokens after the image are raters."""
        if tokens.inputs is None or not len(tokens.inputs[1]):
            raise UserError("sparsevlm needs text after the image, whose attention ranks.")
        visual, text = (part.float() for part in tokens.inputs)
        related = (visual @ text.T).softmax(1).mean(0)
        raters = related > related.mean()
        return raters | ~raters.any()

    def rows(self, tokens: VisualTokens) -> Tensor:
        """(P, T) float32 attention from raters to patch tokens; 0 from other text tokens."""
        # A mask and not indices: their number would need a synchronisation with the device.
        patches, others = tokens.layout.patches, ~self.raters(tokens).to(tokens.features.device)
        if self.version == "1.0":
            return tokens[ROWS][patches].float().masked_fill(others, 0)
        rows = tokens[HEADS][patches].float() / tokens[ROTARY][patches].float()[..., None]
        rows = rows.masked_fill(others[:, None], 0)
        return rows[..., keenest(rows, self.heads)].mean(-1)

    def most_kept(self, tokens: VisualTokens, rows: Tensor) -> int:
        """The largest number of tokens that stay unmerged, given their `rows`."""
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

        def merging(values: Tensor) -> Tensor:
            means = group_means(values[rest], cluster, clusters).to(values)
            return torch.cat([values[best], means])[order]

        features = torch.cat([tokens.features[best], merged])[order]
        return Selection(keep, features, scores=scores, merging=merging)


def keenest(rows: Tensor, count: int) -> Tensor:
    """(count,) indices of the heads of rows (P, T, H) with the most attention, largest first."""
    return rows.sum((0, 1)).argsort(descending=True, stable=True)[:count]
