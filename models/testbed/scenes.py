"""Scenes of coloured shapes with real handwritten digits on real photographs, and questions.

A scene is a tinted crop of a photograph with one to four objects; each object is a shape in a
colour that carries one handwritten digit, ten pixels high.  Digits are legible in the crops of an
any-resolution vision-language model but too small in its thumbnail, so that "which digit is on the
red square?" needs the crops, while the whole picture is needed to count and to tell sides.

Digits (`sklearn.datasets.load_digits`) are split by sample, photographs
(`sklearn.datasets.load_sample_images`) by place: left three quarters train, right quarter test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

__all__ = [
    "COLOURS",
    "GRID_PINPOINTS",
    "KINDS",
    "SHAPES",
    "SIZES",
    "TINTS",
    "VIEW",
    "Item",
    "Question",
    "Scene",
    "ask",
    "questions",
    "render",
    "vocabulary",
]

Split = Literal["train", "test"]
Size = tuple[int, int]

VIEW = 56
"""Side of a view (thumbnail or crop) in pixels."""

GRID_PINPOINTS: tuple[Size, ...] = ((56, 112), (112, 56), (112, 112), (56, 168), (168, 56))
"""Any-resolution grid, (height, width) in pixels."""

SIZES: dict[Size, float] = {
    (112, 112): 0.60,
    (56, 112): 0.10,
    (112, 56): 0.10,
    (80, 112): 0.10,  # no pinpoint: exercises padding and unpadding
    (56, 168): 0.05,
    (168, 56): 0.05,
}
"""Canvas sizes (height, width) in pixels, and how often each occurs."""

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

KINDS = ("existence", "colour", "count", "position", "digit")
MAX_ITEMS = 4
_DIGIT = 10  # side of a digit in pixels
_REACH = 16  # half side of the window an object is drawn into, in pixels


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
class Scene:
    """A picture, (height, width, 3) uint8, and what is in it.

    `owner` (height, width) int8 tells which item a pixel belongs to, -1 for the background.
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]
    items: tuple[Item, ...]
    tint: str

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Question:
    """A question about an image with a one-word answer; questions may share an image."""

    id: str
    image: Image.Image
    question: str
    answer: str
    kind: str
    image_id: str


def vocabulary() -> tuple[str, ...]:
    """Every word of every question and answer, in lower case, punctuation included."""
    words = "is there a ? yes no what colour is the background how many objects are there "
    words += "which digit is on the left or right top or bottom 0 1 2 3 4 5 6 7 8 9"
    return tuple(dict.fromkeys((*words.split(), *SHAPES, *COLOURS, *TINTS)))


# --- pictures -------------------------------------------------------------------------------------


@cache
def _photographs(split: Split) -> tuple[Image.Image, ...]:
    def part(photograph: NDArray[np.uint8]) -> Image.Image:
        cut = photograph.shape[1] * 3 // 4
        half = photograph[:, :cut] if split == "train" else photograph[:, cut:]
        return Image.fromarray(np.ascontiguousarray(half)).convert("L")

    return tuple(part(photograph) for photograph in load_sample_images().images)


@cache
def _digits(split: Split) -> tuple[tuple[Image.Image, ...], ...]:
    """Handwritten digits by class, 8 x 8 gray pictures: every fourth sample is for tests."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[::4] if split == "test" else np.delete(order, np.s_[::4])
    pictures = (data.images * 255 / 16).astype(np.uint8)
    return tuple(
        tuple(Image.fromarray(pictures[i]) for i in chosen if data.target[i] == digit)
        for digit in range(10)
    )


@cache
def _centres(length: int) -> NDArray[np.int64]:
    """Where centres may lie along a side of `length` pixels, a multiple of four pixels.

    They keep 12 px from the middle, so that the side is never in doubt, and 8 px from the border
    of two crops, so that no digit is cut in two.
    """
    candidates = np.arange(12, length - 11, 4)
    offset = -length % VIEW // 2  # a canvas that is no multiple of the view is padded evenly
    to_border = np.abs((candidates + offset + VIEW // 2) % VIEW - VIEW // 2)
    keep = np.abs(candidates - length / 2) >= 12
    if length > VIEW:
        keep &= (to_border >= 8) | (candidates + offset < 8) | (candidates + offset > length - 8)
    places: NDArray[np.int64] = candidates[keep]
    return places


def _places(rng: np.random.Generator, size: Size, count: int) -> list[tuple[int, int]]:
    """`count` centres (x, y) whose objects do not touch."""
    ys, xs = _centres(size[0]), _centres(size[1])
    while True:
        places: list[tuple[int, int]] = []
        for _ in range(8 * count):
            x, y = int(rng.choice(xs)), int(rng.choice(ys))
            if all(max(abs(x - u), abs(y - v)) >= 24 for u, v in places):
                places.append((x, y))
            if len(places) == count:
                return places


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
    else:  # an upright triangle, as far below its centre as two thirds of the radius
        sides = (np.abs(dx) * np.sqrt(3) - dy) / 2 - 0.72 * radius
        distance = np.maximum(dy - 0.68 * radius, sides)
    cover: NDArray[np.float64] = np.clip(0.5 - distance, 0, 1)
    return cover


def _background(
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
    background: NDArray[np.float64] = light * np.array(TINTS[tint])
    return background


def render(
    rng: np.random.Generator,
    *,
    split: Split = "train",
    size: Size | None = None,
    items: tuple[int, int] = (1, MAX_ITEMS),
    alike: bool = False,
) -> Scene:
    """Draw a random scene.

    Args:
        rng: where all randomness comes from.
        split: which digits and which part of the photographs to draw from.
        size: canvas (height, width) in pixels; drawn from `SIZES` if not given.
        items: least and largest number of objects, both possible.
        alike: at most four objects, of two colours and two shapes, so that most can only be told
            apart by both.
    """
    if size is None:
        size = tuple(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    tint = str(rng.choice(list(TINTS)))
    canvas = _background(rng, size, tint, split)
    owner = np.full(size, -1, dtype=np.int8)
    places = _places(rng, size, int(rng.integers(items[0], items[1] + 1)))
    pool = np.arange(len(SHAPES) * len(COLOURS)).reshape(len(COLOURS), len(SHAPES))
    if alike:
        pool = pool[rng.permutation(len(COLOURS))[:2]][:, rng.permutation(len(SHAPES))[:2]]
    pairs = rng.choice(pool.flatten(), size=len(places), replace=False)
    drawn = []
    for index, ((x, y), pair) in enumerate(zip(places, pairs, strict=True)):
        jitter = rng.uniform(-0.5, 0.5, size=2)
        item = Item(
            shape=SHAPES[pair % len(SHAPES)],
            colour=list(COLOURS)[pair // len(SHAPES)],
            digit=int(rng.integers(10)),
            x=x + float(jitter[0]),
            y=y + float(jitter[1]),
            radius=float(rng.uniform(10.5, 12.5)),
        )
        samples = _digits(split)[item.digit]
        _draw(canvas, owner, item, index, samples[rng.integers(len(samples))])
        drawn.append(item)
    pixels = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return Scene(pixels, owner, tuple(drawn), tint)


def _draw(
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


# --- questions ------------------------------------------------------------------------------------


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A random question of `kind` about `scene`, and its answer."""
    item = scene.items[rng.integers(len(scene.items))]
    if kind == "existence":
        present = bool(rng.integers(2))
        name = item.name if present else _absent(scene, rng)
        return f"Is there a {name}?", "yes" if present else "no"
    if kind == "colour":
        return "What colour is the background?", scene.tint
    if kind == "count":
        return "How many objects are there?", str(len(scene.items))
    if kind == "digit":
        return f"Which digit is on the {item.name}?", str(item.digit)
    if kind == "position":
        height, width = scene.size
        if rng.integers(2):
            answer = "left" if item.x < width / 2 else "right"
            return f"Is the {item.name} left or right?", answer
        answer = "top" if item.y < height / 2 else "bottom"
        return f"Is the {item.name} top or bottom?", answer
    raise ValueError(f"no kind of question is called {kind!r}; known: {', '.join(KINDS)}.")


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """The name of an object that is not in the scene.

    Half of the time it is a near miss: its colour and its shape both occur, or, where that is
    impossible, one of them does.
    """
    present = {item.name for item in scene.items}
    colours = {item.colour for item in scene.items}
    shapes = {item.shape for item in scene.items}
    rivals = [(c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
    if rng.integers(2):
        both: Sequence[tuple[str, str]] = [p for p in rivals if p[0] in colours and p[1] in shapes]
        rivals = list(both) or [p for p in rivals if p[0] in colours or p[1] in shapes]
    return " ".join(rivals[rng.integers(len(rivals))])


def questions(count: int, *, seed: int, split: Split = "test") -> list[Question]:
    """`count` questions, every kind in turn; five consecutive ones share a scene.

    The first n questions are the same for every `count` >= n.  Answers are balanced: an answer
    given without the image is right about as often as by chance.
    """
    result: list[Question] = []
    for index in range(-(-count // len(KINDS))):
        rng = np.random.default_rng([seed, index, split == "test"])
        scene = render(rng, split=split)
        image, image_id = Image.fromarray(scene.pixels), f"{split}-{seed}-{index:05d}"
        for kind in KINDS:
            question, answer = ask(scene, kind, rng)
            identity = f"{image_id}-{kind}"
            result.append(Question(identity, image, question, answer, kind, image_id))
    return result[:count]
