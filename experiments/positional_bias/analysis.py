"""Run methods on rearranged images."""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.engine.rankings import noting
from tokenprune.errors import RetentionWarning, UserError, unknown
from tokenprune.experiments.cluster.run import Died, Pool
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.own_images import PROMPT
from tokenprune.experiments.positional_bias.cases import (
    Case,
    fingerprinted,
    moved_cases,
    normal_case,
)
from tokenprune.experiments.positional_bias.cases import cases as encoded_cases
from tokenprune.experiments.positional_bias.estimates import profiles, statistics
from tokenprune.experiments.positional_bias.rearrange import (
    CONDITIONS,
    DEFAULT,
    EXCHANGED,
    LEVELS,
    Condition,
    Level,
    Shown,
)
from tokenprune.experiments.positional_bias.rows import Parts, Rows, Skip, joined
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "Analysis",
    "Asked",
    "check_method",
    "compressors_of",
    "positional_bias",
    "selector_bias",
    "served",
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
class _CaseSelection:
    """What a method keeps of a case, each (N,); scores are NaN where there are none."""

    kept: Tensor
    kept_first: Tensor
    score: Tensor


_Key = tuple[str, float]  # label and retention of a method


_Found = tuple[int, _Key, list[Rows] | Failure]  # number of the batch, method, its rows


_Select = Callable[[Compressor, Sequence[Case]], Sequence[_CaseSelection]]


_Compute = Callable[
    [Mapping[_Key, Compressor], Iterable[Mapping[_Key, set[int]]], ProgressCallback],
    Iterator[_Found],
]


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
    pool: Pool[Any] | None = None,
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
        pool: Workers that serve `served`; the pipeline then needs no weights.  None computes here.
        progress: Called before every step.

    Raises:
        UserError: Bad input, found before anything is run; or worker after worker dies.
    """
    compressors = compressors_of(methods, retention)
    for compressor in compressors:
        check_method(pipe, compressor)
    _check(pipe, images, conditions, levels, prompts, batch_size)
    known = Parts(parts)
    asked = Asked(
        compressors=compressors,
        images=dict(enumerate(images)),
        prompts=dict(enumerate(prompts or [PROMPT] * len(images))),
        conditions=conditions,
        levels=levels,
        batch_size=batch_size,
    )
    if pool is None:
        compute: _Compute = partial(_here, *_computing(pipe, asked, known.skipped), batch_size)
    else:
        compute = partial(_elsewhere, pool, asked, known)
    return _analysed(compressors, len(images), compute, known, batch_size, seed, progress)


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

    def cases(index: int) -> Iterator[Case]:
        tokens = fingerprinted(index, encoded[index])
        yield normal_case(index, tokens)
        yield from moved_cases(index, tokens, conditions, known.skipped)

    compute = partial(_here, cases, _selected, 16)
    return _analysed(compressors, len(encoded), compute, known, 16, seed, progress)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a pipeline: arguments of `positional_bias`, images and prompts by index.

    Attributes:
        lacking: Method to the images on which it is run.
    """

    compressors: Sequence[Compressor]
    images: Mapping[int, Shown]
    prompts: Mapping[int, str]
    conditions: Sequence[Condition]
    levels: Sequence[Level]
    batch_size: int
    lacking: Mapping[_Key, set[int]] = field(default_factory=dict)


def _computing(
    pipe: Pipeline, asked: Asked, skipped: set[Skip]
) -> tuple[Callable[[int], Iterator[Case]], _Select]:
    """The functions that encode an image, and that run a method on some."""
    signals = frozenset[Signal]().union(*(one.needs for one in asked.compressors))
    outside = frozenset(signal for signal in signals if not signal.in_llm)

    def cases(index: int) -> Iterator[Case]:
        shown = asked.images[index]
        return encoded_cases(pipe, index, shown, outside, asked.conditions, asked.levels, skipped)

    def select(compressor: Compressor, some: Sequence[Case]) -> list[_CaseSelection]:
        return _selections(pipe, compressor, some, [asked.prompts[case.image] for case in some])

    return cases, select


def served(pipe: Pipeline, asked: Asked) -> tuple[list[_Found], set[Skip]]:
    """In a worker: the rows of a batch of images, and the images that were skipped in it."""
    skipped: set[Skip] = set()
    compute = partial(_here, *_computing(pipe, asked, skipped), asked.batch_size)
    keys = {(one.label, one.retention): one for one in asked.compressors}
    return list(compute(keys, [asked.lacking], silent)), skipped


def _here(
    cases: Callable[[int], Iterator[Case]],
    select: _Select,
    batch_size: int,
    keys: Mapping[_Key, Compressor],
    batches: Iterable[Mapping[_Key, set[int]]],
    tell: ProgressCallback,
) -> Iterator[_Found]:
    """The rows of every method in every batch of images that it lacks, or why it failed."""
    for number, lacking in enumerate(batches):
        tell(number, 0, "vision encoder")
        needed = sorted(set().union(*lacking.values()))
        batch = [case for index in needed for case in cases(index)]
        for key in lacking:
            tell(number, 0, f"{key[0]} at {key[1]:g}")
            mine = [case for case in batch if case.image in lacking[key]]
            found = tried(partial(_rows_of, keys[key], mine, select, batch_size))
            if isinstance(found, Failure):
                # The failed method may have modified tensors that other methods use.
                batch = [case for index in needed for case in cases(index)]
            yield number, key, found


def _elsewhere(
    pool: Pool[Any],
    asked: Asked,
    known: Parts,
    keys: Mapping[_Key, Compressor],
    batches: Iterable[Mapping[_Key, set[int]]],
    tell: ProgressCallback,
) -> Iterator[_Found]:
    """As `_here`, on workers; batches come in the order in which they finish."""
    waiting = {number: lacking for number, lacking in enumerate(batches) if any(lacking.values())}

    def pack(number: int) -> Asked:
        needed = set().union(*waiting[number].values())
        return replace(
            asked,
            lacking=waiting[number],
            images={index: asked.images[index] for index in needed},
            prompts={index: asked.prompts[index] for index in needed},
        )

    for number, found in pool.results(deque(waiting), pack):
        if isinstance(found, Died):
            raise UserError(
                f"every worker that was given batch {number + 1} of the images died ({found.why}); "
                "the other batches are kept. Give the workers more memory or a smaller "
                "--batch-size."
            )
        rows, skipped = found
        known.skipped |= skipped
        tell(number, 0, f"{pool.ready} workers")
        yield from ((number, key, result) for _, key, result in rows)


def _rows_of(
    compressor: Compressor,
    cases: Sequence[Case],
    select: _Select,
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
    compute: _Compute,
    known: Parts,
    batch_size: int,
    seed: int,
    progress: ProgressCallback,
) -> Analysis:
    """Run the methods on all cases of all images; a method that fails is left out."""
    failures: dict[_Key, tuple[int, Failure]] = {}  # with the batch in which it failed
    keys = {(one.label, one.retention): one for one in compressors}
    total, done = len(keys) * images, 0

    def batches() -> Iterator[Mapping[_Key, set[int]]]:
        for start in range(0, images, batch_size):
            here = set(range(start, min(start + batch_size, images)))
            yield {key: here - known.images(*key) for key in keys if key not in failures}

    def tell(number: int, _: int, doing: str) -> None:
        progress(done, total, f"{doing}, {len(failures)} failed")

    for number, key, found in compute(keys, batches(), tell):
        done += min(batch_size, images - number * batch_size)
        if not isinstance(found, Failure):
            known.add(found)
        elif key not in failures or number < failures[key][0]:
            failures[key] = number, found
    progress(total, total, "statistics")
    ordered = [
        one
        for key in keys
        if key not in failures
        for one in sorted(known.rows(*key), key=lambda rows: rows.shared["image"])
    ]
    tokens = joined(ordered)
    skipped = Counter(skip[1:] for skip in known.skipped)
    why = {key: why for key, (_, why) in sorted(failures.items(), key=lambda one: one[1][0])}
    return Analysis(tokens, statistics(tokens, seed=seed), profiles(tokens), dict(skipped), why)


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


# --- selecting ------------------------------------------------------------------------------------


def _in_front(compressor: Compressor) -> bool:
    """Whether it acts only in front of the language model, which then need not run."""
    return compressor.stage is Stage.PRE_LLM and list(compressor.parts()) == [compressor]


def _selected(compressor: Compressor, cases: Sequence[Case]) -> list[_CaseSelection]:
    """What a method in front of the language model keeps of each case."""
    noted, notes = noting(compressor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)  # the tables show realised shares
        return [_outcome(case, [noted(case.tokens).keep], notes) for case in cases]


def _selections(
    pipe: Pipeline, compressor: Compressor, cases: Sequence[Case], prompts: Sequence[str]
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
    case: Case, keeps: Sequence[Tensor], notes: Sequence[tuple[VisualTokens, Tensor]]
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


def _rows(compressor: Compressor, case: Case, outcome: _CaseSelection) -> Rows:
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
