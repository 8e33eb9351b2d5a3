"""The replay of ToMe: golden vectors through the functions of `tokenprune.ops.merging`."""

import torch

from tokenprune.ops.merging import bipartite_matching, merge_weighted, spread
from tokenprune.testing.golden import Case, Verdict, replay


@replay("tome")
def tome(case: Case) -> Verdict:
    """Which tokens merge and in which order, the weighted means, and unmerging."""
    verdict, given, params = Verdict(), case.tensors, case.params
    found = bipartite_matching(
        given["metric"],
        params["r_requested"],
        class_token=params["class_token"],
        distill_token=params["distill_token"],
    )
    for name, got in {
        "group_of_token": found.group,
        "unm_idx": found.unmerged,
        "src_idx": found.source,
        "dst_idx": found.target,
    }.items():
        if name in given:
            verdict.same(name, got, given[name])
    if verdict.mismatch:
        return verdict
    x = given["x"]
    size = given["size"].squeeze(-1) if "size" in given else torch.ones(x.shape[:2])
    merged, total = merge_weighted(x, size, found.group, found.left)
    tolerance = params.get("rtol_output", 1e-5)
    verdict.close("merged", merged, given["merged"], tolerance)
    verdict.close("merged_size", total[..., None], given["merged_size"], tolerance)
    group = found.group
    if params["distill_token"] and found.source.shape[1]:
        # The official unmerging ignores that the two tokens were moved to the front.
        alone = found.unmerged.shape[1]
        group = torch.where(group == 1, alone, group - ((group > 1) & (group <= alone)).long())
    verdict.close("unmerged", spread(merged, group), given["unmerged"], tolerance)
    return verdict
