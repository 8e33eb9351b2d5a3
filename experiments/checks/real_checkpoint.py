"""Check a checkpoint with its real weights once: full retention, every method, and the ledger.

    python -m tokenprune.experiments.checks.real_checkpoint llava-hf/llava-1.5-7b-hf --device cuda

MODEL is anything that `tokenprune.load` accepts.  Only the model may be downloaded; the ten images
are part of the package and of scikit-learn.  The script checks

* that the uncompressed model and R = 1 give bit-identical logits and ids, inside and outside
  `tokenprune.compress`, for every method on the first image and for ``uniform`` on all images;
* that every method at R = 0.25 gives finite logits, at the prefill and at the decode steps;
* that the ledger states the tokens that hooks of this script see in every decoder layer, and the
  entries and bytes of the KV cache;
* that the selections, the ledger and the decoder layers agree about the number of kept tokens.

It prints a table and writes a JSON file, which is made to be attached to an issue.  The file is
rewritten after every method, so that an interrupted run leaves what it found.
"""

from __future__ import annotations

import functools
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.console import (
    FAILED,
    OK,
    ManyValues,
    as_exit_status,
    new_table,
    progress,
    quiet,
)
from tokenprune.engine.session import compress
from tokenprune.engine.trace import Trace
from tokenprune.errors import ContractError, RetentionWarning, UserError
from tokenprune.experiments.common.files import check_file, replace_file
from tokenprune.experiments.common.options import Device, Dtype, TrustRemoteCode
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.result_folder import free_path
from tokenprune.experiments.common.timing import synchronise
from tokenprune.models.testbed.scenes import questions
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.spec import parse
from tokenprune.testing.asserting import with_fields

__all__ = ["Case", "Verdict", "check", "main", "pictures"]

RETENTION = 0.25
STEPS = 4  # generated tokens
QUESTION = "how many objects are there?"  # in the vocabulary of the testbeds
SIZES = (
    *((427, 640), (640, 427), (336, 336), (224, 448), (448, 224)),
    *((160, 640), (640, 160), (300, 301), (64, 64)),
)
"""(height, width) in pixels of the photographs."""
IMAGES = len(SIZES) + 1


def pictures() -> list[Image.Image]:
    """Ten images: two photographs of scikit-learn, cut to `SIZES`, and a scene of the testbeds."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    cut = [
        ImageOps.fit(photographs[number % len(photographs)], (width, height))
        for number, (height, width) in enumerate(SIZES)
    ]
    return [*cut, questions(1, seed=5)[0].image]


# --- observing ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt with one image.

    Attributes:
        size: (height, width) of the image in pixels.
        inputs: Inputs of the model.
        visual: Number of placeholders in the prompt.
        text: Number of its other tokens.
    """

    size: tuple[int, int]
    inputs: dict[str, Any]
    visual: int
    text: int


@dataclass(frozen=True, eq=False)
class Ran:
    """A prefill, and a generation from the same prompt.

    Attributes:
        logits: (1, S or 1, vocabulary), of the prefill.
        processed: Number of tokens that left each decoder layer in the prefill.
        cached: Entries of each layer's KV cache after the prefill.
        kv_bytes: Bytes of the KV cache after the prefill.
        ids: (`STEPS`,) generated ids.
        step_logits: (`STEPS`, vocabulary) the logits that they are chosen from.
        generating: For every layer the number of tokens that left it in each forward of generation.
        grown: Entries of each layer's KV cache after generation.
        seconds: Duration of the prefill, vision encoder included.
    """

    logits: Tensor
    processed: list[int]
    cached: list[int]
    kv_bytes: int
    ids: Tensor
    step_logits: Tensor
    generating: list[list[int]]
    grown: list[int]
    seconds: float


@contextmanager
def counting(layers: Sequence[nn.Module]) -> Iterator[list[list[int]]]:
    """While open, the number of tokens that leaves each of ``layers`` in every forward."""
    lengths: list[list[int]] = [[] for _ in layers]

    def note(index: int, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        lengths[index].append(int(hidden.shape[1]))

    handles = [
        layer.register_forward_hook(functools.partial(note, index))
        for index, layer in enumerate(layers)
    ]
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_once(pipe: Pipeline, case: Case, *, whole: bool = False) -> Ran:
    """Run the prompt, compressed if a context is open.

    Args:
        pipe: The model.
        case: The prompt.
        whole: Whether to compute the logits of all columns, not only of the last one.
    """
    model, layers = pipe.model, pipe.adapter.decoder_layers
    with counting(layers) as lengths:
        synchronise(pipe.device)
        start = time.perf_counter()
        out = model(**case.inputs, use_cache=True, logits_to_keep=0 if whole else 1)
        synchronise(pipe.device)
        seconds = time.perf_counter() - start
    cache = out.past_key_values
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    with counting(layers) as generating:
        made = model.generate(
            **case.inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            suppress_tokens=[*pipe.adapter.facts.placeholders.values()],
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Ran(
        logits=out.logits,
        processed=[sum(calls) for calls in lengths],
        cached=[layer.keys.shape[-2] for layer in cache.layers],
        kv_bytes=sum(part.nbytes for part in parts),
        ids=made.sequences[0, case.inputs["input_ids"].shape[1] :],
        step_logits=torch.cat(made.logits),
        generating=generating,
        grown=[layer.keys.shape[-2] for layer in made.past_key_values.layers],
        seconds=seconds,
    )


def differences(ran: Ran, plain: Ran) -> Iterator[str]:
    """In what a run at full retention differs from the uncompressed model."""
    for what in ("logits", "ids", "step_logits"):
        mine, theirs = getattr(ran, what), getattr(plain, what)
        if not torch.equal(mine, theirs):
            far = (mine.double() - theirs.double()).abs().max() if what != "ids" else "other ids"
            yield f"R = 1: {what.replace('_', ' ')} are not bit-identical ({far})"


def faults(ran: Ran, trace: Trace, case: Case) -> Iterator[str]:
    """What is wrong with a run: numbers that are not finite, and counts that disagree."""
    for what in ("logits", "step_logits"):
        bad = int((~getattr(ran, what).isfinite()).sum())
        if bad:
            yield f"{bad} of the {what.replace('_', ' ')} are not finite"
    ledger = trace.ledger
    last = {record.image: record for record in trace.selections}
    kept = sum(len(record.keep) for record in last.values()) if last else case.visual
    patches = sum(record.kept_patches for record in last.values()) if last else ledger.patch_tokens
    steps = [[ran.processed[layer], *[1] * (STEPS - 1)] for layer in range(len(ran.processed))]
    for what, seen, stated in (
        ("placeholders of the prompt", case.visual, ledger.patch_tokens + ledger.separators),
        ("text tokens", case.text, ledger.text_tokens),
        ("tokens in the decoder layers", ran.processed, [*ledger.tokens_per_layer]),
        ("entries in the KV cache", ran.cached, [*ledger.kv_per_layer]),
        ("bytes of the KV cache", ran.kv_bytes, ledger.kv_bytes),
        ("visual tokens in the last layer", ran.processed[-1] - case.text, kept),
        ("patch tokens that are kept", patches, ledger.kept_patches),
        ("tokens in the forwards of generate", ran.generating, steps),
        ("KV entries after generate", ran.grown, [one + STEPS - 1 for one in ran.processed]),
    ):
        if seen != stated:
            yield f"{what}: {seen} observed, {stated} stated"


# --- judging --------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Verdict:
    """What was found about a method.

    Attributes:
        method: Its label, or ``uncompressed``.
        status: ``ok``, ``refused`` or ``FAILED``.
        reasons: The refusal, or the faults.
        images: For every image that ran: ``size``, ``patch_tokens``, ``kept_patches``,
            ``tokens_per_layer`` and ``seconds`` of one prefill.
    """

    method: str
    status: str = "ok"
    reasons: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        """Add a fault."""
        self.status = "FAILED"
        self.reasons.append(reason)

    def note(self, case: Case, ran: Ran, trace: Trace) -> None:
        """Add the figures and the faults of an image."""
        ledger, place = trace.ledger, "{} x {}: ".format(*case.size)
        self.images.append(
            {
                "size": case.size,
                "patch_tokens": ledger.patch_tokens,
                "kept_patches": ledger.kept_patches,
                "tokens_per_layer": ran.processed,
                "seconds": ran.seconds,
            }
        )
        for fault in faults(ran, trace, case):
            self.fail(place + fault)


@contextmanager
def judging(verdict: Verdict, case: Case) -> Iterator[None]:
    """Turn an exception of the block into a refusal or a fault."""
    place = "{} x {}: ".format(*case.size)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, ContractError):
            verdict.status = "refused" if verdict.status == "ok" else verdict.status
            verdict.reasons.append(str(error))
        else:
            verdict.fail(f"{place}{type(error).__name__}: {error}")


def uncompressed(pipe: Pipeline, cases: Sequence[Case]) -> Verdict:
    """The model without a method, and ``uniform`` at R = 1, on all images."""
    verdict = Verdict(method="uncompressed")
    for case in cases:
        with judging(verdict, case):
            plain, again = (run_once(pipe, case, whole=True) for _ in range(2))
            if any(differences(again, plain)):
                verdict.fail("the model gives other logits if the same forward runs again")
            with compress(pipe.model, None) as trace:
                verdict.note(case, run_once(pipe, case), trace)
            with compress(pipe.model, tp.create("uniform", retention=1)):
                for fault in differences(run_once(pipe, case, whole=True), plain):
                    verdict.fail("{} x {}: ".format(*case.size) + fault)
    return verdict


def judged(pipe: Pipeline, compressor: Compressor, cases: Sequence[Case], plain: Ran) -> Verdict:
    """A method at its retention ratio on all images, and at R = 1 on the first one.

    Args:
        pipe: The model.
        compressor: The method.
        cases: The prompts.
        plain: What the uncompressed model makes of the first one.
    """
    verdict = Verdict(method=compressor.label)
    for case in cases:
        with judging(verdict, case), compress(pipe.model, compressor) as trace:
            verdict.note(case, run_once(pipe, case), trace)
        if verdict.status == "refused":
            if verdict.images:
                verdict.fail("{} x {} is refused, other images are not".format(*case.size))
            return verdict
    full = with_fields(compressor, retention=1.0, separators="all")
    with judging(verdict, cases[0]), compress(pipe.model, full):
        for fault in differences(run_once(pipe, cases[0], whole=True), plain):
            verdict.fail(fault)
    return verdict


def check(
    pipe: Pipeline,
    compressors: Sequence[Compressor],
    images: Sequence[Image.Image],
    progress: ProgressCallback = silent,
) -> Iterator[Verdict]:
    """The verdict on the uncompressed model, then on each of ``compressors``.

    Raises:
        UserError: The model has no language model, or takes none of the images.
    """
    cases, left_out = _cases(pipe, images)
    progress(0, len(compressors) + 1, "uncompressed")
    first = uncompressed(pipe, cases)
    first.reasons += left_out
    yield first
    plain = run_once(pipe, cases[0], whole=True)
    for done, compressor in enumerate(compressors, start=1):
        progress(done, len(compressors) + 1, compressor.label)
        yield judged(pipe, compressor, cases, plain)


def _cases(pipe: Pipeline, images: Sequence[Image.Image]) -> tuple[list[Case], list[str]]:
    """The prompts, and a sentence about every image that the model cannot take."""
    found: list[Case] = []
    left_out = []
    placeholders = torch.tensor([*pipe.adapter.facts.placeholders.values()])
    for image in images:
        try:
            inputs = pipe.prepare([image], [QUESTION])
        except UserError as error:
            left_out.append(f"{image.height} x {image.width}, left out: {error}")
            continue
        ids = inputs["input_ids"]
        visual = int(torch.isin(ids.cpu(), placeholders).sum())
        size = image.height, image.width
        found.append(Case(size, dict(inputs), visual, ids.numel() - visual))
    if not found:
        raise UserError(f"the model takes none of the images; {left_out[0]}")
    return found, left_out


# --- the command ----------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

_Attention = Annotated[
    str | None,
    typer.Option("--attn", metavar="KERNEL", help="sdpa, eager, flash_attention_2, ..."),
]
_Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "-m", metavar="SPEC...", help="[default: all methods]"),
]
_Images = Annotated[
    int, typer.Option("--images", metavar="N", min=1, max=IMAGES, help="Number of images.")
]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON file. [default: a new file in runs/]"),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


@app.command(cls=ManyValues)
def main(
    model: Annotated[str, typer.Argument(help="Testbed, Hugging Face Hub id or local folder.")],
    methods: _Methods = None,
    images: _Images = IMAGES,
    device: Device = None,
    dtype: Dtype = "auto",
    attention: _Attention = None,
    trust_remote_code: TrustRemoteCode = False,
    out: _Out = None,
    force: _Force = False,
) -> None:
    """Check R = 1, every method and the ledger on a checkpoint; write a table and a JSON file.

    Exit status: 0 nothing failed, 1 something failed, 2 bad input.
    """
    with as_exit_status():
        quiet()
        path = out or free_path(Path("runs/real-checkpoint.json"))
        check_file(path, new=not force)
        specs = methods or tp.list_methods()
        compressors = [
            parse(spec, **({} if "@" in spec else {"retention": RETENTION})) for spec in specs
        ]
        options = {} if attention is None else {"attn_implementation": attention}
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        pipe = tp.load(
            model, device=place, dtype=dtype, trust_remote_code=trust_remote_code, **options
        )
        report = _header(pipe, model)
        verdicts: list[Verdict] = []
        with warnings.catch_warnings(), progress() as bar:
            warnings.simplefilter("ignore", RetentionWarning)
            for verdict in check(pipe, compressors, pictures()[:images], bar):
                verdicts.append(verdict)
                _write(path, report, verdicts, complete=len(verdicts) > len(compressors))
        failed = _show(Console(), report, verdicts)
        typer.echo(f"Written to {path}.")
    raise typer.Exit(FAILED if failed else OK)


def _header(pipe: Pipeline, model: str) -> dict[str, Any]:
    """What was checked, where and with which versions."""
    language, cuda = pipe.adapter.language_model, pipe.device.type == "cuda"
    return {
        "model": model,
        "class": type(pipe.model).__name__,
        "family": pipe.adapter.name,
        "decoder": language.config.model_type,
        "device": torch.cuda.get_device_name(pipe.device) if cuda else str(pipe.device),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "attention": language.config._attn_implementation,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
    }


def _write(path: Path, report: dict[str, Any], verdicts: list[Verdict], *, complete: bool) -> None:
    whole = report | {"complete": complete, "verdicts": [asdict(one) for one in verdicts]}
    with replace_file(path) as temporary:
        temporary.write_text(f"{json.dumps(whole, indent=1)}\n", encoding="utf-8")


def _show(console: Console, report: dict[str, Any], verdicts: Sequence[Verdict]) -> int:
    """Print the table, and the reasons below it; the number of methods that failed."""
    names = ("model", "class", "device", "dtype", "attention")
    console.print(escape(", ".join(str(report[name]) for name in names)), soft_wrap=True)
    shown = new_table("method", "verdict")
    for column in ("kept", "of", "layer average", "ms"):
        shown.add_column(column, justify="right")
    for one in verdicts:
        shown.add_row(escape(one.method), one.status, *_figures(one))
    console.print(shown, "")
    for status in ("FAILED", "refused", "ok"):
        for one in verdicts:
            for reason in one.reasons if one.status == status else ():
                text = f"{one.method}: {status}: {reason}"
                console.print(text, soft_wrap=True, highlight=False, markup=False)
    counts = [sum(one.status == status for one in verdicts) for status in ("ok", "refused")]
    failed = len(verdicts) - sum(counts)
    console.print(f"{counts[0]} ok, {counts[1]} refused, {failed} failed", highlight=False)
    return failed


def _figures(verdict: Verdict) -> list[str]:
    """Kept and all patch tokens of all images, tokens per layer, and the median time."""
    images = verdict.images
    if not images:
        return ["–"] * 4
    kept, full = (sum(one[name] for one in images) for name in ("kept_patches", "patch_tokens"))
    average = mean(count for one in images for count in one["tokens_per_layer"])
    taken = 1000 * median(one["seconds"] for one in images)
    return [f"{kept}", f"{full}", f"{average:.1f}", f"{taken:.1f}"]


if __name__ == "__main__":
    app()
