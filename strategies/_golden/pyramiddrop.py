"""How vectors of PyramidDrop go through our API."""

import math

import torch

from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies.pyramiddrop import PyramidDrop
from tokenprune.tokens import Signal, TokenLayout, VisualTokens


@replay("pyramiddrop")
def pyramiddrop(case: Case) -> Verdict:
    """The kept set of a stage and what is left of the prompt, from the official attention row."""
    verdict, given, params = Verdict(), case.tensors, case.params
    ratios, start = params["ratio_list"], params["image_start"]
    stage, count = params["stage"], len(ratios)
    shares = [(i + 1) / count for i in range(count)]
    if all(math.isclose(a, ratios[-1] ** b) for a, b in zip(ratios, shares, strict=True)):
        depths = tuple((i + 1) / (count + 1) for i in range(count))
        strategy = PyramidDrop(retention=ratios[-1], depths=depths).at(depths[stage])
    else:  # stages that do not drop the same share; each is a cut by itself
        strategy = PyramidDrop(retention=ratios[stage], depths=(0.5,))
    for row, attention in enumerate(given["attention_row"]):
        length, entered = params["visual_before"][row], params["original_visual"][row]
        score = attention.float().mean(0)
        visual = score[start : start + length]
        layout = TokenLayout.single((1, length), newline=False)
        signals = {Signal("llm_ahead"): visual}
        tokens = VisualTokens(layout, torch.zeros(length, 1), signals, entered=entered)
        keep = strategy.select(tokens).keep
        verdict.close("visual_score", visual, given["visual_score"][row][:length], 1e-6)
        verdict.same("kept", keep, given["kept"][row][: params["kept"][row]])
        after = start + length + torch.arange(params["text_tokens"][row])
        survivors = torch.cat([torch.arange(start), start + keep, after])
        expected = given["survivors"][row]
        verdict.same("survivors", survivors, expected[expected >= 0])
    return verdict
