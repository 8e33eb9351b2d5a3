"""Questions with their images and masks."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tokenprune.adapter import Adapter
from tokenprune.errors import UserError
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.kept_bits import unpack
from tokenprune.experiments.common.patch_boxes import (
    Box,
    Lattice,
    ViewSize,
    crop_boxes,
    frame_box,
    lattices,
)
from tokenprune.experiments.common.questions import Picture, Question, normalise
from tokenprune.experiments.common.reading import place_of
from tokenprune.experiments.report.columns import Column
from tokenprune.layout import TokenLayout
from tokenprune.models.checkpoints import read_config
from tokenprune.models.loading import host_of

__all__ = [
    "Gallery",
    "planner",
    "question_entry",
]


_SIDE = 336  # longest side of an image, in pixels


_FRAME_SIDE = 168  # of a video's frame


_STEPS = ((1.0, 85), (1.0, 65), (0.75, 60), (0.5, 50))  # side and quality where pictures are many


# --- one question ---------------------------------------------------------------------------------


def question_entry(
    name: str,
    answers: pd.DataFrame,
    columns: Sequence[Column],
    item: Question | None,
    gallery: Gallery,
    journal: Journal,
) -> dict[str, Any]:
    rows = answers[answers["question_id"] == name]
    first = rows.iloc[0]
    by_cell = {(row["label"], row["retention"]): row for _, row in rows.iterrows()}
    said: list[str | None] = []
    ways: list[int | None] = []
    seen: dict[str, int] = {}
    right, same, keeps = "", "", []
    partial: list[float | None] = []
    media = gallery.add(item)
    for column in columns:
        row = by_cell.get((column.label, column.retention))
        answer = None if row is None or pd.isna(row["answer"]) else str(row["answer"])
        said.append(answer)
        ways.append(None if answer is None else seen.setdefault(normalise(answer), len(seen)))
        right += _flag(None if row is None else row["correct"])
        same += _flag(None if row is None else row["agrees"])
        partial.append(None if row is None else _partial(row.get("score")))
        record = journal.answers.get((column.key or "", name), {})
        keeps.append(gallery.fitting(media, record.get("kept")))
    return {
        "id": name,
        "kind": first["kind"],
        "question": first["question"],
        "truth": first["truth"],
        "truths": list(dict.fromkeys(json.loads(first.get("truths") or "[]"))),
        "media": media,
        "answers": said,
        "ways": ways,
        "right": right,
        "partial": partial if any(score is not None for score in partial) else None,
        "same": same,
        "kept": keeps,
    }


def _flag(value: Any) -> str:
    return "-" if value is None or pd.isna(value) else "1" if value else "0"


def _partial(score: Any) -> float | None:
    """A score between 0 and 1; None for 0, 1 and no score, which a flag shows."""
    return round(float(score), 3) if pd.notna(score) and 0 < score < 1 else None


class Gallery:
    """Every picture once, with the locations of the tokens of images and videos.

    Attributes:
        room: Maximum size of a picture, in bytes.
        pictures: Data URIs; None for a missing picture.
        media: Images and videos: their size, their pictures and the lattices of their tokens.
    """

    def __init__(self, adapter: Adapter | None, notes: list[str], room: int) -> None:
        self.adapter, self.notes, self.room = adapter, notes, room
        self.pictures: list[str | None] = []
        self.media: list[dict[str, Any]] = []
        self._sizes: list[tuple[int, int]] = []
        self._known: dict[tuple[str, int], int] = {}
        self._media: dict[tuple[Any, ...], int] = {}
        self._entries: list[int | None] = []

    def add(self, item: Question | None) -> list[int]:
        """Indices of the images or the video of a question."""
        if item is None:
            return []
        side = _FRAME_SIDE if item.video else _SIDE
        groups = [item.images] if item.video else [(picture,) for picture in item.images]
        together = len(groups) > 1
        return [self._medium(group, side, item.video, together) for group in groups]

    def fitting(self, media: Sequence[int], kept: Any) -> list[str] | None:
        """The ``kept`` entry of a journal if it matches these images."""
        if not isinstance(kept, list) or len(kept) != len(media) or not media:
            return None
        lengths = [self._entries[index] for index in media]
        for text, length in zip(kept, lengths, strict=True):
            if length is None or not isinstance(text, str) or unpack(text, length) is None:
                return None
        return kept

    def _medium(self, group: Sequence[Picture], side: int, video: bool, together: bool) -> int:
        pictures = [self._picture(picture, side) for picture in group]
        key = (tuple(pictures), video, together)
        if key in self._media:
            return self._media[key]
        width, height = self._sizes[pictures[0]]
        medium: dict[str, Any] = {"size": [width, height], "pictures": pictures}
        entries = None
        whole = all(self.pictures[index] is not None for index in pictures)
        if whole and self.adapter is not None:
            try:
                layout = _layout(self.adapter, (height, width), len(group), video, together)
                medium["views"] = _views(layout, (height, width), ViewSize.of(self.adapter))
                entries = len(layout)
            except Exception as error:  # from any adapter: the page must not fail
                note = f"No masks for some images: {type(error).__name__}: {error}"
                if note not in self.notes:
                    self.notes.append(note)
        self.media.append(medium)
        self._entries.append(entries)
        self._media[key] = len(self.media) - 1
        return self._media[key]

    def _picture(self, picture: Picture, side: int) -> int:
        key = (picture.id, side)
        if key not in self._known:
            try:
                image = picture.open()
            except UserError:
                self.pictures.append(None)
                self._sizes.append((4, 3))
            else:
                self.pictures.append(_data_uri(image, side, self.room))
                self._sizes.append(image.size)
            self._known[key] = len(self.pictures) - 1
        return self._known[key]


def _data_uri(image: Image.Image, side: int, room: int) -> str:
    """``image`` as WebP, at most ``side`` pixels long; in lower quality if ``room`` requires."""
    for share, quality in _STEPS:
        small = image.copy()
        small.thumbnail((share * side, share * side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Metadata of cameras and programs may contain names.
        small.save(buffer, "WEBP", quality=quality, exif=b"", xmp=b"")
        if buffer.tell() <= room:
            break
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# --- locations of tokens --------------------------------------------------------------------------


def planner(manifest: Mapping[str, Any], notes: list[str], folder: Path) -> Adapter | None:
    """The model's adapter, made of its configuration alone, which is enough for layouts.

    Args:
        manifest: Of the run.
        notes: Receives a sentence if there is no configuration.
        folder: The run folder.
    """
    experiment = manifest["experiment"]
    name, revision = str(experiment["model"]), experiment.get("revision")
    if manifest.get("model_folder"):
        name = str(place_of(folder, manifest["model_folder"]))
    try:
        # The run may be untrusted: nothing that it names is executed or downloaded.
        config = read_config(
            name, trust_remote_code=False, local_files_only=True, revision=revision
        )
        _, family = host_of(config)
    except UserError as error:
        notes.append(f"No masks: the configuration of {name} is not here ({error}).")
        return None
    return family(SimpleNamespace(config=config))  # type: ignore[arg-type]


def _layout(
    adapter: Any, size: tuple[int, int], pictures: int, video: bool, together: bool
) -> TokenLayout:
    found: TokenLayout
    found = adapter.video_layout(pictures) if video else adapter.layout(size, same_prompt=together)
    return found


def _views(layout: TokenLayout, size: tuple[int, int], view: ViewSize) -> list[dict[str, Any]]:
    """The lattices of tokens, in relative coordinates.

    Each has its ``box`` (left, top, right, bottom in shares of the image, beyond it where there is
    padding), whether it is drawn as a ``square``, the ends of its rows and columns in shares of the
    box, the index ``at`` which its tokens begin in the packed sequence, the ``step`` from row to
    row, and the ``seams`` between crops.
    """
    height, width = size
    found = []
    for lattice in lattices(layout, size, view):
        whole: Box = (0, 0, width, height)
        seams: list[list[float]] = [[], []]
        if lattice.view is None:
            crops = crop_boxes(layout, size, view)
            seams = [
                sorted({_share(x, 0, width) for x in crops[:, 0] if 0 < x < width}),
                sorted({_share(y, 0, height) for y in crops[:, 1] if 0 < y < height}),
            ]
        else:
            whole = frame_box(layout, size, view)
        left, top, right, bottom = whole
        found.append(
            {
                "square": lattice.view is not None,
                "box": [_share(x, 0, n) for x, n in zip(whole, (width, height) * 2, strict=True)],
                "rows": _ends(lattice.top, lattice.bottom, top, bottom),
                "cols": _ends(lattice.left, lattice.right, left, right),
                "seams": seams,
                **_places(lattice),
            }
        )
    return found


def _ends(start: Any, end: Any, low: float, high: float) -> list[list[float]]:
    return [[_share(value, low, high) for value in part] for part in (start, end)]


def _share(value: float, low: float, high: float) -> float:
    return round(float((value - low) / (high - low)), 5)


def _places(lattice: Lattice) -> dict[str, int]:
    """The first index and the step of the lattice's rows in the packed sequence."""
    index = lattice.index
    if not index.size:
        return {"at": 0, "step": 0}
    step = int(index[1, 0] - index[0, 0]) if len(index) > 1 else index.shape[1]
    rows, cols = np.indices(index.shape)
    if not np.array_equal(index, index[0, 0] + step * rows + cols):
        raise UserError("the tokens of a view are not packed row by row.")
    return {"at": int(index[0, 0]), "step": step}
