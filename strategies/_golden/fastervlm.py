"""How vectors of FasterVLM go through our API."""

from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies._golden._shared import mask_like, packed, padded, places
from tokenprune.strategies.fastervlm import FasterVLM
from tokenprune.tokens import VisualTokens


@replay("fastervlm")
def fastervlm(case: Case) -> Verdict:
    """The mask of every view, and the order the language model receives; all views are padded."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["cls_attention"], params)
    scores = packed(layout, given["cls_attention"].mean(1))
    strategy = FasterVLM(retention=params["visual_token_num"] / params["patches"])
    keep = strategy.select(VisualTokens(layout, scores[:, None], {strategy.saliency: scores})).keep
    code = layout.view * params["patches"] + places(layout)
    verdict.same("keep_mask", mask_like(given["keep_mask"], code[keep]), given["keep_mask"])
    if "sequence_code" in given:  # of single views the places in each, of an image's the codes
        alone = given["sequence_code"].ndim == 2
        sequence = places(layout)[keep] if alone else code[keep]
        verdict.same("sequence_code", sequence, given["sequence_code"].flatten())
    return verdict
