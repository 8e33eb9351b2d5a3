"""Run methods on rearranged images."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.engine.rankings import noting
from tokenprune.errors import RetentionWarning, UserError, unknown
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.own_images import PROMPT
from tokenprune.experiments.common.patch_boxes import ViewSize
from tokenprune.experiments.positional_bias.estimates import NORMAL, profiles, statistics
from tokenprune.experiments.positional_bias.rearrange import (
    CONDITIONS,
    CROPS,
    DEFAULT,
    EXCHANGED,
    LEVELS,
    Condition,
    Level,
    NotPossible,
    Shown,
    move_pixels,
    move_tokens,
    paired,
)
from tokenprune.experiments.positional_bias.rows import Parts, Rows, Skip, joined
from tokenprune.layout import Kind, TokenLayout
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "Analysis",
    "check_method",
    "compressors_of",
    "positional_bias",
    "selector_bias",
]


@dataclass(frozen=True)
class Analysis:
    """The results: three tables, and what is missing from them.

    Attributes:
        tokens: One row per method, retention, image, condition, level and patch token: ``token``
            (index in the packed sequence), ``position`` (the relative position of its centre, in
            (0, 1)), ``kind``, ``view``, ``slot`` (index of the crop or frame in the order of the
            sequence; -1 for a thumbnail) of ``slots``, ``row`` and ``col`` in the view, ``y`` and
            ``x`` (relative location in the image), ``content`` (the token with the same content in
            the original image, -1 if there is none), ``kept`` (at the end), ``kept_first`` (at the
            first cut) and ``score`` (of the first cut's ranking; NaN for methods without scores).
        statistics: As `estimates.statistics` returns it.
        profiles: As `estimates.profiles` returns it.
        skipped: (condition, level, why) to the number of images that could not be rearranged.
        failures: (method, retention) to why it is missing from the tables.
    """

    tokens: pd.DataFrame
    statistics: pd.DataFrame
    profiles: pd.DataFrame
    skipped: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    failures: Mapping[tuple[str, float], Failure] = field(default_factory=dict)


# --- the analysis ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    """An image in one condition, encoded.

    Attributes:
        content: (N,) as `rearrange.paired` returns it.
        slot: (N,) crop or frame of each index of the sequence in the original image.
    """

    image: int
    condition: str
    level: str
    tokens: VisualTokens
    content: Tensor
    slot: Tensor

    @cached_property
    def layout(self) -> TokenLayout:
        """The layout, on the CPU."""
        return self.tokens.layout.to("cpu")

    @cached_property
    def geometry(self) -> dict[str, np.ndarray[Any, Any]]:
        """Columns (P,) of the table of tokens that do not depend on the method."""
        layout, index = self.layout, torch.arange(len(self.tokens))
        canvas = layout.kind == Kind.CROP
        (height, width), (rows, cols) = layout.view_shape, layout.canvas_shape
        y = torch.where(
            canvas,
            (layout.canvas_row.float() + 0.5) / max(rows, 1),
            (layout.row.float() + 0.5) / height,
        )
        x = torch.where(
            canvas,
            (layout.canvas_col.float() + 0.5) / max(cols, 1),
            (layout.col.float() + 0.5) / width,
        )
        columns: dict[str, tuple[Tensor, Any]] = {
            "token": (index, np.int32),
            "position": ((index.double() + 0.5) / len(index), np.float64),
            "kind": (layout.kind, np.int8),
            "view": (layout.view, np.int16),
            "slot": (self.slot.cpu(), np.int16),
            "row": (layout.row, np.int16),
            "col": (layout.col, np.int16),
            "y": (y, np.float32),
            "x": (x, np.float32),
            "content": (self.content.cpu(), np.int32),
        }
        return {
            name: values[layout.patches].numpy().astype(kind)
            for name, (values, kind) in columns.items()
        }


@dataclass(frozen=True, eq=False)
class _CaseSelection:
    """What a method keeps of a case, each (N,); scores are NaN where there are none."""

    kept: Tensor
    kept_first: Tensor
    score: Tensor


def positional_bias(
    pipe: Pipeline,
    methods: Sequence[str | Compressor],
    images: Sequence[Shown],
    *,
    retention: Sequence[float] = (0.25,),
    conditions: Sequence[Condition] = DEFAULT,
    levels: Sequence[Level] = LEVELS,
    prompts: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    parts: Path | None = None,
    progress: ProgressCallback = silent,
) -> Analysis:
    """Run methods on images whose content is rearranged, and test what the selection follows.

    Methods that act in front of the language model run alone, as in `Pipeline.select`; all others
    run inside the model, in the prefill of a prompt.

    Args:
        pipe: As `tokenprune.load` returns it.
        methods: Compressors, or specs; specs without a retention ratio run at each of
            ``retention``.
        images: Images, or videos as lists of frames, or both.
        retention: Retention ratios.
        conditions: Which of `rearrange.CONDITIONS`, besides the normal one; each is applied where
            it is possible.
        levels: Whether to move features and signals after the vision encoder (``selector``), pixels
            in front of it (``pipeline``), or both.
        prompts: A question for every image, for methods in the language model; None for "What is
            in the image?".
        batch_size: Prompts that run at once.
        seed: Of the bootstrap.
        parts: Folder to which every finished batch is written at once; methods and images in it are
            not computed again.
        progress: Called before every step.

    Raises:
        UserError: Bad input, found before anything is run.
    """
    compressors = compressors_of(methods, retention)
    for compressor in compressors:
        check_method(pipe, compressor)
    _check(pipe, images, conditions, levels, prompts, batch_size)
    asked = list(prompts or [PROMPT] * len(images))
    signals = frozenset[Signal]().union(*(compressor.needs for compressor in compressors))
    outside = frozenset(signal for signal in signals if not signal.in_llm)
    known = Parts(parts)

    def cases(index: int) -> Iterator[_Case]:
        return _cases(pipe, index, images[index], outside, conditions, levels, known.skipped)

    def select(compressor: Compressor, some: Sequence[_Case]) -> list[_CaseSelection]:
        return _selections(pipe, compressor, some, [asked[case.image] for case in some])

    return _analysed(compressors, len(images), cases, select, known, batch_size, seed, progress)


def selector_bias(
    methods: Sequence[str | Compressor],
    encoded: Sequence[VisualTokens],
    *,
    retention: Sequence[float] = (0.25,),
    conditions: Sequence[Condition] = DEFAULT,
    seed: int = 0,
    progress: ProgressCallback = silent,
) -> Analysis:
    """`positional_bias` for encoded images, real or synthetic, without a model.

    Args:
        methods: As for `positional_bias`, all of them in front of the language model.
        encoded: As `Pipeline.encode` returns them, with the signals that the methods need.
        retention, conditions, seed, progress: As for `positional_bias`.

    Raises:
        UserError: Bad input, found before anything is run.
    """
    compressors = compressors_of(methods, retention)
    for compressor in compressors:
        if not _in_front(compressor):
            raise UserError(
                f"{compressor.label} does not act in front of the language model alone; use "
                "positional_bias with a model."
            )
    _check_names(conditions, LEVELS)
    if not encoded:
        raise UserError("positional bias needs at least one image.")
    known = Parts(None)

    def cases(index: int) -> Iterator[_Case]:
        tokens = _fingerprinted(index, encoded[index])
        yield _normal(index, tokens)
        yield from _moved(index, tokens, conditions, known.skipped)

    return _analysed(compressors, len(encoded), cases, _selected, known, 16, seed, progress)


def _rows_of(
    compressor: Compressor,
    cases: Sequence[_Case],
    select: Callable[[Compressor, Sequence[_Case]], Sequence[_CaseSelection]],
    batch_size: int,
) -> list[Rows]:
    """The rows of a method on all cases, in batches."""
    rows: list[Rows] = []
    for first in range(0, len(cases), batch_size):
        some = cases[first : first + batch_size]
        rows += map(_rows, [compressor] * len(some), some, select(compressor, some))
    return rows


def _analysed(
    compressors: Sequence[Compressor],
    images: int,
    cases: Callable[[int], Iterator[_Case]],
    select: Callable[[Compressor, Sequence[_Case]], list[_CaseSelection]],
    known: Parts,
    batch_size: int,
    seed: int,
    progress: ProgressCallback,
) -> Analysis:
    """Run the methods on all cases of all images; a method that fails is left out."""
    failures: dict[tuple[str, float], Failure] = {}
    keys = {(one.label, one.retention): one for one in compressors}
    total, done = len(keys) * images, 0
    for start in range(0, images, batch_size):
        progress(done, total, f"vision encoder, {len(failures)} failed")
        here = range(start, min(start + batch_size, images))
        lacking = {key: set(here) - known.images(*key) for key in keys if key not in failures}
        needed = sorted(set().union(*lacking.values()))
        batch = [case for index in needed for case in cases(index)]
        for key, compressor in keys.items():
            progress(done, total, f"{key[0]} at {key[1]:g}, {len(failures)} failed")
            done += len(here)
            mine = [case for case in batch if case.image in lacking.get(key, ())]
            found = tried(partial(_rows_of, compressor, mine, select, batch_size))
            if isinstance(found, Failure):
                failures[key] = found
                # The failed method may have modified tensors that other methods use.
                batch = [case for index in needed for case in cases(index)]
            else:
                known.add(found)
    progress(total, total, "statistics")
    tokens = joined([one for key in keys if key not in failures for one in known.rows(*key)])
    skipped = Counter(skip[1:] for skip in known.skipped)
    return Analysis(
        tokens, statistics(tokens, seed=seed), profiles(tokens), dict(skipped), failures
    )


def compressors_of(
    methods: Sequence[str | Compressor], retention: Sequence[float]
) -> list[Compressor]:
    found: dict[tuple[str, float], Compressor] = {}
    for method in methods:
        made = (
            [cell.compressor for cell in cells([method], retention)]
            if isinstance(method, str)
            else [method]
        )
        for compressor in made:
            if compressor is not None:
                found.setdefault((compressor.label, compressor.retention), compressor)
    if not found:
        raise UserError("positional bias needs at least one method and one retention.")
    return list(found.values())


def check_method(pipe: Pipeline, compressor: Compressor) -> None:
    check_compatible(pipe.adapter.facts, compressor)
    for part in compressor.parts():
        if part.stage is Stage.ENCODER:
            raise UserError(
                f"{part.name} acts inside the vision encoder, before the sequence exists in which "
                "this analysis moves content to other places; leave it out (tokenprune masks shows "
                "what it keeps)."
            )


def _check(
    pipe: Pipeline,
    images: Sequence[Shown],
    conditions: Sequence[str],
    levels: Sequence[str],
    prompts: Sequence[str] | None,
    batch_size: int,
) -> None:
    _check_names(conditions, levels)
    if EXCHANGED in conditions and "selector" not in levels:
        raise UserError(
            f"{EXCHANGED} moves features under the thumbnail, which is made of the same pixels; "
            "add the level 'selector' or leave the condition out."
        )
    if not images:
        raise UserError("positional bias needs at least one image.")
    if prompts is not None and len(prompts) != len(images):
        raise UserError(f"{len(prompts)} prompts for {len(images)} images; give one for each.")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}.")
    for shown in images:
        if not isinstance(shown, Image.Image):
            if "video" not in pipe.adapter.modalities:
                raise UserError(
                    f"{pipe.adapter.name} takes images only; load a model that takes videos, "
                    "or hand over single frames as images."
                )
            if not len(shown):
                raise UserError("a video needs at least one frame, got an empty list.")


def _check_names(conditions: Sequence[str], levels: Sequence[str]) -> None:
    for what, values, known in (
        ("condition", conditions, CONDITIONS),
        ("level", levels, LEVELS),
    ):
        for value in values:
            if value not in known:
                raise unknown(what, value, known)


def _cases(
    pipe: Pipeline,
    index: int,
    shown: Shown,
    signals: frozenset[Signal],
    conditions: Sequence[Condition],
    levels: Sequence[Level],
    skipped: set[Skip],
) -> Iterator[_Case]:
    """An encoded image in the normal condition and in all conditions that are possible."""
    normal = _fingerprinted(index, _encoded(pipe, shown, signals))
    yield _normal(index, normal)
    if "selector" in levels:
        yield from _moved(index, normal, conditions, skipped)
    pixelwise = [one for one in _fitting(normal.layout, conditions) if one != EXCHANGED]
    for condition in pixelwise if "pipeline" in levels else ():
        try:
            pixels = move_pixels(shown, condition, normal.layout, ViewSize.of(pipe.adapter).side)
            moved = _encoded(pipe, pixels, signals)
            if not _same_geometry(moved.layout, normal.layout):
                raise NotPossible("another crop grid after rearranging")
        except NotPossible as reason:
            skipped.add((index, condition, "pipeline", str(reason)))
        else:
            content = paired(normal.layout, condition)
            yield _Case(index, condition, "pipeline", moved, content, _slots(normal.layout))


def _fingerprinted(index: int, tokens: VisualTokens) -> VisualTokens:
    """With a fingerprint, which identifies its scores and seeds random methods."""
    if tokens.fingerprint is not None:
        return tokens
    return replace(tokens, fingerprint=torch.tensor([index], dtype=torch.float32))


def _normal(index: int, tokens: VisualTokens) -> _Case:
    layout = tokens.layout
    own = torch.arange(len(layout), device=layout.is_separator.device)
    content = own.masked_fill(layout.is_separator, -1)
    return _Case(index, NORMAL, NORMAL, tokens, content, _slots(layout))


def _slots(layout: TokenLayout) -> Tensor:
    """(N,) the crop or frame at each index, from 0; negative for all else."""
    return layout.view - int(layout.modality != "video")


def _moved(
    index: int,
    tokens: VisualTokens,
    conditions: Sequence[Condition],
    skipped: set[Skip],
) -> Iterator[_Case]:
    """An encoded image in all conditions that are possible, at the selector level."""
    for condition in _fitting(tokens.layout, conditions):
        try:
            content = paired(tokens.layout, condition)
        except NotPossible as reason:
            skipped.add((index, condition, "selector", str(reason)))
        else:
            moved, slots = move_tokens(tokens, condition), _slots(tokens.layout)
            yield _Case(index, condition, "selector", moved, content, slots)


def _fitting(layout: TokenLayout, conditions: Sequence[Condition]) -> list[Condition]:
    """The conditions that apply to an image, or to a video."""
    others = CROPS if layout.modality == "video" else ("reversed-frames",)
    return [condition for condition in conditions if condition not in others]


def _encoded(pipe: Pipeline, shown: Shown, signals: frozenset[Signal]) -> VisualTokens:
    if isinstance(shown, Image.Image):
        return pipe.encode([shown], signals)[0]
    return pipe.encode_videos([list(shown)], signals)[0]


def _same_geometry(one: TokenLayout, other: TokenLayout) -> bool:
    return (
        len(one) == len(other)
        and one.grid == other.grid
        and one.canvas_shape == other.canvas_shape
        and torch.equal(one.view, other.view)
    )


# --- selecting ------------------------------------------------------------------------------------


def _in_front(compressor: Compressor) -> bool:
    """Whether it acts only in front of the language model, which then need not run."""
    return compressor.stage is Stage.PRE_LLM and list(compressor.parts()) == [compressor]


def _selected(compressor: Compressor, cases: Sequence[_Case]) -> list[_CaseSelection]:
    """What a method in front of the language model keeps of each case."""
    noted, notes = noting(compressor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)  # the tables show realised shares
        return [_outcome(case, [noted(case.tokens).keep], notes) for case in cases]


def _selections(
    pipe: Pipeline, compressor: Compressor, cases: Sequence[_Case], prompts: Sequence[str]
) -> list[_CaseSelection]:
    """What any method keeps of each case."""
    if _in_front(compressor):
        return _selected(compressor, cases)
    noted, notes = noting(compressor)
    inputs = pipe.assemble([[case.tokens] for case in cases], prompts)
    with warnings.catch_warnings(), tp.compress(pipe.model, noted) as trace:
        warnings.simplefilter("ignore", RetentionWarning)
        pipe.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
    cuts: list[list[Tensor]] = [[] for _ in cases]
    for chosen in trace.selections:
        cuts[chosen.row].append(chosen.keep)
    return [_outcome(case, keeps, notes) for case, keeps in zip(cases, cuts, strict=True)]


def _outcome(
    case: _Case, keeps: Sequence[Tensor], notes: Sequence[tuple[VisualTokens, Tensor]]
) -> _CaseSelection:
    size = len(case.tokens)
    first, last = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
    first[keeps[0].cpu()] = True
    last[keeps[-1].cpu()] = True
    score = torch.full((size,), torch.nan)
    for seen, values in notes:  # a later cut sees fewer tokens
        if seen.fingerprint is case.tokens.fingerprint and len(values) == size:
            score = values.detach().float().cpu()
            break
    return _CaseSelection(last, first, score)


def _rows(compressor: Compressor, case: _Case, outcome: _CaseSelection) -> Rows:
    layout = case.layout
    patches = layout.patches.numpy()
    slots = layout.frames if layout.modality == "video" else layout.grid[0] * layout.grid[1]
    shared = {
        "method": compressor.label,
        "retention": compressor.retention,
        "modality": layout.modality,
        "image": case.image,
        "condition": case.condition,
        "level": case.level,
        "slots": slots,
        "grid": f"{layout.grid[0]}x{layout.grid[1]}",
    }
    made = {
        "kept": outcome.kept.numpy()[patches],
        "kept_first": outcome.kept_first.numpy()[patches],
        "score": outcome.score.numpy()[patches],
    }
    return Rows(shared, {**case.geometry, **made})
