"""The replay of FasterVLM: its golden vectors through tokenprune's API."""

from tokenprune.strategies._golden._shared import mask_like, packed, padded, places, ranked
from tokenprune.strategies.fastervlm import FasterVLM
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("fastervlm")
def fastervlm(case: Case) -> Verdict:
    """Scores, order and mask of every view, with canvas padding, and the packed sequence."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["cls_attention"], params)
    scores = packed(layout, given["cls_attention"].mean(1))
    strategy = FasterVLM(retention=params["visual_token_num"] / params["patches"])
    tokens = VisualTokens(layout, scores[:, None], {strategy.saliency: scores})
    keep = strategy.select(tokens).keep
    wanted = packed(layout, given["mean_score"])[layout.patches]
    verdict.close("mean_score", scores[layout.patches], wanted, 1e-6)
    order = ranked(layout, strategy.score(tokens), keep).view_as(given["topk_order"])
    verdict.same("topk_order", order, given["topk_order"])
    code = layout.view * params["patches"] + places(layout)
    verdict.same("keep_mask", mask_like(given["keep_mask"], code[keep]), given["keep_mask"])
    if "sequence_code" in given:  # single views record indices within the view, images record codes
        alone = given["sequence_code"].ndim == 2
        sequence = places(layout)[keep] if alone else code[keep]
        verdict.same("sequence_code", sequence, given["sequence_code"].flatten())
    return verdict
