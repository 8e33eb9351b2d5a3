"""DyCoke: keep one frame of every window whole, and of the others what is new.

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
from tokenprune.ops.spatial import nearest_places, patches_by_view
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("dycoke")
@dataclass(frozen=True, kw_only=True)
class DyCoke(Compressor):
    """Drop the tokens that are most similar, by cosine, to the same location of an earlier frame.

    In a window of four frames the first is kept whole.  The second is compared with the first, the
    third with the first and the fourth with the third; in general, frame ``o`` of a window is
    compared with frame ``o & (o - 1)``.  The drop ratio ``k`` follows from R: with ``W`` whole
    frames of ``F``, ``R * F = W + (F - W)(1 - k)``.  Windows of four frames cannot reach R below
    about 1/4, so the window doubles as long as ``1 - k`` is less than ``least``.  If one window
    over all frames still exceeds the budget, compared frames keep the share ``min(least, R)``, and
    the first frame keeps the rest of the budget: the tokens least similar to the mean of their
    view.

    Images are compressed by the same rule as such a first frame: every view keeps the share R.

    After a method in the vision encoder, frames have tokens at different locations and in different
    numbers.  Each token is then compared with the one nearest to its location in the earlier frame.

    Args:
        window: Number of frames of which one is kept whole.  Official: 4.
        least: Smallest share that a compared frame keeps before windows widen.  Ours.
    """

    window: Annotated[int, Field(ge=2)] = 4
    least: Annotated[float, Field(ge=0, lt=1)] = 0.1

    location_aware = True  # the first frame of a window is kept
    card = Card(
        paper="DyCoke (token temporal merging)",
        arxiv="2411.15024",
        code="https://github.com/KD-TAO/DyCoke (dd74634)",
        deviations=(
            "The drop ratio follows from R, and windows widen below the least R of four frames.",
            "All frames follow one rule; officially the last of an odd number is lost, the third "
            "of the last window is kept whole, and videos of four frames or fewer fail.",
            "Kept tokens stay in sequence order; officially they come in the order of similarity.",
            "Images are compressed view by view; officially they are not compressed.",
            "The language model runs unchanged; officially the KV cache is also pruned at every "
            "decode step.",
        ),
    )

    def earlier(self, frames: int) -> list[int]:
        """For every frame the one that it is compared with; -1 for a frame that is kept whole."""
        window = self.window
        while True:
            offsets = [frame % window for frame in range(frames)]
            found = [i - o + (o & (o - 1)) if o else -1 for i, o in enumerate(offsets)]
            share = (self.retention * frames - found.count(-1)) / max(frames - found.count(-1), 1)
            if window >= frames or share >= self.least:
                return found
            window *= 2

    def counts(self, earlier: list[int], sizes: Sequence[int]) -> list[int]:
        """How many tokens every frame keeps, from `earlier` and the ``sizes`` of the frames."""
        compared = [size if frame >= 0 else 0 for size, frame in zip(sizes, earlier, strict=True)]
        whole = [size - other for size, other in zip(sizes, compared, strict=True)]
        total = budget(sum(sizes), self.retention)
        least = int(min(self.least, self.retention) * sum(compared))
        rest = min(max(total - sum(whole), least), sum(compared))
        shares = apportion(rest, compared), apportion(min(total - rest, sum(whole)), whole)
        return [one + other for one, other in zip(*shares, strict=True)]

    def plan(self, layout: TokenLayout) -> tuple[list[int], list[int]]:
        """For every view the one that it is compared with (`earlier`), and how many it keeps."""
        if layout.modality == "video":
            earlier = self.earlier(layout.views)
            return earlier, self.counts(earlier, layout.view_sizes)
        total = budget(len(layout.patches), self.retention)
        return [-1] * layout.views, apportion(total, layout.view_sizes)

    def patch_count(self, layout: TokenLayout) -> int:
        return sum(self.plan(layout)[1])

    def select(self, tokens: VisualTokens) -> Selection:
        layout, views = tokens.layout.host, patches_by_view(tokens.layout.host)
        earlier, counts = self.plan(layout)
        features = tokens.features.float()
        scores = features.new_zeros(len(tokens))
        for patches, before in zip(views, earlier, strict=True):
            compared = before >= 0 and len(views[before]) > 0
            others = _nearest(layout, patches, views[before]) if compared else patches
            here, other = (moved(index, features.device) for index in (patches, others))
            like = features[other] if compared else features[other].mean(0)
            cosine = F.cosine_similarity(features[here], like, dim=-1)
            scores[here] = -cosine.clamp(max=1 - ROUNDING)
        return Selection(best(self, tokens, scores, torch.tensor(counts, device="cpu")))


def _nearest(layout: TokenLayout, patches: Tensor, earlier: Tensor) -> Tensor:
    """(M,) for each of the patches (M,) of a frame the nearest patch of the ``earlier`` frame.

    Of equally near patches, the first.  Everything stays on the CPU.
    """
    (row, col), (row_of, col_of) = (
        (layout.row[index], layout.col[index]) for index in (patches, earlier)
    )
    if torch.equal(row, row_of) and torch.equal(col, col_of):  # both frames are complete
        return earlier
    return earlier[nearest_places(row, col, row_of, col_of)]
