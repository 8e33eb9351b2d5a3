"""The contract: one image's packed visual tokens in, sorted indices out."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import torch
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from torch import Tensor

from tokenprune import allocators, budget
from tokenprune.allocators import Allocator, Proportional
from tokenprune.errors import ContractError, RetentionWarning, UserError, shown
from tokenprune.layout import TokenLayout, moved
from tokenprune.ops.ranking import best_per_view
from tokenprune.precision import autocasts, like_now, without_autocast
from tokenprune.registry import Card
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens, told
from tokenprune.untouched import watched

__all__ = [
    "Chain",
    "Compressor",
    "Depths",
    "ScoringCompressor",
    "Selection",
    "Separators",
    "Stage",
    "StagedCompressor",
    "best",
    "check_cuts",
    "cut_layer",
    "keep_best",
    "placed",
    "warn_about_empty_views",
]


Separators = Literal["all", "rows", "none"]


LARGEST = 2**31 - 1  # that any number of a strategy may be; PyTorch takes it in every dtype we use


class Stage(StrEnum):
    """Where a compressor acts."""

    ENCODER = "encoder"
    PRE_LLM = "pre_llm"
    LLM = "llm"


@dataclass(frozen=True, eq=False)
class Selection:
    """What is left of N entries.

    Attributes:
        keep: (M,) int64 sorted, unique indices into the N entries, on whatever device; on the CPU
            once the core has checked them.
        features: (M, D) new features of the kept entries where dropped ones were merged into
            them, else None.
        sizes: (M,) how many entries each kept one stands for, where attention behind the cut shall
            count it that often (proportional attention: the logarithm is added to the logits of its
            key, also in later decode steps), else None.  Inside the language model only; a later
            selection that gives sizes counts what it sees as one each.
        scores: Numbers of any shape that the choice rests on, where the strategy ranks by itself;
            the core refuses the selection unless all are finite.  None where `keep_best` or `best`
            ranks, which look at the scores themselves.
    """

    keep: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A compression method.  Its fields are its hyper-parameters and make up its `repr`.

    Subclasses are frozen, keyword-only dataclasses that implement `select`.  They see ONE image at
    a time as `VisualTokens`: never a batch, a padding mask, a hook or a model class.

    Attributes:
        retention: R in (0, 1], kept patch tokens / patch tokens.
        separators: Which separators stay: ``all`` (as in the official LLaVA-NeXT methods),
            ``rows`` (those of canvas rows that keep a token) or ``none``.  They are never part of
            R, and the ledger shows them apart.
        location_aware: Whether the choice depends on where tokens lie by design, as in baselines
            that keep evenly spaced tokens.
        position_ids: ``compact`` re-indexes what is left as a shorter prompt, ``original`` keeps
            the position ids of the full one.  ``auto`` is ``compact`` before the language model and
            ``original`` inside it, as the official codes do.
    """

    retention: float
    separators: Separators = "all"
    position_ids: Literal["auto", "compact", "original"] = "auto"

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.PRE_LLM
    location_aware: ClassVar[bool] = False
    card: ClassVar[Card] = Card()

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = _validated(type(self), item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        budget.check_retention(self.retention)

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Choose among the patch tokens; the core adds the separators afterwards."""

    @property
    def needs(self) -> frozenset[Signal]:
        """What the strategy needs to see besides features and layout; nothing else is computed."""
        return frozenset()

    def ranking(self, tokens: VisualTokens) -> Tensor | None:
        """(N,) by what `select` ranks these tokens, higher is kept first; None if it does not.

        For pictures and analyses; values at separators have no meaning.
        """
        return None

    @property
    def cuts(self) -> tuple[int | float, ...]:
        """Where an ``llm`` strategy selects: in front of which decoder layers, ascending.

        Whole numbers are indices of layers, fractions in (0, 1) shares of the decoder's depth.
        """
        return ()

    def at(self, cut: int | float) -> Compressor:
        """What selects at ``cut``, one of `cuts`; itself unless its cuts differ."""
        return self

    @property
    def fills_budget(self) -> bool:
        """Whether it keeps as much as R allows; False where content may decide to keep less."""
        return True

    @property
    def allocation(self) -> Allocator | None:
        """What says how many tokens each view keeps, if it is an allocator."""
        allocator: Allocator | None = getattr(self, "allocator", None)
        return allocator

    def limit(self, tokens: VisualTokens) -> int:
        """How many patch tokens `select` may keep; more are an error.

        The default is R of those that are there, rounded up once a view, or what the allocator may
        hand out (`Allocator.limit`).  Strategies that select in several places and keep more at
        first, or go beyond R by design, override it.
        """
        if self.allocation is not None:
            return self.allocation.limit(tokens.layout, self.retention)
        return budget.rounded_up(tokens.layout, self.retention)

    @property
    def keeps_positions(self) -> bool:
        """Whether survivors keep the position ids of the full prompt."""
        default = "original" if self.stage is Stage.LLM else "compact"
        return (default if self.position_ids == "auto" else self.position_ids) == "original"

    @property
    def label(self) -> str:
        """The spec string that rebuilds the method apart from its retention, for tables."""
        plain = {
            item.name: item.default_factory()
            if item.default_factory is not dataclasses.MISSING
            else item.default
            for item in dataclasses.fields(self)
        }
        changed = {
            name: getattr(self, name)
            for name, default in plain.items()
            if name != "retention" and getattr(self, name) != default
        }
        options = ",".join(f"{name}={_spell(value)}" for name, value in changed.items())
        return f"{self.name or type(self).__name__}{':' if options else ''}{options}"

    def parts(self) -> Iterator[Compressor]:
        """The compressors this one runs, in order (itself, unless it is a `Chain`)."""
        yield self

    def flops(self, tokens: VisualTokens) -> float | None:
        """FLOPs of the strategy beyond those of its signals; None: `select` is measured.

        Override it where the strategy works outside `select`, as in the vision tower.  The figure
        may depend on shapes and dtypes alone, never on values.
        """
        return None

    def memory(self, tokens: VisualTokens) -> float | None:
        """Bytes that the strategy holds at its peak besides ``tokens``; see `flops`."""
        return None

    def __call__(self, tokens: VisualTokens) -> Selection:
        """`select` plus the separators, checked.  This is what the engine runs.

        Raises:
            ContractError: The strategy broke the contract: unsorted, repeated, out of range, empty,
                more than its `limit`, features of the wrong shape, scores that are not finite, or
                it wrote to what it was shown (`tokenprune.untouched`).
        """
        layout = tokens.layout.host
        # Nothing to choose, whatever a formula makes of it.
        if self.retention == 1 or not len(layout.patches):
            chosen = Selection(layout.patches)
        else:
            device, shown = tokens.features.device, tokens
            if tokens.projector is not None and autocasts(device):
                shown = dataclasses.replace(tokens, projector=like_now(tokens.projector, device))
            with watched(_name(self), tokens), without_autocast(device):
                chosen = self.select(shown)
            chosen = _checked(self, tokens, chosen)
        keep, merged, sizes = chosen.keep, chosen.features, chosen.sizes
        extra = _separators(layout, keep, self.separators)
        if not len(extra):
            return chosen
        keep, order = torch.cat([keep, extra]).sort()
        if merged is not None:
            device = merged.device
            merged = torch.cat([merged, tokens.features[moved(extra, device)]])
            merged = merged[moved(order, device)]
        if sizes is not None:
            sizes = torch.cat([sizes, sizes.new_ones(len(extra))])[moved(order, sizes.device)]
        return Selection(keep, merged, sizes)


@dataclass(frozen=True, kw_only=True)
class ScoringCompressor(Compressor):
    """The common case: score every token, an allocator says how many each view keeps.

    Attributes:
        allocator: An `Allocator` or its name (``proportional``, ``topk``, ``globalcom2``, ``max``).
    """

    allocator: Allocator = field(default_factory=Proportional)

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) scores, higher is kept first; values at separators are ignored."""

    @property
    def allocation(self) -> Allocator:
        """How many tokens each view keeps; for strategies that make up their own by default."""
        return self.allocator

    @property
    def needs(self) -> frozenset[Signal]:
        """What the allocator needs; a strategy adds what `score` looks at."""
        return self.allocation.needs

    def ranking(self, tokens: VisualTokens) -> Tensor | None:
        return self.score(tokens)

    def select(self, tokens: VisualTokens) -> Selection:
        return keep_best(self, tokens, self.score(tokens), self.allocation)


Depths = Annotated[
    tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1, max_length=1000)
]
"""Type of `StagedCompressor.depths`."""


@dataclass(frozen=True, kw_only=True)
class StagedCompressor(Compressor):
    """A method that selects at several cuts of the language model.

    At cut ``i`` of ``n`` it keeps at most ``floor(R^(i/n) * P)`` of the ``P`` tokens that entered.
    Every cut drops the same share, and R is left at the end.

    Attributes:
        depths: Cuts as shares of the decoder's depth, ascending.
        cut: Which of the cuts this one is, counted from 1; 0 stands for the last.
    """

    depths: Depths
    cut: Annotated[int, Field(ge=0)] = 0

    stage: ClassVar[Stage] = Stage.LLM

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cuts(self, self.cut)

    @property
    def cuts(self) -> tuple[float, ...]:
        return self.depths

    def at(self, cut: int | float) -> Compressor:
        return dataclasses.replace(self, cut=1 + self.depths.index(cut))

    def limit(self, tokens: VisualTokens) -> int:
        share = (self.cut or len(self.depths)) / len(self.depths)
        return budget.left_at(tokens, self.retention, share)


@dataclass(frozen=True, kw_only=True)
class Chain(Compressor):
    """Several compressors one after the other: inside the vision tower, before and inside the LLM.

    Each acts on what the one before it left; `retention` is the product of theirs.
    """

    members: tuple[Compressor, ...] = ()
    name: ClassVar[str] = "chain"

    @classmethod
    def of(cls, *parts: Compressor) -> Chain:
        """The chain of ``parts``.  Raises `UserError` unless they are in the order they act in."""
        order = [list(Stage).index(part.stage) for part in parts]
        if not parts or order != sorted(order) or max(order.count(0), order.count(1)) > 1:
            raise UserError(
                f"a chain takes at most one encoder and at most one pre_llm strategy followed by "
                f"llm ones, got "
                f"{[f'{part.name} ({part.stage})' for part in parts]}."
            )
        retention = 1.0
        for part in parts:
            retention *= part.retention
        return cls(members=parts, retention=retention)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset().union(*(part.needs for part in self.members))

    @property
    def label(self) -> str:
        return " + ".join(f"{part.label}@{_shortest(part.retention)}" for part in self.members)

    def parts(self) -> Iterator[Compressor]:
        for part in self.members:
            yield from part.parts()

    def select(self, tokens: VisualTokens) -> Selection:
        raise UserError("a chain acts in several places; run it with tokenprune.compress.")


def check_cuts(strategy: Compressor, cut: int) -> None:
    """Raise `UserError` unless the `cuts` of ``strategy`` rise, and ``cut`` counts one of them.

    Args:
        strategy: One that selects several times.
        cut: Which of its cuts it stands for, counted from 1; 0 for none.
    """
    cuts = strategy.cuts
    if any(later <= earlier for earlier, later in pairwise(cuts)):
        raise UserError(f"{strategy.name}: the cuts must rise from one to the next, got {cuts}.")
    if cut > len(cuts):
        raise UserError(f"{strategy.name}: cut={cut} of {len(cuts)} cuts; give at most that many.")


def cut_layer(cut: int | float, depth: int) -> int:
    """Which of ``depth`` decoder layers a cut (see `Compressor.cuts`) lies in front of.

    A share is at least one layer and leaves at least one.  Where two cuts of a strategy fall
    together in a shallow decoder, the later one counts.
    """
    return cut if isinstance(cut, int) else max(1, min(round(cut * depth), depth - 1))


def placed(
    compressor: Compressor | None, depth: int
) -> tuple[list[Compressor], dict[int, Compressor]]:
    """What selects in front of a decoder, in order, and what in front of which of its layers."""
    stages = list(compressor.parts()) if compressor is not None else []
    before = [part for part in stages if part.stage is not Stage.LLM]
    inside = {cut_layer(cut, depth): part.at(cut) for part in stages for cut in part.cuts}
    return before, dict(sorted(inside.items()))


def keep_best(
    strategy: Compressor, tokens: VisualTokens, scores: Tensor, allocator: Allocator
) -> Selection:
    """The tokens of the highest ``scores`` (N,), as many of each view as ``allocator`` says.

    Raises:
        ContractError: A patch token's score is NaN or infinite.
    """
    counts = allocator.counts(tokens, scores, strategy.retention)
    keep = best(strategy, tokens, scores, counts)
    warn_about_empty_views(strategy, tokens.layout.host, keep)
    return Selection(keep)


def best(strategy: Compressor, tokens: VisualTokens, scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[v]`` patch tokens of the highest ``scores`` (N,) of every view ``v``.

    Returns:
        (M,) sorted indices on the CPU; one wait where they are computed on a device.

    Raises:
        ContractError: A patch token's score is NaN or infinite.
    """
    of_patches = scores[tokens.layout.to(scores.device).patches]
    mask = best_per_view(tokens.layout, scores, counts)
    kept, finite = told(mask, of_patches.isfinite().all())
    if not finite:
        raise _not_finite(strategy, of_patches)
    return kept.nonzero().squeeze(1)


def warn_about_empty_views(strategy: Compressor, layout: TokenLayout, keep: Tensor) -> None:
    """Warn when a view's share of the budget is less than one token and it keeps none."""
    starving = [0 < strategy.retention * size < 1 for size in layout.view_sizes]
    if not any(starving):  # an allocator may empty a view on purpose
        return
    kept = torch.bincount(layout.view[keep], minlength=layout.views).tolist()
    empty = [view for view, starves in enumerate(starving) if starves and not kept[view]]
    if empty:
        text = (
            f"{strategy.name}: retention {strategy.retention:g} of {sum(layout.view_sizes)} patch "
            f"tokens keeps {sum(kept)}, and nothing of view"
            f"{'s' if len(empty) > 1 else ''} {', '.join(map(str, empty))} of {layout.views}."
        )
        warnings.warn(RetentionWarning(text, repr(strategy)), stacklevel=2)


def _separators(layout: TokenLayout, keep: Tensor, policy: Separators) -> Tensor:
    """(S,) indices of the separators that stay; all of it on the CPU."""
    if policy == "none":
        return layout.separators[:0]
    if policy == "all":
        return layout.separators
    stays = layout.is_separator
    if layout.canvas_shape[0]:
        rows = torch.zeros(layout.canvas_shape[0] + 1, dtype=torch.bool, device=keep.device)
        rows[layout.canvas_row[keep]] = True
        rows[-1] = False  # where the -1 of thumbnail tokens went
        stays = stays & rows[layout.canvas_row]
    return stays.nonzero().squeeze(1)


def _name(strategy: Compressor) -> str:
    return strategy.name or type(strategy).__name__


def _not_finite(strategy: Compressor, scores: Tensor) -> ContractError:
    wrong = int((~scores.isfinite()).sum())
    return ContractError(
        f"{_name(strategy)} ranks by scores of which {wrong} of {scores.numel()} are NaN or "
        "infinite; a choice by them would be arbitrary."
    )


def _checked(strategy: Compressor, tokens: VisualTokens, chosen: Selection) -> Selection:
    """``chosen`` with its indices on the CPU.  Raises `ContractError` as `Compressor.__call__`."""
    keep, who = chosen.keep, _name(strategy)
    if keep.ndim != 1 or keep.dtype != torch.int64 or not len(keep):
        raise ContractError(
            f"{who} must return a non-empty 1-D int64 tensor of indices, got {keep.dtype} of "
            f"shape {tuple(keep.shape)}."
        )
    # The one wait for the device: places are checked and looked up on the host.
    if chosen.scores is None:
        keep = keep.cpu()
    else:
        keep, finite = told(keep, chosen.scores.isfinite().all())
        if not finite:
            raise _not_finite(strategy, chosen.scores)
    bad = (keep.diff() <= 0).any() | (keep[0] < 0) | (keep[-1] >= len(tokens))
    if bad or tokens.layout.host.is_separator[keep].any():
        raise ContractError(
            f"{who} must return sorted, unique indices of patch tokens in [0, {len(tokens)}); "
            "separators are added by the core."
        )
    limit = strategy.limit(tokens)
    if len(keep) > limit:
        raise ContractError(
            f"{who} keeps {len(keep)} of {len(tokens.layout.patches)} patch tokens, at most "
            f"{limit} are due at a retention of {strategy.retention:g}; a strategy that goes "
            "beyond by design says so in `limit`."
        )
    shape = (len(keep), tokens.features.shape[1])
    if chosen.features is not None and tuple(chosen.features.shape) != shape:
        raise ContractError(
            f"{who} must return features of shape {shape}, one row per kept token, got "
            f"{tuple(chosen.features.shape)}."
        )
    if chosen.sizes is not None and (
        strategy.stage is not Stage.LLM or len(chosen.sizes) != shape[0]
    ):
        raise ContractError(
            f"{who} may return sizes inside the language model only, one per kept token "
            f"({len(keep)}), got {len(chosen.sizes)} at stage {strategy.stage}."
        )
    return Selection(keep, chosen.features, chosen.sizes)


@cache
def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    names = [item.name for item in dataclasses.fields(cls)]
    plain = ConfigDict(arbitrary_types_allowed=True)
    result = {}
    for name in names:
        try:
            result[name] = TypeAdapter(hints[name], config=plain)
        except PydanticUserError:  # a model or dataclass brings its own configuration
            result[name] = TypeAdapter(hints[name])
    return result


def _validated(cls: type, name: str, value: Any) -> Any:
    if name == "allocator" and isinstance(value, str):
        return allocators.allocator(value)
    try:
        made = _adapters(cls)[name].validate_python(value)
    except ValidationError as error:
        if isinstance(value, str) and error.errors()[0]["type"] == "tuple_type":
            return _validated(cls, name, tuple(value.split("/")))
        said = "; ".join(item["msg"] for item in error.errors())
    else:
        # NaN fails every comparison; of the retention `check_retention` tells more.
        if name == "retention" or all(abs(number) <= LARGEST for number in _numbers(made)):
            return made
        said = f"a number must lie between -{LARGEST} and {LARGEST}"
    called = getattr(cls, "name", "") or cls.__name__
    raise UserError(f"{called}: {name}={shown(value)} is not valid: {said}.") from None


def _numbers(value: Any) -> Iterator[int | float]:
    """The numbers in a field."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)


def _shortest(number: float) -> str:
    """The shortest text that is read as ``number`` again."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


def _spell(value: Any) -> str:
    named = {type(v()): k for k, v in allocators.ALLOCATORS.items()}
    if isinstance(value, tuple):
        return "/".join(map(_spell, value))
    return named.get(type(value), str(value)) if isinstance(value, Allocator) else f"{value}"
