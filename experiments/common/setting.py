"""What every experiment starts from: the request, the model and the questions."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.budget import check_retention
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.deadline import check_time_limit
from tokenprune.experiments.common.files import check_writable
from tokenprune.experiments.common.grid import ALL, cells
from tokenprune.experiments.common.limits import check_lengths, check_number, with_long_ones
from tokenprune.experiments.common.questions import (
    MODALITIES,
    Modality,
    Picture,
    Question,
    check_placeholders,
    held_out,
    read_jsonl,
    with_faults,
)
from tokenprune.models.loading import without_weights
from tokenprune.progress import Report

__all__ = [
    "KINDS",
    "RETENTION",
    "Kind",
    "Outcome",
    "Request",
    "Setting",
    "check",
    "checked_questions",
    "prepare",
    "with_crops",
    "with_faults_noted",
]


METHODS = ("uniform", "random", "fastv", "globalcom2")


RETENTION = (1.0, 0.5, 0.25, 0.1)


TESTBED_QUESTIONS = 500


Kind = Literal["tokens", "flops", "prefill-ms"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compare.

    Attributes:
        model: A testbed's name, a Hub id or a local folder.
        methods: Specs such as ``globalcom2:alpha=0.3,tau=5``; ``all`` stands for every registered
            method that the model has what it takes for.  ``uniform@0.3`` and chains such as
            ``globalcom2@0.5 + fastv@0.5`` say themselves what they keep.
        retention: Shares of patch tokens to keep, each in (0, 1].
        questions: How many; None for 500 of the testbed's or for all of ``data``.
        modality: ``image``, ``multi-image`` or ``video``; None for ``image`` of the testbed's or
            for all of ``data``.
        data: JSON lines with your own questions (`data.read_jsonl`); None for the testbed's.
        batch_size: Questions answered at once; None for 50 on a testbed, otherwise 4.
        seed: Draws the testbed's questions and the bootstrap samples.
        seeds: How many seeds a method that draws at random runs with; reported together.
        device: None for CUDA where there is one, otherwise the CPU.
        dtype: As in `tokenprune.load`.
        trust_remote_code: As in `tokenprune.load`.
        out: Folder of the run; None for one in ``runs/`` named after the request.
        max_new_tokens: Longest answer.
        match: Bring every method to the cost of `uniform` at each retention: ``tokens``, ``flops``
            or ``prefill-ms`` (`matching.matched_cells`); None takes retentions as they are.  Times
            are measured anew by every call, so that such a run cannot be resumed.
        timeout_per_batch: Seconds that the model may take for what it computes at once; what takes
            longer has failed (`tokenprune.experiments.common.deadline`).  None is no limit.
    """

    model: str = "testbed-next"
    methods: Sequence[str] = METHODS
    retention: Sequence[float] = RETENTION
    questions: int | None = None
    modality: Modality | None = None
    data: Path | None = None
    batch_size: int | None = None
    seed: int = 0
    seeds: int = 1
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    out: Path | None = None
    max_new_tokens: int = 8
    match: Kind | None = None
    timeout_per_batch: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended.

    Attributes:
        status: ``complete``, ``failed`` (some answer could not be had) or ``interrupted``.
        folder: Where everything was written.
        answered, wanted: Answers in the journal, and answers in a complete one.
        new: Answers this call added.
        summary: As in ``summary.csv``.
        failures: Cell to why it failed, in the order of the cells.
        missing: Question id to the cells that failed on it alone, and why.
        skipped: Methods that ``all`` left out, and why.
    """

    status: str
    folder: Path
    answered: int
    wanted: int
    new: int
    summary: pd.DataFrame
    failures: dict[Cell, Failure] = field(default_factory=dict)
    missing: dict[str, dict[Cell, Failure]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A loaded model and the questions it is to answer."""

    adapter: Adapter
    questions: list[Question]


def prepare(
    request: Request, report: Report = lambda *_: None, *, keep_faulty: bool = False
) -> Setting:
    """Check what is asked, read the questions and load the model.

    Args:
        request: What is asked.
        report: Told how far it is.
        keep_faulty: As in `data.read_jsonl`.

    Raises:
        UserError: As `compare`.
    """
    check_writable(request.out or Path("runs"))
    questions = checked_questions(request, report, keep_faulty=keep_faulty)
    report(0, 0, f"loading {request.model}")
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = tp.load(
        request.model,
        device=device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
    )
    return Setting(adapter, questions)


def check(request: Request, report: Report = lambda *_: None) -> list[Question]:
    """The questions of a comparison, of which every one can be asked; nothing is computed.

    Images are decoded, the frames of a video are of one size, marks in a question are as many as
    its images, and the decoder knows as many positions as its prompt has tokens, for which the
    model's configuration and processor are read.

    Raises:
        UserError: As `compare`, for what is found without weights.
    """
    questions = checked_questions(request, report)
    report(0, 0, f"reading the processor of {request.model}")
    adapter = without_weights(request.model)
    check_placeholders(questions, adapter)
    check_lengths(adapter, questions, request.max_new_tokens)
    return questions


def with_faults_noted(setting: Setting, new: int) -> list[Question]:
    """The questions, of which those that cannot be asked are told and left to fail alone.

    Args:
        setting: The model and its questions.
        new: Longest answer, in tokens.

    Raises:
        UserError: None of them can be asked.
    """
    adapter = setting.adapter
    questions = with_long_ones(adapter, with_faults(setting.questions, adapter), new)
    faulty = [item for item in questions if item.fault]
    if not faulty:
        return questions
    first = f"{faulty[0].id!r}: {faulty[0].fault}"
    if len(faulty) == len(questions):
        raise UserError(f"none of the questions can be asked; the first is {first}")
    warnings.warn(
        f"{len(faulty)} of {len(questions)} questions cannot be asked and will be missing, the "
        f"first is {first} `--check` looks at the questions alone.",
        RuntimeWarning,
        stacklevel=3,
    )
    return questions


def checked_questions(
    request: Request, report: Report, *, keep_faulty: bool = False
) -> list[Question]:
    """The questions of ``request``, if it and they make sense by themselves."""
    _check_numbers(request)
    check_time_limit(request.timeout_per_batch)
    check_kind(request.match)
    cells([spec for spec in request.methods if spec != ALL], request.retention)
    report(0, 0, "checking the questions")
    return _questions(request, keep_faulty)


def _check_numbers(request: Request) -> None:
    for name in ("questions", "batch_size", "max_new_tokens", "seed", "seeds"):
        check_number(name, getattr(request, name))
    for name in ("methods", "retention"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    if request.modality not in (None, *MODALITIES):
        raise unknown("modality", str(request.modality), MODALITIES)
    for value in request.retention:
        check_retention(value)


def _questions(request: Request, keep_faulty: bool) -> list[Question]:
    if request.data is None:
        count = request.questions or TESTBED_QUESTIONS
        return held_out(count, request.seed, request.modality or "image")
    return read_jsonl(request.data, request.questions, request.modality, keep_faulty=keep_faulty)


KINDS: tuple[Kind, ...] = get_args(Kind)


def check_kind(kind: str | None) -> None:
    """Raise `UserError` unless ``kind`` is None or one of `KINDS`."""
    if kind is not None and kind not in KINDS:
        raise unknown("cost to match", kind, KINDS)


def with_crops(setting: "Setting", least: int = 1) -> "tuple[Setting, int]":
    """The same with only those questions whose image is cut into ``least`` crops or more.

    Returns:
        The setting, and how many questions were left out.

    Raises:
        UserError: None is left.
    """

    @cache
    def crops(picture: Picture) -> int:
        width, height = picture.open().size
        rows, cols = setting.adapter.layout((height, width)).grid
        return rows * cols

    left = [
        item
        for item in setting.questions
        if item.modality == "image" and crops(item.images[0]) >= least
    ]
    if not left:
        raise UserError(
            f"{setting.adapter.name} cuts none of the images into {least} or more crops; give "
            "larger single images, or a model that cuts images into crops."
        )
    return replace(setting, questions=left), len(setting.questions) - len(left)
