"""The replay of FastV: its golden vectors through tokenprune's API."""

import torch

from tokenprune.layout import TokenLayout
from tokenprune.strategies.fastv import FastV
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("fastv")
def fastv(case: Case) -> Verdict:
    """The kept set, its order, and the kept positions of the whole prompt."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params["K"] < 1:
        return Verdict(skipped="K = 0 is a random mask in the official code, not FastV")
    start, length = params["image_start"], params["image_length"]
    if params["attention_rank"] is not None:
        retention = params["attention_rank"] / length
    else:
        retention = 1 - params["reduction_ratio"]
    strategy = FastV(layer=params["K"], retention=retention)
    row = given["last_row"].float().mean(0)
    visual = row[start : start + length]
    layout = TokenLayout.single((1, length), newline=False)
    tokens = VisualTokens(layout, torch.zeros(length, 1), {strategy.row: visual})
    keep = strategy(tokens).keep
    ranked = keep[strategy.score(tokens)[keep].argsort(descending=True, stable=True)]
    verdict.same("top_order", start + ranked, given["top_order"])
    verdict.close("mean_visual_score", visual, given["mean_visual_score"], 1e-6)
    verdict.same("kept_visual", keep, given["kept_visual"])
    after = torch.arange(start + length, len(row))
    positions = torch.cat([torch.arange(start), start + keep, after])
    verdict.same("keep_positions", positions, given["keep_positions"])
    return verdict
