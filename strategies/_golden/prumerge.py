"""How vectors of PruMerge go through our API."""

import torch

from tokenprune.attention import Projections, cls_row
from tokenprune.budget import Proportional
from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies.prumerge import PruMerge
from tokenprune.tokens import Signal, TokenLayout, VisualTokens


@replay("prumerge")
def prumerge(case: Case) -> Verdict:
    """Scores, centres and merged tokens of every image; order and budget are the official ones."""
    verdict, given, params = Verdict(), case.tensors, case.params
    centres = params["centers"]
    tapped = Projections(1, params["dim"] ** -0.5, given["query_cls"][:, None], given["key"])
    scores = cls_row(tapped, softmax=True)
    verdict.close("cls_attn", scores, given["cls_attn"], 1e-5)
    side = int(params["patches"] ** 0.5)
    layout = TokenLayout.single((side, side), newline=False)
    best, step, start = params["top_k"], params["spatial_step"] or 0, 0
    if centres > best and not params["adaptive"]:  # the training path, repeats included
        step = int(1 / params["reduction_ratio"])
        start = step // 2
    for image, score in enumerate(scores):
        wanted, output = given["center_idx"][image], given["output"][image]
        number = len(wanted.unique())
        strategy = PruMerge(
            retention=(number + 1) / params["patches"],
            allocator=Proportional("half-even"),
            spatial=(number - best) / number,
            step=step,
            start=start,
        )
        signals = {
            strategy.saliency: score,
            strategy.metric: given["key"][image, 1:],
            Signal("unprojected"): given["hidden_states"][image, 1:],
        }
        tokens = VisualTokens(
            layout, given["hidden_states"][image, 1:], signals, projector=lambda x: x
        )
        if params["adaptive"] and len(scores) == 1:  # officially one count for a whole batch
            free = PruMerge(retention=0.999, adaptive=True, spatial=strategy.spatial)
            kept = free.select(tokens).keep  # and the extra token
            verdict.same("adaptive centres", wanted, wanted[torch.isin(wanted, kept)])
            verdict.same("adaptive count", torch.tensor(len(kept) - 1), torch.tensor(centres))
        chosen = strategy.select(tokens)
        if chosen.features is None:
            verdict.mismatch = "no merged features"
            return verdict
        ours = torch.isin(chosen.keep, wanted)
        verdict.same("center_idx", chosen.keep[ours], wanted.unique())
        if number < centres:  # the card says what the repeats do to the official values
            continue
        verdict.close("output", chosen.features[ours], output[:-1][wanted.argsort()], 1e-4)
        verdict.close("extra", chosen.features[~ours], output[-1:], 1e-4)
    return verdict
