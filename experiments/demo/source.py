"""Where the pictures of a prompt come from: uploaded files, or a scene of the testbed."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import Modality, Question, held_out
from tokenprune.pictures import MAX_PIXELS, frames, picture, pixel_limit

__all__ = [
    "FORMATS",
    "FRAMES",
    "SCENES",
    "SUFFIXES",
    "Clip",
    "Source",
    "scene",
]


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Formats of files that are decoded."""


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
"""Suffixes of such files."""


FRAMES = 8
"""Maximum number of frames of a video; a longer one is sampled evenly."""


_FILES = 16  # of one prompt


SCENES: tuple[tuple[Modality, int], ...] = (
    ("image", 4),
    ("image", 14),
    ("image", 23),
    ("image", 26),
    ("image", 37),
    ("multi-image", 10),
    ("video", 4),
    ("video", 6),
)
"""Modality and index of the held-out questions of the testbed (seed 0) that can be chosen."""


@cache
def scene(number: int) -> Question:
    """The question of a scene, by its index in `SCENES`."""
    modality, index = SCENES[number]
    return held_out(index + 1, 0, modality)[index]


@dataclass(frozen=True, eq=False)
class Clip:
    """The opened pictures of a prompt.

    Attributes:
        pictures: Its images, or the frames of its video.
        video: Whether they are the frames of a video.
        sampled: Indices of the frames, if they were sampled from a longer video.
    """

    pictures: tuple[Image.Image, ...]
    video: bool = False
    sampled: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """The pictures of a prompt, not opened yet.

    Attributes:
        files: Uploaded files; empty for a scene.
        number: Index of the scene in `SCENES`.
        as_video: Whether several files are the frames of one video.  A single animated file always
            is a video.
        limit: Number of pixels of the largest image or video that is decoded.
    """

    files: tuple[Path, ...] = ()
    number: int = 0
    as_video: bool = False
    limit: int = MAX_PIXELS

    def open(self) -> Clip:
        """Decode the pictures.

        Raises:
            UserError: A file is no image of a known format, is broken or too large, there are too
                many files, or an animated file stands beside others.
        """
        if not self.files:
            asked = scene(self.number)
            return Clip(tuple(shown.open() for shown in asked.images), asked.video)
        with pixel_limit(self.limit):
            return self._opened()

    def _opened(self) -> Clip:
        if len(self.files) > _FILES:
            raise UserError(f"got {len(self.files)} files; upload at most {_FILES}.")
        counts = [self._checked(path) for path in self.files]
        if len(self.files) > 1 and max(counts) > 1:
            name = self.files[counts.index(max(counts))].name
            raise UserError(f"{name!r} is animated, so it is a video; upload it alone.")
        if counts == [1] or (len(counts) > 1 and not self.as_video):
            return Clip(tuple(picture(_in_memory(path)) for path in self.files))
        return _sampled([_in_memory(path) for path in self.files])

    def _checked(self, path: Path) -> int:
        """The number of frames of a file.  Raises `UserError` if it must not be decoded."""
        try:
            with _checked_by_us(), Image.open(_in_memory(path), formats=FORMATS) as image:
                count = int(getattr(image, "n_frames", 1)) if image.format != "TIFF" else 1
                width, height = image.size
        except UnidentifiedImageError:
            raise UserError(
                f"{path.name!r} is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image; convert it "
                "to PNG, and a film to an animated GIF or to single frames."
            ) from None
        except Image.DecompressionBombError:
            raise UserError(
                f"{path.name!r} has too many pixels; upload an image of at most {self.limit:,}."
            ) from None
        except Exception as error:  # decoders raise almost any exception for damaged files
            raise UserError(
                f"cannot decode {path.name!r} ({error}); upload another file."
            ) from error
        if width * height * count > self.limit:
            film = f"{count} frames of " if count > 1 else ""
            raise UserError(
                f"{path.name!r} has {film}{width} x {height} pixels, more than the limit of "
                f"{self.limit:,} in all; upload a smaller one."
            )
        return count


@contextmanager
def _checked_by_us() -> Iterator[None]:
    """While open, Pillow does not warn of large images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _in_memory(path: Path) -> io.BytesIO:
    """The file, under a name for messages that does not tell where the server keeps it."""
    file = io.BytesIO(path.read_bytes())
    file.name = path.name
    return file


def _sampled(files: Sequence[io.BytesIO]) -> Clip:
    """The frames of a video, at most `FRAMES` of them."""
    found = frames(files[0] if len(files) == 1 else files)
    places = np.linspace(0, len(found) - 1, min(FRAMES, len(found))).round().astype(int).tolist()
    pictures = tuple(Image.fromarray(found[place]) for place in places)
    return Clip(pictures, True, tuple(places) if len(places) < len(found) else ())
