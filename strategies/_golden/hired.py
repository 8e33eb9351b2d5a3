"""The replay of HiRED: its golden vectors through tokenprune's API."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenprune.attention import Projections, cls_heads
from tokenprune.layout import TokenLayout, unpadded_box
from tokenprune.signals import Signal
from tokenprune.strategies._golden._shared import mask_like, packed, places
from tokenprune.strategies.hired import HiRED, MarkedPatches
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True)
class Strips(MarkedPatches):
    """The official region map: runs of the flattened thumbnail, that is, horizontal strips.

    The thumbnail's patches must divide into as many equal runs as there are crops.
    """

    least: ClassVar[int] = 0

    def per_crop(self, marks: Tensor, grid: tuple[int, int]) -> Tensor:
        return marks.view(grid[0] * grid[1], -1).sum(1)


@replay("hired")
def hired(case: Case) -> Verdict:
    """Budgets and masks with the official region map, packed with the official defects."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params.get("kind") == "hook":
        tapped = Projections(params["heads"], 0.0, given["query"], given["key"])
        tapped.scale = (given["query"].shape[-1] / params["heads"]) ** -0.5
        heads = cls_heads(tapped, softmax=True)[:, :, 1:]
        verdict.close("hook_cls_attention", heads, given["hook_cls_attention"], 1e-5)
        return verdict
    bottom = given["bottom_cls_attention"]
    alpha, early = params.get("alpha", 0.5), Signal("cls_attention", 0)
    strategy = HiRED(
        retention=params["token_budget_rate"], alpha=alpha, allocator=Strips(alpha, early)
    )
    start, emitted = 0, []
    for image, views in enumerate(params.get("views", [len(bottom)])):
        mine = slice(start, start + views)
        start += views
        signals, layout = {}, TokenLayout.single((24, 24))
        if views > 1:
            height, width = given["image_sizes_hw"][image].tolist()
            cells = views - 1
            grid = (2, 2) if cells == 4 else (cells, 1) if height > width else (1, cells)
            layout = TokenLayout.anyres(grid, (24, 24), (0, grid[0] * 24, 0, grid[1] * 24))
            signals[early] = packed(layout, given["top_cls_attention"][mine].mean(1))
        signals[strategy.saliency] = packed(layout, bottom[mine].mean(1))
        tokens = VisualTokens(layout, torch.zeros(len(layout), 1), signals)
        keep = strategy.select(tokens).keep
        if "budgets" in given:
            counts = torch.bincount(layout.view[keep], minlength=views)
            verdict.same("budgets", counts, given["budgets"].flatten()[mine])
        expected = given["keep_mask"].reshape(-1, 576)[mine]
        code = layout.view * 576 + places(layout)
        mask = mask_like(expected, code[keep])
        verdict.same("keep_mask", mask, expected)
        if "sub_budgets" in given:
            scores, shares = tokens[strategy.saliency], strategy.allocation
            crops = shares.counts(tokens, scores, strategy.retention)[1:]
            wanted = given["sub_budgets"].flatten()[start - views - image :][: views - 1]
            verdict.same("sub_budgets", crops, wanted)
        if views > 1:
            emitted.append(_officially_packed(mask, grid, (height, width)))
    if "packed_code" in given:
        verdict.same("packed_code", torch.cat(emitted), given["packed_code"])
        lengths = torch.tensor([len(one) for one in emitted])
        verdict.same("packed_lens", lengths, given["packed_lens"])
    return verdict


def _officially_packed(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Codes of the tokens that the official packing emits of a selection (views, 576).

    It swaps rows and columns of the crop grid, and then cuts the canvas padding where the image
    without the swap would have it.
    """
    rows, cols = grid
    code = torch.arange(mask.numel()).view_as(mask)
    crops = torch.where(mask, code, -1)[1:].view(cols, rows, 24, 24)
    canvas = crops.transpose(1, 2).reshape(cols * 24, rows * 24)
    top, bottom, left, right = unpadded_box(size, (cols * 24, rows * 24), "llava")
    plane = canvas[top:bottom, left:right].flatten()
    return torch.cat([code[0][mask[0]], plane[plane >= 0]])
