"""The replay of CDPruner: its golden vectors through tokenprune's API."""

from tokenprune.ops.diversity import dpp_greedy_map
from tokenprune.strategies._golden._shared import mask_like, packed, padded, places
from tokenprune.strategies.cdpruner import PATCHES, QUESTION, CDPruner
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("cdpruner")
def cdpruner(case: Case) -> Verdict:
    """Relevance, kernel, order of selection and kept set of every view, with canvas padding."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["features"], params)
    views, size = given["features"].shape[:2]
    tokens = VisualTokens(
        layout,
        packed(layout, given["features"]),
        {PATCHES: packed(layout, given["image_embeds"])},
        text={QUESTION: given["text_embeds"]},
    )
    strategy = CDPruner(retention=params["visual_token_num"] / size)
    code = layout.view * size + places(layout)
    quality = strategy.quality(tokens)[code[layout.patches].argsort()].view(views, size)
    verdict.close("relevance", quality, given["relevance"], 1e-5)
    for view, (features, worth) in enumerate(zip(given["features"], quality, strict=True)):
        kernel = strategy.kernel(features, worth)
        verdict.close("kernel_row0", kernel[0], given["kernel_row0"][view], 1e-5)
        order = dpp_greedy_map(kernel, params["visual_token_num"])
        verdict.same("selected_order", order, given["selected_order"][view])
    keep = strategy.select(tokens).keep
    verdict.same("keep_mask", mask_like(given["keep_mask"], code[keep]), given["keep_mask"])
    chosen = code[keep].sort().values.view(views, -1) % size
    verdict.same("selected_sorted", chosen, given["selected_sorted"])
    if "sequence_code" in given:
        verdict.same("sequence_code", code[keep], given["sequence_code"])
    return verdict
