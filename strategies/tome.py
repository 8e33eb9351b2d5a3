"""ToMe: merge similar tokens between attention and MLP of every layer of the vision tower.

Written from the paper and from vectors made with the official code (CC-BY-NC, not looked at).
"""

import itertools
from dataclasses import dataclass

from torch import Tensor

from tokenprune.encoder import EncoderCompressor, EncoderTokens, Reduction
from tokenprune.ops.merging import bipartite_matching
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderCompressor):
    """Halve again and again: tokens of even index merge into the most similar of odd index.

    In each layer up to the one whose output is used, the ``r`` pairs with the largest cosine of
    their keys (mean over heads) merge into their mean, weighted by size.  A view of ``n`` patches
    is to end with ``floor(R * n)`` vectors: ``r`` is the same in all layers up to rounding, except
    where a layer cannot merge as many, at most half of its patches; the layers before it then merge
    more.  Below what halving in every layer reaches, every layer halves, and the largest clusters
    stay.

    Patches in the padding of a canvas are merged like others, as the tower cannot tell them.

    Args:
        proportional: Whether a merged token weighs as much in the attention as the patches that it
            stands for, as the authors do for models that were not trained with merging.
    """

    proportional: bool = True

    card = Card(
        paper="Token Merging: Your ViT But Faster",
        arxiv="2210.09461",
        code="https://github.com/facebookresearch/ToMe (af95e4b)",
        deviations=(
            "R is given, and r follows from it; the authors fix r, 8 to 16 in each layer.",
            "The layers behind the one whose output is used run on what is left and merge nothing.",
            "For the language model one token per cluster stays, the one nearest its centre; the "
            "authors classify images and need none.",
            "Ties go to the earlier token, and keys are compared in float32.",
            "A distillation token's way back follows the merge; the official unmerge forgets that "
            "the token was moved to the front.  The towers here have none.",
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
        """Products of all even with all odd keys, in each layer of the tower that merges."""
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
        """In the tower: keys of unit length, and cosines of even with odd entries."""
        run = tokens.encoding
        if run is None:
            return None
        entries = max(run.attended)
        matched = 4.0 * entries * run.key_width + 4.0 * (entries // 2) * (entries - entries // 2)
        return tokens.layout.views * matched


def schedule(patches: int, target: int, layers: int) -> list[int]:
    """How many patches each of ``layers`` merges so that ``target`` of ``patches`` are left.

    As equal as can be, none more than half of what it gets; if even that is not enough, half.
    """
    halved = [patches]
    for _ in range(layers):
        halved.append(halved[-1] - halved[-1] // 2)
    if halved[-1] >= target:
        return [before - after for before, after in itertools.pairwise(halved)]
    steps: list[int] = []
    left = target  # from the last layer to the first, which takes what later ones cannot
    for earlier in range(layers, 0, -1):
        steps.append(min((patches - left) // earlier, left))
        left += steps[-1]
    return steps[::-1]
