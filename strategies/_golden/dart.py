"""The replay of DART: its golden vectors through tokenprune's API."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.strategies.dart import DART, largest, norms_of, picks
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Official(DART):
    """DART with the shares and the order of the ports.

    Every pivot selects ``int(P * R / pivots)`` tokens in addition to the image pivots, in the order
    in which CPython iterates over a set of their positions.

    Args:
        start: The position at which the official code assumes the image.
    """

    start: int = 35

    def limit(self, tokens: VisualTokens) -> int:
        return super().limit(tokens) + self.image_pivots

    def order(self, image: Tensor, text: Tensor, patches: int) -> list[int]:
        text_start = self.start + patches
        places = [*(self.start + image).tolist(), *(text_start + text).tolist()]
        return [places.index(place) for place in set(places)]

    def shares(self, image: Tensor, text: int, patches: int) -> tuple[Tensor, list[int]]:
        pivots = len(image) + text
        return image, [int(patches * self.retention / pivots)] * pivots


@replay("dart")
def dart(case: Case) -> Verdict:
    """Pivots, the tokens that each selects, and the kept set, with the rules of the ports."""
    verdict, given, params = Verdict(), case.tensors, case.params
    start, length = params["image_start"], params["image_length"]
    strategy = Official(
        retention=params.get("keep_ratio", 1 - params.get("reduction_ratio", 0.5)),
        image_pivots=params["pivot_image_token"],
        text_pivots=params["pivot_text_token"],
        start=start,
    )
    keys = given["key_states"][0].transpose(0, 1).flatten(1)
    states = given["hidden_norm"][0]
    image, text = slice(start, start + length), slice(start + length, None)
    tokens = VisualTokens(
        TokenLayout.single((1, length), newline=False),
        states[image],
        {strategy.keys: keys[image], Signal("llm_states"): states[image]},
        text={strategy.keys: keys[text], Signal("llm_states"): states[text]},
    )
    pivots = largest(norms_of(keys[image]), strategy.image_pivots)
    text_pivots = largest(norms_of(keys[text]), strategy.text_pivots)
    verdict.same("image_pivots", start + pivots, given["image_pivots"])
    verdict.same("text_pivots", start + length + text_pivots, given["text_pivots"])
    places = torch.cat([start + pivots, start + length + text_pivots])
    order = strategy.order(pivots, text_pivots, length)
    verdict.same("pivot_order", places[order], given["pivot_order"])
    unit = F.normalize(states, dim=-1)
    kept, shares = strategy.shares(pivots, len(text_pivots), length)
    picked = picks(unit[image], unit[places[order]], shares, kept)
    verdict.same("picked", start + torch.stack(picked), given["picked"])
    verdict.same("kept", start + strategy.select(tokens).keep, given["kept"])
    return verdict
