"""How vectors of HiRED go through our API."""

import torch

from tokenprune.attention import Projections, cls_row
from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies._golden._shared import mask_like, packed, places
from tokenprune.strategies.hired import HiRED
from tokenprune.tokens import Signal, TokenLayout, VisualTokens


@replay("hired")
def hired(case: Case) -> Verdict:
    """Budgets and masks with the official region map; the packing's defects are not ours."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params.get("kind") == "hook":
        tapped = Projections(params["heads"], 0.0, given["query"], given["key"])
        tapped.scale = (given["query"].shape[-1] / params["heads"]) ** -0.5
        wanted = given["hook_cls_attention"].mean(1)
        verdict.close("hook_cls_attention", cls_row(tapped, softmax=True), wanted, 1e-5)
        return verdict
    bottom = given["bottom_cls_attention"]
    strategy = HiRED(
        retention=params["token_budget_rate"], alpha=params.get("alpha", 0.5), official=True
    )
    start = 0
    for image, views in enumerate(params.get("views", [len(bottom)])):
        mine = slice(start, start + views)
        start += views
        signals, layout = {}, TokenLayout.single((24, 24))
        if views > 1:
            height, width = given["image_sizes_hw"][image].tolist()
            cells = views - 1
            grid = (2, 2) if cells == 4 else (cells, 1) if height > width else (1, cells)
            layout = TokenLayout.anyres(grid, (24, 24), (0, grid[0] * 24, 0, grid[1] * 24))
            early = Signal("cls_attention", strategy.early)
            signals[early] = packed(layout, given["top_cls_attention"][mine].mean(1))
        signals[strategy.saliency] = packed(layout, bottom[mine].mean(1))
        tokens = VisualTokens(layout, torch.zeros(len(layout), 1), signals)
        keep = strategy.select(tokens).keep
        if "budgets" in given:
            counts = torch.bincount(layout.view[keep], minlength=views)
            verdict.same("budgets", counts, given["budgets"].flatten()[mine])
        expected = given["keep_mask"].reshape(-1, 576)[mine]
        code = layout.view * 576 + places(layout)
        verdict.same("keep_mask", mask_like(expected, code[keep]), expected)
    return verdict
