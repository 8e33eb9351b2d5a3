"""GlobalCom²: the thumbnail decides how many tokens each crop keeps, and which.

Paper:  https://arxiv.org/abs/2501.05179 (AAAI 2026)
Code:   https://github.com/xuyang-liu16/GlobalCom2, llava/model/llava_arch.py (96b2d00)
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tokenprune.allocators import Allocator, ThumbnailCommand, ThumbnailMean
from tokenprune.compressor import Compressor, Selection, keep_best
from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops.ranking import normalise
from tokenprune.ops.spatial import divided, pooled, project_thumbnail, summary_distance
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@register("globalcom2")
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Compressor):
    """Keep the top ``R * N`` tokens of the thumbnail and the top ``r_j * N_j`` of crop ``j``.

    The ratios ``r_j`` come from the allocator (`ThumbnailCommand`).  The score of a crop token is
    ``alpha * s^G + (1 - alpha) * s^L``: the thumbnail's score at the same location of the image and
    the token's score in its own crop, each normalised over the crop.

    A video has no thumbnail; the temporal summary of its frames takes this role.  Frames far from
    the summary keep more (`ThumbnailCommand`), and ``s^G`` is a token's distance from it
    (`summary_distance`).  The images of a prompt with several have no crops: each keeps its top
    ``R * N``.

    An image of its own size (Qwen-VL) has neither thumbnail nor crops.  Regions of ``region`` x
    ``region`` tokens take the role of the crops, and the map of its scores at half the resolution
    (`pooled`) that of the thumbnail.

    Args:
        alpha: Weight of the thumbnail's score.  Paper: 0.5.
        tau: Temperature of the allocation.  The paper's 10 suits sums of raw logits.  With small
            views or softmaxed scores, the allocation is then nearly uniform.
        score: The signal that ranks.

            - ``saliency``: ``cls_logits`` if the vision encoder has a CLS token, otherwise
              ``received``.
            - ``cls_logits``: raw logits of the CLS token, as in the official code.
            - ``cls_attention``: the same, softmaxed.
            - ``received``: received attention.
            - ``head_attention``: attention of the pooling head, which the published LLaVA-OneVision
              checkpoints lack.
        layer: Encoder layer of the score.  Official: the last one, whose input the projector
            receives.
        normalisation: ``l2`` (official code), ``minmax`` or ``none`` (the paper's formula as it
        is).
        region: About how many rows and columns of tokens a region has, in images of their own size.
            12 tokens of Qwen2.5-VL are the 336 pixels of a crop of LLaVA-NeXT.  0 stands for no
            regions: such an image then keeps its top ``R * N``.
        richness: How the scores of a region of the thumbnail become one number: ``sum`` as in the
            official code, or ``mean`` for views whose regions differ in size (`ThumbnailMean`).
        total: ``official`` keeps what the formula of ``r_j`` gives, which differs from ``R * N``
            where a ratio is limited to 1 or crops differ in size.  ``exact`` keeps ``trunc(R * N)``
            in all, known from the size of the image (`ThumbnailCommand`).
        allocator: Default: `ThumbnailCommand`, or `ThumbnailMean`, with this `tau`, `score`,
            `layer` and `total`.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    tau: Annotated[float, Field(gt=0)] = 10.0
    score: Literal["saliency", "cls_logits", "cls_attention", "received", "head_attention"] = (
        "saliency"
    )
    layer: int = -1
    normalisation: Literal["l2", "minmax", "none"] = "l2"
    region: Annotated[int, Field(ge=0)] = 12
    richness: Literal["sum", "mean"] = "sum"
    total: Literal["official", "exact"] = "official"
    allocator: Allocator | None = None

    card = Card(
        paper="Global Compression Commander (GlobalCom²)",
        arxiv="2501.05179",
        code="https://github.com/xuyang-liu16/GlobalCom2 (96b2d00)",
        verified="globalcom2",
        deviations=(
            "Tokens stay in sequence order; officially the thumbnail is emitted in score order and "
            "tokens of padded crops move into wrong rows.",
            "Every image of a batch is scored separately; officially image 0's scores rank all.",
            "The canvas is unpadded as in Hugging Face, whose processor counts the tokens, and "
            "rows of padding have no separator.",
            "An image with a single view is cut to R as well; officially it is not compressed.",
            "Videos (the temporal summary in place of the thumbnail) and prompts of several images "
            "(each cut to R separately) are ours; the paper is about single images.",
            "Images of their own size (regions in place of crops, a pooled map in place of the "
            "thumbnail) are ours; the paper is about images with crops.",
            "total=exact and richness=mean are ours.",
            "R = 1 keeps everything; the formula of r_j would still drop tokens of some crops.",
            "Scores are ranked in float32, whatever the model's dtype.",
        ),
    )

    @property
    def saliency(self) -> Signal:
        """The signal that ranks the tokens of every view."""
        return Signal(self.score, self.layer)

    @property
    def allocation(self) -> Allocator:
        """How many tokens each view keeps."""
        rule = ThumbnailCommand if self.richness == "sum" else ThumbnailMean
        return self.allocator or rule(self.tau, self.saliency, self.total)

    @property
    def needs(self) -> frozenset[Signal]:
        return self.allocation.needs | {self.saliency}

    def ranking(self, tokens: VisualTokens) -> Tensor:
        """(N,) scores: ``s^L`` of the thumbnail, the weighted sum for crops, regions or frames."""
        tokens = replace(tokens, layout=self._divided(tokens.layout))
        layout, local = tokens.layout, tokens[self.saliency].float()
        if layout.modality == "video":
            commanded, guide = layout.places[Kind.FRAME], summary_distance(layout, tokens.features)
        elif layout.native and layout.views > 1:
            commanded, guide = layout.patches, pooled(layout, local)
        elif layout.grid == (0, 0) or 0 in layout.canvas_shape:
            return local
        else:
            commanded, guide = layout.places[Kind.CROP], project_thumbnail(layout, local)
        view, scores = layout.view[commanded], local.clone()
        scores[commanded] = self.alpha * normalise(
            guide[commanded], view, layout.views, self.normalisation
        ) + (1 - self.alpha) * normalise(local[commanded], view, layout.views, self.normalisation)
        return scores

    def _divided(self, layout: TokenLayout) -> TokenLayout:
        """``layout`` with regions as views, if the image has its own size."""
        if not (layout.native and self.region) or layout.modality == "video":
            return layout
        return divided(layout, self.region)

    def limit(self, tokens: VisualTokens) -> int:
        return super().limit(replace(tokens, layout=self._divided(tokens.layout)))

    def patch_count(self, layout: TokenLayout) -> int | None:
        return super().patch_count(self._divided(layout))

    def select(self, tokens: VisualTokens) -> Selection:
        tokens = replace(tokens, layout=self._divided(tokens.layout))
        return keep_best(self, tokens, self.ranking(tokens), self.allocation)
