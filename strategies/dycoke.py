"""DyCoke: of every few frames one stays whole, the others keep what is new in them.

Paper:  https://arxiv.org/abs/2411.15024 (CVPR 2025), token temporal merging (TTM)
Code:   https://github.com/KD-TAO/DyCoke, llava/model/llava_arch.py (dd74634)
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field

from tokenprune.budget import apportion, budget
from tokenprune.compressor import Compressor, Selection, best
from tokenprune.primitives import float_copy, patches_by_view
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

    Args:
        window: Frames of which one stays whole.  Official: 4.
        least: Smallest share of a compared frame before windows widen.  Ours.
        official: Windows of four as the code makes them: the last frame of an odd number is lost,
            the third one of the last window stays whole, counts are rounded down.
    """

    window: Annotated[int, Field(ge=2)] = 4
    least: Annotated[float, Field(ge=0, lt=1)] = 0.1
    official: bool = False

    positional = True  # the first frame of a window
    card = Card(
        paper="DyCoke (token temporal merging)",
        arxiv="2411.15024",
        code="https://github.com/KD-TAO/DyCoke (dd74634)",
        deviations=(
            "The drop ratio follows from R, and windows widen below the least R of four frames.",
            "All frames are treated alike; officially the last one of an odd number is lost and "
            "the third one of the last window stays whole (official=True), and videos of four "
            "frames or fewer fail.",
            "Kept tokens stay in their places; officially they come in the order of similarity.",
            "Images, which the official code leaves alone, are compressed view by view.",
            "Nothing happens in the language model, where officially the KV cache is thinned out "
            "anew at decode steps.",
        ),
    )

    def earlier(self, frames: int) -> list[int]:
        """For every frame the one that it is compared with, -1 where it stays whole."""
        window = 4 if self.official else self.window
        while True:
            offsets = [frame % window for frame in range(frames)]
            found = [i - o + (o & (o - 1)) if o else -1 for i, o in enumerate(offsets)]
            if self.official:
                return [-1 if i % 4 == 2 and i + 2 >= frames else f for i, f in enumerate(found)]
            share = (self.retention * frames - found.count(-1)) / max(frames - found.count(-1), 1)
            if window >= frames or share >= self.least:
                return found
            window *= 2

    def counts(self, earlier: list[int], size: int) -> list[int]:
        """How many of its ``size`` tokens every frame keeps."""
        frames = len(earlier)
        lost = [frames - 1] if self.official and frames % 2 and frames > 1 else []
        whole = [i for i, f in enumerate(earlier) if f < 0 and i not in lost]
        compared = [i for i, f in enumerate(earlier) if f >= 0 and i not in lost]
        total = budget(frames * size, self.retention)
        least = int(min(self.least, self.retention) * size * len(compared))
        rest = min(max(total - size * len(whole), least), size * len(compared))
        shares = apportion(rest, [size] * len(compared))
        if self.official:
            shares = [rest // max(len(compared), 1)] * len(compared)
        first = apportion(min(total - rest, size * len(whole)), [size] * len(whole))
        kept = dict(zip(compared + whole, shares + first, strict=True))
        return [kept.get(frame, 0) for frame in range(frames)]

    def select(self, tokens: VisualTokens) -> Selection:
        layout, views = tokens.layout, patches_by_view(tokens.layout)
        if layout.modality == "video":
            earlier = self.earlier(len(views))
            counts = self.counts(earlier, max(layout.view_sizes))
        else:
            earlier = [-1] * len(views)
            counts = apportion(budget(len(layout.patches), self.retention), layout.view_sizes)
        features = tokens.features.float()
        scores = features.new_zeros(len(tokens))
        for patches, before in zip(views, earlier, strict=True):
            other = features[views[before] if before >= 0 else patches]
            other = other if before >= 0 else other.mean(0)
            scores[patches] = -F.cosine_similarity(features[patches], other, dim=-1)
        return Selection(best(self, tokens, scores, torch.tensor(counts)))

    def flops(self, tokens: VisualTokens) -> float:
        """One cosine for every token, of two norms and a product."""
        return 6.0 * len(tokens.layout.patches) * tokens.features.shape[1]

    def memory(self, tokens: VisualTokens) -> float:
        """All features in float32, and of one view: they, what they are compared with, both of
        unit length, and the products."""
        view = max(tokens.layout.view_sizes) * tokens.features.shape[1]
        copies = 5 if tokens.layout.modality == "video" else 4  # or with a single vector
        return super().memory(tokens) + float_copy(tokens.features) + 4.0 * copies * view
