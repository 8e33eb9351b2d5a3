"""How vectors of DART go through our API."""

import torch

from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.strategies.dart import DART
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("dart")
def dart(case: Case) -> Verdict:
    """Pivots, what each of them picks, and the kept set, with the shares and order of the ports."""
    verdict, given, params = Verdict(), case.tensors, case.params
    start, length = params["image_start"], params["image_length"]
    strategy = DART(
        retention=params.get("keep_ratio", 1 - params.get("reduction_ratio", 0.5)),
        image_pivots=params["pivot_image_token"],
        text_pivots=params["pivot_text_token"],
        official=True,
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
    pivots, behind = strategy.pivots(tokens, keys[image].abs().sum(-1))
    verdict.same("image_pivots", start + pivots, given["image_pivots"])
    verdict.same("text_pivots", start + length + behind, given["text_pivots"])
    places = torch.cat([start + pivots, start + length + behind])
    order = strategy.order(tokens, pivots, behind)
    verdict.same("pivot_order", places[order], given["pivot_order"])
    picked, _ = strategy.picks(tokens, pivots, behind)
    verdict.same("picked", start + torch.stack(picked), given["picked"])
    verdict.same("kept", start + strategy.select(tokens).keep, given["kept"])
    return verdict
