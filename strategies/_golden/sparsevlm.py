"""How vectors of SparseVLM go through our API."""

import torch

from tokenprune.golden import Case, Verdict, replay
from tokenprune.strategies.sparsevlm import ROWS, SparseVLM
from tokenprune.tokens import TokenLayout, VisualTokens


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
