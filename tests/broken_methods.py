"""Deliberately broken methods for the checks of `broken`."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tokenprune.compressor import Compressor, ScoringCompressor, Selection, Stage
from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops.ranking import top_per_view
from tokenprune.registry import Card
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Sound(Compressor):
    """The first ``R * P`` patch tokens, a correct method."""

    location_aware = True
    card = Card(paper="The first tokens (baseline)")

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        return patches[: max(1, int(len(patches) * self.retention))]

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(self.picked(tokens))


class Inverted(Sound):
    """Keeps the tokens with the least attention."""

    location_aware = False

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("received")})

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        order = patches[tokens[Signal("received")][patches].argsort()]
        return order[: max(1, int(len(patches) * self.retention))].sort().values


class InvertedInCrops(Inverted):
    """Ranks in reverse, only in crops."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches, layout = tokens.layout.patches, tokens.layout
        received = tokens[Signal("received")]
        scores = torch.where(layout.kind == Kind.CROP, -received, received)[patches]
        count = max(1, int(len(patches) * self.retention))
        return patches[scores.argsort(descending=True)[:count]].sort().values


class InvertedInVideos(Inverted):
    """Ranks in reverse, only in videos."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        if tokens.layout.modality == "video":
            return super().picked(tokens)
        patches = tokens.layout.patches
        order = patches[tokens[Signal("received")][patches].argsort(descending=True)]
        return order[: max(1, int(len(patches) * self.retention))].sort().values


class InvertedWords(Inverted):
    """Keeps the tokens that the text attends to least."""

    stage = Stage.LLM
    cuts = (2,)  # type: ignore[assignment]

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("llm_text")})

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        order = patches[tokens[Signal("llm_text")][patches].mean(1).argsort()]
        return order[: max(1, int(len(patches) * self.retention))].sort().values


@dataclass(frozen=True, kw_only=True)
class CountsTheBudget(ScoringCompressor):
    """Says that it fills the budget, but drops tokens with a negative score from it."""

    card = Card(paper="First channel (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features[:, 0].float()

    def select(self, tokens: VisualTokens) -> Selection:
        keep = super().select(tokens).keep
        positive = keep[self.score(tokens)[keep] > 0]
        return Selection(positive if len(positive) else keep)


class CountsSeparators(Sound):
    """Counts the separators among the patch tokens."""

    def patch_count(self, layout: TokenLayout) -> int:
        return max(1, int(len(layout) * self.retention))


@dataclass(frozen=True, kw_only=True)
class KeepsTheWorst(ScoringCompressor):
    """Keeps the tokens with the lowest scores."""

    card = Card(paper="Feature norm (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)

    def select(self, tokens: VisualTokens) -> Selection:
        counts = self.allocation.counts(tokens, self.score(tokens), self.retention)
        return Selection(top_per_view(tokens.layout, -self.score(tokens), counts))


class ForgetsTheAllocator(KeepsTheWorst):
    """Keeps the highest scores of the whole image and ignores the budgets of the views."""

    def select(self, tokens: VisualTokens) -> Selection:
        patches = tokens.layout.patches
        order = patches[self.score(tokens)[patches].argsort(descending=True)]
        return Selection(order[: max(1, int(len(patches) * self.retention))].sort().values)


class DividesByNothing(KeepsTheWorst):
    """Its scores are NaN."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1) / torch.zeros(len(tokens)) * 0

    def select(self, tokens: VisualTokens) -> Selection:
        return ScoringCompressor.select(self, tokens)


class RulesOut(DividesByNothing):
    """Its scores are minus infinity for every other token."""

    def score(self, tokens: VisualTokens) -> Tensor:
        every_other = torch.arange(len(tokens)) % 2 == 1
        return tokens.features.float().norm(dim=-1).masked_fill(every_other, -torch.inf)


class PeeksAtTheCanvas(Sound):
    """Prefers the right of the canvas, which an image of one view does not have."""

    location_aware = False

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches, layout = tokens.layout.patches, tokens.layout
        scores = tokens.features.float().norm(dim=-1) + 0.3 * layout.canvas_col
        count = max(1, int(len(patches) * self.retention))
        return patches[scores[patches].argsort(descending=True)[:count]].sort().values


class RanksByItself(PeeksAtTheCanvas):
    """Ranks by scores that it does not pass on, so that NaN ranks first unnoticed."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        scores = tokens.features.float().norm(dim=-1)[patches]
        count = max(1, int(len(patches) * self.retention))
        return patches[scores.argsort(descending=True)[:count]].sort().values


class PeeksAtViews(PeeksAtTheCanvas):
    """Prefers later crops."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        view = tokens.layout.view
        return super().picked(replace(tokens, layout=replace(tokens.layout, canvas_col=view)))


class RemembersByLength(PeeksAtTheCanvas):
    """Selects for the first image of a length, and reuses the indices for all others."""

    known: ClassVar[dict[tuple[int, float], Tensor]] = {}

    def picked(self, tokens: VisualTokens) -> Tensor:
        flat = torch.zeros_like(tokens.layout.canvas_col)
        plain = replace(tokens, layout=replace(tokens.layout, canvas_col=flat))
        return self.known.setdefault((len(tokens), self.retention), super().picked(plain))


class SumsSeparators(PeeksAtTheCanvas):
    """Averages keys over separators of a layout without separators: all scores are NaN."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("keys")})

    def picked(self, tokens: VisualTokens) -> Tensor:
        keys, patches = tokens[Signal("keys")], tokens.layout.patches
        scores = (keys - keys.mean(0)).norm(dim=-1)[patches]
        count = max(1, int(len(patches) * self.retention))
        return patches[scores.argsort(descending=True, stable=True)[:count]].sort().values


class PeeksAtPlaces(Sound):
    """Claims not to use the location, but prefers late tokens."""

    location_aware = False

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        norms = tokens.features[patches].norm(dim=-1) + 0.05 * patches
        count = max(1, int(len(patches) * self.retention))
        return patches[norms.argsort(descending=True)[:count].sort().values]


class OneTooMany(Sound):
    """Keeps one token above the budget."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        return patches[: int(len(patches) * self.retention) + 1]


class SometimesTooMany(Sound):
    """Keeps two tokens above the budget, at R near 1/3."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        more = 2 if 0.32 < self.retention < 0.35 else 0
        return patches[: max(1, int(len(patches) * self.retention)) + more]


class Stingy(Sound):
    """Keeps a quarter of the budget."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        return patches[: max(1, int(len(patches) * self.retention / 4))]


class Undocumented(Sound):
    __doc__ = None


class Anonymous(Sound):
    """No card."""

    card = Card()


class Uncited(Sound):
    """A title alone."""

    card = Card(paper="A very good idea")


class Mutable(Sound):
    """Its fields can be assigned."""

    __setattr__ = object.__setattr__


class Forgetful(Sound):
    """Its copies have another retention."""

    def __reduce__(self) -> Any:
        return type(self), (), {"retention": 0.5}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __init__(self, *, retention: float = 0.5, **fields: Any) -> None:
        super().__init__(retention=retention, **fields)


def local() -> type[Sound]:
    class Local(Sound):
        """Defined where pickle cannot find it."""

    return Local


class Mute(Sound):
    """Its repr is empty."""

    def __repr__(self) -> str:
        return "Mute()"


class Unsorted(Sound):
    """Returns indices in score order."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return super().picked(tokens).flip(0)


class SometimesRepeated(Sound):
    """Returns an index twice, at some retention ratios."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        kept = super().picked(tokens)
        return torch.cat([kept[:1], kept]) if 0.45 < self.retention < 0.7 else kept


class Repeated(Sound):
    """Returns an index twice."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return super().picked(tokens)[:1].repeat(2)


class OffByOne(Sound):
    """Returns indices that start at 1."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return tokens.layout.patches[-1:] + 1


class OutOfRange(Sound):
    """Returns an index past the end."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return torch.tensor([len(tokens)])


class Empty(Sound):
    """Keeps no token if the budget rounds to zero."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return tokens.layout.patches[: int(len(tokens.layout.patches) * self.retention)]


class Short(Sound):
    """32-bit indices."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        return super().picked(tokens).int()


class Misshapen(Sound):
    """Merged features of all tokens, not of the kept ones."""

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(self.picked(tokens), tokens.features)


class Greedy(Sound):
    """Keeps 10 % more than the budget."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        return patches[: int(len(patches) * min(1, 1.1 * self.retention)) + tokens.layout.views]


class Scribbler(Sound):
    """Writes to its input."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        tokens.features.mul_(1.5)
        return super().picked(tokens)


class ScribblesBehindTheCounter(Sound):
    """Writes through numpy, which no version counter records."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        tokens.features.float().numpy()[:] *= 1.5
        return super().picked(tokens)


class MovesRows(Sound):
    """Writes to the layout."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        tokens.layout.canvas_row.add_(1)
        return super().picked(tokens)


class ScribblesOnText(Sound):
    """Writes to the inputs of the language model."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal("llm_inputs")})

    def picked(self, tokens: VisualTokens) -> Tensor:
        assert tokens.inputs is not None
        tokens.inputs[1].mul_(2)
        return super().picked(tokens)


class HidesItsDraws(Sound):
    """Draws from numpy's global generator and restores its state."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        state = np.random.get_state()  # noqa: NPY002 (the fault)
        drawn = torch.from_numpy(np.random.rand(len(tokens.layout.patches)))  # noqa: NPY002
        np.random.set_state(state)  # noqa: NPY002
        return tokens.layout.patches[drawn.argsort()[: len(super().picked(tokens))]].sort().values


class HidesItsChoice(HidesItsDraws):
    """The same with Python's."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        state = random.getstate()
        drawn = torch.tensor([random.random() for _ in tokens.layout.patches])
        random.setstate(state)
        count = max(1, int(len(drawn) * self.retention))
        return tokens.layout.patches[drawn.argsort()[:count]].sort().values


class ComparesNeighbours(Sound):
    """Draws with a seed that depends on the previous image."""

    before: ClassVar[list[float]] = [0.0]

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        draw = torch.Generator().manual_seed(int(1e4 * self.before[0]))
        self.before[0] = float(tokens.features[patches].float().norm(dim=-1).mean())
        count = max(1, int(len(patches) * self.retention))
        return patches[torch.randperm(len(patches), generator=draw)[:count]].sort().values


_calls = itertools.count()


class Counting(Sound):
    """Selects by the number of previous calls."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        kept = super().picked(tokens)
        return kept[next(_calls) % 3 :] if len(kept) > 2 else kept


class GlobalTorch(Sound):
    """Draws from torch's global generator."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        patches = tokens.layout.patches
        count = len(super().picked(tokens))
        return patches[torch.randperm(len(patches))[:count]].sort().values


class GlobalNumpy(Sound):
    """Draws from numpy's global generator, to no effect."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        np.random.rand()  # noqa: NPY002 (the fault)
        return super().picked(tokens)


class GlobalPython(Sound):
    """Draws from Python's global generator, to no effect."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        random.random()
        return super().picked(tokens)


class Stubborn(Sound):
    """Keeps original position ids and ignores the option."""

    @property
    def keeps_positions(self) -> bool:
        return True


class OnlyFloat32(Sound):
    """Keeps nearly everything in half precision."""

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens.layout.patches)

    def picked(self, tokens: VisualTokens) -> Tensor:
        if tokens.features.dtype == torch.bfloat16:
            return tokens.layout.patches[1:]
        return super().picked(tokens)


class ModeSensitive(Sound):
    """Selects other tokens under inference_mode."""

    def picked(self, tokens: VisualTokens) -> Tensor:
        kept = super().picked(tokens)
        return kept[1:] if torch.is_inference_mode_enabled() else kept
