"""What methods cost: estimated analytically on any model, and measured on this device."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.grid import ALL, chosen, expanded
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.prompt import Prompt, asks, prompt_of, read_size
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.request import FIGURES, FigureOptions, Request
from tokenprune.experiments.common.result_folder import ResultFolder
from tokenprune.experiments.efficiency import figures
from tokenprune.experiments.efficiency.costs import analytic_break_even, costs, layers
from tokenprune.experiments.efficiency.measured import measure
from tokenprune.models.checkpoints import device_of
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "EfficiencyRequest",
    "PromptRequest",
    "describe",
    "prompt_for",
    "run",
    "stand_in",
]


@dataclass(frozen=True, kw_only=True)
class PromptRequest(Request):
    """A prompt on a model.

    Attributes:
        model: As for `tokenprune.models.loading.adapter_without_weights`.
        image_size: As `prompt.read_size` reads it; None for `Adapter.usual_layout`.
        patches: Rows and columns of a single view, written like a size, instead of an image.
        text_tokens: Tokens of the prompt that are not visual.
        dtype: Of weights and KV cache: ``bfloat16``, ``float16`` or ``float32``.
    """

    model: str = "llava-v1.6-vicuna-7b"
    image_size: str | None = None
    patches: str | None = None
    text_tokens: int = 0
    dtype: str = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class EfficiencyRequest(PromptRequest):
    """Which methods to cost, on which prompt.

    Attributes:
        methods: Specs, as in `CompareRequest`.
        retention: Retention ratios, each in (0, 1].
        measure: Whether to measure time and memory on this device, with random weights.
        layers: Decoder layers to build for that; None for all.
        batch_size: Prompts that run at once when measured.
        repeats: Timed runs of each part.
        device: As in `ModelRequest`.
        figures: As in `ModelRequest`.
        force: Whether to replace the result of an earlier call in ``out``.
    """

    methods: Sequence[str] = ("uniform",)
    retention: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.1)
    measure: bool = False
    layers: int | None = None
    batch_size: int = 1
    repeats: int = 5
    device: str | None = None
    figures: FigureOptions = FIGURES
    force: bool = False


def run(request: EfficiencyRequest, progress: ProgressCallback = silent) -> Outcome:
    """Forecast the costs of methods, and measure them on request.

    The folder gets ``costs.csv``, ``layers.csv``, if measured ``measured.csv``,
    ``efficiency.json`` (the request) and ``plots/``.

    Returns:
        With these tables; ``about`` describes the ``prompt`` and how times were ``measured``.

    Raises:
        UserError: Bad input, or ``out`` holds files and ``force`` is not set.
    """
    _check(request)
    folder = ResultFolder.open(
        request.out,
        f"efficiency_{Path(request.model).name}",
        marker="efficiency.json",
        force=request.force,
    )
    prompt = prompt_for(request)
    specs, skipped = expanded(request.methods, partial(check_compatible, prompt.adapter.facts))
    methods = chosen(specs, request.retention)
    for method in methods:
        check_compatible(prompt.adapter.facts, method)
    progress(0, 0, "forecast")
    found = costs(prompt, methods)
    found["pays_from"] = [
        None if method is None else analytic_break_even(prompt, method)
        for method in (None, *methods)
    ]
    tables = {"costs": found, "layers": layers(prompt, methods)}
    about = {"prompt": describe(request.model, prompt)}
    if request.measure:
        measured = measure(
            request.model,
            prompt,
            methods,
            layers=request.layers,
            batch_size=request.batch_size,
            repeats=request.repeats,
            device=request.device,
            progress=progress,
        )
        tables["measured"] = measured.table
        about["measured"] = measured.words
    write_tables(folder.path, tables)
    drawn = _draw(folder.path, tables, request, prompt)
    files = [f"{name}.csv" for name in tables]
    folder.finish(_details(request, prompt), [*files, *drawn])
    return Outcome(
        folder.path,
        tables=tables,
        files=(*files, "plots/"),
        skipped=skipped,
        notes=tuple(stand_in(prompt, methods)),
        about=about,
    )


def _check(request: EfficiencyRequest) -> None:
    """Raise `UserError` for errors that can be found without a model."""
    if request.device is not None:
        device_of(request.device)
    for name in ("layers", "batch_size", "repeats"):
        check_number(name, getattr(request, name))
    if request.layers is not None and not request.measure:
        raise UserError("--layers says how many layers are measured; add --measure.")
    chosen([spec for spec in request.methods if spec != ALL], request.retention)


def prompt_for(request: PromptRequest) -> Prompt:
    """The prompt of ``request``.  Raises `UserError` as `prompt_of`."""
    size, grid = (
        None if given is None else read_size(given)
        for given in (request.image_size, request.patches)
    )
    return prompt_of(
        request.model, size, patches=grid, text=request.text_tokens, dtype=request.dtype
    )


def stand_in(prompt: Prompt, methods: Sequence[Compressor]) -> Iterator[str]:
    """A sentence if a method uses the question but no text is counted."""
    if not prompt.text and any(asks(prompt, method) for method in methods):
        yield (
            f"No text is counted; for methods that use the question, {prompt.asking} tokens "
            "stand in for it (--text-tokens sets the number and counts them)."
        )


def describe(model: str, prompt: Prompt) -> str:
    """Model and prompt in a line."""
    image = ""
    if prompt.image_size is not None:
        height, width = prompt.image_size
        image = f"image {height} high x {width} wide, "
    return f"{Path(model).name}: {image}{_parts(prompt)}"


def _parts(prompt: Prompt) -> str:
    separators = prompt.visual - prompt.patches
    parts = [f"{prompt.patches} patch tokens"]
    parts += [f"{separators} separators"] if separators else ["no separators"]
    return ", ".join([*parts, f"{prompt.text} of text" if prompt.text else "no text"])


# --- files ----------------------------------------------------------------------------------------


def _details(request: EfficiencyRequest, prompt: Prompt) -> dict[str, Any]:
    """The request, with the parsed image size."""
    asked = asdict(request)
    size = prompt.image_size
    asked["image_size"] = None if size is None else {"height": size[0], "width": size[1]}
    for name in ("out", "force", "repeats", "device", "figures"):
        del asked[name]
    return asked | environment()


def _draw(
    folder: Path, tables: dict[str, pd.DataFrame], request: EfficiencyRequest, prompt: Prompt
) -> list[str]:
    """Write the figures, and return the names of their files."""
    about, options = _parts(prompt), request.figures
    title = f"What methods cost on {Path(request.model).name}"
    where = "Where tokens are processed"
    made = {
        "cost": figures.cost_by_retention(tables["costs"], title, about, options),
        "layers": figures.tokens_by_layer(tables["layers"], where, about, options),
    }
    names = []
    for name, figure in made.items():
        names += plots.save(figure, folder / "plots" / name, options)
    return [f"plots/{name}" for name in names]
