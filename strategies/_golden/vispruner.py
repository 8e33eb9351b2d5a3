"""How vectors of VisPruner go through our API."""

from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies._golden._shared import mask_like, packed, padded, places
from tokenprune.strategies.vispruner import VisPruner
from tokenprune.tokens import Signal, VisualTokens


@replay("vispruner")
def vispruner(case: Case) -> Verdict:
    """The mask of every view; all views are padded."""
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
    keep = strategy.select(VisualTokens(layout, features, signals)).keep
    code = layout.view * params["patches"] + places(layout)
    verdict.same("keep_mask", mask_like(given["keep_mask"], code[keep]), given["keep_mask"])
    return verdict
