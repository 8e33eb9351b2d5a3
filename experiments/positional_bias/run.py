"""Does a method keep tokens because of their content, or because of their location?

Figure 4 of GlobalCom² (arXiv 2501.05179): methods that rank by the language model's attention keep
late crops, whatever their content and order.  This experiment shows methods the same content at
other locations (`rearrange`) and estimates which of the two the selection follows (`estimates`).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tokenprune.compressor import Compressor
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.cluster.run import Hardware, Pool, description, hardware, workers
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.files import check_writable, replace_file
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.limits import check_lengths, check_number
from tokenprune.experiments.common.loading import options_of_answers
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.own_images import own_questions
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    Files,
    answer_files,
    digests,
    environment,
)
from tokenprune.experiments.common.questions import (
    Modality,
    Question,
    check_placeholders,
    fingerprint,
    held_out,
)
from tokenprune.experiments.common.request import FigureOptions, ModelRequest
from tokenprune.experiments.common.run_folder import RunFolder, asked_for
from tokenprune.experiments.common.setting import warn_about_testbed
from tokenprune.experiments.positional_bias import figures
from tokenprune.experiments.positional_bias.analysis import (
    Analysis,
    check_method,
    compressors_of,
    positional_bias,
    served,
)
from tokenprune.experiments.positional_bias.rearrange import CONDITIONS, DEFAULT, Condition, Shown
from tokenprune.experiments.positional_bias.rows import Parts
from tokenprune.models import testbed
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "METHODS",
    "PositionalBiasRequest",
    "run",
]


PARTS = "parts"  # folder of the finished parts of an interrupted run


METHODS = ("uniform", "random", "last", "fastv", "globalcom2")


TESTBED_IMAGES = 60


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PositionalBiasRequest(ModelRequest):
    """What to analyse.

    Attributes:
        methods: Specs, as in `CompareRequest`.
        retention: Retention ratios, each in (0, 1].
        paths: Images: files, folders and patterns (`own_images.image_files`).
        data: File of questions (`questions.read_jsonl`), which need no answers; an image is used
            once, with its first question.  Without paths and data, the images are those of the
            testbed.
        prompt: The question about images that come without one; None for `own_images.PROMPT` with
            ``paths``.
        images: Number of images; None for 60 of the testbed, or all given ones.
        modality: ``image`` or ``video``; None for ``image`` of the testbed, or all of ``data``.
        conditions: As in `positional_bias`.
        batch_size: Prompts that run at once; None for 50 on a testbed, otherwise 4.
    """

    methods: Sequence[str] = METHODS
    retention: Sequence[float] = (0.25,)
    paths: Sequence[Path] = ()
    data: Path | None = None
    prompt: str | None = None
    images: int | None = None
    modality: Modality | None = None
    conditions: Sequence[Condition] = DEFAULT
    batch_size: int | None = None


def run(request: PositionalBiasRequest, progress: ProgressCallback = silent) -> Outcome:
    """Analyse methods, or resume an analysis that was interrupted, and write it to a folder.

    The folder gets ``manifest.json``, ``parts/`` (finished batches), and, made from them,
    ``tokens.parquet``, ``statistics.csv``, ``profiles.csv`` and ``plots/``.

    Returns:
        With the tables ``statistics``, ``tokens`` and ``profiles``, as in `Analysis`, unless the
        run was interrupted.

    Raises:
        UserError: Bad input, before the model runs.
    """
    _check_request(request)
    cells([spec for spec in request.methods if spec != ALL], request.retention)
    check_writable(request.out or Path("runs"))
    progress(0, 0, "checking the images")
    questions, left_out = _questions(request)
    own = request.data is not None or bool(request.paths)
    warn_about_testbed(request.model, own=own)
    pipe = description(request, progress)
    methods, unfit = expanded(request.methods, lambda one: check_method(pipe, one))
    compressors = compressors_of(methods, request.retention)
    for compressor in compressors:
        check_method(pipe, compressor)
    if pipe.adapter.has_language_model:
        check_placeholders(questions, pipe)
    check_lengths(pipe, questions, new=1)
    asked = request, compressors, questions, pipe
    if request.cluster is None:
        outcome = _recorded(*asked, hardware(pipe), None, progress)
    else:
        with workers(request, served, progress) as (pool, there):
            outcome = _recorded(*asked, there, pool, progress)
    if outcome.status == "interrupted":
        return replace(outcome, skipped=unfit)
    if left_out:
        many = "s" * (left_out != 1)
        note = f"SKIPPED: {left_out} image{many} with several images in one prompt."
        outcome = replace(outcome, notes=(*outcome.notes, note))
    return replace(outcome, skipped=unfit)


def _recorded(
    request: PositionalBiasRequest,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    pipe: Pipeline,
    there: Hardware,
    pool: Pool[Any] | None,
    progress: ProgressCallback,
) -> Outcome:
    """Fill the folder of the run, and record how that ended."""
    folder = _opened(request, compressors, questions, pipe, there)
    status = "failed"
    failures: list[dict[str, Any]] = []
    try:
        found = _analysed(request, compressors, questions, pipe, pool, folder.path, progress)
        progress(0, 0, "tables and plots")
        _write(folder.path, found, questions, Path(request.model).name, request.figures)
        failures = [{"cell": _cell(*which), **asdict(why)} for which, why in found.failures.items()]
        status = "failed" if failures else "complete"
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        folder.close(status, failures)
    done, wanted = len(Parts(folder.path / PARTS)), len(questions) * len(compressors)
    if status == "interrupted":
        return Outcome(folder.path, status, answered=done, wanted=wanted)
    return Outcome(
        folder.path,
        status,
        tables={name: getattr(found, name) for name in ("statistics", "tokens", "profiles")},
        files=("tokens.parquet", "statistics.csv", "profiles.csv", "plots/"),
        answered=done,
        wanted=wanted,
        failures={_cell(*which): why for which, why in found.failures.items()},
        notes=tuple(_notes(found)),
    )


def _cell(method: str, retention: float) -> str:
    return f"{method} at {retention:g}"


def _opened(
    request: PositionalBiasRequest,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    pipe: Pipeline,
    there: Hardware,
) -> RunFolder:
    """The folder of the run, which holds nothing else."""
    surroundings = environment()
    files = answer_files(pipe.path, compressors, [type(pipe.adapter), __name__])
    experiment = _experiment(
        request, compressors, questions, there, surroundings["versions"], files
    )
    path = request.out or Path("runs") / _folder_name(experiment)
    details = asked_for(request, path) | {"files": files} | surroundings
    return RunFolder.open(path, experiment, details)


def _analysed(
    request: PositionalBiasRequest,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    pipe: Pipeline,
    pool: Pool[Any] | None,
    folder: Path,
    progress: ProgressCallback,
) -> Analysis:
    return positional_bias(
        pipe,
        compressors,
        [_shown(item) for item in questions],
        conditions=request.conditions,
        prompts=[item.question for item in questions],
        batch_size=request.batch_size or (50 if request.model in testbed.names() else 4),
        seed=request.seed,
        parts=folder / PARTS,
        pool=pool,
        progress=progress,
    )


def _notes(found: Analysis) -> Iterator[str]:
    """Sentences about images that were skipped in a condition."""
    for (condition, level, why), count in found.skipped.items():
        yield f"SKIPPED {condition} ({level}): {count} image{'s' * (count != 1)} with {why}."


def _check_request(request: PositionalBiasRequest) -> None:
    for name in ("images", "batch_size", "seed"):
        check_number(name, getattr(request, name))
    for name in ("methods", "retention", "conditions"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    for condition in request.conditions:
        if condition not in CONDITIONS:
            raise unknown("condition", condition, CONDITIONS)
    if request.modality not in (None, "image", "video"):
        raise unknown("modality", str(request.modality), ["image", "video"])


def _questions(request: PositionalBiasRequest) -> tuple[list[Question], int]:
    """One question for every image or video, and the number of multi-image prompts left out."""
    if request.paths or request.data is not None:
        found = own_questions(
            request.paths, request.data, request.prompt, modality=request.modality
        )
    elif request.prompt is not None:
        raise UserError("--prompt asks about images of your own; give them, or --data.")
    else:
        from tokenprune.models.testbed import scenes

        count, modality = request.images or TESTBED_IMAGES, request.modality or "image"
        kinds = len(scenes.MODALITIES[modality])
        found = held_out(count * kinds, request.seed, modality)
        # The kinds of questions in turn, each about another image.
        found = [found[index * kinds + index % kinds] for index in range(count)]
    by_image = {item.image_id: item for item in reversed(found)}  # its first question
    names = list(dict.fromkeys(item.image_id for item in found))
    ordered = [by_image[name] for name in names if by_image[name].modality != "multi-image"]
    left_out = len(names) - len(ordered)
    if not ordered:
        raise UserError("there is no single image and no video among the questions.")
    if request.images is not None and len(ordered) < request.images:
        raise UserError(
            f"there are {len(ordered)} images, fewer than the {request.images} asked for; leave "
            "--images out to use all."
        )
    return ordered[: request.images], left_out


def _shown(item: Question) -> Shown:
    opened = [picture.open() for picture in item.images]
    return opened if item.video else opened[0]


def _experiment(
    request: PositionalBiasRequest,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    there: Hardware,
    versions: Mapping[str, str | None],
    files: Mapping[str, Files],
) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        "experiment": "positional-bias",
        "model": request.model,
        "methods": list(dict.fromkeys(compressor.label for compressor in compressors)),
        "retention": list(dict.fromkeys(compressor.retention for compressor in compressors)),
        "cells": [repr(compressor) for compressor in compressors],
        "images": len(questions),
        "conditions": list(request.conditions),
        "data": fingerprint(questions),
        "seed": request.seed,
        "device": there.device,
        "dtype": there.dtype,
        **options_of_answers(request),
        **digests(files),
        **{package: versions[package] for package in DECISIVE},
    }


def _folder_name(experiment: Mapping[str, Any]) -> str:
    methods = "+".join(experiment["methods"])
    if len(methods) > 60:
        methods = f"{len(experiment['methods'])}-methods"
    model = Path(experiment["model"]).name
    digest = hashlib.sha256(json.dumps(experiment, sort_keys=True).encode()).hexdigest()
    name = f"positional-bias_{model}_{methods}_{experiment['images']}-images_{digest[:8]}"
    return re.sub(r"[^\w.+=-]+", "-", name)


def _write(
    path: Path,
    found: Analysis,
    questions: Sequence[Question],
    model: str,
    options: FigureOptions,
) -> None:
    names = dict(enumerate(item.image_id for item in questions))
    tokens = found.tokens.assign(image_id=found.tokens["image"].map(names).astype("category"))
    with replace_file(path / "tokens.parquet") as temporary:
        tokens.to_parquet(temporary, index=False)
    write_tables(path, {"statistics": found.statistics, "profiles": found.profiles})
    for name, figure in figures.figures(found.tokens, found.statistics, model, options):
        plots.save(figure, path / "plots" / name, options)
