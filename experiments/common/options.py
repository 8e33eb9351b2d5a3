"""Options that the commands of several experiments share."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenprune.console import (
    FAILED,
    INTERRUPTED,
    OK,
    Plugin,
    complete_method,
    complete_word,
)
from tokenprune.models import testbed
from tokenprune.models.published import KNOWN, hub_id

if TYPE_CHECKING:
    from tokenprune.experiments.common.outcome import Outcome
    from tokenprune.experiments.common.request import FigureOptions

__all__ = [
    "Attn",
    "BatchSize",
    "Benchmark",
    "Config",
    "Data",
    "Device",
    "DeviceMap",
    "Dtype",
    "Force",
    "Formats",
    "GpusPerWorker",
    "ImageSize",
    "Images",
    "LogFile",
    "MaxImagePixels",
    "MaxNewTokens",
    "Metric",
    "Modality",
    "Model",
    "NoTitle",
    "Out",
    "Patches",
    "Plugin",
    "Prompt",
    "Quantize",
    "Questions",
    "Ray",
    "Revision",
    "Root",
    "Seed",
    "Split",
    "Suffix",
    "System",
    "Template",
    "TextTokens",
    "TrustRemoteCode",
    "Width",
    "Workers",
    "closing",
    "figures",
    "gaps",
    "image_limit",
    "interrupted",
    "methods",
    "missing",
    "resolved",
    "retention",
    "stoppable",
    "written",
]


_NAMED = 10  # how many unanswered questions are named


_LISTED = 10  # how many files are


def methods(about: str, default: str) -> Any:
    """The option ``--methods``; its values and its default differ by command."""
    text = f"{about} [default: {default}]"
    return typer.Option(
        "--methods", "-m", metavar="SPEC...", help=text, autocompletion=complete_method
    )


def retention(default: str) -> Any:
    """The option ``--retention``."""
    text = f"Retention ratios: shares of patch tokens to keep, in (0, 1]. [default: {default}]"
    return typer.Option("--retention", "-r", metavar="R...", help=text)


def resolved(context: typer.Context, model: str | None) -> str | None:
    """The Hub id of a published model that is called by its name alone, which is printed.

    Every other name, and that of a folder, stays as it is.
    """
    found = None if model is None or context.resilient_parsing else hub_id(model)
    if model is None or found is None or Path(model).is_dir():
        return model
    typer.echo(f"{model} is {found} on the Hugging Face Hub.", err=True)
    return found


Model = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="Embedded testbed, Hugging Face Hub id, local folder, or the name of a published "
        "model, such as llava-v1.6-vicuna-7b.",
        autocompletion=complete_word(*testbed.names(), *KNOWN),
        callback=resolved,
    ),
]


Questions = Annotated[
    int | None,
    typer.Option(
        help="Number of questions; of your own data, a sample drawn with --seed. [default: 200 of "
        "the testbed, or all]"
    ),
]


Data = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="File or folder of questions, as for compare."),
]


Benchmark = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The files of a benchmark in --root, with its metric and usual suffix: chartqa, "
        "docvqa, gqa, mmbench, pope, scienceqa, textvqa or vqav2.",
        autocompletion=complete_word(
            "chartqa", "docvqa", "gqa", "mmbench", "pope", "scienceqa", "textvqa", "vqav2"
        ),
    ),
]


Root = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Folder with the files of --benchmark.")
]


Split = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Split of --benchmark, or of a folder with several. [default: the usual one]",
    ),
]


Template = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text of every prompt; {question} and {choices} mark places. [default: the question, "
        "then its choices, one a line]",
    ),
]


Suffix = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help='Last line of every prompt, such as "Answer with a single word." [default: that of '
        "--benchmark, or none]",
    ),
]


System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help="System message. [default: that of the model's chat template, or none]"
    ),
]


Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[IMAGE]...",
        help="Images of your own, before the options: files, folders, and quoted patterns such as "
        "'photos/*.jpg'. [default: images of the testbed]",
    ),
]


Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="TEXT",
        help='The question about images that come without one. [default: "What is in the image?" '
        "about images that are not in --data]",
    ),
]


BatchSize = Annotated[
    int | None,
    typer.Option(help="Questions per batch. [default: 50 on a testbed, otherwise 4]"),
]


Seed = Annotated[
    int,
    typer.Option(help="Seed of the testbed's questions, of samples and of the bootstrap."),
]


Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ... [default: cuda if available]",
        autocompletion=complete_word("cpu", "cuda"),
    ),
]


DeviceMap = Annotated[
    str | None,
    typer.Option(
        metavar="auto|balanced|...",
        help="Distribute the layers over all devices, as accelerate does, in place of --device.",
        autocompletion=complete_word("auto", "balanced", "balanced_low_0", "sequential"),
    ),
]


Attn = Annotated[
    str | None,
    typer.Option(
        metavar="sdpa|eager|...",
        help="Attention kernel: sdpa, eager, flash_attention_2 or flash_attention_3. [default: "
        "that of transformers]",
        autocompletion=complete_word("eager", "flash_attention_2", "flash_attention_3", "sdpa"),
    ),
]


Quantize = Annotated[
    str | None,
    typer.Option(
        metavar="4bit|8bit",
        help="Quantise the linear layers of the language model with bitsandbytes.",
        autocompletion=complete_word("4bit", "8bit"),
    ),
]


Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the Hub."),
]


Dtype = Annotated[
    str,
    typer.Option(
        metavar="DTYPE",
        help="float32, bfloat16, float16 or auto.",
        autocompletion=complete_word("auto", "bfloat16", "float16", "float32"),
    ),
]


Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Run folder. The same command resumes an unfinished run in it. "
        "[default: a folder in runs/, named after the options]",
    ),
]


Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="[ADDRESS]",
        help="Compute on the workers of a Ray cluster: of this machine (without an address), of "
        "the cluster that it belongs to (auto), or at an address. Needs the extra ray.",
        autocompletion=complete_word("auto", "local"),
    ),
]


Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --ray: number of workers, each with the model. [default: as many as fit]",
    ),
]


GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="With --ray: GPUs of each worker, such as 0.5. [default: 1 where there are GPUs]",
    ),
]


LogFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append a line a minute, with the time, and warnings."),
]


Force = Annotated[
    bool, typer.Option("--force", help="Replace the earlier result of this command in --out.")
]


MaxNewTokens = Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")]


Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME|MODULE:FUNCTION",
        help="Score all answers by this metric: exact, vqa, anls, relaxed, choice, yes-no, iou, "
        "contains, or your own, whose module is executed. [default: metric of the data file, "
        "choice for questions with choices, otherwise exact]",
        autocompletion=complete_word(
            "anls", "choice", "contains", "exact", "iou", "relaxed", "vqa", "yes-no"
        ),
    ),
]


MaxImagePixels = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Refuse larger images without decoding them. [default: 64000000]"
    ),
]


Modality = Annotated[
    str | None,
    typer.Option(
        metavar="image|video|multi-image",
        help="Modality of the questions. [default: image, or all of --data]",
        autocompletion=complete_word("image", "video", "multi-image"),
    ),
]


Config = Annotated[
    str,
    typer.Option(
        "--config",
        "--model",
        metavar="MODEL",
        help="Configuration of a model: a known name (llava-v1.6-vicuna-7b, "
        "llava-onevision-qwen2-7b, ...), a testbed, a folder with config.json, or a Hub id.",
        autocompletion=complete_word(*KNOWN, *testbed.names()),
    ),
]


ImageSize = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH",
        help="Image size in pixels, height first as in transformers, or with letters: 1008wx672h. "
        "[default: thumbnail and 2x2 full crops without separators, as in published tables: "
        "2880 tokens on LLaVA-NeXT; 576 on LLaVA-1.5; 1008x1008 on Qwen-VL]",
    ),
]


Patches = Annotated[
    str | None,
    typer.Option(
        metavar="ROWSxCOLUMNS",
        help="Instead of an image size: one view of this many patches without separators, such as "
        "24x24 in published tables for LLaVA-1.5.",
    ),
]


TextTokens = Annotated[
    int,
    typer.Option(help="Number of text tokens of the prompt; published tables count none."),
]


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Execute Python code of the model's repository. Without it, such models are refused.",
    ),
]


Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format", metavar="pdf|svg|png...", help="File formats of figures. [default: png pdf]"
    ),
]


Width = Annotated[
    str,
    typer.Option(
        metavar="column|page|slide",
        help="Width of figures: column (3.3 inches, type of 7 points), page (6.9 inches) or slide.",
    ),
]


NoTitle = Annotated[
    bool,
    typer.Option("--no-title", help="Leave out titles of figures, where a caption replaces them."),
]


def figures(formats: list[str] | None, width: str, no_title: bool) -> FigureOptions:
    """The values of ``--format``, ``--width`` and ``--no-title``.  Raises `UserError`."""
    from tokenprune.experiments.common.request import FIGURES, FigureOptions

    chosen = tuple(dict.fromkeys(formats)) if formats else FIGURES.formats
    return FigureOptions(formats=chosen, width=width, title=not no_title)


def image_limit(pixels: int | None) -> AbstractContextManager[None]:
    """Apply ``--max-image-pixels`` inside the context.  Raises `UserError` if out of range."""
    if pixels is None:
        return nullcontext()
    from tokenprune.experiments.common.limits import check_number
    from tokenprune.pictures import pixel_limit

    check_number("max_image_pixels", pixels)
    return pixel_limit(pixels)


def stoppable() -> float:
    """Treat SIGTERM, which schedulers send, as Ctrl-C; returns the current time, for `closing`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return time.monotonic()


def interrupted(outcome: Outcome, what: str = "answers") -> int:
    """Print how many of ``what`` are kept, and return the exit status."""
    typer.echo(
        f"Interrupted: {outcome.answered} of {outcome.wanted} {what} are kept in "
        f"{outcome.folder}; the same command resumes the run."
    )
    return INTERRUPTED


def written(outcome: Outcome) -> str:
    """Where the files of an experiment are; of many, the first and the last ones."""
    files = list(outcome.files)
    if len(files) > _LISTED:
        files[4:-2] = [f"{len(files) - 6} more"]
    return f"Written to {outcome.folder}: {', '.join(files)}"


def gaps(outcome: Outcome) -> Iterator[str]:
    """A sentence for everything that was left out, failed or is missing."""
    for name, why in outcome.skipped.items():
        yield f"SKIPPED {name}: {why}"
    for cell, failure in outcome.failures.items():
        yield f"FAILED {cell}: {failure.error}"
    yield from missing(outcome)


def missing(outcome: Outcome) -> Iterator[str]:
    """The number of missing answers, and a sentence for each of the first such questions."""
    if not outcome.missing:
        return
    number = sum(map(len, outcome.missing.values()))
    yield (
        f"Answers missing: {number}; questions: {len(outcome.missing)}. What stands above is of "
        "the others, and differences are of what both methods answered."
    )
    for question, failures in list(outcome.missing.items())[:_NAMED]:
        cells, why = list(map(str, failures)), next(iter(failures.values()))
        few = ", ".join(cells) if len(cells) <= 3 else f"{len(cells)} cells, {cells[0]} first"
        yield f"MISSING {question!r} in {few}: {why.error}"
    if len(outcome.missing) > _NAMED:
        yield f"MISSING {len(outcome.missing) - _NAMED} more questions; all are in manifest.json."


def closing(outcome: Outcome, started: float) -> int:
    """Say what must be known of a run, how long it took and where its files are; the exit status.

    Args:
        outcome: Of an experiment based on a comparison.
        started: As `stoppable` returned it.
    """
    for note in outcome.notes:
        typer.echo(note)
    if outcome.status == "interrupted":
        return interrupted(outcome)
    for words in (*gaps(outcome), *_without_image(outcome)):
        typer.echo(words)
    seconds = time.monotonic() - started
    typer.echo(f"{outcome.new} answers in {seconds:.0f} s.\n{written(outcome)}")
    return FAILED if outcome.failures or outcome.missing else OK


def _without_image(outcome: Outcome) -> Iterator[str]:
    """The accuracy of the model without images or, without true answers, its agreement."""
    from tokenprune.experiments.common.answers import read_answers
    from tokenprune.experiments.common.run_folder import IMAGE_FREE
    from tokenprune.experiments.common.summary import OVERALL, summarise

    answers = read_answers(outcome.folder)
    for row in summarise(answers[answers["label"] == IMAGE_FREE], seed=0).itertuples():
        if row.kind != OVERALL or row.status != "ok":
            continue
        known = not math.isnan(row.accuracy)
        name, words = ("accuracy", "right") if known else ("agreement", "the same as with it")
        shares = (getattr(row, f"{name}{end}") for end in ("", "_low", "_high"))
        share, low, high = (f"{100 * value:.1f}" for value in shares)
        yield f"Without the image {share} % of the answers are {words} ({low}–{high})."
