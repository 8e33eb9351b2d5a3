"""Random: keep a seeded random subset of every view.

The file ends in an underscore because ``random.py`` would shadow the standard library.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.compressor import ScoringCompressor
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(ScoringCompressor):
    """Keep random patch tokens.

    The generator is seeded with `seed` and the content of the image or video.  The selection
    depends neither on the global generator nor on the rest of the batch.

    Args:
        seed: Seed of the generator.
    """

    seed: int = 0

    location_aware = True
    card = Card(paper="Random tokens (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        # On the CPU, so that every device gets the same subset.
        generator = torch.Generator("cpu").manual_seed(hash((self.seed, tokens.seed)) % 2**63)
        # float32 explicitly: the numbers depend on the dtype, and users change its default.
        return torch.rand(len(tokens), generator=generator, dtype=torch.float32, device="cpu")
