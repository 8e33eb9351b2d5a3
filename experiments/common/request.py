"""What a comparison is asked, and how it ended; nothing heavy is imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tokenprune.experiments.common.questions import Modality, Question, held_out, read_jsonl

if TYPE_CHECKING:
    import pandas as pd

    from tokenprune.experiments.common.cells import Cell, Failure

__all__ = [
    "METHODS",
    "RETENTION",
    "Kind",
    "Outcome",
    "Request",
    "questions_for",
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


def questions_for(
    request: Request, *, check_images: bool = True, keep_faulty: bool = False
) -> list[Question]:
    """The questions of ``request``; the rest as `questions.read_jsonl`."""
    if request.data is None:
        count = request.questions or TESTBED_QUESTIONS
        return held_out(count, request.seed, request.modality or "image")
    return read_jsonl(
        request.data,
        request.questions,
        request.modality,
        check_images=check_images,
        keep_faulty=keep_faulty,
    )
