"""The replay of PruMerge: its golden vectors through tokenprune's API."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenprune.allocators import Proportional
from tokenprune.attention import Projections, cls_row
from tokenprune.layout import TokenLayout
from tokenprune.ops.merging import nearest_others
from tokenprune.signals import Signal
from tokenprune.strategies.prumerge import PruMerge
from tokenprune.strategies.prumerge_plus import PruMergePlus
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Sampled(PruMergePlus):
    """PruMerge+ with the samples of a case.

    Args:
        start: The first sample.
        step: Distance of the samples in raster order; 0 leaves it to the method.
    """

    start: int = 0
    step: int = 0

    def samples(self, patches: int, step: int) -> slice:
        return slice(self.start, patches - 1, self.step or step)


@replay("prumerge")
def prumerge(case: Case) -> Verdict:
    """Scores, centres and merged tokens of every image, in the official order and number.

    Our centres never repeat.  If official centres do, the values are compared with the repeats
    inserted.
    """
    verdict, given, params = Verdict(), case.tensors, case.params
    centres = params["centers"]
    tapped = Projections(1, params["dim"] ** -0.5, given["query_cls"][:, None], given["key"])
    scores = cls_row(tapped, softmax=True)
    verdict.close("cls_attn", scores, given["cls_attn"], 1e-5)
    side = int(params["patches"] ** 0.5)
    layout = TokenLayout.single((side, side), newline=False)
    best, step, start = params["top_k"], params["spatial_step"] or 0, 0
    if centres > best and not params["adaptive"]:  # the training path, repeats included
        step = int(1 / params["reduction_ratio"])
        start = step // 2
    for image, score in enumerate(scores):
        wanted, output = given["center_idx"][image], given["output"][image]
        number = len(wanted.unique())
        strategy = Sampled(
            retention=(number + 1) / params["patches"],
            allocator=Proportional("half-even"),
            spatial=max(0, number - best) / number,
            step=step,
            start=start,
        )
        signals = {
            strategy.saliency: score,
            strategy.metric: given["key"][image, 1:],
            Signal("unprojected"): given["hidden_states"][image, 1:],
        }
        tokens = VisualTokens(
            layout, given["hidden_states"][image, 1:], signals, projector=lambda x: x
        )
        if params["adaptive"] and len(scores) == 1:  # officially one count for a whole batch
            _check_adaptive(verdict, tokens, strategy, wanted)
        chosen = strategy.select(tokens)
        if chosen.features is None:
            verdict.mismatch = "no merged features"
            return verdict
        ours = torch.isin(chosen.keep, wanted)
        verdict.same("set of centres", chosen.keep[ours], wanted.unique())
        chain = score.argsort(descending=True, stable=True)[:best]
        samples = torch.arange(start, len(score) - 1, step) if step else chain[:0]
        if number == centres:  # in the adaptive path no sample is an attended patch
            samples = samples[~torch.isin(samples, chain)]
        verdict.same("center_idx", torch.cat([chain, samples]), wanted)
        official = _officially_merged(tokens, strategy, wanted)
        verdict.same("complement_idx", official[0], given["complement_idx"][image])
        nearest = given["neighbours"][image]
        verdict.same("neighbours", official[1][: len(nearest)], nearest)
        if number < centres:
            verdict.with_defects("output", official[2], output, 1e-4)
            continue
        verdict.close("output", chosen.features[ours], output[:-1][wanted.argsort()], 1e-4)
        verdict.close("extra", chosen.features[~ours], output[-1:], 1e-4)
    return verdict


def _check_adaptive(
    verdict: Verdict, tokens: VisualTokens, strategy: PruMergePlus, wanted: Tensor
) -> None:
    """Compare the adaptive centres with ``wanted`` (K,), the official ones of a case."""
    kind = PruMergePlus if strategy.spatial else PruMerge
    kept = kind(retention=0.999, adaptive=True).select(tokens).keep  # with the extra token
    verdict.same("adaptive centres", wanted, wanted[torch.isin(wanted, kept)])
    verdict.same("adaptive count", torch.tensor(len(kept) - 1), torch.tensor(len(wanted)))


def _officially_merged(
    tokens: VisualTokens, strategy: PruMerge, centres: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The official result for centres (K,) that may repeat.

    The official list of the other patches always has length P - K, so that with repeats it lacks
    the first of them.  A centre absorbs its own copies.

    Returns:
        (P - K,) the other patches, (K, neighbours) the patches that each centre absorbs, and
        (K + 1, C) the vectors of the centres and of the extra token.
    """
    scores, vectors = tokens[strategy.saliency], tokens[Signal("unprojected")]
    unit = F.normalize(tokens[strategy.metric], dim=-1)
    others = torch.arange(len(scores)).index_fill(0, centres, 0).sort().values[len(centres) :]
    pool = torch.cat([centres, others])
    own = torch.arange(len(centres))
    found = pool[nearest_others(unit[centres], unit[pool], own, strategy.neighbours)]
    weighted = scores[:, None] * vectors
    made = vectors[centres] + weighted[found].sum(1)
    return others, found, torch.cat([made, weighted[others].sum(0, keepdim=True)])
