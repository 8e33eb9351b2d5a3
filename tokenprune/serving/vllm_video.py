"""Any method of fixed count as the pair of functions with which vLLM compresses videos.

vLLM has two methods for the videos of Qwen-VL.  Each is a pair of functions: one reserves the place
of a video in the prompt before it is encoded, the other marks which tokens stay (``evs`` and
``vidcom2`` in ``vllm.multimodal.video_prune``).  `video_pair` makes such a pair of a spec.  vLLM
has no option that names another pair; this one is for a fork, or for a contribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tokenprune.compressor import Compressor, Stage
from tokenprune.errors import UserError
from tokenprune.grammar import has_retention
from tokenprune.layout import TokenLayout, moved
from tokenprune.registry import strategies
from tokenprune.spec import create, parse
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

__all__ = ["VideoPair", "video_pair"]

_SHAPES = ((2, 4, 6), (3, 2, 5), (1, 3, 3))  # frames, rows and columns that a method is tried on
_RATES = (0.25, 0.5, 0.9)


class VideoPair(NamedTuple):
    """The two functions, with the names, arguments and results of vLLM's.

    Attributes:
        compute_retained_tokens_count: ``(tokens_per_frame, num_frames, q)`` to the number of tokens
            that stay of a video, where ``q`` in [0, 1) is the share that is dropped.
        compute_retention_mask: ``(video_embeds, video_size_thw, spatial_merge_size, q)`` to a mask
            (N,) of as many of the features (N, D).  The size is the number of frames, and of rows
            and columns of patches; so ``N = T * (H / merge) * (W / merge)``.
    """

    compute_retained_tokens_count: Callable[[int, int, float], int]
    compute_retention_mask: Callable[[Tensor, Sequence[int] | Tensor, int, float], Tensor]


def video_pair(spec: str) -> VideoPair:
    """The pair of a method.

    Args:
        spec: A method with options, without a retention, which follows from ``q``.

    Raises:
        UserError: The spec is not valid or has a retention; or a pair cannot express the method: it
            needs signals, merges tokens, acts elsewhere than in front of the language model, or the
            number of tokens that it keeps depends on more than their number.
    """
    if has_retention(spec):
        raise UserError(
            f"{spec!r} has a retention, but vLLM gives the share to drop with every video; leave "
            "the retention out."
        )
    method = parse(spec, retention=0.5)
    reason = _inexpressible(method)
    if reason:
        raise UserError(
            f"{method.label} cannot be a pair of functions of vLLM: it {reason}. Methods that can "
            f"be: {', '.join(_expressible())}."
        )
    made = _Pair(method)
    return VideoPair(made.compute_retained_tokens_count, made.compute_retention_mask)


def _expressible() -> list[str]:
    """Names of the methods that a pair can express with their default options."""
    return [one for one in strategies.names() if not _inexpressible(create(one, retention=0.5))]


def _inexpressible(method: Compressor) -> str:
    """Why a pair cannot express ``method``; empty if it can."""
    if method.stage is not Stage.PRE_LLM or list(method.parts()) != [method]:
        return "does not act in front of the language model alone"
    if method.needs:
        return f"needs {', '.join(sorted({one.name for one in method.needs}))}"
    for frames, rows, cols in _SHAPES:
        for rate in _RATES:
            one = _at(method, rate)
            counts = {
                one.count(_layout(frames, rows, cols)),
                one.count(_layout(frames, 1, rows * cols)),
            }
            if None in counts or len(counts) > 1:
                return "keeps a number of tokens that depends on the video"
    tokens = sample_tokens(frozenset(), _layout(*_SHAPES[0]), seed=0, text=1)
    return "merges tokens" if method(tokens).features is not None else ""


@dataclass(frozen=True)
class _Pair:
    method: Compressor

    def compute_retained_tokens_count(
        self, tokens_per_frame: int, num_frames: int, q: float
    ) -> int:
        count = _at(self.method, q).count(_layout(num_frames, 1, tokens_per_frame))
        if count is None:
            raise AssertionError(f"{self.method.label} has no fixed count")
        return count

    def compute_retention_mask(
        self,
        video_embeds: Tensor,
        video_size_thw: Sequence[int] | Tensor,
        spatial_merge_size: int,
        q: float,
    ) -> Tensor:
        frames, tall, wide = (int(number) for number in video_size_thw)
        layout = _layout(frames, tall // spatial_merge_size, wide // spatial_merge_size)
        with torch.no_grad():
            keep = _at(self.method, q)(VisualTokens(layout, video_embeds)).keep
        mask = torch.zeros(len(video_embeds), dtype=torch.bool, device=video_embeds.device)
        mask[moved(keep, mask.device)] = True
        return mask


def _at(method: Compressor, q: float) -> Compressor:
    # 1 - 0.9 is slightly less than 0.1.
    return replace(method, retention=round(1 - q, 12))


def _layout(frames: int, rows: int, cols: int) -> TokenLayout:
    return TokenLayout.video(frames, (rows, cols), newline=False, native=True)
