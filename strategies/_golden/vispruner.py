"""The replay of VisPruner: its golden vectors through tokenprune's API."""

import torch.nn.functional as F

from tokenprune.ops.spatial import patches_by_view
from tokenprune.signals import Signal
from tokenprune.strategies._golden._shared import mask_like, packed, padded, places
from tokenprune.strategies.vispruner import VisPruner, thinned
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("vispruner")
def vispruner(case: Case) -> Verdict:
    """Important and diverse tokens in order, and the mask of every view, with canvas padding."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["cls_attention"], params)
    strategy = VisPruner(
        retention=params["visual_token_num"] / params["patches"],
        important=params["important_ratio"],
    )
    features = packed(layout, given["features"])
    signals = {
        strategy.saliency: packed(layout, given["cls_attention"].mean(1)),
        Signal("unprojected"): features,
    }
    tokens = VisualTokens(layout, features, signals)
    keep = strategy.select(tokens).keep
    scores, unit = tokens[strategy.saliency], F.normalize(features.float(), dim=-1)
    wanted = packed(layout, given["mean_score"])[layout.patches]
    verdict.close("mean_score", scores[layout.patches], wanted, 1e-6)
    for view, patches in enumerate(patches_by_view(layout)):
        count, first = params["visual_token_num"], given["important_idx"].shape[1]
        order = patches[scores[patches].argsort(descending=True, stable=True)]
        important = places(layout)[order[: int(count * strategy.important)]]
        verdict.same("important_idx", important, given["important_idx"][view])
        if "diverse_idx" in given:
            diverse = thinned(order[first:], count - first, unit)
            verdict.same("diverse_idx", places(layout)[diverse], given["diverse_idx"][view])
    code = layout.view * params["patches"] + places(layout)
    verdict.same("keep_mask", mask_like(given["keep_mask"], code[keep]), given["keep_mask"])
    if "sequence_code" in given:
        verdict.same("sequence_code", code[keep], given["sequence_code"].flatten())
    return verdict
