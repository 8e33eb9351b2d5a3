"""SparseVLM: words that look at the image rate its tokens; some of what is dropped is recycled.

Paper:  https://arxiv.org/abs/2410.04417 (ICML 2025)
Code:   https://github.com/Gumpest/SparseVLMs, llava/model/language_model/ (score.py, utils.py;
        rank-based: 91fb6d9, fixed lists and version 2.0, SparseVLM+: 26a5f48)
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tokenprune.budget import left_at
from tokenprune.compressor import Compressor, Selection, Stage, check_cuts
from tokenprune.errors import UserError
from tokenprune.ops.clustering import density_peaks
from tokenprune.ops.merging import group_means
from tokenprune.registry import Card, register
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

Cut = Annotated[float, Field(gt=0, lt=1)]
ROWS, INPUTS = Signal("llm_text"), Signal("llm_inputs")
HEADS, ROTARY = Signal("llm_text_heads"), Signal("llm_text_rotary")
LISTS = {
    "1.0": {"192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)},
    "2.0": {"192": (300, 200, 118), "128": (238, 108, 60), "96": (246, 54, 28), "64": (66, 34, 20)},
}


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Compressor):
    """Rank by the mean attention of the raters, the text tokens most related to the image.

    Raters have more than the mean of ``mean_v softmax_t(x_v . x_t)``, with ``x`` what enters the
    language model.  Of ``d`` dropped tokens the best ``m = int(recycle * d) + 1`` become
    ``int(m / 10) + 1`` clusters (`density_peaks`), each the mean of its members, in the place of
    its centre.  Merged tokens count as tokens, here and at later cuts.

    At cut ``i`` of ``n`` at most ``floor(R^(i/n) * P)`` of the ``P`` tokens that entered are left,
    kept and merged together, whatever `schedule` says; the ledger tells the average over layers.

    Version 2.0 (SparseVLM+) divides every attention by what rotary positions alone make of it
    (`rotary_product`), lets only the heads rate in which the raters look most at the image, merges
    nothing and leaves the positions as they were.

    Args:
        version: 1.0 or 2.0.
        heads: How many heads rate in version 2.0, at most all.  Official: 14, whatever the model.
        depths: Cuts as shares of the decoder's depth.  Official: behind layers 2, 6 and 15 of 32
            (and 19, rank-based).
        schedule: How many are kept besides the merged ones: as many as ``retention`` allows, by the
            ``rank`` of the raters' attention (``int(rank * scale + bias)``), or one of the official
            lists for 576 tokens, called by their nominal average.
        scale, bias: Of ``rank``.
        recycle: Share of the dropped tokens that is merged; None for the official 0.3 of version
            1.0 and nothing of version 2.0.
        positions: ``auto`` numbers anew what is left in version 1.0 only.
        cut: Which of the cuts this one is, counted from 1; 0 stands for the last.
    """

    version: Literal["1.0", "2.0"] = "1.0"
    heads: Annotated[int, Field(ge=1)] = 14
    depths: Annotated[tuple[Cut, ...], Field(min_length=1, max_length=1000)] = (
        3 / 32,
        7 / 32,
        16 / 32,
    )
    schedule: Literal["retention", "rank", "192", "128", "96", "64"] = "retention"
    scale: Annotated[float, Field(gt=0)] = 13.5
    bias: float = 0.0
    recycle: Annotated[float, Field(ge=0, le=1)] | None = None
    cut: Annotated[int, Field(ge=0)] = 0

    stage: ClassVar[Stage] = Stage.LLM
    card = Card(
        paper="SparseVLM",
        arxiv="2410.04417",
        code="https://github.com/Gumpest/SparseVLMs (91fb6d9, 26a5f48)",
        verified="sparsevlm",
        deviations=(
            "The budget follows R unless schedule names the rank or an official list, and bounds "
            "these too; where it leaves no room, fewer clusters are made.",
            "A merged token lies where its centre lay; officially behind all kept ones.",
            "Equally dense tokens rank by attention; officially random noise decides.",
            "Every image and row is rated by itself; officially batches of one image. Separators "
            "are neither rated nor merged.",
            "Where no text stands out as rater, all of it rates; officially the result is NaN.",
            "Version 2.0 divides by a positional term that far from the text may be near zero or "
            "negative; that is the official formula.",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuts(self, self.cut)
        if self.schedule in LISTS[self.version] and len(self.depths) > 3:
            raise UserError(
                f"sparsevlm: the list {self.schedule} has 3 counts for {len(self.depths)} cuts."
            )

    @property
    def cuts(self) -> tuple[float, ...]:
        return self.depths

    def at(self, cut: int | float) -> Compressor:
        return replace(self, cut=1 + self.depths.index(cut))

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({INPUTS} | ({ROWS} if self.version == "1.0" else {HEADS, ROTARY}))

    @property
    def keeps_positions(self) -> bool:
        return self.version == "2.0" if self.position_ids == "auto" else super().keeps_positions

    @property
    def recycled(self) -> float:
        """Share of the dropped tokens that is merged."""
        return (0.3 if self.version == "1.0" else 0.0) if self.recycle is None else self.recycle

    def raters(self, tokens: VisualTokens) -> Tensor:
        """(T,) bool, which of the text tokens behind the image rate."""
        if tokens.inputs is None or not len(tokens.inputs[1]):
            raise UserError("sparsevlm needs text behind the image, whose tokens rate it.")
        visual, text = (part.float() for part in tokens.inputs)
        related = (visual @ text.T).softmax(1).mean(0)
        raters = related > related.mean()
        return raters | ~raters.any()

    def limit(self, tokens: VisualTokens) -> int:
        stage = self.cut or len(self.depths)
        return left_at(tokens, self.retention, stage / len(self.depths))

    def left(self, tokens: VisualTokens, rows: Tensor) -> tuple[int, int]:
        """How many tokens are kept and how many clusters made, given the raters' `rows`."""
        there, stage = len(rows), self.cut or len(self.depths)
        most = self.limit(tokens)
        kept = most if self.schedule == "retention" else there - 1
        if self.schedule == "rank":
            rank = int(torch.linalg.matrix_rank(rows[:, self.raters(tokens)]))
            kept = min(int(rank * self.scale + self.bias), kept)
        elif self.schedule != "retention":
            kept = min(LISTS[self.version][self.schedule][stage - 1], kept)
        kept = max(1, min(kept, most))
        while kept > 1 and kept + self._clusters(there - kept) > most:
            kept -= 1
        return kept, min(self._clusters(there - kept), most - kept)

    def _clusters(self, dropped: int) -> int:
        return self._recycled(dropped) // 10 + 1 if self.recycled and dropped else 0

    def _recycled(self, dropped: int) -> int:
        return min(int(self.recycled * dropped) + 1, dropped)

    def rows(self, tokens: VisualTokens) -> Tensor:
        """(P, T) attention that the patch tokens get of the raters, 0 of other text, float32."""
        # Not taken out by a mask: the device would have to be waited for to learn how many rate.
        patches, others = tokens.layout.patches, ~self.raters(tokens).to(tokens.features.device)
        if self.version == "1.0":
            return tokens[ROWS][patches].float().masked_fill(others, 0)
        corrected = self.corrected(tokens)
        return corrected[..., self.best_heads(corrected)].mean(-1)

    def best_heads(self, corrected: Tensor) -> Tensor:
        """Which heads rate, of the raters' attention (P, T, H), the keenest first."""
        return corrected.sum((0, 1)).argsort(descending=True, stable=True)[: self.heads]

    def corrected(self, tokens: VisualTokens) -> Tensor:
        """(P, T, H) attention over its positional part, 0 of text that does not rate, float32."""
        patches, others = tokens.layout.patches, ~self.raters(tokens).to(tokens.features.device)
        rotary = tokens[ROTARY][patches].float()[..., None]
        return (tokens[HEADS][patches].float() / rotary).masked_fill(others[:, None], 0)

    def recycle_of(self, order: Tensor, kept: int) -> Tensor:
        """Those of the ranked patches behind the ``kept`` first that are merged, best first."""
        return order[kept:][: self._recycled(len(order) - kept)]

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        rows = self.rows(tokens)
        kept, clusters = self.left(tokens, rows)
        scores = rows.sum(1)
        order = scores.argsort(descending=True, stable=True)
        if not clusters:
            return Selection(patches[order[:kept].sort().values], scores=scores)
        recycled = patches[self.recycle_of(order, kept)]
        vectors = tokens.features[recycled].float()
        centres, cluster = density_peaks(vectors, clusters)
        merged = group_means(vectors, cluster, clusters)
        keep = torch.cat([patches[order[:kept]], recycled[centres]])
        features = torch.cat([tokens.features[keep[:kept]], merged.to(tokens.features)])
        keep, order = keep.sort()
        return Selection(keep, features[order], scores=scores)
