"""The replay of PyramidDrop: its golden vectors through tokenprune's API."""

import math

import torch
import torch.nn.functional as F

from tokenprune.attention import decoder_row, decoder_rows
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.strategies.pyramiddrop import PyramidDrop
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.testing.llama import llama_attention
from tokenprune.tokens import VisualTokens


@replay("pyramiddrop")
def pyramiddrop(case: Case) -> Verdict:
    """The attention row from the weights, the kept set of a cut, and the kept positions."""
    verdict, given, params = Verdict(), case.tensors, case.params
    ratios, start = params["ratio_list"], params["image_start"]
    stage, count = params["stage"], len(ratios)
    shares = [(i + 1) / count for i in range(count)]
    if all(math.isclose(a, ratios[-1] ** b) for a, b in zip(ratios, shares, strict=True)):
        depths = tuple((i + 1) / (count + 1) for i in range(count))
        strategy = PyramidDrop(retention=ratios[-1], depths=depths).at(depths[stage])
    else:  # stages that drop different shares are replayed as separate cuts
        strategy = PyramidDrop(retention=ratios[stage], depths=(0.5,))
    features = given["features"]
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    if "attention_mask" in given:
        mask = given["attention_mask"]
    attention, norm, rotary = llama_attention(
        given["q_weight"],
        given["k_weight"],
        given["norm_weight"],
        params["heads"],
        base=params["rope_base"],
        eps=params["rms_eps"],
        length=mask.shape[1],
    )
    with torch.no_grad():
        states = norm(features)
        asking = mask.sum(1) - 1
        means = decoder_row(attention, states, rotary, asking, mask)
    for row, heads in enumerate(given["attention_row"]):
        length, entered = params["visual_before"][row], params["original_visual"][row]
        asks, seen = asking[row : row + 1], mask[row : row + 1]
        at = rotary[0][0], rotary[1][0]
        with torch.no_grad():
            mine = decoder_rows(attention, states[row], at, asks, seen, by_head=True)
        verdict.close("attention_row", mine[0].T, heads, 1e-5)
        visual = means[row, start : start + length]
        layout = TokenLayout.single((1, length), newline=False)
        signals = {Signal("llm_ahead"): visual}
        tokens = VisualTokens(layout, torch.zeros(length, 1), signals, entered=entered)
        keep = strategy.select(tokens).keep
        verdict.close("visual_score", visual, given["visual_score"][row][:length], 1e-6)
        verdict.same("kept", keep, given["kept"][row][: params["kept"][row]])
        ranked = keep[visual[keep].argsort(descending=True, stable=True)]
        verdict.same("kept_order", ranked, given["kept_order"][row][: len(ranked)])
        after = start + length + torch.arange(params["text_tokens"][row])
        survivors = torch.cat([torch.arange(start), start + keep, after])
        padding = (0, given["survivors"].shape[1] - len(survivors))
        verdict.same("survivors", F.pad(survivors, padding, value=-1), given["survivors"][row])
        if "new_features" in given:
            left = F.pad(features[row, survivors], (0, 0, *padding))
            verdict.same("new_features", left, given["new_features"][row])
        if "new_position_ids" in given:
            kept = survivors if strategy.keeps_positions else torch.arange(len(survivors))
            verdict.same("new_position_ids", F.pad(kept, padding), given["new_position_ids"][row])
    return verdict
