"""Checks of a method alone, on synthetic tokens."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenprune.allocators import Proportional
from tokenprune.compressor import (
    Compressor,
    ScoringCompressor,
    Selection,
    Separators,
    Stage,
)
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.ops.spatial import patches_by_view
from tokenprune.signals import Signal
from tokenprune.spec import format as spec_of
from tokenprune.spec import parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.asserting import Check, assert_same, called, rng_state, seeded
from tokenprune.tokens import VisualTokens
from tokenprune.untouched import shown

__all__ = [
    "LAYOUTS",
    "STRATEGY_CHECKS",
]


SHARES = (0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.99)
COUNTED = (0.03, 0.25, 0.4, 0.9, 1)
SEPARATORS: tuple[Separators, ...] = ("all", "rows", "none")


# -- synthetic tokens ----------------------------------------------------------------------------

# Full and padded grids, one view, and images so thin that the canvas has no row or no column.
LAYOUTS = {
    "2x2": TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8)),
    "2x2 padded": TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8)),
    "1x3": TokenLayout.anyres((1, 3), (4, 4), (0, 4, 1, 11)),
    "3x1": TokenLayout.anyres((3, 1), (4, 4), (0, 12, 1, 3)),
    "one view": TokenLayout.single((4, 4)),
    "no rows": TokenLayout.anyres((1, 2), (4, 4), (2, 2, 0, 8)),
    "no columns": TokenLayout.anyres((2, 1), (4, 4), (0, 8, 2, 2)),
    "2x2 resampled": TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8), canvas=(4, 6)),
    "video": TokenLayout.video(4, (2, 2)),
}


def _samples(part: Compressor, **options: Any) -> Iterator[tuple[str, VisualTokens]]:
    for index, (name, layout) in enumerate(LAYOUTS.items()):
        yield name, sample_tokens(part.needs, layout, seed=index, **options)


def _select(part: Compressor, tokens: VisualTokens) -> Selection:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        return part.select(tokens)


# -- checks --------------------------------------------------------------------------------------


NO_PAPER = ("(baseline)", "(unpublished)")
"""What `Card.paper` ends with if there is no paper."""


def check_documented(compressor: Compressor) -> None:
    """The class has a docstring, and a card that names its source or says that there is none."""
    for part in compressor.parts():
        cls = type(part)
        written = (cls.__doc__ or f"{cls.__name__}(").strip()  # a dataclass's default docstring
        if written.startswith(f"{cls.__name__}("):
            raise AssertionError(f"{cls.__name__} has no docstring")
        if not part.card.paper:
            raise AssertionError(
                f"{cls.__name__} has no card naming its paper; a method without one says so: card "
                '= Card(paper="Longest tokens (unpublished)")'
            )
        card = part.card
        known = card.arxiv or card.code or any(word in card.paper for word in NO_PAPER)
        if not known:
            raise AssertionError(
                f"the card of {cls.__name__} cites neither a paper (arxiv=...) nor code "
                f'(code=...); a method without both says so: Card(paper="{card.paper} '
                '(unpublished)")'
            )


def check_is_a_value(compressor: Compressor) -> None:
    """The method is frozen and hashable; copies, pickles and its spec give an equal method."""
    field = dataclasses.fields(compressor)[0].name
    try:
        setattr(compressor, field, getattr(compressor, field))
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{type(compressor).__name__} is not frozen: {field} can be assigned")
    try:
        pickled = pickle.loads(pickle.dumps(compressor))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"{type(compressor).__name__} cannot be pickled: {error}. Define the class at the top "
            "of a module or notebook, and create the method again after its cell has run again."
        ) from error
    copies = {
        "deepcopy": copy.deepcopy(compressor),
        "pickle": pickled,
        "dataclasses.replace": replace(compressor),
    }
    for part in compressor.parts():
        if part.name and part is compressor:
            copies[f"parse({part.label!r})"] = parse(part.label, retention=part.retention)
    for how, copied in copies.items():
        if copied != compressor:
            raise AssertionError(f"{how} of {compressor} gives {copied}")
        if hash(copied) != hash(compressor):
            raise AssertionError(f"{how} of {compressor} hashes differently")
        if repr(copied) != repr(compressor):
            raise AssertionError(f"{how}: repr {copied!r}, not {compressor!r}")
    for item in dataclasses.fields(compressor):
        if f"{item.name}=" not in repr(compressor):
            raise AssertionError(f"repr does not show {item.name}")


def check_selection_form(compressor: Compressor) -> None:
    """``keep`` is a non-empty int64 vector of sorted, unique indices of patch tokens."""
    for part in compressor.parts():
        for retention in (part.retention, *SHARES):
            method = replace(part, retention=retention)
            for dtype in (torch.float32, torch.bfloat16):
                for name, tokens in _samples(method, dtype=dtype):
                    what = f"{part.label}, R = {retention}, {dtype}, layout {name!r}"
                    _well_formed(_select(method, tokens), tokens, what)


def _well_formed(chosen: Selection, tokens: VisualTokens, what: str) -> None:
    keep, listed = chosen.keep, chosen.keep.tolist()
    if keep.dtype != torch.int64:
        raise AssertionError(f"{what}: keep is {keep.dtype}")
    if keep.ndim != 1:
        raise AssertionError(f"{what}: keep has shape {tuple(keep.shape)}")
    if not listed:
        raise AssertionError(f"{what}: keeps nothing")
    if listed != sorted(set(listed)):
        raise AssertionError(f"{what}: not sorted and unique: {listed}")
    inside = range(len(tokens))
    if listed[0] not in inside or listed[-1] not in inside:
        raise AssertionError(f"{what}: not in 0 .. {inside[-1]}: {listed}")
    separators = tokens.layout.is_separator[keep].any()
    if separators:
        raise AssertionError(f"{what}: keeps a separator; the core adds separators")
    if chosen.features is not None:
        shape = len(keep), tokens.features.shape[1]
        if chosen.features.shape != shape:
            raise AssertionError(
                f"{what}: features of shape {tuple(chosen.features.shape)}, not {shape}"
            )


def check_budget(compressor: Compressor) -> None:
    """The method keeps at most ``R * P`` tokens, rounded up once per view, and not too few.

    At R up to 0.4 it keeps at least half the budget, unless the content may lower the number
    (`Compressor.fills_budget`).  At larger R its schedule may keep fewer.

    If views differ in size, an allocator may give a large view more than its share, but not more
    than twice the budget in total.
    """
    hundredths = [percent / 100 for percent in range(1, 100)]
    for part in compressor.parts():
        for name, tokens in _samples(part):
            # One view is cheap: a fault may show at a few retention ratios only.
            for retention in hundredths if name == "one view" else (*SHARES, 0.4, 0.77):
                _check_count(replace(part, retention=retention), name, tokens)


def _check_count(method: Compressor, name: str, tokens: VisualTokens) -> None:
    sizes = [size for size in tokens.layout.view_sizes if size]
    share = method.retention * sum(sizes) * (1 if len(set(sizes)) == 1 else 2)
    # Rounding up may add one token per view, but none to a whole number.
    extra = len(sizes) if len(sizes) > 1 else math.ceil(share - 1e-9) - share
    most = max(share + extra, 1)
    floor = method.fills_budget and method.retention <= 0.4
    least = method.retention * sum(sizes) / 2 - len(sizes) if floor else 1
    kept = len(_select(method, tokens).keep)
    if not least <= kept <= most:
        raise AssertionError(
            f"{method.label}, layout {name!r}: keeps {kept} of {sum(sizes)} patch tokens at "
            f"R = {method.retention}, expected at least {max(least, 1):.1f} and at most {most:.1f}"
        )


def check_count(compressor: Compressor) -> None:
    """A number of kept tokens that follows from the layout is right, whatever the content.

    `Compressor.count` may be None.  Methods inside the vision encoder are checked in a model
    (``check_count_in_model``).
    """
    layouts = LAYOUTS | {
        "1x3 of unlike crops": TokenLayout.anyres((1, 3), (5, 5), (0, 5, 2, 11)),
        "2x3": TokenLayout.anyres((2, 3), (5, 5), (1, 9, 0, 15)),
        "tiled": TokenLayout.tiled((2, 1), (3, 4)),
        "own size": TokenLayout.single((9, 14), native=True),
        "two frames": TokenLayout.video(2, (3, 3), newline=False),
        "every third gone": _thinned(LAYOUTS["2x2"]),
    }
    for part in compressor.parts():
        if part.stage is Stage.ENCODER:
            continue
        for name, layout in layouts.items():
            for retention, separators in zip(COUNTED, itertools.cycle(SEPARATORS), strict=False):
                method = replace(part, retention=retention, separators=separators)
                _check_claim(method, name, layout)


def _thinned(layout: TokenLayout) -> TokenLayout:
    """``layout`` without every third entry, as an earlier method may leave it."""
    return layout.take((torch.arange(len(layout)) % 3).nonzero().squeeze(1))


def _check_claim(method: Compressor, name: str, layout: TokenLayout) -> None:
    claimed = method.count(layout)
    for seed in range(0 if claimed is None else 2):
        kept = len(called(method, sample_tokens(method.needs, layout, seed=seed)).keep)
        if kept != claimed:
            raise AssertionError(
                f"{spec_of(method)} keeps {kept} of {len(layout)} visual tokens of layout "
                f"{name!r}, but its count says {claimed}; override patch_count, which may be None"
            )


def check_keeps_what_stands_out(compressor: Compressor) -> None:
    """A token that receives all attention is kept or merged, in every view.

    Otherwise the ranking is inverted.  A ranking by features alone cannot be checked in this way.
    """
    for part in compressor.parts():
        own = part  # the signals of the ranking, without those of the allocator
        if getattr(part, "allocator", None) is not None:
            own = replace(part, allocator=Proportional())  # type: ignore[call-arg]
        asked = [signal for signal in own.needs if signal.info.is_attention]
        # Views large enough for methods that keep only some of their tokens by attention.
        frames = {"two frames": TokenLayout.video(2, (4, 4))}
        layouts = {name: LAYOUTS[name] for name in ("2x2", "2x2 padded", "one view")} | frames
        for name, layout in layouts.items() if asked else ():
            tokens = sample_tokens(own.needs, layout)
            patches = tokens.layout.patches
            for token in patches[len(patches) // 8 :: len(patches) // 4].tolist():
                bright = _lit(tokens, asked, token, 1.0)
                keep = _select(own, bright).keep.tolist()
                if token in keep or _merges(own, bright, token):
                    continue
                # In a video a method may rank by change instead, and ignore the attention.
                dark = _lit(tokens, asked, token, 0.0)
                ignores = layout.modality == "video" and keep == _select(own, dark).keep.tolist()
                if not ignores:
                    raise AssertionError(
                        f"{part.label} drops token {token}, the one that gets all of "
                        f"{[s.name for s in asked]} (layout {name!r}); is the ranking inverted?"
                    )


def _lit(tokens: VisualTokens, asked: Sequence[Signal], token: int, share: float) -> VisualTokens:
    """``tokens`` in which ``token`` receives attention ``share``, and all others 0.001."""
    signals = dict(tokens.signals)
    for signal in asked:
        signals[signal] = torch.full_like(signals[signal], 1e-3)
        if not signal.in_llm:
            signals[signal][tokens.layout.is_separator] = torch.nan
        signals[signal][_same_location(tokens.layout, token)] = share
    return replace(tokens, signals=signals)


def _same_location(layout: TokenLayout, token: int) -> list[int]:
    """The token and, for a token of a crop, the thumbnail's token at the same location."""
    if layout.kind[token] != Kind.CROP:
        return [token]
    at = int(layout.canvas_row[token]), int(layout.canvas_col[token])
    row, col = (
        place * side // full
        for place, side, full in zip(at, layout.view_shape, layout.canvas_shape, strict=True)
    )
    return [token, row * layout.view_shape[1] + col]


def check_keeps_the_best_scores(compressor: Compressor) -> None:
    """A scoring method keeps the highest scores of every view, as many as are allocated."""
    for part in compressor.parts():
        if not isinstance(part, ScoringCompressor):
            continue
        for name, tokens in _samples(part):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RetentionWarning)
                scores, keep = part.score(tokens).float(), _select(part, tokens).keep
                counts = part.allocation.counts(tokens, part.score(tokens), part.retention)
            for view, patches in enumerate(patches_by_view(tokens.layout)):
                kept = torch.isin(patches, keep)
                what = f"{part.label}, layout {name!r}, view {view}"
                if kept.sum() != counts[view]:
                    raise AssertionError(
                        f"{what}: keeps {int(kept.sum())} tokens, expected {int(counts[view])}"
                    )
                best, worst = scores[patches[~kept]], scores[patches[kept]]
                if len(best) and len(worst) and not best.max() <= worst.min():
                    raise AssertionError(
                        f"{what}: drops a score of {best.max():.4g}, keeps one of {worst.min():.4g}"
                    )


def check_scores_are_finite(compressor: Compressor) -> None:
    """Scores are finite; NaN in the input of the ranking is refused.

    A method that sorts its scores itself returns them in `Selection.scores`.
    """
    for part in compressor.parts():
        for name, tokens in _samples(part):
            what = f"{part.label} on layout {name!r}"
            try:
                sound = called(part, tokens).keep
            except UserError as error:
                raise AssertionError(f"{what}: {error}") from error
            for token in tokens.layout.patches[[0, -1]].tolist():
                try:
                    keep = called(part, _spoilt(tokens, token)).keep
                except Exception:  # any failure will do: NaN does not rank
                    continue
                assert_same(keep, sound, f"{what}, with only NaN in token {token}, keeps")


def _spoilt(tokens: VisualTokens, token: int) -> VisualTokens:
    """``tokens`` with NaN in all features and signals of one token."""
    here = torch.tensor([token])
    return replace(
        tokens,
        features=tokens.features.index_fill(0, here, torch.nan),
        signals={
            signal: values.index_fill(0, here, torch.nan)
            for signal, values in tokens.signals.items()
        },
    )


def _merges(part: Compressor, tokens: VisualTokens, token: int) -> bool:
    """Whether the features of ``token`` affect the features of the kept tokens."""
    nudged = tokens.features.clone()
    nudged[token] *= 1.001
    shown = _select(part, tokens).features
    other = _select(part, replace(tokens, features=nudged)).features
    return shown is not None and other is not None and not torch.equal(shown, other)


def check_follows_content(compressor: Compressor) -> None:
    """Content decides, not location: turned content gives the turned selection.

    Methods that use locations by design set ``location_aware = True``.
    """
    for part in compressor.parts():
        if part.location_aware:
            continue
        half = replace(part, retention=0.5)  # half of every view is a whole number of tokens
        for method, layout in (
            (part, TokenLayout.single((5, 5))),
            (half, LAYOUTS["2x2"]),
            (half, TokenLayout.anyres((1, 2), (4, 4), (0, 4, 0, 8))),
        ):
            turned, order = _turned(layout)
            for seed in range(3):
                tokens = sample_tokens(part.needs, layout, seed=seed)
                other = replace(
                    tokens,
                    features=tokens.features[order],
                    signals={signal: values[order] for signal, values in tokens.signals.items()},
                )
                keep, mirrored = _select(method, tokens).keep, _select(method, other).keep
                what = f"{part.label}, with {turned}, keeps"
                assert_same(mirrored, order[keep].sort().values, what)


def _turned(layout: TokenLayout) -> tuple[str, Tensor]:
    """A description, and (N,) the source of each entry's content if the image is turned by 180°."""
    order = torch.arange(len(layout))
    for kind in (Kind.THUMBNAIL, Kind.CROP):
        there = (layout.kind == kind).nonzero().squeeze(1)
        order[there] = there.flip(0)
    shape = f"{layout.grid[0]}x{layout.grid[1]} crops" if layout.grid != (0, 0) else "one view"
    return f"the image of {shape} upside down", order


def check_tokens_untouched(compressor: Compressor) -> None:
    """The method does not write to the tensors that it receives."""
    for part in compressor.parts():
        for name, tokens in _samples(part):
            before = {key: values.clone() for key, values in shown(tokens).items()}
            _select(part, tokens)
            for key, values in shown(tokens).items():
                unchanged = torch.equal(values.nan_to_num(), before[key].nan_to_num())
                if not unchanged:
                    raise AssertionError(f"{part.label} writes to {key} (layout {name!r})")


def check_deterministic(compressor: Compressor) -> None:
    """The same image gives the same selection, after any other image and for any global seed."""
    for part in compressor.parts():
        for name, tokens in _samples(part):
            with seeded(1):
                first = _select(part, tokens).keep
            with seeded(2):
                _select(part, sample_tokens(part.needs, LAYOUTS[name], seed=99))
                again = _select(copy.deepcopy(part), tokens).keep
            assert_same(again, first, f"{part.label} on layout {name!r}, a second time")


def check_rng_untouched(compressor: Compressor) -> None:
    """The method does not use the global generators of PyTorch, NumPy and Python."""
    for part in compressor.parts():
        for name, tokens in _samples(part):
            before = rng_state()
            _select(part, tokens)
            if rng_state() != before:
                raise AssertionError(f"{part.label} draws from a global generator ({name!r})")


# -- list ----------------------------------------------------------------------------------------

STRATEGY_CHECKS: tuple[Check, ...] = (
    check_documented,
    check_is_a_value,
    check_selection_form,
    check_budget,
    check_count,
    check_keeps_what_stands_out,
    check_keeps_the_best_scores,
    check_scores_are_finite,
    check_follows_content,
    check_tokens_untouched,
    check_deterministic,
    check_rng_untouched,
)
