"""Reads images and videos as RGB pixels, as an image viewer shows them.

`picture` reads one image, `frames` a video.  Both apply the EXIF orientation, put transparent
images on white and scale all values to 8 bits.  Colour profiles are not applied.  Only regular
files of at most `pixel_limit` pixels are decoded.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor

from tokenprune.errors import PictureWarning, UserError
from tokenprune.texts import is_remote

__all__ = ["MAX_PIXELS", "frames", "is_one_picture", "most_pixels", "picture", "pixel_limit"]

MAX_PIXELS = 64_000_000
"""Number of pixels of the largest image that is decoded; `pixel_limit` changes it."""

_limit: ContextVar[int] = ContextVar("pixel_limit", default=MAX_PIXELS)

_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
_MOVING = f"an animated {', '.join(_ANIMATIONS[:-1])} or {_ANIMATIONS[-1]} file"
_STILL = (
    "a PIL image, a path, an open binary file, or a NumPy array or torch tensor of shape "
    "(height, width), (height, width, channels) or (channels, height, width)"
)
_VIDEO = (
    "a list of images of one size, an array (frames, height, width, 3) or a tensor (frames, 3, "
    f"height, width), {_MOVING}, or a folder of images"
)


def most_pixels() -> int:
    """Number of pixels of the largest image that is decoded now."""
    return _limit.get()


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """While open, only images of up to ``pixels`` pixels are decoded."""
    before = Image.MAX_IMAGE_PIXELS
    token = _limit.set(pixels)
    if before is not None:  # Pillow has its own limit
        Image.MAX_IMAGE_PIXELS = max(before, pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
        _limit.reset(token)


def picture(source: Any) -> Image.Image:
    """One image in RGB, as an image viewer shows it; the first frame of an animation.

    Args:
        source: A PIL image, a path, a ``file://`` URL, an open binary file, or a NumPy array or
            torch tensor of shape (height, width), (height, width, C) or (C, height, width), with
            C = 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA).  If both orders fit, the channels
            are last in arrays and first in tensors.  Floats between 0 and 1, as torchvision makes
            them, range from black to white; so does the full range of ``uint8`` and ``uint16``.

    Raises:
        UserError: ``source`` is none of these, has no pixels or too many, cannot be decoded, or
            its values have no known range.

    Warns:
        PictureWarning: The range of values of a gray image is guessed.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _on_white(_of_array(*_array(source)))
    with _decoding(_name(source), "an image", _STILL):
        return _shown(_opened(source, "an image", _STILL))


def frames(source: Any) -> NDArray[np.uint8]:
    """The frames of a video, each as `picture` shows it, (frames, height, width, 3).

    Args:
        source: A list of what `picture` takes, all of one size; an array (frames, height, width,
            C) or tensor (frames, C, height, width); an animated image as a path, an open file or a
            PIL image; or a folder of images, in the order of their names.

    Raises:
        UserError: As `picture`, there is no frame, or frames differ in size.

    Warns:
        PictureWarning: As `picture`.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _of_video_array(*_array(source))
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        stills = [_still_frame(frame) for frame in source]
    elif _is_folder(source):
        stills = [picture(file) for file in _images_in(Path(source))]
    else:
        with _decoding(_name(source), "a video", _VIDEO):
            moving = _opened(source, "a video", _VIDEO)
            stills = [_shown(frame) for frame in ImageSequence.Iterator(moving)]
    sizes = {still.size for still in stills}
    if len(sizes) != 1:
        raise UserError(
            f"the frames of a video must be of one size, got {sorted(sizes)} (width, height)."
            if stills
            else "a video needs at least one frame, got an empty list."
        )
    return np.stack([np.asarray(still) for still in stills])


def is_one_picture(source: Any) -> bool:
    """Whether ``source`` is one image and not a list of images."""
    if isinstance(source, np.ndarray | Tensor):
        return source.ndim < 4
    return not isinstance(source, Sequence) or isinstance(source, str | bytes)


# --- opening --------------------------------------------------------------------------------------


def _opened(source: Any, what: str, takes: str) -> Image.Image:
    """The PIL image of a path, a file or a PIL image; a file is not decoded yet."""
    if isinstance(source, Image.Image):
        image = source
    elif isinstance(source, str | os.PathLike):
        image = _open(_regular_file(source))
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        image = _open(source)
    else:
        said = "None" if source is None else f"an object of type {type(source).__name__}"
        hint = " (io.BytesIO makes a file of bytes)" if isinstance(source, bytes) else ""
        raise UserError(f"{said} is not {what}; give {takes}{hint}.")
    width, height = image.size
    if not width * height:
        raise UserError(f"an image of {width} x {height} pixels has nothing to show; leave it out.")
    if isinstance(image, ImageFile.ImageFile) and width * height > _limit.get():
        raise UserError(
            f"{_name(source)} has {width} x {height} pixels, more than the limit of "
            f"{_limit.get():,}; make it smaller, or raise the limit (--max-image-pixels, or "
            "tokenprune.pictures.pixel_limit)."
        )
    if image.format == "EPS":
        raise UserError(f"{_name(source)} is a PostScript program; convert it to PNG.")
    return image


def _open(file: Any) -> Image.Image:
    with warnings.catch_warnings():  # `pixel_limit` replaces Pillow's limit
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _regular_file(source: str | os.PathLike[Any]) -> str:
    """The path of a regular file.  Raises `UserError` or `OSError` for anything else."""
    path = os.fsdecode(source)
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    elif is_remote(path) and not os.path.lexists(path):
        raise UserError(f"{path!r} is a remote address; download it and give the path of the file.")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no image {path!r}; check the path.") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise OSError(f"it is {kind}, not a regular file")
    return path


@contextmanager
def _decoding(name: str, what: str, takes: str) -> Iterator[None]:
    """Turn every exception of a decoder into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise almost any exception for damaged files
        said = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            said = f"it is no image that Pillow knows; {what} is {takes}"
        raise UserError(f"cannot decode {name} ({said}); replace it or leave it out.") from error


def _name(source: Any) -> str:
    """The name of ``source`` in a message."""
    if isinstance(source, str | os.PathLike):
        return f"the image {os.fsdecode(source)!r}"
    file = getattr(source, "filename", None) or getattr(source, "name", None)
    return f"the image {file!r}" if isinstance(file, str) else "an image"


def _is_folder(source: Any) -> bool:
    # Unlike pathlib, os.path returns False for a name that is too long or has a null byte.
    return isinstance(source, str | os.PathLike) and os.path.isdir(source)


def _images_in(folder: Path) -> list[Path]:
    known = Image.registered_extensions()
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in known)
    if not found:
        raise UserError(f"there is no image in the folder {str(folder)!r}.")
    return found


def _still_frame(source: Any) -> Image.Image:
    """`picture` for a frame of a video: an animation is refused."""
    if isinstance(source, np.ndarray | Tensor):
        return picture(source)
    with _decoding(_name(source), "a frame", _STILL):
        image = _opened(source, "a frame", _STILL)
        if image.format in _ANIMATIONS and getattr(image, "n_frames", 1) > 1:
            raise UserError(
                f"{_name(source)} is animated, so it cannot be one frame of a video; give it in "
                "place of the list, or copies of its frames."
            )
        return _shown(image)


# --- conversion to RGB ----------------------------------------------------------------------------


def _shown(image: Image.Image) -> Image.Image:
    """A new RGB image of the current frame."""
    white = _white_value(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _on_white(_of_gray(upright, white))
    return _on_white(upright)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # the only mode that Pillow converts it to
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _white_value(image: Image.Image) -> int | None:
    """The value of white in a gray image of more than 8 bits, if its mode or format defines it."""
    if image.mode.startswith("I;16"):
        # Pillow does not scale the 12-bit values of some scanners and cameras.
        bits = getattr(image, "tag_v2", {}).get(258) if image.format == "TIFF" else None
        return 4095 if bits == (12,) else 65535
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 65535
    return None


def _of_gray(image: Image.Image, white: int | None) -> Image.Image:
    """An image of more than 8 bits in 8 bits, with alpha if one value stands for transparent."""
    values = np.asarray(image)
    gray = Image.fromarray(_scaled(values, (0, white)) if white else _guessed(values, image.mode))
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return gray


# --- arrays ---------------------------------------------------------------------------------------


def _array(source: NDArray[Any] | Tensor) -> tuple[NDArray[Any], bool]:
    """The values on the CPU, and whether channels come first if both orders fit."""
    if not isinstance(source, Tensor):
        return source, False
    if source.is_meta:
        raise UserError("a tensor on the meta device holds no pixels; give one with values.")
    values = source.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy(), True


def _of_array(array: NDArray[Any], first: bool) -> Image.Image:
    """The image of one array; ``first`` as returned by `_array`."""
    values = _with_channels_last(array[None], first)[0] if array.ndim == 3 else array
    if array.ndim not in (2, 3):
        raise UserError(f"an array of shape {array.shape} is no image; give {_STILL}.")
    gray = values.ndim == 2 or values.shape[-1] < 3
    pixels = _eight_bits(values, array, gray)
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if _is_flat(pixels) else pixels))


def _of_video_array(array: NDArray[Any], first: bool) -> NDArray[np.uint8]:
    """The frames of one array.  All of them have the range of values of the whole video."""
    if array.ndim != 4:
        raise UserError(f"an array of shape {array.shape} is no video; a video is {_VIDEO}.")
    values = _with_channels_last(array, first)
    pixels = _eight_bits(values, array, values.shape[-1] < 3)
    if pixels.shape[-1] == 3:
        return pixels
    return np.stack([np.asarray(_on_white(_of_array(frame, False))) for frame in pixels])


def _is_flat(pixels: NDArray[Any]) -> bool:
    return pixels.ndim == 3 and pixels.shape[-1] == 1


def _with_channels_last(array: NDArray[Any], first: bool) -> NDArray[Any]:
    """(n, height, width, channels) from an array with the channels on axis 1 or 3."""
    places = [place for place in (3, 1) if 1 <= array.shape[place] <= 4]
    if not places:
        raise UserError(
            f"an array of shape {array.shape[1:]} has no axis of 1 to 4 channels, first or last; "
            f"an image is {_STILL}."
        )
    place = 1 if first and 1 in places else places[0]
    return np.moveaxis(array, place, -1)


def _eight_bits(values: NDArray[Any], given: NDArray[Any], gray: bool) -> NDArray[np.uint8]:
    """``values`` from 0 (black) to 255 (white)."""
    if not values.size:
        raise UserError(f"an array of shape {given.shape} has no pixels; leave it out.")
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.uint16:
        return _scaled(values, (0, 65535))
    if values.dtype.kind not in "iuf":
        raise UserError(f"an array of {values.dtype} is no image; give 8-bit integers.")
    low, high = _extent(values)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return _scaled(values, (0, 1))
    if not gray and not (low >= 0 and high <= 255):
        raise UserError(
            f"a colour image with values from {low:g} to {high:g} has no known range; give floats "
            "from 0 to 1 or 8-bit integers, not what an image processor has normalised."
        )
    return _guessed(values, str(values.dtype))


def _extent(values: NDArray[Any]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # the minimum and maximum propagate NaN
        raise UserError("an image holds NaN or infinity; replace them by finite values.")
    return low, high


def _guessed(values: NDArray[Any], kind: str) -> NDArray[np.uint8]:
    """``values`` in 8 bits, scaled from their most likely range, with a warning."""
    low, high = _extent(values)
    usual = (1, 255) if values.dtype.kind == "f" else (255, 65535)
    white = next((one for one in usual if low >= 0 and high <= one), None)
    span = (low, high) if white is None else (0, white)
    why = "their minimum and maximum" if white is None else f"0 and {white}"
    warnings.warn(
        f"gray values of type {kind} have no defined range; {why} are used as black and white. "
        "Give 8- or 16-bit images to be sure.",
        PictureWarning,
        stacklevel=2,
    )
    return _scaled(values, span)


def _scaled(values: NDArray[Any], span: tuple[float, float]) -> NDArray[np.uint8]:
    """``values`` scaled from ``span`` to 0 (black) to 255 (white), and rounded."""
    low, high = span
    found = values.astype(np.float64)  # one array for all steps, because it may be large
    found -= low
    found *= 255 / ((high - low) or 1.0)
    np.rint(found.clip(0, 255, out=found), out=found)
    return found.astype(np.uint8)
