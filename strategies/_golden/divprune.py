"""How vectors of DivPrune go through our API."""

import torch

from tokenprune.layout import TokenLayout
from tokenprune.ops.diversity import cosine_distances, max_min_diversity
from tokenprune.strategies.divprune import DivPrune
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("divprune")
def divprune(case: Case) -> Verdict:
    """What is picked, in order, and what is left of a whole prompt."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params["kind"] == "sequence":
        # Officially the visual span starts here, whatever comes before it; the card says so.
        start, length = params["assumed_system_tokens"], params["visual_tokens"]
        features = given["sequence_embeds"][start : start + length]
    else:
        features, length = given["features"], params["num_tokens"]
    layout = TokenLayout.single((1, length), newline=False)
    keep = DivPrune(retention=params["ratio"])(VisualTokens(layout, features)).keep
    picked = max_min_diversity(features, len(keep))
    verdict.same("selected", picked, given["selected"])
    verdict.same("set", keep, given["selected"].sort().values)
    if params["kind"] != "sequence":
        verdict.same("selected_sorted", keep, given["selected_sorted"])
        row = cosine_distances(features)[0]
        verdict.close("distance_first_row", row, given["distance_first_row"], 1e-5)
    if params["kind"] == "sequence":
        after = torch.arange(start + length, len(given["sequence_embeds"]))
        survivors = torch.cat([torch.arange(start), start + keep, after])
        verdict.same("sequence_keep", survivors, given["sequence_keep"])
    return verdict
