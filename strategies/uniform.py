"""Uniform: keep evenly spaced tokens of every view.  A baseline without signals.

There is no single official definition; the default is the exact-count, centred form
``floor((i + 0.5) * n / T)``, ``i < T``.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from tokenprune.allocators import Proportional
from tokenprune.compressor import Compressor, Selection, warn_about_empty_views
from tokenprune.layout import TokenLayout
from tokenprune.ops.spatial import dithered, evenly_spaced
from tokenprune.registry import Card, register
from tokenprune.tokens import VisualTokens


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Keep ``floor(R * P)`` evenly spaced patch tokens, in proportion to the size of the views.

    Args:
        pattern: ``stride`` counts along the rows of a view, as published baselines do.  If the
            stride divides the width, whole columns are kept and the others dropped.  ``dispersed``
            spreads the tokens over rows and columns.
    """

    pattern: Literal["stride", "dispersed"] = "stride"

    location_aware = True
    card = Card(paper="Evenly spaced tokens (baseline)")

    def patch_count(self, layout: TokenLayout) -> int:
        return Proportional().patch_count(layout, self.retention)

    def select(self, tokens: VisualTokens) -> Selection:
        counts = Proportional().counts(tokens, torch.empty(0, device="cpu"), self.retention)
        spread = evenly_spaced if self.pattern == "stride" else dithered
        keep = spread(tokens.layout, counts)
        warn_about_empty_views(self, tokens.layout.host, keep)
        return Selection(keep)
