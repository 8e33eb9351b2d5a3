"""How vectors of VisionZip go through our API."""

import torch

from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies._golden._shared import packed, padded, places
from tokenprune.strategies.visionzip import VisionZip
from tokenprune.tokens import Signal, VisualTokens


@replay("visionzip")
def visionzip(case: Case) -> Verdict:
    """Dominant and contextual tokens of every view; official order and CLS token are not ours."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["cls_attention"], params)
    contextual = params["contextual_num"]
    count = params["dominant_num"] + contextual
    strategy = VisionZip(retention=count / params["patches"], contextual=contextual / count)
    hidden = packed(layout, given["hidden_states"][:, 1:])
    signals = {
        strategy.saliency: packed(layout, given["cls_attention"].mean(1)),
        strategy.metric: packed(layout, given["metric"][:, 1:]),
        Signal("unprojected"): hidden,
    }
    chosen = strategy.select(VisualTokens(layout, hidden, signals, projector=lambda x: x))
    if chosen.features is None:
        verdict.mismatch = "no merged features"
        return verdict
    place, view = places(layout)[chosen.keep], layout.view[chosen.keep]
    for index, (ranked, output) in enumerate(
        zip(given["dominant_idx"], given["output"], strict=True)
    ):
        dominant = (ranked[ranked > 0] - 1).sort().values  # entry 0 is the CLS token
        mine = view == index
        ours = torch.isin(place[mine], dominant)
        verdict.same("dominant_idx", place[mine][ours], dominant)
        verdict.close("output", chosen.features[mine][ours], output[1 : 1 + len(dominant)], 1e-6)
        # Targets in the order of their places, as officially.
        merged = chosen.features[mine][~ours]
        verdict.close("contextual", merged, output[1 + len(dominant) :], 1e-5)
    return verdict
