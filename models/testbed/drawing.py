"""Drawing of the testbed's pictures: photographs, shapes and handwritten digits.

Digits (`sklearn.datasets.load_digits`) are split by sample.  Photographs
(`sklearn.datasets.load_sample_images`) are split by location: the left three quarters are for
training, the right quarter is for tests.
"""

from dataclasses import dataclass
from functools import cache
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
    "Size",
    "Split",
    "background",
    "digits",
    "draw",
]

Split = Literal["train", "test"]
Size = tuple[int, int]

VIEW = 56
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


@cache
def _photographs(split: Split) -> tuple[Image.Image, ...]:
    def part(photograph: NDArray[np.uint8]) -> Image.Image:
        cut = photograph.shape[1] * 3 // 4
        half = photograph[:, :cut] if split == "train" else photograph[:, cut:]
        return Image.fromarray(np.ascontiguousarray(half)).convert("L")

    return tuple(part(photograph) for photograph in load_sample_images().images)


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

    left, top = round(item.x - _DIGIT / 2), round(item.y - _DIGIT / 2)
    ink = np.asarray(digit.resize((_DIGIT, _DIGIT), Image.Resampling.BICUBIC), dtype=np.float64)
    ink = ink[:, :, None] / 255
    box = np.s_[top : top + _DIGIT, left : left + _DIGIT]
    pen = 0.0 if colour @ (0.3, 0.6, 0.1) > 110 else 255.0
    canvas[box] = (1 - ink) * canvas[box] + ink * pen
