"""ToMe: merge similar tokens between attention and MLP of every layer of the vision encoder.

Written from the paper and from recorded outputs of the official code.  The code itself (CC-BY-NC)
was not read.
"""

import itertools
from dataclasses import dataclass

from torch import Tensor

from tokenprune.encoder import EncoderCompressor, EncoderTokens, Reduction
from tokenprune.ops.merging import bipartite_matching
from tokenprune.ops.similarity import BLOCK
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderCompressor):
    """In every layer, merge tokens of even index into the most similar tokens of odd index.

    In each layer up to the one whose output is used, the ``r`` pairs with the largest cosine of
    their keys (mean over heads) merge into their mean, weighted by size.  A view of ``n`` patches
    ends with ``floor(R * n)`` tokens.  All layers have the same ``r`` up to rounding.  A layer can
    merge at most half of its patches; if it cannot merge ``r``, the layers before it merge more.
    If halving in every layer leaves more than ``floor(R * n)``, every layer halves, and the largest
    clusters are kept.

    Patches in the canvas padding are merged like others, because the vision encoder cannot
    distinguish them.

    Args:
        proportional: Whether proportional attention counts the patches of a merged token, as the
            authors do for models that were not trained with merging.
    """

    proportional: bool = True

    card = Card(
        paper="Token Merging: Your ViT But Faster",
        arxiv="2210.09461",
        code="https://github.com/facebookresearch/ToMe (af95e4b)",
        deviations=(
            "R is given and r follows from it; officially r is given, 8 to 16 in each layer.",
            "The layers after the one whose output is used merge nothing.",
            "The language model gets one token per cluster, at the token nearest to the centre of "
            "the cluster; the authors classify images and need no location.",
            "Ties go to the earlier token, and keys are compared in float32.",
            "Unmerging restores a distillation token; officially it ignores that the token was "
            "moved to the front. The vision encoders here have none.",
        ),
        verified="tome",
    )

    def reduce(self, tokens: EncoderTokens) -> Reduction | None:
        steps = schedule(tokens.patches, tokens.target, tokens.layers)
        found = bipartite_matching(
            tokens.keys, steps[tokens.layer], class_token=bool(tokens.prefix)
        )
        return Reduction(found.group, found.left) if found.source.shape[1] else None

    def bias(self, size: Tensor) -> Tensor | None:
        return super().bias(size) if self.proportional else None

    def flops(self, tokens: VisualTokens) -> float | None:
        """FLOPs of the products of all even with all odd keys, in each layer that merges."""
        run = tokens.encoding
        if run is None:
            return None
        pairs = sum(
            (n // 2) * (n - n // 2)
            for n, left in zip(run.attended, run.processed, strict=True)
            if left < n
        )
        return 2.0 * pairs * run.key_width * tokens.layout.views

    def memory(self, tokens: VisualTokens) -> float | None:
        """Bytes of the keys of unit length, and of a block of cosines of even with odd entries."""
        run = tokens.encoding
        if run is None:
            return None
        entries = max(run.attended)
        pairs = tokens.layout.views * (entries // 2) * (entries - entries // 2)
        keys = tokens.layout.views * entries * run.key_width
        return 4.0 * (keys + min(pairs, BLOCK))


def schedule(patches: int, target: int, layers: int) -> list[int]:
    """How many patches each of ``layers`` merges so that ``target`` of ``patches`` are left.

    The numbers are as equal as possible.  No layer merges more than half of its patches; if that
    cannot reach ``target``, every layer merges half.
    """
    halved = [patches]
    for _ in range(layers):
        halved.append(halved[-1] - halved[-1] // 2)
    if halved[-1] >= target:
        return [before - after for before, after in itertools.pairwise(halved)]
    steps: list[int] = []
    left = target  # from the last layer to the first: earlier layers merge what later ones cannot
    for earlier in range(layers, 0, -1):
        steps.append(min((patches - left) // earlier, left))
        left += steps[-1]
    return steps[::-1]
