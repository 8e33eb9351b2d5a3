"""How each method's official vectors go through our API (see `tokenprune.golden`)."""

from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.attention import Projections, cls_row
from tokenprune.budget import Proportional
from tokenprune.golden import Case, Verdict, replay
from tokenprune.primitives import project_thumbnail
from tokenprune.strategies.dart import DART
from tokenprune.strategies.divprune import DivPrune
from tokenprune.strategies.fastervlm import FasterVLM
from tokenprune.strategies.fastv import FastV
from tokenprune.strategies.globalcom2 import GlobalCom2
from tokenprune.strategies.hired import HiRED
from tokenprune.strategies.prumerge import PruMerge
from tokenprune.strategies.pyramiddrop import PyramidDrop
from tokenprune.strategies.sparsevlm import ROWS, SparseVLM
from tokenprune.strategies.vidcom2 import VidCom2
from tokenprune.strategies.visionzip import VisionZip
from tokenprune.strategies.vispruner import VisPruner
from tokenprune.tokens import Kind, Signal, TokenLayout, VisualTokens, unpadded_box


@replay("globalcom2")
def globalcom2(case: Case) -> Verdict:
    """Ratios in float64, counts and sets of every view; order is officially defective."""
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

    keep = strategy(tokens).keep
    kept = keep[~layout.is_separator[keep]]
    crops = kept[crop[kept]]
    counts = torch.bincount(layout.view[crops] - 1, minlength=grid[0] * grid[1])
    verdict.same("keep_counts", counts, given["keep_counts"])
    verdict.same("thumbnail", place[kept[~crop[kept]]], given["thumb_keep_sorted"])
    verdict.same("crops", place[_by_view(layout, crops)], given["keep_flat_sorted"])
    code = torch.where(crop, layout.view * patches + place, place)
    code[layout.is_separator] = -1
    official = _officially_ordered(layout, code, place, kept, scores)
    verdict.order("sequence", code[keep], given["llm_sequence"], official)
    return verdict


def _officially_ordered(
    layout: TokenLayout, code: Tensor, place: Tensor, kept: Tensor, scores: Tensor
) -> Tensor:
    """The kept tokens in the order of the official code, defects included (its card names them).

    The thumbnail comes in score order; a crop token lies at its index in the list of the crop's
    unpadded patches instead of at its place; and all canvas rows have a newline.
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


@replay("fastv")
def fastv(case: Case) -> Verdict:
    """The kept set, and the surviving positions of the whole prompt."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params["K"] < 1:
        return Verdict(skipped="K = 0 is a random mask in the official code, not FastV")
    start, length = params["image_start"], params["image_length"]
    if params["attention_rank"] is not None:
        retention = params["attention_rank"] / length
    else:
        retention = 1 - params["reduction_ratio"]
    strategy = FastV(layer=params["K"], retention=retention)
    row = given["last_row"].float().mean(0)
    visual = row[start : start + length]
    layout = TokenLayout.single((1, length), newline=False)
    keep = strategy(VisualTokens(layout, torch.zeros(length, 1), {strategy.row: visual})).keep
    verdict.close("mean_visual_score", visual, given["mean_visual_score"], 1e-6)
    verdict.same("kept_visual", keep, given["kept_visual"])
    after = torch.arange(start + length, len(row))
    survivors = torch.cat([torch.arange(start), start + keep, after])
    verdict.same("keep_positions", survivors, given["keep_positions"])
    return verdict


def _by_view(layout: TokenLayout, index: Tensor) -> Tensor:
    """``index`` view after view, each in the order of its own rows and columns."""
    place = layout.row * layout.view_shape[1] + layout.col
    patches = layout.view_shape[0] * layout.view_shape[1]
    return index[(layout.view[index] * patches + place[index]).argsort()]


@replay("fastervlm")
def fastervlm(case: Case) -> Verdict:
    """The mask of every view, and the order the language model receives; all views are padded."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = _padded(given["cls_attention"], params)
    scores = _packed(layout, given["cls_attention"].mean(1))
    strategy = FasterVLM(retention=params["visual_token_num"] / params["patches"])
    keep = strategy(VisualTokens(layout, scores[:, None], {strategy.saliency: scores})).keep
    code = layout.view * params["patches"] + _place(layout)
    verdict.same("keep_mask", _mask(given["keep_mask"], code[keep]), given["keep_mask"])
    if "sequence_code" in given:
        verdict.same("sequence_code", code[keep], given["sequence_code"].flatten())
    return verdict


@replay("visionzip")
def visionzip(case: Case) -> Verdict:
    """Dominant and contextual tokens of every view; official order and CLS token are not ours."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = _padded(given["cls_attention"], params)
    contextual = params["contextual_num"]
    count = params["dominant_num"] + contextual
    strategy = VisionZip(retention=count / params["patches"], contextual=contextual / count)
    hidden = _packed(layout, given["hidden_states"][:, 1:])
    signals = {
        strategy.saliency: _packed(layout, given["cls_attention"].mean(1)),
        strategy.metric: _packed(layout, given["metric"][:, 1:]),
        Signal("unprojected"): hidden,
    }
    chosen = strategy.select(VisualTokens(layout, hidden, signals, projector=lambda x: x))
    assert chosen.features is not None
    place, view = _place(layout)[chosen.keep], layout.view[chosen.keep]
    for index, (ranked, output) in enumerate(
        zip(given["dominant_idx"], given["output"], strict=True)
    ):
        dominant = (ranked[ranked > 0] - 1).sort().values  # entry 0 is the CLS token
        mine = view == index
        ours = torch.isin(place[mine], dominant)
        verdict.same("dominant_idx", place[mine][ours], dominant)
        verdict.close("output", chosen.features[mine][ours], output[1 : 1 + len(dominant)], 1e-6)
        # Targets in the order of their places, as officially.
        merged = chosen.features[mine][~ours]
        verdict.close("contextual", merged, output[1 + len(dominant) :], 1e-5)
    return verdict


@replay("vispruner")
def vispruner(case: Case) -> Verdict:
    """The mask of every view; all views are padded."""
    verdict, given, params = Verdict(), case.tensors, case.params
    layout = _padded(given["cls_attention"], params)
    strategy = VisPruner(
        retention=params["visual_token_num"] / params["patches"],
        important=params["important_ratio"],
    )
    features = _packed(layout, given["features"])
    signals = {
        strategy.saliency: _packed(layout, given["cls_attention"].mean(1)),
        Signal("unprojected"): features,
    }
    keep = strategy.select(VisualTokens(layout, features, signals)).keep
    code = layout.view * params["patches"] + _place(layout)
    verdict.same("keep_mask", _mask(given["keep_mask"], code[keep]), given["keep_mask"])
    return verdict


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
    if len(bottom) > 1:
        height, width = given["image_sizes_hw"][0].tolist()
        cells = len(bottom) - 1
        grid = (2, 2) if cells == 4 else (cells, 1) if height > width else (1, cells)
        layout = TokenLayout.anyres(grid, (24, 24), (0, grid[0] * 24, 0, grid[1] * 24))
    else:
        layout = TokenLayout.single((24, 24))
    signals = {strategy.saliency: _packed(layout, bottom.mean(1))}
    if len(bottom) > 1:
        early = Signal("cls_attention", strategy.early)
        signals[early] = _packed(layout, given["top_cls_attention"].mean(1))
    features = torch.zeros(len(layout), 1)
    keep = strategy.select(VisualTokens(layout, features, signals)).keep
    if "budgets" in given:
        counts = torch.bincount(layout.view[keep], minlength=len(bottom))
        verdict.same("budgets", counts, given["budgets"])
    code = layout.view * 576 + _place(layout)
    verdict.same("keep_mask", _mask(given["keep_mask"], code[keep]), given["keep_mask"])
    return verdict


@replay("divprune")
def divprune(case: Case) -> Verdict:
    """The picked set, and what is left of a whole prompt."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if params["kind"] == "sequence":
        start, length = params["assumed_system_tokens"], params["visual_tokens"]
        if params["system_tokens"] != start:
            return Verdict(skipped="the official code assumes a wrong visual span here")
        features = given["sequence_embeds"][start : start + length]
    else:
        features, length = given["features"], params["num_tokens"]
    layout = TokenLayout.single((1, length), newline=False)
    keep = DivPrune(retention=params["ratio"])(VisualTokens(layout, features)).keep
    verdict.same("selected", keep, given["selected"].sort().values)
    if params["kind"] == "sequence":
        after = torch.arange(start + length, len(given["sequence_embeds"]))
        survivors = torch.cat([torch.arange(start), start + keep, after])
        verdict.same("sequence_keep", survivors, given["sequence_keep"])
    return verdict


@replay("vidcom2")
def vidcom2(case: Case) -> Verdict:
    """Resemblances, ratios, budgets and the kept set of a video."""
    verdict, given, params = Verdict(), case.tensors, case.params
    frames, size = params["frames"], params["tokens_per_frame"]
    layout = TokenLayout.video(frames, (1, size))
    newline = torch.zeros(1, params["channels"])
    tokens = VisualTokens(layout, torch.cat([given["features"], newline]))
    strategy = VidCom2(retention=params["base_ratio"], temperature=params["softmax_temperature"])
    to_video, to_frame = strategy.resemblance(tokens)
    verdict.close("video_score", to_video.view(frames, size), given["video_score"], 1e-4)
    verdict.close("frame_score", to_frame.view(frames, size), given["frame_score"], 1e-4)
    ratios = strategy.ratios(tokens, to_video)
    verdict.close("frame_ratio", ratios, given["frame_ratio"], 1e-3)
    keep = strategy.select(tokens).keep
    counts = torch.bincount(layout.view[keep], minlength=frames)
    verdict.same("frame_budget", counts, given["frame_budget"])
    verdict.same("keep_global", keep, given["keep_global"])
    return verdict


@replay("prumerge")
def prumerge(case: Case) -> Verdict:
    """Scores, centres and merged tokens of every image; order and budget are the official ones."""
    verdict, given, params = Verdict(), case.tensors, case.params
    centres = params["centers"]
    tapped = Projections(1, params["dim"] ** -0.5, given["query_cls"][:, None], given["key"])
    scores = cls_row(tapped, softmax=True)
    verdict.close("cls_attn", scores, given["cls_attn"], 1e-5)
    layout = TokenLayout.single((24, 24), newline=False)
    strategy = PruMerge(
        retention=(centres + 1) / params["patches"],
        spatial=params["spatial_added"] / centres,
        step=params["spatial_step"] or 0,
        allocator=Proportional("half-even"),
    )
    for image, score in enumerate(scores):
        signals = {
            strategy.saliency: score,
            strategy.metric: given["key"][image, 1:],
            Signal("unprojected"): given["hidden_states"][image, 1:],
        }
        features = given["hidden_states"][image, 1:]
        chosen = strategy.select(VisualTokens(layout, features, signals, projector=lambda x: x))
        assert chosen.features is not None
        wanted, output = given["center_idx"][image], given["output"][image]
        ours = torch.isin(chosen.keep, wanted)
        verdict.same("center_idx", chosen.keep[ours], wanted.sort().values)
        verdict.close("output", chosen.features[ours], output[:-1][wanted.argsort()], 1e-4)
        verdict.close("extra", chosen.features[~ours], output[-1:], 1e-4)
    return verdict


@replay("dart")
def dart(case: Case) -> Verdict:
    """The kept set, with the shares and the order of the ports."""
    verdict, given, params = Verdict(), case.tensors, case.params
    start, length = params["image_start"], params["image_length"]
    strategy = DART(
        retention=params.get("keep_ratio", 1 - params.get("reduction_ratio", 0.5)),
        image_pivots=params["pivot_image_token"],
        text_pivots=params["pivot_text_token"],
        official=True,
        start=start,
    )
    keys = given["key_states"][0].transpose(0, 1).flatten(1)
    states = given["hidden_norm"][0]
    image, text = slice(start, start + length), slice(start + length, None)
    tokens = VisualTokens(
        TokenLayout.single((1, length), newline=False),
        states[image],
        {strategy.keys: keys[image], Signal("llm_states"): states[image]},
        text={strategy.keys: keys[text], Signal("llm_states"): states[text]},
    )
    verdict.same("kept", start + strategy.select(tokens).keep, given["kept"])
    return verdict


@replay("pyramiddrop")
def pyramiddrop(case: Case) -> Verdict:
    """The kept set of a stage and what is left of the prompt, from the official attention row."""
    verdict, given, params = Verdict(), case.tensors, case.params
    ratios, start = params["ratio_list"], params["image_start"]
    depths = tuple((i + 1) / (len(ratios) + 1) for i in range(len(ratios)))
    strategy = PyramidDrop(retention=ratios[-1], depths=depths).at(depths[params["stage"]])
    for row, attention in enumerate(given["attention_row"]):
        length, entered = params["visual_before"][row], params["original_visual"][row]
        score = attention.float().mean(0)
        visual = score[start : start + length]
        layout = TokenLayout.single((1, length), newline=False)
        signals = {Signal("llm_ahead"): visual}
        tokens = VisualTokens(layout, torch.zeros(length, 1), signals, entered=entered)
        keep = strategy.select(tokens).keep
        verdict.close("visual_score", visual, given["visual_score"][row], 1e-6)
        verdict.same("kept", keep, given["kept"][row])
        after = start + length + torch.arange(params["text_tokens"][row])
        survivors = torch.cat([torch.arange(start), start + keep, after])
        expected = given["survivors"][row]
        verdict.same("survivors", survivors, expected[expected >= 0])
    return verdict


@replay("sparsevlm")
def sparsevlm(case: Case) -> Verdict:
    """Raters, kept and merged tokens of every cut, in the order the official code leaves them."""
    verdict, given, params = Verdict(), case.tensors, case.params
    if "heads_kept" in params:
        return Verdict(skipped="SparseVLM+ is not offered (see the card)")
    embeds, start = given["embeds"][0], params["visual_start"]
    visual, text = embeds[start:].split([params["visual_tokens"], params["text_tokens"]])
    states, cuts = visual, params["pruning_layers"]
    named = {"scale": params["scale"], "bias": params["bias"]} if "scale" in params else {}
    strategy = SparseVLM(
        retention=0.999,  # bounds nothing here
        schedule="rank" if named else str(params["retain_setting"]),  # type: ignore[arg-type]
        depths=tuple((layer + 1) / 32 for layer in cuts),
        **named,
    )
    for layer, depth in zip(cuts, strategy.depths, strict=True):
        rows = given[f"layer{layer}_text_to_visual"].mean(0).T
        layout = TokenLayout.single((1, len(states)), newline=False)
        tokens = VisualTokens(layout, states, {ROWS: rows}, inputs=(visual, text))
        raters = strategy.raters(tokens)
        score = rows[:, raters].mean(1)
        verdict.same("rater_idx", raters.nonzero().squeeze(1), given["rater_idx"])
        verdict.close(f"relation of layer {layer}", score, given[f"layer{layer}_relation"], 1e-6)
        chosen = strategy.at(depth).select(tokens)
        kept, recycled = given[f"layer{layer}_kept"], given[f"layer{layer}_recycled"]
        merged = given[f"layer{layer}_merged"]
        # With one cluster the official centre is noise; ours is then the best of the recycled.
        centres = recycled[given.get(f"layer{layer}_centers", torch.tensor([0]))]
        order = torch.cat([kept, centres]).argsort()
        verdict.same(f"kept in layer {layer}", chosen.keep, torch.cat([kept, centres])[order])
        if verdict.mismatch or chosen.features is None:
            return verdict
        states = torch.cat([states[kept], chosen.features[order.argsort()[len(kept) :]]])
        verdict.close(f"merged in layer {layer}", states[len(kept) :], merged, 1e-5)
    left = torch.cat([embeds[:start], states, text])
    verdict.close("final_sequence", left, given["final_sequence"], 1e-5)
    return verdict


def _padded(maps: Tensor, params: dict[str, Any]) -> TokenLayout:
    """Views with all their padding and without separators, as some official codes have them."""
    side = int(params["patches"] ** 0.5)
    if len(maps) == 1:
        return TokenLayout.single((side, side), newline=False)
    grid = params.get("num_patch_height", 0), params.get("num_patch_width", 0)
    if len(maps) != 1 + grid[0] * grid[1]:  # views without a thumbnail
        return TokenLayout.video(len(maps), (side, side))
    box = (0, grid[0] * side, 0, grid[1] * side)
    return TokenLayout.anyres(grid, (side, side), box, newlines=False)


def _place(layout: TokenLayout) -> Tensor:
    """(N,) index of every entry in its view."""
    return layout.row * layout.view_shape[1] + layout.col


def _packed(layout: TokenLayout, maps: Tensor) -> Tensor:
    """(N, ...) values of maps (views, patches, ...), NaN at separators."""
    values = maps[layout.view, _place(layout).clamp(min=0)]
    values[layout.is_separator] = torch.nan
    return values


def _mask(like: Tensor, code: Tensor) -> Tensor:
    """A mask of the shape of ``like`` that is true at the flat places ``code``."""
    mask = torch.zeros(like.numel(), dtype=torch.bool)
    mask[code] = True
    return mask.view_as(like)
