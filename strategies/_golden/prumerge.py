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
    layout = TokenLayout.single((24, 24), newline=False)
    strategy = PruMerge(
        retention=(centres + 1) / params["patches"],
        spatial=params["spatial_added"] / centres,
        step=params["spatial_step"] or 0,
        allocator=Proportional("half-even"),
    )
    for image, score in enumerate(scores):
        signals = {
            strategy.saliency: score,
            strategy.metric: given["key"][image, 1:],
            Signal("unprojected"): given["hidden_states"][image, 1:],
        }
        features = given["hidden_states"][image, 1:]
        chosen = strategy.select(VisualTokens(layout, features, signals, projector=lambda x: x))
        assert chosen.features is not None
        wanted, output = given["center_idx"][image], given["output"][image]
        ours = torch.isin(chosen.keep, wanted)
        verdict.same("center_idx", chosen.keep[ours], wanted.sort().values)
        verdict.close("output", chosen.features[ours], output[:-1][wanted.argsort()], 1e-4)
        verdict.close("extra", chosen.features[~ours], output[-1:], 1e-4)
    return verdict
