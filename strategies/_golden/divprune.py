"""The replay of DivPrune: its golden vectors through tokenprune's API."""

import torch

from tokenprune.layout import TokenLayout
from tokenprune.ops.diversity import max_min_diversity
from tokenprune.ops.similarity import cosine_distances
from tokenprune.strategies.divprune import DivPrune
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("divprune")
def divprune(case: Case) -> Verdict:
    """The selected tokens in order, and the kept positions of a whole prompt."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params["kind"] == "sequence":
        # Officially the visual span starts here, whatever precedes it (see the card).
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
        positions = torch.cat([torch.arange(start), start + keep, after])
        verdict.same("sequence_keep", positions, given["sequence_keep"])
    return verdict
