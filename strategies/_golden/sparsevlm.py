"""The replay of SparseVLM: its golden vectors through tokenprune's API."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenprune.attention import rotary_product
from tokenprune.layout import TokenLayout
from tokenprune.ops.clustering import density_peaks, recycling
from tokenprune.strategies.sparsevlm import HEADS, ROTARY, ROWS, SparseVLM, keenest
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens

LISTS = {
    "1.0": {"192": (300, 200, 110), "128": (303, 110, 36), "96": (238, 48, 26), "64": (66, 30, 17)},
    "2.0": {"192": (300, 200, 118), "128": (238, 108, 60), "96": (246, 54, 28), "64": (66, 34, 20)},
}
"""Official numbers of kept tokens at the three cuts, of 576, by version and nominal average."""


@dataclass(frozen=True, kw_only=True)
class Scheduled(SparseVLM):
    """SparseVLM that keeps as many tokens as the official code, up to R.

    Args:
        schedule: One of the official `LISTS`, or ``rank``: ``int(rank * scale + bias)`` tokens,
            with the rank of the raters' attention.
        scale, bias: Numbers of the formula for ``rank``.
    """

    schedule: Literal["rank", "192", "128", "96", "64"] = "rank"
    scale: float = 13.5
    bias: float = 0.0

    def most_kept(self, tokens: VisualTokens, rows: Tensor) -> int:
        if self.schedule == "rank":
            rank = int(torch.linalg.matrix_rank(rows[:, self.raters(tokens)]))
            kept = int(rank * self.scale + self.bias)
        else:
            kept = LISTS[self.version][self.schedule][(self.cut or len(self.depths)) - 1]
        return min(kept, len(rows) - 1)


@replay("sparsevlm")
def sparsevlm(case: Case) -> Verdict:
    """Raters, kept and merged tokens of every cut, in the order of the official code."""
    verdict, given, params = Verdict(), case.tensors, case.params
    embeds, start = given["embeds"][0], params["visual_start"]
    visual, text = embeds[start:].split([params["visual_tokens"], params["text_tokens"]])
    states, cuts = visual, params["pruning_layers"]
    version: Literal["1.0", "2.0"] = "2.0" if "heads_kept" in params else "1.0"
    named = {"scale": params["scale"], "bias": params["bias"]} if "scale" in params else {}
    # The counts of a list belong to these layers; a case may cut after only some of them.
    layers = cuts if named else sorted({2, 6, 15, *cuts})
    strategy = Scheduled(
        retention=1.0,  # bounds nothing here
        version=version,
        heads=params.get("heads_kept", 1),
        schedule="rank" if named else str(params["retain_setting"]),  # type: ignore[arg-type]
        depths=tuple((layer + 1) / 32 for layer in layers),
        **named,
    )
    places = torch.arange(start, len(embeds) - len(text))
    for layer in cuts:
        heads = given[f"layer{layer}_text_to_visual"].permute(2, 1, 0)
        layout = TokenLayout.single((1, len(states)), newline=False)
        signals = {ROWS: heads.mean(-1), HEADS: heads}
        if version == "2.0":
            signals[ROTARY] = _rotary(params, places, len(text), len(embeds))
        tokens = VisualTokens(layout, states, signals, inputs=(visual, text))
        raters = strategy.raters(tokens)
        score = strategy.rows(tokens).sum(1) / raters.sum()
        verdict.same("rater_idx", raters.nonzero().squeeze(1), given["rater_idx"])
        verdict.close(f"relation of layer {layer}", score, given[f"layer{layer}_relation"], 1e-6)
        chosen = strategy.at((layer + 1) / 32).select(tokens)
        kept = given[f"layer{layer}_kept"]
        if version == "2.0":  # nothing is merged, and position ids stay
            corrected = (heads / signals[ROTARY][..., None]).masked_fill(~raters[:, None], 0)
            best = keenest(corrected, strategy.heads)
            verdict.same(f"heads of layer {layer}", best, given[f"layer{layer}_heads"])
            verdict.same(f"kept in layer {layer}", chosen.keep, kept)
            states, places = states[chosen.keep], places[chosen.keep]
            after = torch.arange(len(embeds) - len(text), len(embeds))
            positions = torch.cat([torch.arange(start), places, after])
            verdict.same("position_ids", positions, given[f"layer{layer}_position_ids"])
            continue
        _check_clusters(verdict, given, layer, states, score)
        recycled = given[f"layer{layer}_recycled"]
        merged = given[f"layer{layer}_merged"]
        # With one cluster the official centre is random; ours is the first of the recycled tokens.
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


def _check_clusters(
    verdict: Verdict, given: Mapping[str, Tensor], layer: int, states: Tensor, score: Tensor
) -> None:
    """Compare which tokens ``states`` (P, D) are recycled by ``score`` (P,), and their clusters."""
    kept, recycled = given[f"layer{layer}_kept"], given[f"layer{layer}_recycled"]
    _, number, _ = recycling(len(states), len(kept), len(states), 0.3)
    mine = score.argsort(descending=True, stable=True)[len(kept) :][:number]
    verdict.same(f"recycled in layer {layer}", mine, recycled)
    clusters = len(given[f"layer{layer}_merged"])
    found, cluster = density_peaks(states[recycled], clusters)
    verdict.same(f"clusters of layer {layer}", cluster, given[f"layer{layer}_cluster_of"])
    if clusters > 1:
        verdict.same(f"centers of layer {layer}", found, given[f"layer{layer}_centers"])


def _rotary(params: dict[str, Any], places: Tensor, text: int, length: int) -> Tensor:
    """(N, T) `rotary_product` of the tokens at ``places`` (N,) and the last ``text`` tokens."""
    width = params["rope_head_dim"]
    pace = params["rope_base"] ** -(torch.arange(0, width, 2) / width)
    angle = (torch.arange(length)[:, None] * pace).repeat(1, 2)
    asking = torch.arange(length - text, length)
    return rotary_product((angle.cos(), angle.sin()), asking)[:, places].T
