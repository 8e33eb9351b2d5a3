"""Drawing of the testbed's pictures: photographs, shapes, signs and handwritten digits.

Digits (`sklearn.datasets.load_digits`) are split by sample.  Photographs
(`sklearn.datasets.load_sample_images`) are split by location: the left three quarters are for
training, the right quarter is for tests.  If scikit-image is installed, training also uses the
photographs that it ships.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

__all__ = [
    "COLOURS",
    "SHAPES",
    "TINTS",
    "VIEW",
    "Item",
    "Sign",
    "Size",
    "Split",
    "background",
    "check_photographs",
    "digits",
    "draw",
    "draw_sign",
]

Split = Literal["train", "test"]
Size = tuple[int, int]

VIEW = 60
"""Side of a view (thumbnail or crop) in pixels."""

SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (40, 185, 60),
    "blue": (55, 85, 240),
    "yellow": (245, 225, 45),
    "purple": (175, 50, 205),
    "cyan": (60, 215, 225),
}
TINTS: dict[str, tuple[int, int, int]] = {
    "gray": (120, 120, 120),
    "brown": (115, 70, 35),
    "pink": (225, 150, 170),
    "navy": (25, 30, 85),
    "olive": (105, 110, 40),
    "orange": (225, 130, 50),
}

_DIGIT = 10  # side of a digit in pixels
_PITCH = 9  # distance of the digits of a sign in pixels
_REACH = 16  # half the side of the window in which an object is drawn, in pixels


@dataclass(frozen=True)
class Item:
    """One object: a shape in a colour with a digit, centred at (x, y) pixels."""

    shape: str
    colour: str
    digit: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A white sign with digits, centred at (x, y) pixels."""

    digits: tuple[int, ...]
    x: float
    y: float

    @property
    def half(self) -> tuple[float, float]:
        """Half its height and half its width in pixels."""
        return _PITCH / 2 + 2, len(self.digits) * _PITCH / 2 + 2

    def places(self) -> list[tuple[int, float, float]]:
        """Its digits and their centres (x, y) in pixels."""
        first = self.x - self.half[1] + 2 + _PITCH / 2
        return [(digit, first + i * _PITCH, self.y) for i, digit in enumerate(self.digits)]


# Photographs of scikit-image that show textures, things or people, in their own right.
_MORE = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "ihc",
    "moon",
    "motorcycle_left",
)


def check_photographs() -> None:
    """Raise unless the photographs behind training scenes are installed."""
    if not _more_photographs():
        raise ModuleNotFoundError(
            "training scenes have photographs of scikit-image as backgrounds, which is not "
            "installed; pip install 'tokenprune[training]'.",
            name="skimage",
        )


@cache
def _more_photographs() -> tuple[Image.Image, ...]:
    """Photographs that scikit-image ships, in gray; none if it is not installed."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent / "data"
    return tuple(Image.open(folder / f"{name}.png").convert("L") for name in _MORE)


@cache
def _photographs(split: Split) -> tuple[Image.Image, ...]:
    def part(photograph: NDArray[np.uint8]) -> Image.Image:
        cut = photograph.shape[1] * 3 // 4
        half = photograph[:, :cut] if split == "train" else photograph[:, cut:]
        return Image.fromarray(np.ascontiguousarray(half)).convert("L")

    own = tuple(part(photograph) for photograph in load_sample_images().images)
    return own if split == "test" else own + _more_photographs()


@cache
def digits(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    """Handwritten digits by class, as 8 x 8 gray pictures.  Every fourth sample is for tests."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[::4] if split == "test" else np.delete(order, np.s_[::4])
    pictures = (data.images * 255 / 16).astype(np.uint8)
    return tuple(
        tuple(Image.fromarray(pictures[i]) for i in chosen if data.target[i] == digit)
        for digit in range(10)
    )


def _coverage(
    shape: str, radius: float, dx: NDArray[np.float64], dy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share of each pixel that a shape covers, from the signed distance to its outline."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    elif shape == "diamond":
        distance = (np.abs(dx) + np.abs(dy)) / np.sqrt(2) - 0.85 * radius
    else:  # an upright triangle; its base is about two thirds of the radius below its centre
        sides = (np.abs(dx) * np.sqrt(3) - dy) / 2 - 0.72 * radius
        distance = np.maximum(dy - 0.68 * radius, sides)
    cover: NDArray[np.float64] = np.clip(0.5 - distance, 0, 1)
    return cover


def background(
    rng: np.random.Generator, size: Size, tint: str, split: Split
) -> NDArray[np.float64]:
    """A crop of a photograph in shades of `tint`, (height, width, 3) from 0 to 255 and above."""
    photographs = _photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    limit = min(photograph.width / size[1], photograph.height / size[0])
    zoom = min(limit, rng.uniform(1.0, 2.0))
    width, height = int(size[1] * zoom), int(size[0] * zoom)
    left = int(rng.integers(photograph.width - width + 1))
    top = int(rng.integers(photograph.height - height + 1))
    crop = photograph.resize(
        (size[1], size[0]), Image.Resampling.BILINEAR, (left, top, left + width, top + height)
    )
    light = 0.6 + 0.7 * np.asarray(crop, dtype=np.float64)[:, :, None] / 255
    tinted: NDArray[np.float64] = light * np.array(TINTS[tint])
    return tinted


def draw(
    canvas: NDArray[np.float64],
    owner: NDArray[np.int8],
    item: Item,
    index: int,
    digit: Image.Image,
) -> None:
    """Draw `item` into `canvas` and enter its `index` into `owner`, both in place."""
    height, width = owner.shape
    window = np.s_[
        max(0, int(item.y) - _REACH) : min(height, int(item.y) + _REACH),
        max(0, int(item.x) - _REACH) : min(width, int(item.x) + _REACH),
    ]
    ys = np.arange(window[0].start, window[0].stop) + 0.5 - item.y
    xs = np.arange(window[1].start, window[1].stop) + 0.5 - item.x
    cover = _coverage(item.shape, item.radius, xs[None, :], ys[:, None])[:, :, None]
    colour = np.array(COLOURS[item.colour], dtype=np.float64)
    canvas[window] = (1 - cover) * canvas[window] + cover * colour
    owner[window][cover[:, :, 0] >= 0.5] = index

    pen = 0.0 if colour @ (0.3, 0.6, 0.1) > 110 else 255.0
    _write(canvas, digit, item.x, item.y, pen)


def draw_sign(
    canvas: NDArray[np.float64],
    owner: NDArray[np.int8],
    sign: Sign,
    index: int,
    pictures: Sequence[Image.Image],
) -> None:
    """Draw `sign` with `pictures` of its digits, and enter its `index` into `owner`, in place."""
    high, wide = sign.half
    box = np.s_[
        round(sign.y - high) : round(sign.y + high), round(sign.x - wide) : round(sign.x + wide)
    ]
    canvas[box] = 245.0
    owner[box] = index
    for (_, x, y), picture in zip(sign.places(), pictures, strict=True):
        _write(canvas, picture, x, y, 0.0)


def _write(canvas: NDArray[np.float64], digit: Image.Image, x: float, y: float, pen: float) -> None:
    """Write a digit, centred at (x, y), with a pen of one gray."""
    left, top = round(x - _DIGIT / 2), round(y - _DIGIT / 2)
    ink = np.asarray(digit.resize((_DIGIT, _DIGIT), Image.Resampling.BICUBIC), dtype=np.float64)
    ink = ink[:, :, None] / 255
    box = np.s_[top : top + _DIGIT, left : left + _DIGIT]
    canvas[box] = (1 - ink) * canvas[box] + ink * pen
