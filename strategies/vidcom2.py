"""VidCom²: frames that differ from the video keep more, and of each frame what differs most.

Paper:  https://arxiv.org/abs/2505.14454 (EMNLP 2025)
Code:   https://github.com/xuyang-liu16/VidCom2, token_compressor/vidcom2/vidcom2.py (944a17d)
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenprune.budget import rounded_up, surplus
from tokenprune.compressor import Compressor, Selection, best
from tokenprune.layout import moved
from tokenprune.ops.merging import group_means, group_sums, tally
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens

SCALES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
PART = 256  # channels or tokens that are converted to float32 at a time


@register("vidcom2")
@dataclass(frozen=True, kw_only=True)
class VidCom2(Compressor):
    """Keep the tokens that are similar neither to the mean of the video nor to that of their frame.

    Tokens ``x`` are restricted to the channels of lowest variance and normalised.  The similarity
    to a mean ``c`` is ``G(x, c) = sum_a exp(-|x - c|^2 / (2 a))`` over ``SCALES``.  Let ``e_f`` be
    minus the mean similarity of the tokens of frame ``f`` to the video.  With ``p = softmax(e /
    temperature)`` and ``r_f = min(R * (1 + p_f - mean p), 1)``, frame ``f`` of ``N_f`` tokens keeps
    ``max(1, round(r_f * N_f))``.

    Views of an image are treated like frames.

    Args:
        temperature: Temperature of the softmax over frames.  Official: 0.01.
        channels: Share of the channels that is used.  Official: 0.5.
    """

    temperature: Annotated[float, Field(ge=1e-6)] = 0.01
    channels: Annotated[float, Field(gt=0, le=1)] = 0.5

    card = Card(
        paper="Video Compression Commander (VidCom²)",
        arxiv="2505.14454",
        code="https://github.com/xuyang-liu16/VidCom2 (944a17d)",
        verified="vidcom2",
        deviations=(
            "The views of an image are treated like frames; officially images are not compressed.",
            "A batch may have several videos; officially batches are not compressed.",
        ),
    )

    def calm(self, tokens: VisualTokens) -> Tensor:
        """Sorted indices of the channels with the lowest variance over all patch tokens."""
        patches, features = tokens.layout.patches, tokens.features
        # A part of the channels at a time, because a float32 copy of all would take memory.
        parts = features.split(PART, dim=1)
        varies = torch.cat([part[patches].float().var(0, unbiased=False) for part in parts])
        count = max(1, int(features.shape[1] * self.channels))
        return varies.argsort(stable=True)[:count].sort().values

    def resemblance(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """(P,) float32 each: ``G`` of the patch tokens to the video and to their frame."""
        layout, patches, features = tokens.layout, tokens.layout.patches, tokens.features
        calm = self.calm(tokens)
        unit = F.normalize(features[patches[:, None], calm].float(), dim=-1)
        view = layout.view[patches]
        frames = group_means(unit, view, layout.views)
        to_video = _kernel(unit, unit.mean(0)[None], torch.zeros_like(view))
        return to_video, _kernel(unit, frames, view)

    def ratios(self, tokens: VisualTokens, to_video: Tensor) -> Tensor:
        """(V,) retention ratio of every frame; 0 for a frame without tokens."""
        layout = tokens.layout
        view = layout.view[layout.patches]
        sizes = tally(view, layout.views)
        sums = group_sums(to_video, view, layout.views)
        score = torch.where(sizes > 0, -sums / sizes.clamp(min=1), -torch.inf)
        share = ((score - score.max()) / self.temperature).softmax(0)
        mean = share.sum() / (sizes > 0).sum()
        return (self.retention * (1 + share - mean)).clamp(max=1) * (sizes > 0)

    def limit(self, tokens: VisualTokens) -> int:
        layout = tokens.layout
        return rounded_up(layout, self.retention) + surplus(layout.view_sizes, self.retention)

    def select(self, tokens: VisualTokens) -> Selection:
        to_video, to_frame = self.resemblance(tokens)
        layout = tokens.layout
        sizes = tally(layout.view[layout.patches], layout.views)
        counts = (self.ratios(tokens, to_video) * sizes).round().long()
        counts = counts.clamp(min=1).minimum(sizes)
        scores = to_video.new_zeros(len(tokens))
        scores[layout.patches] = -(to_video + to_frame)
        return Selection(best(self, tokens, scores, counts))


def _kernel(unit: Tensor, centres: Tensor, which: Tensor) -> Tensor:
    """(P,) ``G`` of tokens (P, C) and ``centres[which]``, of centres (V, C) and indices (P,)."""
    parts = zip(unit.split(PART), which.split(PART), strict=True)
    squared = torch.cat([(rows - centres[own]).square().sum(-1) for rows, own in parts])
    scales = moved(torch.tensor(SCALES, dtype=unit.dtype, device="cpu"), unit.device)
    return (-squared[:, None] / (2 * scales)).exp().sum(-1)
