"""What each method keeps of an image, several images or a video, drawn over the pixels.

`look` runs the methods and records kept tokens, answers and scores; `draw` and `heat` draw them.
`masks` goes from a question to the figure in one call.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.limits import check_lengths, check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.plots import save
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.questions import check_placeholders
from tokenprune.experiments.common.result_folder import ResultFolder
from tokenprune.experiments.common.run_folder import asked_for
from tokenprune.experiments.common.setting import load_model, warn_about_testbed
from tokenprune.experiments.masks.figures import draw, heat_pages, pages
from tokenprune.experiments.masks.look import MaskedPrompt, check, look
from tokenprune.experiments.masks.prompts import MasksRequest, Prompt, prompts
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "MasksRequest",
    "masks",
    "run",
]


def masks(
    pipe: Pipeline,
    images: Sequence[Image.Image],
    question: str | None = None,
    methods: Sequence[str] = ("globalcom2", "fastv"),
    retention: float | Sequence[float] = 0.25,
    **options: Any,
) -> Figure:
    """What each method keeps of ``images``, side by side, with the model's answers.

    Args:
        pipe: As `tokenprune.load` returns it.
        images: Of one prompt, in order; or the frames of a video with ``video=True``.
        question: The question.  Without one, or without a language model, only methods that act
            in front of it are shown, without answers.
        methods: Specs, as for a comparison.
        retention: One or several retention ratios.
        **options: As of `look`.

    Raises:
        UserError: As `look`.
    """
    return draw(look(pipe, images, question, methods, retention, **options))


# --- the command ----------------------------------------------------------------------------------


def run(request: MasksRequest, progress: ProgressCallback = silent) -> Outcome:
    """Run methods on one or several prompts, and write figures of what they keep.

    The folder gets ``masks`` and, if there are scores, ``heat`` as figures, ``kept.csv`` and
    ``manifest.json``.  With several prompts, the names of the figures end with that of the prompt.
    Figures of many panels are divided: ``masks-1``, ``masks-2`` and so on.

    Returns:
        With the table ``kept``, as `MaskedPrompt.table` returns it, and with several prompts the
        column ``prompt``; ``about`` has the ``question`` and the ``truth`` of a single prompt, if
        they are known.

    Raises:
        UserError: Bad input, before the model runs.
    """
    for name in ("frames", "images", "max_new_tokens", "seed"):
        check_number(name, getattr(request, name))
    named = [spec for spec in request.methods or () if spec != ALL]
    cells(named, request.retention)  # to find a misspelt method early
    shown = prompts(request)
    single = all(len(one.pictures) == 1 and not one.video for one in shown)
    model = request.model or ("testbed-next" if single else "testbed-onevision")
    folder = _folder(request, model, shown)
    warn_about_testbed(model, own=request.data is not None or bool(request.words))
    extra = {} if request.pretrained is None else {"pretrained": request.pretrained}
    pipe = load_model(replace(request, model=model), progress, **extra)
    asks = shown[0].question is not None and pipe.adapter.has_language_model
    methods, skipped = expanded(
        request.methods or (("globalcom2", "fastv") if asks else ("globalcom2",)),
        lambda compressor: check(pipe, compressor, asks),
    )
    if asks:
        asked = [one.asked() for one in shown]
        check_placeholders(asked, pipe)
        check_lengths(pipe, asked, request.max_new_tokens)
    files, tables, about = [], [], {}
    for name, one in zip(_file_names(shown), shown, strict=True):
        seen = _seen(replace(request, model=model), pipe, one, methods, asks, progress)
        table = seen.table()
        if len(shown) > 1:
            table.insert(0, "prompt", one.name)
        else:
            about = {"question": seen.question, "truth": seen.truth}
        tables.append(table)
        progress(0, 0, "drawing")
        files += _drawn(request, folder.path, seen, name)
    kept = pd.concat(tables, ignore_index=True)
    write_tables(folder.path, {"kept": kept})
    files.append("kept.csv")
    folder.finish({**asked_for(request, folder.path), **environment()}, files)
    return Outcome(
        folder.path,
        tables={"kept": kept},
        files=(*files, "manifest.json"),
        skipped=skipped,
        about={name: text for name, text in about.items() if text is not None},
    )


def _seen(
    request: MasksRequest,
    pipe: Pipeline,
    one: Prompt,
    methods: Sequence[str],
    asks: bool,
    progress: ProgressCallback,
) -> MaskedPrompt:
    """What ``methods`` keep of one prompt, with its answers if the model is asked."""
    untrained = request.model.startswith("timm/") and request.pretrained is None
    return look(
        pipe,
        [shown.open() for shown in one.pictures],
        one.question if asks else None,
        methods,
        request.retention,
        video=one.video,
        cuts=request.cuts,
        truth=one.truth if asks else None,
        name=f"{request.model}, random weights" if untrained else request.model,
        max_new_tokens=request.max_new_tokens,
        progress=lambda done, total, doing: progress(done, total, f"{one.name}: {doing}"),
    )


def _folder(request: MasksRequest, model: str, shown: Sequence[Prompt]) -> ResultFolder:
    """The folder of the results.  Raises `UserError` as `ResultFolder.open`."""
    name = f"masks_{Path(model).name}_{_title(request, shown)}"
    return ResultFolder.open(
        request.out,
        re.sub(r"[^\w.+=-]+", "-", name),
        marker="manifest.json",
        force=request.force,
    )


def _title(request: MasksRequest, shown: Sequence[Prompt]) -> str:
    """The part of a folder's name that names the images."""
    if len(shown) == 1:
        return shown[0].name
    word = request.data or Path(next(iter(request.words), ""))
    return f"{word.stem[:80] or 'images'}-{len(shown)}"


def _file_names(shown: Sequence[Prompt]) -> list[str]:
    """What is appended to the names of each prompt's figures; nothing for a single prompt."""
    if len(shown) == 1:
        return [""]
    plain = [re.sub(r"[^\w+=-]+", "-", _stem(one.name))[:80] for one in shown]
    # Different names may be the same without their special characters.
    return [
        f"-{name}-{index}" if plain.index(name) < index else f"-{name}"
        for index, name in enumerate(plain)
    ]


def _stem(name: str) -> str:
    """``name`` without the ending of an image file."""
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in Image.registered_extensions() else name


def _drawn(request: MasksRequest, folder: Path, seen: MaskedPrompt, name: str) -> list[str]:
    """Write the figures of a prompt, and return the names of their files."""
    kinds = {"masks": pages(seen, request.figures)}
    if seen.saliency or any(one.scores for one in seen.masks):
        kinds["heat"] = heat_pages(seen, request.figures)
    files = []
    for kind, figures in kinds.items():
        for number, figure in enumerate(figures, 1):
            part = f"-{number}" if len(figures) > 1 else ""
            files += save(figure, folder / f"{kind}{name}{part}", request.figures)
    return files
