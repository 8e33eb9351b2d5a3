"""What each method keeps of an image, several images or a video, drawn over the pixels.

`look` runs the methods and records kept tokens, answers and scores; `draw` and `heat` draw them.
`masks` goes from a question to the figure in one call.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.files import check_writable, replace_file
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.plots import save
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.request import ModelRequest
from tokenprune.experiments.common.setting import load_model
from tokenprune.experiments.masks.figures import draw, heat_pages, pages
from tokenprune.experiments.masks.look import MaskedPrompt, check, look
from tokenprune.pictures import frames, picture
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


@dataclass(frozen=True, kw_only=True)
class MasksRequest(ModelRequest):
    """What to draw.

    Attributes:
        model: As for `tokenprune.load`; empty for a testbed that takes such images.
        words: Image files, and last the question; none for an example of the testbed.
        methods: Specs; None for GlobalCom² and FastV, or those of them that need no question if
            there is none.
        retention: Retention ratios, each in (0, 1].
        video: Whether the images are the frames of one video.
        frames: Maximum number of frames.
        cuts: As of `look`.
        pretrained: Checkpoint of a timm model.
        max_new_tokens: Maximum length of an answer.
    """

    model: str = ""
    words: Sequence[str] = ()
    methods: Sequence[str] | None = None
    retention: Sequence[float] = (0.25,)
    video: bool = False
    frames: int = 8
    cuts: bool = False
    pretrained: str | None = None
    max_new_tokens: int = 8


def run(request: MasksRequest, progress: ProgressCallback = silent) -> Outcome:
    """Run methods on one prompt, and write figures of what they keep.

    The folder gets ``masks`` and, if there are scores, ``heat`` as figures, ``kept.csv`` and
    ``manifest.json``.  Figures of many panels are divided: ``masks-1``, ``masks-2`` and so on.

    Returns:
        With the table ``kept``, as `MaskedPrompt.table` returns it; ``about`` has the ``question``
        and the ``truth``, if they are known.

    Raises:
        UserError: Bad input, before the model runs.
    """
    for name in ("frames", "max_new_tokens", "seed"):
        check_number(name, getattr(request, name))
    named = [spec for spec in request.methods or () if spec != ALL]
    cells(named, request.retention)  # to find a misspelt method early
    shown = _example(request) if not request.words else _given(request)
    single = len(shown.images) == 1 and not request.video
    model = request.model or ("testbed-next" if single else "testbed-onevision")
    folder = request.out or Path("runs") / re.sub(
        r"[^\w.+=-]+", "-", f"masks_{Path(model).name}_{shown.name}"
    )
    check_writable(folder)
    extra = {} if request.pretrained is None else {"pretrained": request.pretrained}
    pipe = load_model(replace(request, model=model), progress, **extra)
    asks = shown.question is not None and pipe.adapter.has_language_model
    methods, skipped = expanded(
        request.methods or (("globalcom2", "fastv") if asks else ("globalcom2",)),
        lambda compressor: check(pipe, compressor, asks),
    )
    untrained = model.startswith("timm/") and request.pretrained is None
    seen = look(
        pipe,
        shown.images,
        shown.question if asks else None,
        methods,
        request.retention,
        video=request.video,
        cuts=request.cuts,
        truth=shown.truth if asks else None,
        name=f"{model}, random weights" if untrained else model,
        max_new_tokens=request.max_new_tokens,
        progress=progress,
    )
    progress(0, 0, "drawing")
    table = seen.table()
    files = _written(request, folder, seen, table)
    about = {"question": seen.question, "truth": seen.truth}
    return Outcome(
        folder,
        tables={"kept": table},
        files=files,
        skipped=skipped,
        about={name: text for name, text in about.items() if text is not None},
    )


def _written(
    request: MasksRequest, folder: Path, seen: MaskedPrompt, table: pd.DataFrame
) -> tuple[str, ...]:
    """Write figures, table and manifest, and return their names."""
    drawn = {"masks": pages(seen, request.figures)}
    if seen.saliency or any(one.scores for one in seen.masks):
        drawn["heat"] = heat_pages(seen, request.figures)
    files: list[str] = []
    for name, figures in drawn.items():
        for number, figure in enumerate(figures, 1):
            part = f"{name}-{number}" if len(figures) > 1 else name
            files += save(figure, folder / part, request.figures)
    write_tables(folder, {"kept": table})
    asked = {"request": asdict(request), "command": sys.argv, **environment()}
    with replace_file(folder / "manifest.json") as temporary:
        temporary.write_text(
            json.dumps(asked, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )
    return (*files, "kept.csv", "manifest.json")


@dataclass(frozen=True, eq=False)
class _Shown:
    name: str
    images: list[Image.Image]
    question: str | None
    truth: str | None = None


def _example(request: MasksRequest) -> _Shown:
    """A question of the testbed that needs the crops."""
    asked = held_out(50, request.seed, "video" if request.video else "image")
    item = next((item for item in asked if item.kind == "digit"), asked[0])
    images = [picture.open() for picture in item.images]
    return _Shown(f"example-{request.seed}", images, item.question, item.answer)


def _given(request: MasksRequest) -> _Shown:
    """The images and the question of ``request.words``.  Raises `UserError`."""
    words = list(request.words)
    last = Path(words[-1])
    # os.path: a question may be too long for a name.
    is_file = os.path.exists(last) or last.suffix.lower() in Image.registered_extensions()
    question = None if is_file else words.pop()
    if not words:
        raise UserError(
            f"{question!r} is no image file; give images first, then the question: "
            'tokenprune masks photo.jpg "What is this?"'
        )
    if request.video:
        clip = frames(words[0] if len(words) == 1 else words)
        images = [Image.fromarray(frame) for frame in clip]
        places = np.linspace(0, len(images) - 1, min(request.frames, len(images)))
        images = [images[index] for index in places.round().astype(int)]
    else:
        images = [picture(word) for word in words]
    return _Shown(Path(words[0]).stem[:80] or "picture", images, question)
