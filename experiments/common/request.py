"""Requests of experiments.  This module imports neither PyTorch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.own_images import own_questions
from tokenprune.experiments.common.questions import Modality, Question, held_out
from tokenprune.experiments.datasets.wording import Wording
from tokenprune.experiments.metrics import check_metrics, with_metric

__all__ = [
    "FIGURES",
    "METHODS",
    "RETENTION",
    "Cluster",
    "CompareRequest",
    "FigureOptions",
    "Kernel",
    "MatchedCost",
    "ModelRequest",
    "Quantization",
    "QuestionRequest",
    "Request",
    "comparison",
    "questions_for",
]


METHODS = ("uniform", "random", "fastv", "globalcom2")


RETENTION = (1.0, 0.5, 0.25, 0.1)


TESTBED_QUESTIONS = 200


MatchedCost = Literal["tokens", "flops", "prefill-ms"]
"""The cost that `compare --match` makes equal."""


MOST_WORKERS, MOST_GPUS = 10_000, 64


Kernel = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""The attention kernel of ``transformers`` that ``--attn`` chooses."""


Quantization = Literal["4bit", "8bit"]
"""How ``--quantize`` stores the weights of the decoder."""


FORMATS = ("pdf", "svg", "png")
WIDTHS = ("column", "page", "slide")


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """How figures are drawn.

    Attributes:
        formats: File formats, of `FORMATS`.
        width: ``column`` (3.3 inches, type of 7 points), ``page`` (6.9 inches) or ``slide``.
        title: Whether a figure has a title and a line about what is drawn.

    Raises:
        UserError: An unknown format or width.
    """

    formats: Sequence[str] = ("png", "pdf")
    width: str = "page"
    title: bool = True

    def __post_init__(self) -> None:
        if self.width not in WIDTHS:
            raise unknown("width", self.width, WIDTHS)
        for one in self.formats:
            if one not in FORMATS:
                raise unknown("format", one, FORMATS)
        if not self.formats:
            raise UserError(f"no format is given; choose from: {', '.join(FORMATS)}.")


FIGURES = FigureOptions()
"""How figures are drawn by default."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the workers of a run are (`cluster.run`); each holds the model.

    Attributes:
        address: ``local`` for this machine, ``auto`` for the cluster that it belongs to, or the
            address of a Ray cluster.
        workers: Number of workers; None for as many as the cluster has room for.
        gpus: GPUs of each worker, which may be a fraction; None for one where the cluster has GPUs,
            otherwise none.

    Raises:
        UserError: A number out of range.
    """

    address: str = "local"
    workers: int | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise UserError(
                f"--workers must be at least 1 and at most {MOST_WORKERS}, got {self.workers}."
            )
        gpus = self.gpus or 0.0
        if not 0 <= gpus <= MOST_GPUS or (gpus > 1 and gpus != int(gpus)):
            raise UserError(
                "--gpus-per-worker must be a share of a GPU, such as 0.5, or a whole number up to "
                f"{MOST_GPUS}, got {self.gpus:g}."
            )


@dataclass(frozen=True, kw_only=True)
class Request:
    """The request of any experiment.

    Attributes:
        out: Path of the results; None for a path in ``runs/`` named after the request.
    """

    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Request):
    """The request of an experiment that runs a model.

    Attributes:
        model: A testbed's name, a Hub id or a local folder.
        device: None for CUDA if there is a GPU, otherwise the CPU.
        device_map: How the layers are distributed over devices, in place of ``device``: ``auto``,
            ``balanced``, ``balanced_low_0`` or ``sequential``, as in accelerate.
        dtype: As in `tokenprune.load`.  With ``quantize``, of the weights that are not quantised;
            ``auto`` is then bfloat16 for ``4bit`` and float16 for ``8bit``.
        attn: The attention kernel; None for that of transformers' choice.
        quantize: Quantise the linear layers of the decoder with bitsandbytes.
        revision: Branch, tag or commit of a model on the Hub.
        trust_remote_code: As in `tokenprune.load`.
        system: System message in front of every question; None for that of the chat template.
        seed: Seed of the testbed's questions, of samples and of the bootstrap.
        figures: How figures are drawn.
        cluster: Where the workers are; None computes in this process.
    """

    model: str = "testbed-next"
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn: Kernel | None = None
    quantize: Quantization | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    system: str | None = None
    seed: int = 0
    figures: FigureOptions = FIGURES
    cluster: Cluster | None = None


@dataclass(frozen=True, kw_only=True)
class QuestionRequest(ModelRequest):
    """The request of an experiment that asks a model questions.

    Attributes:
        questions: Number of questions; None for 200 of the testbed, or all of ``data``, of which
            a smaller number is a random sample with ``seed``.
        modality: ``image``, ``multi-image`` or ``video``; None for ``image`` of the testbed, or all
            of ``data``.
        data: File or folder of questions (`files.records_of`); None for the testbed.
        benchmark: Name of a benchmark (`benchmarks.BENCHMARKS`), instead of ``data``.
        root: The folder with the files of the benchmark.
        split: The split of ``data`` or of the benchmark; None for the only or the usual one.
        paths: Images without true answers, instead of ``data``: files, folders and patterns
            (`own_images.image_files`).
        prompt: The question about images that come without one; None for `own_images.PROMPT` with
            ``paths``.
        template, suffix: The parts of `wording.Wording`, in place of those of the benchmark.
        batch_size: Questions per batch; None for 50 on a testbed, otherwise 4.
        max_new_tokens: Maximum length of an answer, unless its question has its own.
        metric: Scores all answers: a registered metric, ``module:function`` or ``module:Class``;
            None leaves the choice to each question (`metrics.metric_of`).
        timeout_per_batch: Time limit of one computation of the model, in seconds; a longer one
            fails (`tokenprune.experiments.common.deadline`).  None is no limit.
    """

    questions: int | None = None
    modality: Modality | None = None
    data: Path | None = None
    paths: Sequence[Path] = ()
    benchmark: str | None = None
    root: Path | None = None
    split: str | None = None
    prompt: str | None = None
    template: str | None = None
    suffix: str | None = None
    batch_size: int | None = None
    max_new_tokens: int = 8
    metric: str | None = None
    timeout_per_batch: float | None = None

    @property
    def own(self) -> bool:
        """Whether the questions are a user's own, not those of the testbed."""
        return self.data is not None or self.benchmark is not None or bool(self.paths)


@dataclass(frozen=True, kw_only=True)
class CompareRequest(QuestionRequest):
    """What to compare.

    Attributes:
        methods: Specs such as ``globalcom2:alpha=0.3,tau=5``; ``all`` stands for every registered
            method that runs on the model.  ``uniform@0.3`` and chains such as
            ``globalcom2@0.5 + fastv@0.5`` contain their own retention ratios.
        retention: Retention ratios, each in (0, 1].
        seeds: Number of seeds of a random method; they are reported together.
        match: Bring every method to the cost of `uniform` at each retention ratio: ``tokens``,
            ``flops`` or ``prefill-ms`` (`matching.matched_cells`); None keeps the ratios.  Every
            call measures times again, so a run that matches them cannot be resumed.
        measure: Measure time and memory of every method too (`compare.measuring`).
    """

    methods: Sequence[str] = METHODS
    retention: Sequence[float] = RETENTION
    seeds: int = 1
    match: MatchedCost | None = None
    measure: bool = False


def comparison(request: QuestionRequest, **changes: Any) -> CompareRequest:
    """A comparison with the model and the questions of ``request``, and ``changes``."""
    shared = {item.name: getattr(request, item.name) for item in fields(QuestionRequest)}
    return CompareRequest(**shared | changes)


def questions_for(
    request: QuestionRequest,
    *,
    check_images: bool = True,
    keep_faulty: bool = False,
    needs_answers: bool = True,
) -> list[Question]:
    """The questions of ``request``; other arguments as for `own_images.own_questions`.

    Raises:
        UserError: As `own_images.own_questions`, `metrics.with_metric` and `metrics.check_metrics`.
    """
    found = with_metric(
        _read(
            request,
            check_images=check_images,
            keep_faulty=keep_faulty,
            needs_answers=needs_answers,
        ),
        request.metric,
    )
    check_metrics(found)
    return found


def _read(
    request: QuestionRequest, *, check_images: bool, keep_faulty: bool, needs_answers: bool
) -> list[Question]:
    """The questions of ``request``, before their metrics are known."""
    wording = Wording(request.template, request.suffix)
    if not request.own and request.root is None and request.split is None:
        if request.prompt is not None:
            raise UserError("--prompt asks about images of your own; give them, or --data.")
        count = request.questions or TESTBED_QUESTIONS
        found = held_out(count, request.seed, request.modality or "image")
        return [replace(item, question=wording.applied(item.question)) for item in found]
    if request.paths and needs_answers:
        raise UserError(
            "a comparison needs true answers, which images alone do not have; give a data file "
            "with answers (--data)."
        )
    return own_questions(
        request.paths,
        request.data,
        request.prompt,
        benchmark=request.benchmark,
        root=request.root,
        split=request.split,
        count=request.questions,
        seed=request.seed,
        modality=request.modality,
        check_images=check_images,
        keep_faulty=keep_faulty,
        needs_answers=needs_answers,
        wording=wording,
    )
