"""Does a method keep tokens for what they show, or for where they lie in the sequence?

Figure 4 of GlobalCom² (arXiv 2501.05179): methods that rank by the language model's attention keep
late crops, whatever they show and in whatever order they come.  Here any method is shown the same
content at other places (`rearrange`), and statistics say which the choice follows
(`position_statistics`).
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import check_writable, replace_file
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.limits import check_lengths, check_number
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    Files,
    answer_files,
    digests,
    environment,
)
from tokenprune.experiments.common.questions import (
    Modality,
    Picture,
    Question,
    check_placeholders,
    fingerprint,
    held_out,
    read_jsonl,
)
from tokenprune.experiments.common.run_folder import RunFolder, asked_for
from tokenprune.experiments.positional_bias import figures
from tokenprune.experiments.positional_bias.analysis import (
    PROMPT,
    Result,
    check_method,
    compressors_of,
    positional_bias,
)
from tokenprune.experiments.positional_bias.rearrange import CONDITIONS, DEFAULT, Condition, Shown
from tokenprune.experiments.positional_bias.rows import Parts
from tokenprune.models import testbed
from tokenprune.progress import Report

__all__ = [
    "Outcome",
    "Request",
    "run",
]


PARTS = "parts"  # folder of what an interrupted run has finished


METHODS = ("uniform", "random", "last", "fastv", "globalcom2")


TESTBED_IMAGES = 60


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
        device, dtype, trust_remote_code: As in `compare.Request`.
        out: Folder of the run; None for one in ``runs/`` named after the request.
    """

    model: str = "testbed-next"
    methods: Sequence[str] = METHODS
    retention: Sequence[float] = (0.25,)
    paths: Sequence[Path] = ()
    data: Path | None = None
    images: int | None = None
    modality: Modality | None = None
    conditions: Sequence[Condition] = DEFAULT
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """Where a run was written, and what was found.

    Attributes:
        folder: ``manifest.json``, ``parts/`` (batches as they were finished), and, made from them,
            ``tokens.parquet``, ``statistics.csv``, ``profiles.csv`` and ``plots/``.
        result: As `positional_bias` returns it.
        left_out: Methods of ``all`` that do not run here, and why.
    """

    folder: Path
    result: Result
    left_out: Mapping[str, str] = field(default_factory=dict)


def run(request: Request, report: Report = lambda *_: None) -> Outcome:
    """Do what is asked, or what is left of it if it was begun before, and write it to a folder.

    Raises:
        UserError: Bad input, found before the model runs.
        KeyboardInterrupt: Ctrl-C, with a sentence about what is kept.
    """
    _check_request(request)
    cells([spec for spec in request.methods if spec != ALL], request.retention)
    check_writable(request.out or Path("runs"))
    report(0, 0, "checking the images")
    questions, left_out = _questions(request)
    report(0, 0, f"loading {request.model}")
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = tp.load(
        request.model,
        device=device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    methods, unfit = expanded(request.methods, lambda one: check_method(adapter, one))
    compressors = compressors_of(methods, request.retention)
    for compressor in compressors:
        check_method(adapter, compressor)
    if adapter.has_language_model:
        check_placeholders(questions, adapter)
    check_lengths(adapter, questions, new=1)

    surroundings = environment()
    files = answer_files(adapter.path, compressors, [type(adapter), __name__])
    experiment = _experiment(
        request, compressors, questions, adapter, surroundings["versions"], files
    )
    path = request.out or Path("runs") / _folder_name(experiment)
    folder = RunFolder.open(
        path, experiment, asked_for(request, path) | {"files": files} | surroundings
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
            parts=folder.path / PARTS,
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
        there = len(Parts(folder.path / PARTS))
        raise KeyboardInterrupt(
            f"interrupted: of {len(questions) * len(compressors)} choices (an image by a method), "
            f"{there} are kept in {folder.path}; the same command goes on from there."
        ) from None
    finally:
        folder.close(status, failures)
    return Outcome(folder.path, result, unfit)


def _check_request(request: Request) -> None:
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
    if request.paths and request.data:
        raise UserError("give either image files or --data, not both.")


def _questions(request: Request) -> tuple[list[Question], int]:
    """One question about every image or video, and how many prompts of several were left out."""
    if request.paths:
        found = [
            Question(str(path), (Picture(str(path), path),), PROMPT, "") for path in request.paths
        ]
        for item in found:
            item.images[0].open()  # raises before anything is computed
    elif request.data is not None:
        found = read_jsonl(request.data, None, request.modality)
    else:
        from tokenprune.models.testbed import scenes

        count, modality = request.images or TESTBED_IMAGES, request.modality or "image"
        kinds = len(scenes.MODALITIES[modality])
        found = held_out(count * kinds, request.seed, modality)
        # Every kind of question in turn, each about another image.
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
    request: Request,
    compressors: Sequence[Compressor],
    questions: Sequence[Question],
    adapter: Adapter,
    versions: Mapping[str, str | None],
    files: Mapping[str, Files],
) -> dict[str, Any]:
    """All that the figures depend on."""
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
        "device": adapter.device.type,
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
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


def _write(path: Path, result: Result, questions: Sequence[Question], model: str) -> None:
    names = dict(enumerate(item.image_id for item in questions))
    tokens = result.tokens.assign(image_id=result.tokens["image"].map(names).astype("category"))
    with replace_file(path / "tokens.parquet") as temporary:
        tokens.to_parquet(temporary, index=False)
    for name, table in (("statistics", result.statistics), ("profiles", result.profiles)):
        with replace_file(path / f"{name}.csv") as temporary:
            write_csv(table, temporary)
    for name, figure in figures.figures(result.tokens, result.statistics, model):
        plots.save(figure, path / "plots" / name)
