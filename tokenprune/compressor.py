"""The contract of a method: the packed visual tokens of one image in, sorted indices out."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tokenprune import budget
from tokenprune.allocators import Allocator, Proportional
from tokenprune.deprecated import (
    CallableTuple,
    RenamedAttribute,
    RenamesOptions,
    moved_names,
    rename_attributes,
)
from tokenprune.errors import ContractError, RetentionWarning, UserError
from tokenprune.fields import option_text, validated
from tokenprune.grammar import Part, chained, shortest
from tokenprune.layout import TokenLayout, moved
from tokenprune.ops.ranking import all_finite, best_per_view
from tokenprune.precision import autocasts, like_now, without_autocast
from tokenprune.registry import Card
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens, on_cpu
from tokenprune.untouched import watched

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Chain",
    "Compressor",
    "ScoringCompressor",
    "Selection",
    "Separators",
    "Stage",
    "best",
    "check_cuts",
    "cut_layer",
    "keep_best",
    "placed",
    "warn_about_empty_views",
]

Separators = Literal["all", "rows", "none"]


class Stage(StrEnum):
    """Where a compressor acts: inside the vision encoder, before or inside the language model."""

    ENCODER = "encoder"
    PRE_LLM = "pre_llm"
    LLM = "llm"


@dataclass(frozen=True, eq=False)
class Selection:
    """The M entries that stay of N.

    Attributes:
        keep: (M,) int64, sorted, unique indices into the N entries, on any device.  The core
            returns them on the CPU.
        features: (M, D) new features of the kept entries if dropped entries are merged into them,
            else None.
        sizes: (M,) number of entries that each kept entry stands for, for proportional attention:
            the logarithm is added to the logits of its key, also in decode steps.  None without
            proportional attention.  Inside the language model only.  A later selection with sizes
            counts each entry that it receives as one.
        merging: Maps vectors (N, C) of all entries to those (M, C) of the kept ones, with the
            weights with which ``features`` were merged.  Models that add features of the vision
            encoder after their first decoder layers merge those the same way.  None if each kept
            entry keeps its own.
        scores: The scores, of any shape, if the method sorts them itself.  The core refuses the
            selection unless all are finite.  None if `keep_best` or `best` sorts them.
    """

    keep: Tensor
    features: Tensor | None = None
    sizes: Tensor | None = None
    scores: Tensor | None = None
    merging: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        merged = ", merged" if self.features is not None else ""
        return f"Selection({len(self.keep)} kept{merged})"

    def to_frame(self) -> pd.DataFrame:
        """One row for each kept entry: ``index``, and ``size`` if the selection has sizes."""
        import pandas as pd

        columns = {"index": self.keep.cpu().numpy()}
        if self.sizes is not None:
            columns["size"] = self.sizes.cpu().numpy()
        return pd.DataFrame(columns)


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC, metaclass=RenamesOptions):
    """A compression method with its options, which are the fields of the dataclass.

    A subclass is a frozen, keyword-only dataclass that implements `select`.  It receives ONE image
    at a time as `VisualTokens`: no batch, no padding mask, no hook, no model class.

    Attributes:
        retention: Retention ratio R in (0, 1]: kept patch tokens divided by all patch tokens.
        separators: Which separators stay: ``all`` (as in the official LLaVA-NeXT methods),
            ``rows`` (those of canvas rows that keep a token) or ``none``.  Separators do not count
            in R; the ledger lists them separately.
        location_aware: Whether the method uses the location of tokens by design, as baselines that
            keep evenly spaced tokens do.
        position_ids: ``compact`` renumbers the kept tokens as a shorter prompt, ``original`` keeps
            the position ids of the full prompt.  ``auto`` is ``compact`` before the language model
            and ``original`` inside it, as in the official codes.  With multimodal position ids
            (Qwen-VL) it is ``original`` everywhere, and ``compact`` numbers an image as if it had
            only the rows and columns of which a token is kept.
        name: The registered name.
        stage: Where the method acts.
        card: Where the method comes from.
    """

    retention: float
    separators: Separators = "all"
    position_ids: Literal["auto", "compact", "original"] = "auto"

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = Stage.PRE_LLM
    location_aware: ClassVar[bool] = False
    card: ClassVar[Card] = Card()

    positional = RenamedAttribute("location_aware")
    positions = RenamedAttribute("position_ids")
    stages = RenamedAttribute("parts")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        rename_attributes(cls)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = validated(type(self), item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, value)
        budget.check_retention(self.retention)

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Select patch tokens.  The core adds the separators afterwards.

        Args:
            tokens: One image's or video's packed sequence of N entries.

        Returns:
            At most `limit` patch tokens, never an empty selection.
        """

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals that the method needs besides features and layout.  No other is computed."""
        return frozenset()

    def ranking(self, tokens: VisualTokens) -> Tensor | None:
        """(N,) scores by which `select` ranks, higher is kept first; None if it does not rank.

        For figures and analyses.  Values at separators have no meaning.
        """
        return None

    @property
    def cuts(self) -> tuple[int | float, ...]:
        """The decoder layers in front of which an ``llm`` method selects, ascending.

        An integer is the index of a layer, a fraction in (0, 1) a share of the decoder's depth.
        """
        return ()

    def at(self, cut: int | float) -> Compressor:
        """The compressor that selects at ``cut``, one of `cuts`: itself unless the cuts differ."""
        return self

    @property
    def fills_budget(self) -> bool:
        """Whether the method always keeps the whole budget; False if the content may lower it."""
        return True

    @property
    def allocation(self) -> Allocator | None:
        """The allocator that divides the budget between the views, or None."""
        allocator: Allocator | None = getattr(self, "allocator", None)
        return allocator

    def limit(self, tokens: VisualTokens) -> int:
        """The most patch tokens that `select` may keep; more are an error.

        The default is R times the number of patch tokens, rounded up once per view, or the limit of
        the allocator (`Allocator.limit`).  Override it if the method selects at several cuts and
        keeps more at the first ones, or exceeds R by design.
        """
        if self.allocation is not None:
            return self.allocation.limit(tokens.layout, self.retention)
        return budget.rounded_up(tokens.layout, self.retention)

    def count(self, layout: TokenLayout) -> int | None:
        """The number of visual tokens, separators included, that stay of an image or video.

        None if the layout alone does not decide it.  A server that reserves the place of an image
        before it is encoded needs this number.

        Args:
            layout: Geometry of the packed sequence that the method receives.
        """
        host = layout.host
        patches, separators = len(host.patches), len(host.separators)
        if self.retention == 1 or not patches:
            return patches + len(_separators(host, host.patches, self.separators))
        kept = self.patch_count(host)
        rows_decide = self.separators == "rows" and host.canvas_shape[0]
        if kept is None or (rows_decide and separators):
            return None
        return kept + separators * (self.separators != "none")

    def patch_count(self, layout: TokenLayout) -> int | None:
        """The number of patch tokens that `select` keeps of an image or video at R < 1.

        None if the layout alone does not decide it.  The default is the sum that the allocator
        divides (`Allocator.patch_count`), if the method always keeps it (`fills_budget`).  A method
        without an allocator overrides it if it knows the number.  ``check_count`` of
        `tokenprune.testing` compares it with what `select` keeps.
        """
        if self.allocation is None or not self.fills_budget:
            return None
        return self.allocation.patch_count(layout, self.retention)

    @property
    def keeps_positions(self) -> bool:
        """Whether kept tokens keep their position ids, unless these are multimodal."""
        default = "original" if self.stage is Stage.LLM else "compact"
        return (default if self.position_ids == "auto" else self.position_ids) == "original"

    @property
    def label(self) -> str:
        """The spec of the method without its retention, for tables: options that are not defaults.

        `tokenprune.spec.format` adds the retention.
        """
        plain = {
            item.name: item.default_factory()
            if item.default_factory is not dataclasses.MISSING
            else item.default
            for item in dataclasses.fields(self)
        }
        changed = {
            name: option_text(getattr(self, name))
            for name, default in plain.items()
            if name != "retention" and getattr(self, name) != default
        }
        return str(Part(_name(self), changed))

    def parts(self) -> Iterator[Compressor]:
        """The compressors that this one runs, in order: itself, or the members of a `Chain`."""
        yield self

    def flops(self, tokens: VisualTokens) -> float | None:
        """FLOPs of the method beyond those of its signals; None if `select` is to be measured.

        Override it if the method works outside `select`, as in the vision encoder.  The figure
        may depend on shapes and dtypes alone, never on values.
        """
        return None

    def memory(self, tokens: VisualTokens) -> float | None:
        """Peak bytes that the method holds besides ``tokens``; None as in `flops`."""
        return None

    def __call__(self, tokens: VisualTokens) -> Selection:
        """`select`, checked, with the separators.  The engine calls this.

        Raises:
            ContractError: The selection is unsorted, repeated, out of range, empty or larger than
                `limit`; its features have the wrong shape; its scores are not finite; or the method
                wrote to a tensor of ``tokens`` (`tokenprune.untouched`).
        """
        layout = tokens.layout.host
        # Full retention keeps everything, also where a method's formula would round down.
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
        if merged is None and sizes is None and chosen.merging is None:
            return Selection(_united(keep, extra, len(layout)))
        keep, order = torch.cat([keep, extra]).sort()
        if merged is not None:
            device = merged.device
            merged = torch.cat([merged, tokens.features[moved(extra, device)]])
            merged = merged[moved(order, device)]
        if sizes is not None:
            sizes = torch.cat([sizes, sizes.new_ones(len(extra))])[moved(order, sizes.device)]
        return Selection(keep, merged, sizes, merging=_with(chosen.merging, extra, order))


@dataclass(frozen=True, kw_only=True)
class ScoringCompressor(Compressor):
    """The common case: the method scores every token, and an allocator divides the budget.

    Attributes:
        allocator: An `Allocator`, or its name: ``proportional``, ``topk``, ``globalcom2``, ``max``.
    """

    allocator: Allocator = field(default_factory=Proportional)

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) scores, higher is kept first.  Values at separators are ignored."""

    @property
    def allocation(self) -> Allocator:
        """The allocator in use.  Override it if the default depends on other options."""
        return self.allocator

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals of the allocator.  A method adds those of `score`."""
        return self.allocation.needs

    def ranking(self, tokens: VisualTokens) -> Tensor | None:
        return self.score(tokens)

    def select(self, tokens: VisualTokens) -> Selection:
        return keep_best(self, tokens, self.score(tokens), self.allocation)


@dataclass(frozen=True, kw_only=True)
class Chain(Compressor):
    """Several compressors, one after the other, at the same or at later stages.

    Each one receives what the previous one kept.  `retention` is the product of their ratios.

    Attributes:
        members: The compressors, in the order in which they act.
    """

    members: tuple[Compressor, ...] = ()
    name: ClassVar[str] = "chain"

    @classmethod
    def of(cls, *parts: Compressor) -> Chain:
        """The chain of ``parts``.

        Raises:
            UserError: They are not in the order in which they act, or more than one acts inside the
                vision encoder or before the language model.
        """
        order = [list(Stage).index(part.stage) for part in parts]
        if not parts or order != sorted(order) or max(order.count(0), order.count(1)) > 1:
            raise UserError(
                f"a chain takes at most one encoder and at most one pre_llm method followed by "
                f"llm ones; got "
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
        return chained(f"{part.label}@{shortest(part.retention)}" for part in self.members)

    def _parts(self) -> Iterator[Compressor]:
        for part in self.members:
            yield from part.parts()

    if TYPE_CHECKING:

        def parts(self) -> Iterator[Compressor]: ...

    else:

        @property
        def parts(self) -> CallableTuple:
            """A method; formerly the name of the field `members`."""
            return CallableTuple.of(self.members, self._parts, "Chain.parts", "Chain.members")

    def select(self, tokens: VisualTokens) -> Selection:
        raise UserError("a chain selects at several stages; run it with tokenprune.compress.")

    def count(self, layout: TokenLayout) -> int | None:
        """That of the only member; None with several, because later ones receive what is left."""
        return self.members[0].count(layout) if len(self.members) == 1 else None


def check_cuts(strategy: Compressor, cut: int) -> None:
    """Raise `UserError` unless the `cuts` of ``strategy`` ascend and ``cut`` is one of them.

    Args:
        strategy: A method with several cuts.
        cut: The number of the cut at which it selects, counted from 1; 0 for none.
    """
    cuts = strategy.cuts
    if any(later <= earlier for earlier, later in pairwise(cuts)):
        raise UserError(f"{strategy.name}: the cuts must rise from one to the next, got {cuts}.")
    if cut > len(cuts):
        raise UserError(f"{strategy.name}: cut={cut} of {len(cuts)} cuts; give at most that many.")


def cut_layer(cut: int | float, depth: int) -> int:
    """Index of the decoder layer, of ``depth``, in front of which ``cut`` (`Compressor.cuts`) is.

    A fraction leaves at least one layer before the cut and one after it.  In a shallow decoder two
    cuts may fall on one layer; the later one counts.
    """
    return cut if isinstance(cut, int) else max(1, min(round(cut * depth), depth - 1))


def placed(
    compressor: Compressor | None, depth: int
) -> tuple[list[Compressor], dict[int, Compressor]]:
    """The compressors in front of a decoder of ``depth`` layers, and those inside it by layer."""
    stages = list(compressor.parts()) if compressor is not None else []
    before = [part for part in stages if part.stage is not Stage.LLM]
    inside = {cut_layer(cut, depth): part.at(cut) for part in stages for cut in part.cuts}
    return before, dict(sorted(inside.items()))


def keep_best(
    strategy: Compressor, tokens: VisualTokens, scores: Tensor, allocator: Allocator
) -> Selection:
    """Select the highest ``scores`` (N,) of each view, as many as ``allocator`` allows.

    Raises:
        ContractError: A patch token's score is NaN or infinite.
    """
    counts = allocator.counts(tokens, scores, strategy.retention)
    keep = best(strategy, tokens, scores, counts)
    warn_about_empty_views(strategy, tokens.layout.host, keep)
    return Selection(keep)


def best(strategy: Compressor, tokens: VisualTokens, scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[v]`` patch tokens with the highest ``scores`` (N,) of every view ``v``.

    Returns:
        (M,) sorted indices on the CPU.  One synchronisation if the scores are on a device.

    Raises:
        ContractError: A patch token's score is NaN or infinite.
    """
    of_patches = scores.index_select(0, tokens.layout.to(scores.device).patches)
    mask = best_per_view(tokens.layout, scores, counts)
    kept, finite = on_cpu(mask, all_finite(of_patches))
    if not finite:
        raise _not_finite(strategy, of_patches)
    return kept.nonzero().squeeze(1)


def warn_about_empty_views(strategy: Compressor, layout: TokenLayout, keep: Tensor) -> None:
    """Warn of each view whose share of the budget is below one token and that keeps none."""
    starving = [0 < strategy.retention * size < 1 for size in layout.view_sizes]
    if not any(starving):  # an allocator may empty a view by design
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
    """(S,) indices of the separators that stay, on the CPU."""
    if policy == "none":
        return layout.separators[:0]
    if policy == "all":
        return layout.separators
    stays = layout.is_separator
    if layout.canvas_shape[0]:
        rows = torch.zeros(layout.canvas_shape[0] + 1, dtype=torch.bool, device=keep.device)
        rows[layout.canvas_row[keep]] = True
        rows[-1] = False  # thumbnail tokens have canvas row -1
        stays = stays & rows[layout.canvas_row]
    return stays.nonzero().squeeze(1)


def _united(keep: Tensor, extra: Tensor, size: int) -> Tensor:
    """The sorted union of two sets of indices below ``size``, all on the CPU.

    It is faster than a sort.
    """
    stays = np.zeros(size, dtype=bool)
    stays[keep.numpy()] = stays[extra.numpy()] = True
    return torch.from_numpy(stays.nonzero()[0])


def _with(
    merging: Callable[[Tensor], Tensor] | None, extra: Tensor, order: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """``merging`` of patch tokens and of the separators ``extra``, both in ``order``."""
    if merging is None:
        return None

    def both(vectors: Tensor) -> Tensor:
        parts = [merging(vectors), vectors[moved(extra, vectors.device)]]
        return torch.cat(parts)[moved(order, vectors.device)]

    return both


def _name(strategy: Compressor) -> str:
    return strategy.name or type(strategy).__name__


def _not_finite(strategy: Compressor, scores: Tensor) -> ContractError:
    wrong = int((~scores.isfinite()).sum())
    return ContractError(
        f"{_name(strategy)} ranks by scores of which {wrong} of {scores.numel()} are NaN or "
        "infinite; the selection would be arbitrary."
    )


def _checked(strategy: Compressor, tokens: VisualTokens, chosen: Selection) -> Selection:
    """``chosen``, indices on the CPU.  Raises `ContractError` as `Compressor.__call__` does."""
    keep, who = chosen.keep, _name(strategy)
    if keep.ndim != 1 or keep.dtype != torch.int64 or not len(keep):
        raise ContractError(
            f"{who} must return a non-empty 1-D int64 tensor of indices, got {keep.dtype} of "
            f"shape {tuple(keep.shape)}."
        )
    # Checking the indices on the CPU takes the only synchronisation.
    if chosen.scores is None:
        keep = keep.cpu()
    else:
        keep, finite = on_cpu(keep, all_finite(chosen.scores))
        if not finite:
            raise _not_finite(strategy, chosen.scores)
    # NumPy takes a fifth of the time of PyTorch on short vectors.
    index, separator = keep.numpy(), tokens.layout.host.is_separator.numpy()
    sound = index[0] >= 0 and index[-1] < len(separator) and (index[1:] > index[:-1]).all()
    if not sound or separator[index].any():
        raise ContractError(
            f"{who} must return sorted, unique indices of patch tokens in [0, {len(tokens)}); "
            "separators are added by the core."
        )
    limit = strategy.limit(tokens)
    if len(keep) > limit:
        raise ContractError(
            f"{who} keeps {len(keep)} of {len(tokens.layout.patches)} patch tokens, at most "
            f"{limit} are allowed at a retention of {strategy.retention:g}; a method that exceeds "
            "it by design overrides `limit`."
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
    return Selection(keep, chosen.features, chosen.sizes, merging=chosen.merging)


__getattr__ = moved_names(__name__)
