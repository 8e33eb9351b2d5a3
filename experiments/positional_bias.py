"""Does a method keep tokens for what they show, or for where they lie in the sequence?

Figure 4 of GlobalCom² (arXiv 2501.05179): methods that rank by the language model's attention keep
late crops, whatever they show and in whatever order they come.  Here any method is shown the same
content at other places (`rearrange`), and statistics say which the choice follows
(`position_statistics`).
"""

import copy
import hashlib
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Chain, Compressor, ScoringCompressor, Stage
from tokenprune.errors import RetentionWarning, UserError, unknown
from tokenprune.experiments import data, plots, position_plots
from tokenprune.experiments.compare import cells
from tokenprune.experiments.data import Modality, Picture, Question
from tokenprune.experiments.position_statistics import (
    NORMAL,
    agreement,
    equivariance,
    paired_bias,
    profiles,
    sign_flip,
    slope,
    statistics,
)
from tokenprune.experiments.rearrange import (
    CONDITIONS,
    LEVELS,
    Condition,
    Level,
    NotPossible,
    Shown,
    move_pixels,
    move_tokens,
    paired,
)
from tokenprune.experiments.results import (
    Failure,
    RunFolder,
    check_writable,
    code_fingerprint,
    environment,
    files_fingerprint,
    replace_file,
)
from tokenprune.models import testbed
from tokenprune.models.adapter import Adapter
from tokenprune.terminal import Report
from tokenprune.tokens import Kind, Signal, TokenLayout, VisualTokens

__all__ = [
    "CONDITIONS",
    "LEVELS",
    "NORMAL",
    "Outcome",
    "Request",
    "Result",
    "agreement",
    "equivariance",
    "paired_bias",
    "positional_bias",
    "profiles",
    "run",
    "sign_flip",
    "slope",
    "statistics",
]

METHODS = ("uniform", "random", "last", "fastv", "globalcom2")
TESTBED_IMAGES = 60
PROMPT = "What is in the image?"


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        tokens: One row per method, retention, image, condition, level and patch token: ``token``
            (index in the packed sequence), ``position`` (its middle, relative, in (0, 1)),
            ``kind``, ``view``, ``slot`` (of crops and of frames, from 0; -1 for a thumbnail) of
            ``slots``, ``row`` and ``col`` in the view, ``y`` and ``x`` (relative place in the
            image), ``content`` (which token showed the same originally, -1 where none did),
            ``kept`` (at the end), ``kept_first`` (at the first cut) and ``score`` (that the first
            cut ranked by; missing for methods that do not score).
        statistics: As `position_statistics.statistics` returns it.
        profiles: As `position_statistics.profiles` returns it.
        skipped: (condition, level, why) to the number of images that could not be rearranged so.
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
    """An image in one condition, encoded."""

    image: int
    condition: str
    level: str
    tokens: VisualTokens
    content: Tensor


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a method made of a case: (N,) each; scores missing where there are none."""

    kept: Tensor
    kept_first: Tensor
    score: Tensor


def positional_bias(
    adapter: Adapter,
    methods: Sequence[str | Compressor],
    images: Sequence[Shown],
    *,
    retention: Sequence[float] = (0.25,),
    conditions: Sequence[Condition] = CONDITIONS,
    levels: Sequence[Level] = LEVELS,
    prompts: Sequence[str] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    report: Report = lambda *_: None,
) -> Result:
    """Run methods on images whose content is rearranged, and test what the choice follows.

    Methods in front of the language model choose as `Adapter.choose` lets them; all others run
    inside the model, in the prefill of a prompt.

    Args:
        adapter: As `tokenprune.load` returns it.
        methods: Compressors, or specs: those without a retention of their own run at each of
            ``retention``.
        images: Images, or videos as lists of frames, or both.
        retention: Shares of patch tokens to keep.
        conditions: Which ones, besides the normal one; each is applied where it is possible.
        levels: Whether to move features and signals behind the encoder (``selector``), pixels in
            front of it (``pipeline``), or both.
        prompts: For every image the question that methods in the language model see; None for
            "What is in the image?".
        batch_size: Prompts that run at once.
        seed: Of the bootstrap.
        report: Told about progress.

    Raises:
        UserError: Bad input, found before anything is run.
    """
    compressors = _compressors(methods, retention)
    for compressor in compressors:
        adapter.check(compressor)
    _check(adapter, images, conditions, levels, prompts, batch_size)
    asked = list(prompts or [PROMPT] * len(images))
    signals = frozenset[Signal]().union(*(compressor.needs for compressor in compressors))
    outside = frozenset(signal for signal in signals if not signal.in_llm)
    skipped: Counter[tuple[str, str, str]] = Counter()
    failures: dict[tuple[str, float], Failure] = {}
    tables: dict[tuple[str, float], list[pd.DataFrame]] = {
        (one.label, one.retention): [] for one in compressors
    }
    total, done = len(compressors) * len(images), 0
    for start in range(0, len(images), batch_size):
        here = range(start, min(start + batch_size, len(images)))
        report(done, total, "vision tower")
        cases = [
            case
            for index in here
            for case in _cases(adapter, index, images[index], outside, conditions, levels, skipped)
        ]
        for compressor in compressors:
            key = (compressor.label, compressor.retention)
            report(done, total, f"{key[0]} at {key[1]:g}")
            done += len(here)
            if key in failures:
                continue
            try:
                for first in range(0, len(cases), batch_size):
                    some = cases[first : first + batch_size]
                    chosen = _choices(adapter, compressor, some, [asked[c.image] for c in some])
                    tables[key] += map(_frame, some, chosen)
            except Exception as error:
                failures[key] = Failure.of(error)
    report(total, total, "statistics")
    tokens = _joined({key: some for key, some in tables.items() if key not in failures})
    return Result(tokens, statistics(tokens, seed=seed), profiles(tokens), dict(skipped), failures)


def _compressors(
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


def _check(
    adapter: Adapter,
    images: Sequence[Shown],
    conditions: Sequence[str],
    levels: Sequence[str],
    prompts: Sequence[str] | None,
    batch_size: int,
) -> None:
    for what, values, known in (
        ("condition", conditions, CONDITIONS),
        ("level", levels, LEVELS),
    ):
        for value in values:
            if value not in known:
                raise unknown(what, value, known)
    if not images:
        raise UserError("positional bias needs at least one image.")
    if prompts is not None and len(prompts) != len(images):
        raise UserError(f"{len(prompts)} prompts for {len(images)} images; give one for each.")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}.")
    for shown in images:
        if not isinstance(shown, Image.Image):
            if "video" not in adapter.encoders:
                raise UserError(
                    f"{adapter.name} takes images only; load a model that takes videos, or hand "
                    "over single frames as images."
                )
            if not len(shown):
                raise UserError("a video needs at least one frame, got an empty list.")


def _cases(
    adapter: Adapter,
    index: int,
    shown: Shown,
    signals: frozenset[Signal],
    conditions: Sequence[Condition],
    levels: Sequence[Level],
    skipped: Counter[tuple[str, str, str]],
) -> Iterator[_Case]:
    """An image as it is and in every condition that is possible, encoded."""
    normal = _encoded(adapter, shown, signals)
    layout = normal.layout
    itself = torch.arange(len(layout)).masked_fill(layout.is_separator.cpu(), -1)
    yield _Case(index, NORMAL, NORMAL, normal, itself)
    video = not isinstance(shown, Image.Image)
    other = "reversed-crops" if video else "reversed-frames"
    for condition in conditions:
        if condition == other:  # not a question of this image
            continue
        for level in levels:
            try:
                content = paired(layout, condition).cpu()
                if level == "selector":
                    moved = move_tokens(normal, condition)
                else:
                    pixels = move_pixels(shown, condition, layout, _side(adapter))
                    moved = _encoded(adapter, pixels, signals)
                    if not _alike(moved.layout, layout):
                        raise NotPossible("another grid once rearranged")
            except NotPossible as reason:
                skipped[condition, level, str(reason)] += 1
            else:
                yield _Case(index, condition, level, moved, content)


def _encoded(adapter: Adapter, shown: Shown, signals: frozenset[Signal]) -> VisualTokens:
    if isinstance(shown, Image.Image):
        return adapter.encode([shown], signals)[0]
    return adapter.encode_videos([list(shown)], signals)[0]


def _side(adapter: Adapter) -> int:
    """Of a view, in pixels."""
    return int(adapter.base.config.vision_config.image_size)


def _alike(one: TokenLayout, other: TokenLayout) -> bool:
    return (
        len(one) == len(other)
        and one.grid == other.grid
        and one.canvas_shape == other.canvas_shape
        and torch.equal(one.view, other.view)
    )


# --- choosing -------------------------------------------------------------------------------------


def _choices(
    adapter: Adapter, compressor: Compressor, cases: Sequence[_Case], prompts: Sequence[str]
) -> list[_Choice]:
    """What ``compressor`` keeps of each case."""
    noted, scores = _noting(compressor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)  # the shares show it
        if compressor.stage is Stage.PRE_LLM and list(compressor.stages()) == [compressor]:
            cuts = [[noted(case.tokens).keep] for case in cases]
        else:
            inputs = adapter.assemble([[case.tokens] for case in cases], prompts)
            with tp.compress(adapter.model, noted) as trace:
                adapter.model.generate(**inputs, max_new_tokens=1, do_sample=False, num_beams=1)
            cuts = [
                [chosen.keep for chosen in trace.selections if chosen.row == row]
                for row in range(len(cases))
            ]
    return [_choice(case, keeps, scores) for case, keeps in zip(cases, cuts, strict=True)]


def _choice(
    case: _Case, keeps: Sequence[Tensor], scores: Sequence[tuple[VisualTokens, Tensor]]
) -> _Choice:
    size = len(case.tokens)
    first, last = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
    first[keeps[0].cpu()] = True
    last[keeps[-1].cpu()] = True
    score = torch.full((size,), torch.nan)
    for seen, values in scores:  # a later cut sees fewer tokens
        if seen.fingerprint is case.tokens.fingerprint and len(values) == size:
            score = values.detach().float().cpu()
            break
    return _Choice(last, first, score)


def _noting(compressor: Compressor) -> tuple[Compressor, list[tuple[VisualTokens, Tensor]]]:
    """A copy that notes every score vector it ranks by, and where it notes them.

    The copy's own ``score`` stands in front of its class's; nothing else is touched.
    """
    notes: list[tuple[VisualTokens, Tensor]] = []

    def noting(part: Compressor) -> Compressor:
        made = copy.copy(part)
        if isinstance(part, Chain):
            object.__setattr__(made, "parts", tuple(map(noting, part.parts)))
        if isinstance(part, ScoringCompressor):
            score = part.score

            def noted(tokens: VisualTokens) -> Tensor:
                values = score(tokens)
                notes.append((tokens, values))
                return values

            object.__setattr__(made, "score", noted)
        return made

    return noting(compressor), notes


# --- the table of tokens --------------------------------------------------------------------------


def _frame(case: _Case, choice: _Choice) -> pd.DataFrame:
    layout = case.tokens.layout.to("cpu")
    patches = layout.patches
    canvas = layout.kind == Kind.CROP
    (height, width), (rows, cols) = layout.view_shape, layout.canvas_shape
    y = torch.where(canvas, (layout.canvas_row + 0.5) / max(rows, 1), (layout.row + 0.5) / height)
    x = torch.where(canvas, (layout.canvas_col + 0.5) / max(cols, 1), (layout.col + 0.5) / width)
    frames = layout.modality == "video"
    slots = layout.frames if frames else layout.grid[0] * layout.grid[1]
    columns: dict[str, tuple[Tensor, Any]] = {
        "token": (torch.arange(len(layout)), np.int32),
        "position": ((torch.arange(len(layout)) + 0.5) / len(layout), np.float64),
        "view": (layout.view, np.int16),
        "slot": (layout.view if frames else layout.view - 1, np.int16),
        "row": (layout.row, np.int16),
        "col": (layout.col, np.int16),
        "y": (y, np.float32),
        "x": (x, np.float32),
        "content": (case.content, np.int32),
        "kept": (choice.kept, np.bool_),
        "kept_first": (choice.kept_first, np.bool_),
        "score": (choice.score, np.float32),
    }
    table = pd.DataFrame(
        {name: values[patches].numpy().astype(kind) for name, (values, kind) in columns.items()}
    )
    kinds = layout.kind[patches].numpy()
    return table.assign(
        image=np.int32(case.image),
        modality=layout.modality,
        condition=case.condition,
        level=case.level,
        kind=pd.Categorical.from_codes(kinds, [kind.name.lower() for kind in Kind]),
        slots=np.int16(slots),
        grid=f"{layout.grid[0]}x{layout.grid[1]}",
    )


_ORDER = [
    *("method", "retention", "modality", "image", "condition", "level", "token", "position"),
    *("kind", "view", "slot", "slots", "grid", "row", "col", "y", "x", "content"),
    *("kept", "kept_first", "score"),
]


def _joined(tables: Mapping[tuple[str, float], list[pd.DataFrame]]) -> pd.DataFrame:
    parts = [
        pd.concat(some).assign(method=method, retention=retention)
        for (method, retention), some in tables.items()
    ]
    if not parts:
        return pd.DataFrame(columns=_ORDER)
    tokens = pd.concat(parts, ignore_index=True)[_ORDER]
    names = {"method": list(dict.fromkeys(method for method, _ in tables))}
    names |= {"condition": [NORMAL, *CONDITIONS], "level": [NORMAL, *LEVELS]}
    for column, values in names.items():
        tokens[column] = pd.Categorical(tokens[column], values)
    return tokens


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to analyse.

    Attributes:
        model: A testbed's name, a Hub id or a local folder.
        methods: Specs, as in `compare.Request`.
        retention: Shares of patch tokens to keep, each in (0, 1].
        paths: Own images, each asked "What is in the image?".
        data: JSON lines with own questions (`data.read_jsonl`); an image is used once, with its
            first question.  None, without paths: the testbed's images.
        images: How many; None for 60 of the testbed's or for all of one's own.
        modality: ``image`` or ``video``; None for ``image`` of the testbed's or all of ``data``.
        conditions: As in `positional_bias`.
        batch_size: Prompts that run at once; None for 50 on a testbed, otherwise 4.
        seed: Draws the testbed's images and the bootstrap samples.
        device, dtype: As in `compare.Request`.
        out: Folder of the run; None for one in ``runs/`` named after the request.
    """

    model: str = "testbed-next"
    methods: Sequence[str] = METHODS
    retention: Sequence[float] = (0.25,)
    paths: Sequence[Path] = ()
    data: Path | None = None
    images: int | None = None
    modality: Modality | None = None
    conditions: Sequence[Condition] = CONDITIONS
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    out: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """Where a run was written, and what was found.

    Attributes:
        folder: ``manifest.json``, ``tokens.parquet``, ``statistics.csv``, ``profiles.csv`` and
            ``plots/``.
        result: As `positional_bias` returns it.
    """

    folder: Path
    result: Result


def run(request: Request, report: Report = lambda *_: None) -> Outcome:
    """Do what is asked and write it to a folder.

    Raises:
        UserError: Bad input, found before the model runs.
    """
    _check_request(request)
    cells(request.methods, request.retention)
    check_writable(request.out or Path("runs"))
    report(0, 0, "checking the images")
    questions, left_out = _questions(request)
    report(0, 0, f"loading {request.model}")
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = tp.load(request.model, device=device, dtype=request.dtype)
    compressors = _compressors(request.methods, request.retention)
    for compressor in compressors:
        adapter.check(compressor)
    if adapter.has_language_model:
        data.check_placeholders(questions, adapter.placeholder_texts)

    surroundings = environment()
    experiment = _experiment(request, compressors, questions, adapter, surroundings["versions"])
    folder = RunFolder.open(
        request.out or Path("runs") / _folder_name(experiment),
        experiment,
        {"command": sys.argv, "request": asdict(request)} | surroundings,
    )
    status = "failed"
    failures: list[dict[str, Any]] = []
    try:
        result = positional_bias(
            adapter,
            compressors,
            [_shown(item) for item in questions],
            conditions=request.conditions,
            prompts=[item.question for item in questions],
            batch_size=request.batch_size or (50 if request.model in testbed.names() else 4),
            seed=request.seed,
            report=report,
        )
        if left_out:
            skipped = {**result.skipped, ("all", "all", "several images in one prompt"): left_out}
            result = Result(**{**vars(result), "skipped": skipped})
        report(0, 0, "tables and plots")
        _write(folder.path, result, questions, Path(request.model).name)
        failures = [
            {"cell": f"{method} at {retention:g}", **asdict(why)}
            for (method, retention), why in result.failures.items()
        ]
        status = "failed" if failures else "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        folder.close(status, failures)
    return Outcome(folder.path, result)


def _check_request(request: Request) -> None:
    for name in ("images", "batch_size"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    if request.seed < 0:
        raise UserError(f"--seed must not be negative, got {request.seed}.")
    for name in ("methods", "retention", "conditions"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    for condition in request.conditions:
        if condition not in CONDITIONS:
            raise unknown("condition", condition, CONDITIONS)
    if request.modality not in (None, "image", "video"):
        raise unknown("modality", str(request.modality), ["image", "video"])
    if request.paths and request.data:
        raise UserError("give either image files or --data, not both.")


def _questions(request: Request) -> tuple[list[Question], int]:
    """One question about every image or video, and how many prompts of several were left out."""
    if request.paths:
        found = [
            Question(str(path), (Picture(str(path), path),), PROMPT, "") for path in request.paths
        ]
    elif request.data is not None:
        found = data.read_jsonl(request.data, None, request.modality)
    else:
        count, modality = request.images or TESTBED_IMAGES, request.modality or "image"
        kinds = len(testbed_kinds(modality))
        found = data.held_out(count * kinds, request.seed, modality)
        # Every kind of question in turn, each about another image.
        found = [found[index * kinds + index % kinds] for index in range(count)]
    usable = {item.image_id: item for item in reversed(found) if item.modality != "multi-image"}
    ordered = [
        usable[name]
        for name in dict.fromkeys(item.image_id for item in found if item.image_id in usable)
    ]
    left_out = len({item.image_id for item in found}) - len(ordered)
    if not ordered:
        raise UserError("there is no single image and no video among the questions.")
    if request.images is not None and len(ordered) < request.images:
        raise UserError(
            f"there are {len(ordered)} images, fewer than the {request.images} asked for; leave "
            "--images out to use all."
        )
    return ordered[: request.images], left_out


def testbed_kinds(modality: Modality) -> tuple[str, ...]:
    """Kinds of questions that the testbed asks in turn about each image or video."""
    from tokenprune.models.testbed import scenes

    return scenes.MODALITIES[modality]


def _shown(item: Question) -> Shown:
    opened = [picture.open() for picture in item.images]
    return opened if item.video else opened[0]


def _experiment(
    request: Request,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    adapter: Adapter,
    versions: Mapping[str, str | None],
) -> dict[str, Any]:
    """All that the figures depend on."""
    return {
        "experiment": "positional-bias",
        "model": request.model,
        "methods": list(dict.fromkeys(compressor.label for compressor in compressors)),
        "retention": list(dict.fromkeys(compressor.retention for compressor in compressors)),
        "images": len(questions),
        "conditions": list(request.conditions),
        "data": data.fingerprint(questions),
        "seed": request.seed,
        "device": adapter.device.type,
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        **files_fingerprint(adapter.path),
        "code": code_fingerprint(compressors),
        "torch": versions["torch"],
        "transformers": versions["transformers"],
    }


def _folder_name(experiment: Mapping[str, Any]) -> str:
    methods = "+".join(experiment["methods"])
    if len(methods) > 60:
        methods = f"{len(experiment['methods'])}-methods"
    model = Path(experiment["model"]).name
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    name = f"positional-bias_{model}_{methods}_{experiment['images']}-images_{digest[:8]}"
    return re.sub(r"[^\w.+=-]+", "-", name)


def _write(path: Path, result: Result, questions: Sequence[Question], model: str) -> None:
    names = dict(enumerate(item.image_id for item in questions))
    tokens = result.tokens.assign(image_id=result.tokens["image"].map(names).astype("category"))
    with replace_file(path / "tokens.parquet") as temporary:
        tokens.to_parquet(temporary, index=False)
    for name, table in (("statistics", result.statistics), ("profiles", result.profiles)):
        with replace_file(path / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    for name, figure in position_plots.figures(result.tokens, result.statistics, model):
        plots.save(figure, path / "plots" / name)
