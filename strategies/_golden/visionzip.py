"""The replay of VisionZip: its golden vectors through tokenprune's API."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.ops.merging import assigned
from tokenprune.ops.spatial import patches_by_view
from tokenprune.signals import Signal
from tokenprune.strategies._golden._shared import packed, padded, places
from tokenprune.strategies.visionzip import VisionZip
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("visionzip")
def visionzip(case: Case) -> Verdict:
    """Dominant and contextual tokens of every view, and the resulting features.

    Our tokens are in sequence order.  For the comparison they are put into the official order,
    after the CLS token that the official code sends along.
    """
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = padded(given["cls_attention"], params)
    contextual, number = params["contextual_num"], params["dominant_num"]
    count = number + contextual
    strategy = VisionZip(retention=count / params["patches"], contextual=contextual / count)
    hidden = packed(layout, given["hidden_states"][:, 1:])
    scores = packed(layout, given["cls_attention"].mean(1))
    metric = packed(layout, given["metric"][:, 1:])
    signals = {strategy.saliency: scores, strategy.metric: metric, Signal("unprojected"): hidden}
    chosen = strategy.select(VisualTokens(layout, hidden, signals, projector=lambda x: x))
    if chosen.features is None:
        verdict.mismatch = "no merged features"
        return verdict
    place, keys = places(layout), F.normalize(metric, dim=-1)
    official = []  # indices of every view's dominant tokens
    for index, patches in enumerate(patches_by_view(layout)):
        order = patches[scores[patches].argsort(descending=True, stable=True)]
        cls = torch.zeros(1, dtype=torch.long)
        ranked = torch.cat([cls, 1 + place[order[:number]]])  # entry 0 is the CLS token
        verdict.same("dominant_idx", ranked, given["dominant_idx"][index])
        dominant = patches[torch.isin(patches, order[:number])]
        rest = patches[~torch.isin(patches, dominant)]
        rest = rest[place[rest].argsort()]
        targets, merged, nearest = assigned(rest, contextual, keys)
        dominant = dominant[place[dominant].argsort()]
        if "dominant_sorted" in given:
            verdict.same("dominant_sorted", place[dominant], given["dominant_sorted"][index])
            verdict.same("contextual_idx", place[targets], given["contextual_idx"][index])
            verdict.same("merged_idx", place[merged], given["merged_idx"][index])
            verdict.same("merged_assignment", nearest, given["merged_assignment"][index])
        sequence = torch.cat([dominant, targets])
        mine = chosen.keep[layout.view[chosen.keep] == index]
        verdict.same("kept", mine.sort().values, sequence.sort().values)
        if verdict.mismatch:
            return verdict
        rows = chosen.features[torch.searchsorted(chosen.keep, sequence)]
        output = torch.cat([given["hidden_states"][index, :1], rows])
        verdict.close("output", output, given["output"][index], 1e-5)
        official.append(place[dominant])
    if "sequence_code" in given:
        grid = params["num_patch_height"], params["num_patch_width"]
        sequence = _officially_restored(official, grid, contextual)
        verdict.same("sequence_code", sequence, given["sequence_code"])
    return verdict


def _officially_restored(dominant: list[Tensor], grid: tuple[int, int], contextual: int) -> Tensor:
    """Codes in the official order, of an image whose views are the crops of a grid.

    The dominant patches row by row over the whole grid, then the CLS tokens, then the contextual
    tokens crop by crop.
    """
    crop = torch.arange(len(dominant)).repeat_interleave(torch.tensor([*map(len, dominant)]))
    place = torch.cat(dominant)
    y, x = crop // grid[1] * 24 + place // 24, crop % grid[1] * 24 + place % 24
    order = (y * grid[1] * 24 + x).argsort()
    first = 10000 * torch.arange(len(dominant))
    merged = first[:, None] + 9001 + torch.arange(contextual)
    return torch.cat([(10000 * crop + place)[order], first + 9000, merged.flatten()])
