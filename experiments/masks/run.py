"""What each method keeps of an image, several images or a video, drawn over the pixels.

`look` runs the methods and notes what they keep, answer and score; `draw` and `heat` make figures
of that.  `masks` is the short way from a question to the figure.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import check_writable, replace_file
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.plots import save
from tokenprune.experiments.common.provenance import environment
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.masks.figures import draw, heat
from tokenprune.experiments.masks.look import Seen, check, look
from tokenprune.pictures import frames, picture
from tokenprune.progress import Report

__all__ = [
    "Request",
    "masks",
    "render",
]


def masks(
    adapter: Adapter,
    images: Sequence[Image.Image],
    question: str | None = None,
    methods: Sequence[str] = ("globalcom2", "fastv"),
    retention: float | Sequence[float] = 0.25,
    **options: Any,
) -> Figure:
    """What each method keeps of ``images``, side by side, with the model's answers.

    Args:
        adapter: As `tokenprune.load` returns it.
        images: Of one prompt, in order; or the frames of a video with ``video=True``.
        question: What to ask.  Without one, or without a language model, methods that act in
            front of it are shown and nothing is answered.
        methods: Specs, as for a comparison.
        retention: One or several shares of patch tokens to keep.
        **options: As of `look`.

    Raises:
        UserError: As `look`.
    """
    return draw(look(adapter, images, question, methods, retention, **options))


# --- the command ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, as asked on the command line.

    Attributes:
        words: Image files, and last the question; none for an example of the testbed.
        model: As of `tokenprune.load`; None for a testbed.
        methods: Specs; None for GlobalCom² and FastV, or what a missing question leaves of them.
        retention: Shares of patch tokens to keep.
        video: Whether the images are the frames of one video.
        frames: How many of a longer video are taken.
        cuts: As of `look`.
        pretrained: Checkpoint of a timm model.
        seed: Draws the example.
        device, dtype, trust_remote_code: As of `tokenprune.load`.
        max_new_tokens: Longest answer.
        out: Folder; None for one in ``runs/``.
    """

    words: Sequence[str] = ()
    model: str | None = None
    methods: Sequence[str] | None = None
    retention: Sequence[float] = (0.25,)
    video: bool = False
    frames: int = 8
    cuts: bool = False
    pretrained: str | None = None
    seed: int = 0
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_new_tokens: int = 8
    out: Path | None = None


def render(
    request: Request, report: Report = lambda *_: None
) -> tuple[Seen, Path, list[str], dict[str, str]]:
    """Do what is asked; what was seen, the folder it is drawn in, and the files there.

    Last, which methods ``all`` left out, and why.

    Raises:
        UserError: Bad input, found before the model runs.
    """
    for name in ("frames", "max_new_tokens", "seed"):
        check_number(name, getattr(request, name))
    named = [spec for spec in request.methods or () if spec != ALL]
    cells(named, request.retention)  # a misspelt method is found early
    shown = _example(request) if not request.words else _given(request)
    single = len(shown.images) == 1 and not request.video
    model = request.model or ("testbed-next" if single else "testbed-onevision")
    folder = request.out or Path("runs") / re.sub(
        r"[^\w.+=-]+", "-", f"masks_{Path(model).name}_{shown.name}"
    )
    check_writable(folder)
    report(0, 0, f"loading {model}")
    extra = {} if request.pretrained is None else {"pretrained": request.pretrained}
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapter = tp.load(
        model,
        device=device,
        dtype=request.dtype,
        trust_remote_code=request.trust_remote_code,
        **extra,
    )
    asks = shown.question is not None and adapter.has_language_model
    methods, skipped = expanded(
        request.methods or (("globalcom2", "fastv") if asks else ("globalcom2",)),
        lambda compressor: check(adapter, compressor, asks),
    )
    untrained = model.startswith("timm/") and request.pretrained is None
    seen = look(
        adapter,
        shown.images,
        shown.question if asks else None,
        methods,
        request.retention,
        video=request.video,
        cuts=request.cuts,
        truth=shown.truth if asks else None,
        name=f"{model}, random weights" if untrained else model,
        max_new_tokens=request.max_new_tokens,
        report=report,
    )
    report(0, 0, "drawing")
    save(draw(seen), folder / "masks")
    files = ["masks.png", "masks.pdf"]
    if seen.saliency or any(one.scores for one in seen.kept):
        save(heat(seen), folder / "heat")
        files += ["heat.png", "heat.pdf"]
    with replace_file(folder / "kept.csv") as temporary:
        write_csv(seen.table(), temporary)
    asked = {"request": asdict(request), "command": sys.argv, **environment()}
    with replace_file(folder / "manifest.json") as temporary:
        temporary.write_text(
            json.dumps(asked, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
        )
    return seen, folder, [*files, "kept.csv", "manifest.json"], skipped


@dataclass(frozen=True, eq=False)
class _Shown:
    name: str
    images: list[Image.Image]
    question: str | None
    truth: str | None = None


def _example(request: Request) -> _Shown:
    """A question of the testbed that only the details answer."""
    asked = held_out(50, request.seed, "video" if request.video else "image")
    item = next((item for item in asked if item.kind == "digit"), asked[0])
    images = [picture.open() for picture in item.images]
    return _Shown(f"example-{request.seed}", images, item.question, item.answer)


def _given(request: Request) -> _Shown:
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
