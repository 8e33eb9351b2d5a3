"""The replay of GlobalCom²: its golden vectors through tokenprune's API."""

from typing import Literal

import torch
from torch import Tensor

from tokenprune.layout import Kind, TokenLayout, unpadded_box
from tokenprune.ops.spatial import project_thumbnail
from tokenprune.signals import Signal
from tokenprune.strategies._golden._shared import ranked
from tokenprune.strategies.globalcom2 import GlobalCom2
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("globalcom2")
def globalcom2(case: Case) -> Verdict:
    """Ratios in float64, counts and sets of every view; the official order has defects."""
    verdict, given, params = Verdict(), case.tensors, case.params
    width, height = given["image_size_wh"].tolist()
    grid = params["num_patch_height"], params["num_patch_width"]
    patches = given["thumb_scores"].numel()
    side = int(patches**0.5)
    rule: Literal["llava"] = "llava"  # the vectors were unpadded by the official rule
    box = unpadded_box((height, width), (grid[0] * side, grid[1] * side), rule)
    layout = TokenLayout.anyres(grid, (side, side), box)
    place = (layout.row * side + layout.col).clamp(min=0)
    crop = layout.kind == Kind.CROP
    scores = torch.where(
        crop,
        given["crop_scores"][(layout.view - 1).clamp(min=0), place],
        given["thumb_scores"][place],
    ).masked_fill(layout.is_separator, torch.nan)
    strategy = GlobalCom2(retention=params["base_ratio"], tau=params.get("temperature", 10.0))
    tokens = VisualTokens(layout, torch.zeros(len(layout), 1), {Signal("cls_logits"): scores})

    valid = torch.zeros(grid[0] * grid[1], patches, dtype=torch.bool)
    valid[layout.view[crop] - 1, place[crop]] = True
    verdict.same("valid_mask", valid, given["valid_mask"])
    if verdict.mismatch:
        return verdict
    ratios = strategy.allocation.ratios(tokens, strategy.retention)  # type: ignore[attr-defined]
    verdict.close("ratios", ratios, given["ratios"], 1e-14)
    guide = project_thumbnail(layout, scores)
    by_crop = _by_view(layout, layout.patches)
    verdict.close("guide_scores", guide[by_crop[crop[by_crop]]], given["guide_scores"], 1e-5)
    by_crop = by_crop[crop[by_crop]]
    dims = torch.stack([_extent(valid, side, axis) for axis in (1, 2)], 1)
    verdict.same("crop_dims_wh", dims, given["crop_dims_wh"])
    keep = strategy(tokens).keep
    kept = keep[~layout.is_separator[keep]]
    crops = kept[crop[kept]]
    counts = torch.bincount(layout.view[crops] - 1, minlength=grid[0] * grid[1])
    verdict.same("keep_counts", counts, given["keep_counts"])
    verdict.same("thumbnail", place[kept[~crop[kept]]], given["thumb_keep_sorted"])
    verdict.same("crops", place[_by_view(layout, crops)], given["keep_flat_sorted"])
    score = strategy.ranking(tokens)
    thumbnail = ranked(layout, score, kept[~crop[kept]])
    verdict.same("thumb_keep_order", thumbnail, given["thumb_keep_order"])
    order = ranked(layout, score, crops)
    verdict.same("keep_flat_order", order, given["keep_flat_order"])
    # Its place in the list of the crop's unpadded patches, in which the official code lays it out.
    view = torch.arange(len(counts)).repeat_interleave(counts)
    slot = valid.long().cumsum(1)[view, order] - 1
    verdict.same("keep_slot_order", slot, given["keep_slot_order"])
    code = torch.where(crop, layout.view * patches + place, place)
    code[layout.is_separator] = -1
    official = _officially_ordered(layout, code, place, kept, scores)
    verdict.order("sequence", code[keep], given["llm_sequence"], official)
    return verdict


def _extent(valid: Tensor, side: int, axis: int) -> Tensor:
    """(crops,) number of columns (axis 1) or rows (axis 2) of the masks with a valid patch."""
    crops = valid.view(-1, side, side)
    return crops.any(axis).sum(1)


def _officially_ordered(
    layout: TokenLayout, code: Tensor, place: Tensor, kept: Tensor, scores: Tensor
) -> Tensor:
    """Codes of the kept tokens in the order of the official code, with its defects (see the card).

    The thumbnail comes in score order.  A crop token is at its index in the list of the crop's
    unpadded patches and not at its location.  All canvas rows have a separator.
    """
    (rows, cols), side = layout.grid, layout.view_shape[1]
    thumbnail = kept[layout.kind[kept] == Kind.THUMBNAIL]
    thumbnail = thumbnail[scores[thumbnail].argsort(descending=True, stable=True)]
    crops = _by_view(layout, (layout.kind == Kind.CROP).nonzero().squeeze(1))
    view = layout.view[crops] - 1
    slot = torch.arange(len(crops)) - torch.searchsorted(view, view)
    y = view // cols * side + slot // side
    key = y * (cols * side + 1) + view % cols * side + slot % side
    chosen = torch.isin(crops, kept)
    newlines = torch.arange(1, rows * side + 1) * (cols * side + 1) - 1
    keys = torch.cat([key[chosen], newlines])
    codes = torch.cat([code[crops[chosen]], torch.full_like(newlines, -1)])
    return torch.cat([code[thumbnail], codes[keys.argsort()]])


def _by_view(layout: TokenLayout, index: Tensor) -> Tensor:
    """``index`` view by view, each in the order of its rows and columns."""
    place = layout.row * layout.view_shape[1] + layout.col
    patches = layout.view_shape[0] * layout.view_shape[1]
    return index[(layout.view[index] * patches + place[index]).argsort()]
