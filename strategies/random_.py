"""Random: a seeded random subset of every view, in sequence order.

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

    Every sample has its own generator, made of `seed` and the sample's own content, so the choice
    depends neither on the global generator nor on the rest of the batch.

    Args:
        seed: Another seed gives another subset.
    """

    seed: int = 0

    location_aware = True
    card = Card(paper="Random tokens (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        # Drawn and left on the CPU: the same subset on every device.
        generator = torch.Generator("cpu").manual_seed(hash((self.seed, tokens.seed)) % 2**63)
        # In float32 whatever the default: another dtype draws other numbers.
        return torch.rand(len(tokens), generator=generator, dtype=torch.float32, device="cpu")
