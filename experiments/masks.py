"""What each method keeps of an image, several images or a video, drawn over the pixels.

`look` runs the methods and notes what they keep, answer and score; `draw` and `heat` make figures
of that.  `masks` is the short way from a question to the figure.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from scipy.stats import rankdata
from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Compressor, Stage
from tokenprune.encoder import encoder_part
from tokenprune.engine import Chosen
from tokenprune.errors import UserError
from tokenprune.experiments import kept
from tokenprune.experiments.compare import cells
from tokenprune.experiments.csv_files import write_csv
from tokenprune.experiments.data import Picture, Question, held_out, normalise
from tokenprune.experiments.efficiency import ALL, expanded
from tokenprune.experiments.geometry import (
    Box,
    Lattice,
    ViewSize,
    crop_boxes,
    frame_box,
    lattices,
)
from tokenprune.experiments.limits import check_lengths, check_number
from tokenprune.experiments.plots import FAINT, INK, save, style
from tokenprune.experiments.ranking import Note, noting
from tokenprune.experiments.results import check_writable, environment, replace_file
from tokenprune.models.adapter import Adapter
from tokenprune.pictures import frames, picture
from tokenprune.terminal import Report, percent
from tokenprune.tokens import Signal, TokenLayout, VisualTokens

__all__ = [
    "Kept",
    "Medium",
    "Request",
    "Seen",
    "Sheet",
    "Tile",
    "draw",
    "heat",
    "look",
    "masks",
    "render",
    "sheet",
]

SALIENCY = Signal("saliency")
_WIDTH = 11.0  # of a figure, in inches
_GAP = 0.06  # between crops, in sides of a crop
_FRAMES = 10  # of a strip
_SMALLEST = 0.5  # side of a crop in a figure, in inches
_PALE = np.array([0.86, 0.88, 0.91])  # what dropped patches fade to
_RIM = np.array([0.05, 0.4, 0.95])  # around what is kept
_PADDING = (150, 150, 150)
_HEAT = "inferno"

Pixels = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Medium:
    """An image or a video of the prompt.

    Attributes:
        pictures: The image, or the frames.
        tokens: Its packed sequence, with the tower's saliency where it has one.
    """

    pictures: tuple[Image.Image, ...]
    tokens: VisualTokens

    @property
    def layout(self) -> TokenLayout:
        return self.tokens.layout

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pictures[0].height, self.pictures[0].width


@dataclass(frozen=True, eq=False)
class Kept:
    """What one method left.

    Attributes:
        label: The method, ``uncompressed`` for all tokens.
        retention: R asked for.
        keeps: For every medium (M,) indices into its packed sequence.
        answer: The model's; None where there is no language model or no question.
        where: Where the method acts, in words.
        scores: For every medium, the layout of the tokens it scored last and (M,) their scores;
            empty unless it ranks (`Compressor.ranking`).
    """

    label: str
    retention: float
    keeps: tuple[Tensor, ...]
    answer: str | None = None
    where: str = ""
    scores: tuple[tuple[TokenLayout, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Seen:
    """A prompt's images or video, and what every method left of them.

    Attributes:
        model: Its name.
        view: Its views.
        media: The images, or the video.
        kept: What is left, all tokens first.
        question, truth: What was asked, and the true answer if known.
        saliency: What the tower's saliency is, in words; empty if it has none that can be told.
    """

    model: str
    view: ViewSize
    media: tuple[Medium, ...]
    kept: tuple[Kept, ...]
    question: str | None = None
    truth: str | None = None
    saliency: str = ""

    def table(self) -> pd.DataFrame:
        """One row per method, retention, image and view: its patch tokens, and those kept."""
        rows = []
        for one in self.kept:
            for number, (medium, keep) in enumerate(zip(self.media, one.keeps, strict=True)):
                sizes = medium.layout.view_sizes
                counts = medium.layout.take(keep).view_sizes
                for view, (size, count) in enumerate(zip(sizes, counts, strict=True)):
                    rows.append(
                        {
                            "method": one.label,
                            "retention": one.retention,
                            "acts": one.where,
                            "image": number,
                            "view": view,
                            "kind": _view_kind(medium.layout, view),
                            "tokens": size,
                            "kept": count,
                            "share": count / size if size else math.nan,
                            "answer": one.answer,
                        }
                    )
        return pd.DataFrame(rows)


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
        lambda compressor: _check(adapter, compressor, asks),
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


def _check(adapter: Adapter, compressor: Compressor, asks: bool) -> None:
    """Raises `UserError` if the model, or a missing question, leaves it nothing to work on."""
    adapter.check(compressor)
    stages = list(compressor.stages())
    inside = [part for part in stages if part.stage is Stage.LLM]
    if inside and not asks:
        raise UserError(f"{inside[0].name} acts inside the language model; ask a question.")
    if len(stages) > 1 and not asks:
        raise UserError(f"{compressor.label} acts in several places; ask a question.")


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


# --- what is kept ---------------------------------------------------------------------------------


def look(
    adapter: Adapter,
    images: Sequence[Image.Image],
    question: str | None = None,
    methods: Sequence[str] = ("globalcom2", "fastv"),
    retention: float | Sequence[float] = 0.25,
    *,
    video: bool = False,
    cuts: bool = False,
    truth: str | None = None,
    name: str = "",
    max_new_tokens: int = 8,
    report: Report = lambda *_: None,
) -> Seen:
    """Run ``methods`` on one prompt and note what they keep.

    Args:
        adapter, images, question, methods, retention: As of `masks`.
        video: Whether the images are the frames of one video.
        cuts: Whether methods that cut several times are shown after every cut, not only at last.
        truth: The true answer, if known.
        name: Of the model, for the title.
        max_new_tokens: Longest answer.
        report: Told of the progress.

    Raises:
        UserError: The model lacks what a method needs, a method acts inside the language model but
            there is none or no question, or there is no image.
    """
    if not images:
        raise UserError("there is nothing to draw; give at least one image.")
    ratios = [retention] if isinstance(retention, int | float) else retention
    columns = cells(methods, ratios)
    asks = question is not None and adapter.has_language_model
    for cell in columns:
        if cell.compressor is not None:
            _check(adapter, cell.compressor, asks)
    pictures = [picture(image) for image in images]
    if question is not None and asks:
        named = tuple(Picture(str(index), one) for index, one in enumerate(pictures))
        check_lengths(adapter, [Question("0", named, question, "", video=video)], max_new_tokens)
    signals = frozenset[Signal]().union(
        *(cell.compressor.needs for cell in columns if cell.compressor)
    )
    report(0, len(columns), "vision tower")
    groups = [tuple(pictures)] if video else [(picture,) for picture in pictures]
    saliency = "attention received"
    if adapter.has_cls:
        saliency = "logits of the CLS token's attention"
    try:
        encoded = _encode(adapter, pictures, signals | {SALIENCY}, video)
    except UserError:  # a tower whose attention cannot be told
        encoded, saliency = _encode(adapter, pictures, signals, video), ""
    media = tuple(Medium(g, tokens) for g, tokens in zip(groups, encoded, strict=True))
    found: list[Kept] = []
    for index, cell in enumerate(columns):
        report(index, len(columns), str(cell))
        if cell.compressor is not None and cell.compressor.retention == 1:
            continue  # is the first, the uncompressed model
        compressor, heard = (None, []) if cell.compressor is None else noting(cell.compressor)
        answer, shown = None, encoded
        if compressor is not None and encoder_part(compressor) is not None:
            shown = _encode(adapter, pictures, compressor.needs, video, compressor)
        if asks:
            inputs = adapter.assemble([shown], [str(question)])
            with tp.compress(adapter.model, compressor) as trace:
                ids = adapter.model.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
                )
            (answer,) = adapter.decode(ids, inputs)
            selections = trace.selections
        else:
            selections = [
                Chosen(0, number, compressor.stage, None, tokens.layout, compressor(tokens).keep)
                for number, tokens in enumerate(shown)
                if compressor is not None
            ]
        made = _steps(selections) if cuts else [kept.final(selections)]
        for step in made:
            keeps = tuple(
                step[0, number].keep.cpu() if (0, number) in step else torch.arange(len(tokens))
                for number, tokens in enumerate(encoded)
            )
            last = step is made[-1]
            enough = last and len(heard) >= len(media)
            scores = tuple(map(_on_cpu, heard[-len(media) :] if enough else ()))
            where = _where(next(iter(step.values()), None))
            found.append(Kept(cell.label, cell.retention, keeps, answer, where, scores))
    view = ViewSize.of(adapter)
    return Seen(name or adapter.name, view, media, tuple(found), question, truth, saliency)


def _encode(
    adapter: Adapter,
    pictures: Sequence[Image.Image],
    signals: frozenset[Signal],
    video: bool,
    compressor: Compressor | None = None,
) -> list[VisualTokens]:
    if video:
        return adapter.encode_videos([list(pictures)], signals, compressor)
    return adapter.encode(pictures, signals, compressor, together=len(pictures) > 1)


def _on_cpu(note: Note) -> tuple[TokenLayout, Tensor]:
    tokens, scores = note
    return tokens.layout.to("cpu"), scores.detach().float().cpu()


def _steps(selections: Sequence[Chosen]) -> list[dict[tuple[int, int], Chosen]]:
    """What was left after every cut; all tokens if there was none."""
    layers = list(dict.fromkeys(chosen.layer for chosen in selections))
    return [kept.final(c for c in selections if c.layer == layer) for layer in layers] or [{}]


def _where(chosen: Chosen | None) -> str:
    if chosen is None:
        return ""
    if chosen.stage is Stage.ENCODER:
        return "in the encoder"
    return "before the LLM" if chosen.layer is None else f"before layer {chosen.layer}"


def _view_kind(layout: TokenLayout, view: int) -> str:
    if layout.modality == "video":
        return "frame"
    return "crop" if view and layout.grid != (0, 0) else "thumbnail"


# --- where it is drawn ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tile:
    """A view on a sheet.

    Attributes:
        view: Which.
        picture: What it is cut from.
        box: (left, top, right, bottom) of what it shows, in pixels of the picture.
        place: (x, y, width, height) on the sheet, in sides of a crop.
        lattice: The tokens.
    """

    view: int
    picture: Image.Image
    box: Box
    place: Box
    lattice: Lattice


@dataclass(frozen=True, eq=False)
class Sheet:
    """The views of an image or a video laid out for drawing, in sides of a crop."""

    tiles: tuple[Tile, ...]
    width: float
    height: float


def sheet(medium: Medium, view: ViewSize) -> Sheet:
    """The thumbnail beside the grid of crops without their padding, or frames in a row."""
    found = lattices(medium.layout, medium.size, view)
    if medium.layout.grid == (0, 0):
        whole = frame_box(medium.layout, medium.size, view)
        columns = min(len(found), _FRAMES)
        rows, step = -(-len(found) // columns), 1 + _GAP
        tiles = [
            Tile(i, picture, whole, (i % columns * step, i // columns * step, 1, 1), lattice)
            for i, (lattice, picture) in enumerate(zip(found, medium.pictures, strict=True))
        ]
        return Sheet(tuple(tiles), columns * step - _GAP, rows * step - _GAP)

    *_, canvas = found
    (picture,), (height, width) = medium.pictures, medium.size
    boxes = crop_boxes(medium.layout, medium.size, view)
    grid_rows, grid_cols = medium.layout.grid
    # Pixels of the image in a crop's side: the image fills the canvas one way or the other.
    side = max(height / grid_rows, width / grid_cols)
    wide = width / side + _GAP * (grid_cols - 1)
    tall = height / side + _GAP * (grid_rows - 1)
    thumb = max(1.0, min(tall / 2, wide))
    total = max(tall, thumb)
    left = thumb + 3 * _GAP
    tiles = [
        Tile(0, picture, (0, 0, width, height), (0, (total - thumb) / 2, thumb, thumb), found[0])
    ]
    for index, box in enumerate(boxes.tolist()):
        x0, y0, x1, y1 = box
        row, col = divmod(index, grid_cols)
        if x1 - x0 > 0 and y1 - y0 > 0:
            place = (
                left + x0 / side + _GAP * col,
                (total - tall) / 2 + y0 / side + _GAP * row,
                (x1 - x0) / side,
                (y1 - y0) / side,
            )
            tiles.append(Tile(1 + index, picture, (x0, y0, x1, y1), place, canvas))
    return Sheet(tuple(tiles), left + wide, total)


def _beside(sheets: Iterable[Sheet]) -> tuple[list[float], float, float]:
    """Where several sheets begin when they stand in a row, and how wide and high that is."""
    sheets = list(sheets)
    gap = (2 if all(one.height == 1 for one in sheets) else 6) * _GAP
    starts = np.cumsum([0.0, *(one.width + gap for one in sheets)]).tolist()
    return starts[:-1], starts[-1] - gap, max(one.height for one in sheets)


def _paint(one: Sheet, density: float, shade: Any) -> Pixels:
    """(height, width, 3) the sheet at ``density`` pixels a unit, white between the views.

    Args:
        one: What to paint.
        density: Pixels in a crop's side.
        shade: Called with a tile's pixels (h, w, 3) in [0, 1] and the token (h, w) of each; returns
            them as they are to be seen.
    """
    canvas = np.ones((round(one.height * density), round(one.width * density), 3))
    for tile in one.tiles:
        x, y, wide, tall = tile.place
        left, top = round(x * density), round(y * density)
        right, bottom = round((x + wide) * density), round((y + tall) * density)
        size = max(right - left, 1), max(bottom - top, 1)
        pixels = np.asarray(_cut(tile.picture, tile.box, size), dtype=float) / 255
        x0, y0, x1, y1 = tile.box
        across = x0 + (np.arange(size[0]) + 0.5) / size[0] * (x1 - x0)
        down = y0 + (np.arange(size[1]) + 0.5) / size[1] * (y1 - y0)
        painted = shade(pixels, tile.lattice.at(down, across))
        room = canvas[top : top + size[1], left : left + size[0]]
        room[:] = painted[: room.shape[0], : room.shape[1]]
    return canvas


def _cut(picture: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """What lies in ``box``, resized to ``size`` (width, height); grey outside the picture."""
    left, top, right, bottom = box
    if left < 0 or top < 0 or right > picture.width or bottom > picture.height:
        square = Image.new("RGB", (round(right - left), round(bottom - top)), _PADDING)
        square.paste(picture, (round(-left), round(-top)))
        picture, box = square, (0, 0, square.width, square.height)
    return picture.resize(size, Image.Resampling.BICUBIC, box=box)


def _show_kept(pixels: Pixels, token: NDArray[np.int64], keep: NDArray[np.bool_]) -> Pixels:
    """Dropped patches pale and grey, with a line around what is kept."""
    stays = keep[token] & (token >= 0)
    grey = pixels.mean(-1, keepdims=True)
    shown = np.where(stays[..., None], pixels, 0.22 * grey + 0.78 * _PALE)
    if keep.all() or keep[token[token >= 0]].all():  # at most what no token saw is pale
        return shown
    side = math.sqrt(token.size / len(np.unique(token)))  # of a patch, in pixels
    if side >= 8:
        width = int(np.clip(round(side / 14), 1, 4))
        shown[stays & ~_eroded(stays, width)] = _RIM
    return shown


def _eroded(inside: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """What lies at least ``width`` pixels inside; the edge of the view does not count as one."""
    found = binary_erosion(inside, np.ones((3, 3)), iterations=width, border_value=1)
    return np.asarray(found, dtype=bool)


def _show_heat(pixels: Pixels, token: NDArray[np.int64], value: Pixels) -> Pixels:
    """The picture in grey under colours; plain where there is no value."""
    grey = np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    heat = np.where(token >= 0, value[token], np.nan)
    colours = colormaps[_HEAT](np.nan_to_num(heat))[..., :3]
    return np.where(
        np.isnan(heat)[..., None], 0.22 * grey + 0.78 * _PALE, 0.3 * grey + 0.7 * colours
    )


# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Panel:
    """One picture of a figure: how to shade each medium, and what to write."""

    title: str
    lines: tuple[str, ...]
    shades: tuple[Any, ...]
    corners: tuple[dict[int, str], ...]
    row: int = 0


def draw(seen: Seen) -> Figure:
    """What every method keeps: dropped patches are pale, the share kept stands in each view.

    The first panel is the whole, with the number of patch tokens of each view.
    """
    ratios = list(dict.fromkeys(one.retention for one in seen.kept[1:]))
    panels = []
    for one in seen.kept:
        whole = one is seen.kept[0]
        shades, corners, total, left = [], [], 0, 0
        for medium, keep in zip(seen.media, one.keeps, strict=True):
            bits = np.zeros(len(medium.layout), dtype=bool)
            bits[keep.numpy()] = True
            shades.append(lambda pixels, token, bits=bits: _show_kept(pixels, token, bits))
            sizes, counts = medium.layout.view_sizes, medium.layout.take(keep).view_sizes
            corners.append(
                {
                    view: str(size) if whole else percent(count / size, 0) if size else ""
                    for view, (size, count) in enumerate(zip(sizes, counts, strict=True))
                }
            )
            total, left = total + sum(sizes), left + sum(counts)
        share = "" if whole else f", {percent(one.retention, None)}"
        tokens = f"{total} patch tokens" if whole else f"{left} of {total} tokens"
        where = f", {one.where}" if one.where else ""
        lines = (*_answer(one, seen.truth), f"{tokens}{where}")
        row = 0 if whole else ratios.index(one.retention)
        panels.append(_Panel(f"{one.label}{share}", lines, tuple(shades), tuple(corners), row))
    note = "In the corner: how many patch tokens a view has, and what share of them is kept."
    return _figure(seen, panels, note)


def heat(seen: Seen) -> Figure:
    """The tower's saliency and the scores of methods that score, as percentiles over all tokens.

    Raises:
        UserError: The tower has no saliency and no method scores.
    """
    panels = []
    if seen.saliency:
        maps = [(medium.layout, medium.tokens[SALIENCY].float().cpu()) for medium in seen.media]
        panels.append(_heat_panel(seen, "saliency of the vision tower", (seen.saliency,), maps))
    shown = set()
    for one in seen.kept:
        if one.scores and one.label not in shown:
            shown.add(one.label)  # the scores do not depend on how many are kept
            lines = (f"score, {one.where}",)
            panels.append(_heat_panel(seen, one.label, lines, list(one.scores)))
    if not panels:
        raise UserError(
            "there is no score to draw: this vision tower has no saliency that can be told, and "
            "none of the methods scores tokens."
        )
    figure = _figure(seen, panels, "Percentile of the score among all tokens shown.")
    bar = ScalarMappable(Normalize(0, 100), _HEAT)
    scale = figure.colorbar(bar, ax=figure.axes, shrink=0.6, aspect=30, pad=0.01, format="%d %%")
    scale.outline.set_visible(False)
    return figure


def _heat_panel(
    seen: Seen, title: str, lines: tuple[str, ...], maps: Sequence[tuple[TokenLayout, Tensor]]
) -> _Panel:
    shades = []
    values = [_aligned(m.layout, *scored) for m, scored in zip(seen.media, maps, strict=True)]
    ranks = _percentiles(np.concatenate(values))
    for part in np.split(ranks, np.cumsum([len(value) for value in values])[:-1]):
        shades.append(lambda pixels, token, part=part: _show_heat(pixels, token, part))
    return _Panel(title, lines, tuple(shades), tuple({} for _ in seen.media))


def _aligned(full: TokenLayout, layout: TokenLayout, values: Tensor) -> Pixels:
    """(N,) the values at their places in the full sequence, NaN elsewhere and at separators."""

    def places(one: TokenLayout) -> NDArray[np.int64]:
        parts = (one.kind, one.view, one.row, one.col, one.canvas_row, one.canvas_col)
        return np.stack([part.cpu().numpy() for part in parts], 1)

    where = {tuple(place): index for index, place in enumerate(places(full).tolist())}
    found = np.full(len(full), np.nan)
    index = [where[tuple(place)] for place in places(layout).tolist()]
    found[index] = values.numpy()
    found[full.is_separator.numpy()] = np.nan
    return found


def _percentiles(values: Pixels) -> Pixels:
    """Ranks in [0, 1], the mean rank where values are equal; NaN stays."""
    finite = ~np.isnan(values)
    ranks = np.full(len(values), np.nan)
    count = int(finite.sum())
    ranks[finite] = (rankdata(values[finite]) - 1) / max(count - 1, 1)
    return ranks


def _answer(one: Kept, truth: str | None) -> tuple[str, ...]:
    if one.answer is None:
        return ()
    verdict = ""
    if truth is not None:
        verdict = "  ✓" if normalise(one.answer) == normalise(truth) else "  ✗"
    return (f"“{one.answer}”{verdict}",)


def _figure(seen: Seen, panels: Sequence[_Panel], note: str) -> Figure:
    sheets = [sheet(medium, seen.view) for medium in seen.media]
    starts, wide, tall = _beside(sheets)
    columns, places = _arranged(panels, wide, tall)
    rows = max(row for row, _ in places) + 1
    width = _WIDTH / columns  # of a panel, in inches
    if rows * width * tall / wide > _WIDTH * 1.4:  # as tall as a page
        width = _WIDTH * 1.4 / rows * wide / tall
    lines = max(len(panel.lines) for panel in panels)
    text = 0.36 + 0.2 * lines
    density = min(400.0, max(160.0, 1.1 * 200 * width / wide), 3000 / max(wide, tall))
    head = _heading(seen, note, columns * width)
    height = rows * (width * tall / wide + text) + 0.24 * len(head) + 0.25
    with style():
        figure = Figure(figsize=(columns * width + 0.3, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.09, h_pad=0.08, wspace=0.02, hspace=0.01)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for panel, place in zip(panels, places, strict=True):
            _draw_panel(grid[place], panel, sheets, starts, (wide, tall), density, width / wide)
        figure.suptitle(
            "\n".join(head), x=0.01, ha="left", fontsize=11, color=INK, linespacing=1.4,
            parse_math=False,
        )  # fmt: skip
    return figure


def _arranged(
    panels: Sequence[_Panel], wide: float, tall: float
) -> tuple[int, list[tuple[int, int]]]:
    """Columns of a figure, and the row and column of every panel.

    A row for each retention where there are several; otherwise side by side as far as crops do
    not become too small.
    """
    aspect = wide / tall
    rows = max(panel.row for panel in panels) + 1
    if rows > 1 and aspect < 3:
        places, filled = [], [1 if row else 0 for row in range(rows)]  # below the whole: nothing
        for panel in panels:
            places.append((panel.row, filled[panel.row]))
            filled[panel.row] += 1
        return max(filled), places
    count = len(panels)
    if count <= 4 and aspect < 2 and _WIDTH / count >= _SMALLEST * wide:
        columns = count
    else:
        columns = min(range(1, count + 1), key=lambda c: _misfit(c, count, wide, tall))
    return columns, [divmod(index, columns) for index in range(count)]


def _misfit(columns: int, count: int, wide: float, tall: float) -> float:
    """How far a figure of so many columns is from twice as wide as high, with few holes."""
    rows, width = -(-count // columns), _WIDTH / columns
    height = rows * (width * tall / wide + 0.7)
    cramped = columns > 1 and width < _SMALLEST * wide
    holes = (rows * columns - count) / count
    return abs(math.log(_WIDTH / height / 2)) + 0.6 * holes + (10.0 if cramped else 0.0)


def _draw_panel(
    axes: Axes,
    panel: _Panel,
    sheets: Sequence[Sheet],
    starts: Sequence[float],
    extent: tuple[float, float],
    density: float,
    inches: float,
) -> None:
    """``inches`` are those of a crop's side."""
    wide, tall = extent
    for one, start, shade, corners in zip(sheets, starts, panel.shades, panel.corners, strict=True):
        top = (tall - one.height) / 2
        painted = _paint(one, density, shade)
        axes.imshow(
            painted, extent=(start, start + one.width, top + one.height, top),
            interpolation="antialiased",
        )  # fmt: skip
        for tile in one.tiles:
            if corners.get(tile.view):
                x, y, tile_wide, _ = tile.place
                size = float(np.clip(72 * inches * tile_wide * 0.1, 3.5, 9))
                axes.text(
                    start + x + 0.04 * tile_wide, top + y + 0.04 * tile_wide, corners[tile.view],
                    size=size, color="white", va="top", ha="left",
                    bbox={"boxstyle": "round,pad=0.25", "fc": "black", "alpha": 0.7, "lw": 0},
                )  # fmt: skip
    axes.set_xlim(0, wide)
    axes.set_ylim(tall, 0)
    room = 10 * inches * wide  # characters of a title in full size
    axes.set_title(
        panel.title, loc="left", fontsize=11 * min(1.0, room / len(panel.title)),
        fontweight="bold", color=INK, pad=4, parse_math=False,
    )  # fmt: skip
    for index, line in enumerate(panel.lines):
        axes.annotate(
            line, (0, 0), (0, -6 - 14 * index), xycoords="axes fraction",
            textcoords="offset points", va="top", fontsize=10, parse_math=False,
            color=INK if line.startswith("“") else FAINT, annotation_clip=False,
        )  # fmt: skip


def _heading(seen: Seen, note: str, inches: float) -> list[str]:
    width = max(30, int(inches * 12.5))
    asked = f"“{seen.question}”" if seen.question else ""
    truth = f"  True answer: {seen.truth}" if seen.truth is not None else ""
    lines = textwrap.wrap(f"{asked}{truth}", width) + textwrap.wrap(f"{seen.model}. {note}", width)
    return lines
