"""The start of every experiment on questions: a loaded model and the questions."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import tokenprune as tp
from tokenprune.budget import check_retention
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.deadline import check_time_limit
from tokenprune.experiments.common.files import check_writable
from tokenprune.experiments.common.grid import ALL, cells
from tokenprune.experiments.common.limits import check_lengths, check_number, with_long_ones
from tokenprune.experiments.common.loading import check_loading, load_arguments
from tokenprune.experiments.common.own_images import with_answers
from tokenprune.experiments.common.questions import (
    MODALITIES,
    Picture,
    Question,
    check_placeholders,
    with_faults,
)
from tokenprune.experiments.common.request import (
    CompareRequest,
    MatchedCost,
    ModelRequest,
    QuestionRequest,
    questions_for,
)
from tokenprune.models import testbed
from tokenprune.models.loading import without_weights
from tokenprune.models.published import hub_id
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "MATCHED_COSTS",
    "Setting",
    "check",
    "checked_questions",
    "load_model",
    "prepare",
    "testbed_note",
    "warn_about_testbed",
    "with_crops",
    "with_faults_noted",
]


@dataclass(frozen=True)
class Setting:
    """A loaded model, and the questions for it."""

    pipe: Pipeline
    questions: list[Question]


def prepare(
    request: QuestionRequest,
    progress: ProgressCallback = silent,
    *,
    keep_faulty: bool = False,
    needs_answers: bool = True,
    load: Callable[[ModelRequest, ProgressCallback], Pipeline] | None = None,
) -> Setting:
    """Check the request, read the questions and load the model.

    Args:
        request: The request.
        progress: Called before every step.
        keep_faulty: As in `own_images.own_questions`.
        needs_answers: Whether all true answers must be known; otherwise, all or none.
        load: Makes the pipeline; None for `load_model`.

    Raises:
        UserError: As `compare`.
    """
    check_writable(request.out or Path("runs"))
    questions = checked_questions(
        request, progress, keep_faulty=keep_faulty, needs_answers=needs_answers
    )
    with_answers(questions)
    warn_about_testbed(request.model, own=request.own, shown={item.modality for item in questions})
    return Setting((load or load_model)(request, progress), questions)


def warn_about_testbed(model: str, *, own: bool, shown: Collection[str] = ()) -> None:
    """Warn if a testbed is asked about a user's own images, or about what it did not train on.

    Args:
        model: Name of the model.
        own: Whether the images are a user's own.
        shown: Modalities of the questions.
    """
    if model not in testbed.names():
        return
    if own:
        warnings.warn(f"{testbed_note(model)}; give another --model.", UserWarning, stacklevel=3)
    new = sorted(set(shown) - set(testbed.TRAINED_ON[model]))
    if new:
        warnings.warn(
            f"{model} was not trained on questions of the modality {', '.join(new)}. Its answers "
            "mean nothing; give another --model.",
            UserWarning,
            stacklevel=3,
        )


def testbed_note(model: str) -> str:
    """Why the answers of the testbed ``model`` about a user's own images mean nothing."""
    return (
        f"{model} is a small model trained on drawings of coloured shapes and digits. What it "
        "answers about other images, such as photographs, means nothing"
    )


def load_model(
    request: ModelRequest, progress: ProgressCallback = silent, **options: Any
) -> Pipeline:
    """The pipeline of the model of ``request``.

    Args:
        request: The request.
        progress: Called before the model is loaded.
        **options: Further arguments of `tokenprune.load`.

    Raises:
        UserError: As `loading.check_loading` and `tokenprune.load`.
    """
    arguments = load_arguments(request)
    progress(0, 0, f"loading {hub_id(request.model) or request.model}")
    pipe = tp.load(request.model, **arguments, **options)
    pipe.system = request.system
    return pipe


def check(request: QuestionRequest, progress: ProgressCallback = silent) -> list[Question]:
    """The questions of a comparison, after a check that all can be asked; nothing is computed.

    The check decodes images, compares the sizes of the frames of a video, counts the placeholders
    in a question, and compares the length of the prompt with the number of positions of the
    decoder.  It reads the model's configuration and processor.

    Raises:
        UserError: As `compare`, for what is found without weights.
    """
    questions = checked_questions(request, progress)
    progress(0, 0, f"reading the processor of {request.model}")
    places = {} if request.revision is None else {"revision": request.revision}
    pipe = without_weights(request.model, trust_remote_code=request.trust_remote_code, **places)
    pipe.system = request.system
    check_placeholders(questions, pipe)
    check_lengths(pipe, questions, request.max_new_tokens)
    return questions


def with_faults_noted(setting: Setting, new: int) -> list[Question]:
    """The questions; a warning names those that cannot be asked and will be missing.

    Args:
        setting: The model and its questions.
        new: Maximum length of an answer, in tokens.

    Raises:
        UserError: None of them can be asked.
    """
    pipe = setting.pipe
    questions = with_long_ones(pipe, with_faults(setting.questions, pipe), new)
    faulty = [item for item in questions if item.fault]
    if not faulty:
        return questions
    first = f"{faulty[0].id!r}: {faulty[0].fault}"
    if len(faulty) == len(questions):
        raise UserError(f"none of the questions can be asked; the first is {first}")
    warnings.warn(
        f"{len(faulty)} of {len(questions)} questions cannot be asked and will be missing, the "
        f"first is {first} `--check` checks only the questions.",
        RuntimeWarning,
        stacklevel=3,
    )
    return questions


def checked_questions(
    request: QuestionRequest,
    progress: ProgressCallback,
    *,
    keep_faulty: bool = False,
    needs_answers: bool = True,
) -> list[Question]:
    """The questions of ``request``, after the checks that need no model."""
    check_loading(request)
    for name in ("questions", "batch_size", "max_new_tokens", "seed"):
        check_number(name, getattr(request, name))
    if request.modality not in (None, *MODALITIES):
        raise unknown("modality", str(request.modality), MODALITIES)
    check_time_limit(request.timeout_per_batch)
    if isinstance(request, CompareRequest):
        _check_cells(request)
    progress(0, 0, "checking the questions")
    return questions_for(request, keep_faulty=keep_faulty, needs_answers=needs_answers)


def _check_cells(request: CompareRequest) -> None:
    """Raise `UserError` if methods, retention ratios or the matched cost are invalid."""
    check_number("seeds", request.seeds)
    for name in ("methods", "retention"):
        if not getattr(request, name):
            raise UserError(f"--{name} needs at least one value.")
    for value in request.retention:
        check_retention(value)
    if request.match is not None and request.match not in MATCHED_COSTS:
        raise unknown("cost to match", request.match, MATCHED_COSTS)
    cells([spec for spec in request.methods if spec != ALL], request.retention)


MATCHED_COSTS: tuple[MatchedCost, ...] = get_args(MatchedCost)


def with_crops(setting: Setting, least: int = 1) -> tuple[Setting, int]:
    """The setting with only those questions whose image is cut into ``least`` crops or more.

    Returns:
        The setting, and the number of questions left out.

    Raises:
        UserError: No such question exists.
    """

    @cache
    def crops(picture: Picture) -> int:
        width, height = picture.open().size
        rows, cols = setting.pipe.adapter.layout((height, width)).grid
        return rows * cols

    left = [
        item
        for item in setting.questions
        if item.modality == "image" and crops(item.images[0]) >= least
    ]
    if not left:
        raise UserError(
            f"{setting.pipe.adapter.name} cuts none of the images into {least} or more crops; give "
            "larger single images, or a model that cuts images into crops."
        )
    return replace(setting, questions=left), len(setting.questions) - len(left)
