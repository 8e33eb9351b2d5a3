"""DyCoke: of every few frames one stays whole, the others keep what is new in them.

Paper:  https://arxiv.org/abs/2411.15024 (CVPR 2025), token temporal merging (TTM)
Code:   https://github.com/KD-TAO/DyCoke, llava/model/llava_arch.py (dd74634)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import apportion, budget
from tokenprune.compressor import Compressor, Selection, best
from tokenprune.layout import TokenLayout, moved
from tokenprune.ops.ranking import ROUNDING
from tokenprune.ops.spatial import patches_by_view
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("dycoke")
@dataclass(frozen=True, kw_only=True)
class DyCoke(Compressor):
    """Frames drop the tokens most like those at the same places of an earlier frame, by cosine.

    Of a window of four frames the first stays whole, the second is compared with it, the third
    with the first, the fourth with the third; in any window frame ``o`` with frame ``o & (o - 1)``.
    The drop ratio ``k`` follows from R: with ``W`` whole frames of ``F``,
    ``R * F = W + (F - W)(1 - k)``, which four frames a window cannot bring below about 1/4.  Where
    ``1 - k`` would be less than ``least``, the window doubles.  Where even one window for all is
    too much, compared frames keep the share ``min(least, R)`` and the first frame what is left, by
    the rule for what has no earlier frame: the tokens least like the mean of their view.

    That rule also holds for images, of which every view keeps the share R.

    Behind a method in the vision tower frames have tokens at different places, and not equally
    many: each is compared with the one nearest to its place in the earlier frame.

    Args:
        window: Frames of which one stays whole.  Official: 4.
        least: Smallest share of a compared frame before windows widen.  Ours.
    """

    window: Annotated[int, Field(ge=2)] = 4
    least: Annotated[float, Field(ge=0, lt=1)] = 0.1

    location_aware = True  # the first frame of a window
    card = Card(
        paper="DyCoke (token temporal merging)",
        arxiv="2411.15024",
        code="https://github.com/KD-TAO/DyCoke (dd74634)",
        deviations=(
            "The drop ratio follows from R, and windows widen below the least R of four frames.",
            "All frames are treated alike; officially the last of an odd number is lost, the third "
            "of the last window stays whole, and videos of four frames or fewer fail.",
            "Kept tokens stay in their places; officially they come in the order of similarity.",
            "Images, which the official code leaves alone, are compressed view by view.",
            "Nothing happens in the language model, where officially the KV cache is thinned out "
            "anew at decode steps.",
        ),
    )

    def earlier(self, frames: int) -> list[int]:
        """For every frame the one that it is compared with, -1 where it stays whole."""
        window = self.window
        while True:
            offsets = [frame % window for frame in range(frames)]
            found = [i - o + (o & (o - 1)) if o else -1 for i, o in enumerate(offsets)]
            share = (self.retention * frames - found.count(-1)) / max(frames - found.count(-1), 1)
            if window >= frames or share >= self.least:
                return found
            window *= 2

    def counts(self, earlier: list[int], sizes: Sequence[int]) -> list[int]:
        """How many of its tokens, ``sizes``, every frame keeps."""
        compared = [size if frame >= 0 else 0 for size, frame in zip(sizes, earlier, strict=True)]
        whole = [size - other for size, other in zip(sizes, compared, strict=True)]
        total = budget(sum(sizes), self.retention)
        least = int(min(self.least, self.retention) * sum(compared))
        rest = min(max(total - sum(whole), least), sum(compared))
        shares = apportion(rest, compared), apportion(min(total - rest, sum(whole)), whole)
        return [one + other for one, other in zip(*shares, strict=True)]

    def select(self, tokens: VisualTokens) -> Selection:
        layout, views = tokens.layout.host, patches_by_view(tokens.layout.host)
        if layout.modality == "video":
            earlier = self.earlier(len(views))
            counts = self.counts(earlier, layout.view_sizes)
        else:
            earlier = [-1] * len(views)
            counts = apportion(budget(len(layout.patches), self.retention), layout.view_sizes)
        features = tokens.features.float()
        scores = features.new_zeros(len(tokens))
        for patches, before in zip(views, earlier, strict=True):
            compared = before >= 0 and len(views[before]) > 0
            others = _nearest(layout, patches, views[before]) if compared else patches
            here, other = (moved(index, features.device) for index in (patches, others))
            like = features[other] if compared else features[other].mean(0)
            alike = F.cosine_similarity(features[here], like, dim=-1)
            scores[here] = -alike.clamp(max=1 - ROUNDING)
        return Selection(best(self, tokens, scores, torch.tensor(counts, device="cpu")))


def _nearest(layout: TokenLayout, patches: Tensor, earlier: Tensor) -> Tensor:
    """Of each of the patches (M,) of a frame the one of an ``earlier`` frame nearest to its place.

    The first of equally near ones; all on the CPU.
    """
    (row, col), (row_of, col_of) = (
        (layout.row[index], layout.col[index]) for index in (patches, earlier)
    )
    if torch.equal(row, row_of) and torch.equal(col, col_of):  # nothing is missing
        return earlier
    distance = (row[:, None] - row_of).square() + (col[:, None] - col_of).square()
    order = torch.arange(len(earlier), device="cpu")
    return earlier[(distance * len(earlier) + order).argmin(1)]
