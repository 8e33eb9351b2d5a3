"""Scenes of coloured shapes with real handwritten digits on real photographs, and questions.

A scene is a tinted crop of a photograph with one to four objects; each object is a shape in a
colour that carries one handwritten digit, ten pixels high.  Digits are legible in the crops of an
any-resolution vision-language model but too small in its thumbnail, so that "which digit is on the
red square?" needs the crops, while the whole picture is needed to count and to tell sides.

Digits (`sklearn.datasets.load_digits`) are split by sample, photographs
(`sklearn.datasets.load_sample_images`) by place: left three quarters train, right quarter test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

__all__ = [
    "COLOURS",
    "GRID_PINPOINTS",
    "KINDS",
    "MODALITIES",
    "SHAPES",
    "SIZES",
    "TINTS",
    "VIEW",
    "Clip",
    "Item",
    "Modality",
    "Pair",
    "Scene",
    "SceneQuestion",
    "Track",
    "ask",
    "ask_clip",
    "ask_pair",
    "questions",
    "render",
    "render_clip",
    "render_pair",
    "vocabulary",
]

Split = Literal["train", "test"]
Modality = Literal["image", "video", "multi-image"]
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
MODALITIES: dict[Modality, tuple[str, ...]] = {
    "image": KINDS,
    "video": ("existence", "digit", "first", "last", "motion"),
    "multi-image": ("existence", "digit", "which", "both"),
}
"""Kinds of questions about each modality."""
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
class Track:
    """An object of a clip: visible from frame `start` up to `stop`, which it is gone in.

    `item` is where it starts; every frame it moves by `dx` pixels to the right.
    """

    item: Item
    start: int
    stop: int
    dx: float = 0.0

    def at(self, frame: int) -> Item:
        """The object as it is in a frame in which it is visible."""
        return replace(self.item, x=self.item.x + self.dx * (frame - self.start))


@dataclass(frozen=True)
class Clip:
    """A video: one `Scene` of one view a frame, and its objects in order of appearance."""

    frames: tuple[Scene, ...]
    tracks: tuple[Track, ...]


@dataclass(frozen=True)
class Pair:
    """Two scenes of one view; `shared` names an object that both have, or is empty."""

    scenes: tuple[Scene, Scene]
    shared: str


@dataclass(frozen=True)
class SceneQuestion:
    """A question with a one-word answer about an image, two images or the frames of a video.

    Questions may share what they are about, which `image_id` names.  `place` is where the object
    that an image's question names is centred, (x, y) as shares of width and height; None where it
    names none that is there.
    """

    id: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str
    image_id: str
    modality: Modality = "image"
    place: tuple[float, float] | None = None

    @property
    def image(self) -> Image.Image:
        """The image, or the first one."""
        return self.images[0]


def vocabulary(modalities: Sequence[Modality] = ("image",)) -> tuple[str, ...]:
    """Every word of every question and answer, in lower case, punctuation included.

    The words of images come first and in the same order, whatever else is asked for.
    """
    words = "is there a ? yes no what colour is the background how many objects are there "
    words += "which digit is on the left or right top or bottom 0 1 2 3 4 5 6 7 8 9"
    more = {
        "image": "",
        "video": "which digit appeared first last did the move left or right",
        "multi-image": "which image has the first second do both images have a",
    }
    added = [word for modality in modalities for word in more[modality].split()]
    return tuple(dict.fromkeys((*words.split(), *SHAPES, *COLOURS, *TINTS, *added)))


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
    named: Sequence[str] = (),
    avoid: Sequence[str] = (),
) -> Scene:
    """Draw a random scene.

    Args:
        rng: where all randomness comes from.
        split: which digits and which part of the photographs to draw from.
        size: canvas (height, width) in pixels; drawn from `SIZES` if not given.
        items: least and largest number of objects, both possible.
        alike: at most four objects, of two colours and two shapes, so that most can only be told
            apart by both.
        named: objects that must be there, such as ``red square``.
        avoid: objects that must not be there.
    """
    if size is None:
        size = tuple(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    tint = str(rng.choice(list(TINTS)))
    canvas = _background(rng, size, tint, split)
    owner = np.full(size, -1, dtype=np.int8)
    places = _places(rng, size, max(int(rng.integers(items[0], items[1] + 1)), len(named)))
    pool = np.arange(len(SHAPES) * len(COLOURS)).reshape(len(COLOURS), len(SHAPES))
    if alike:
        pool = pool[rng.permutation(len(COLOURS))[:2]][:, rng.permutation(len(SHAPES))[:2]]
    fixed = [_pair(name) for name in named]
    barred = [*fixed, *map(_pair, avoid)]
    free = pool.flatten() if not barred else np.setdiff1d(pool.flatten(), barred)
    pairs = [*fixed, *rng.choice(free, size=len(places) - len(fixed), replace=False)]
    drawn = []
    for index, ((x, y), pair) in enumerate(zip(places, pairs, strict=True)):
        item = _item(rng, pair, x, y)
        samples = _digits(split)[item.digit]
        _draw(canvas, owner, item, index, samples[rng.integers(len(samples))])
        drawn.append(item)
    pixels = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return Scene(pixels, owner, tuple(drawn), tint)


def _pair(name: str) -> int:
    """Number of a colour and shape, as in ``red square``."""
    colour, shape = name.split()
    return list(COLOURS).index(colour) * len(SHAPES) + SHAPES.index(shape)


def _item(rng: np.random.Generator, pair: int, x: int, y: int) -> Item:
    """An object of a colour and shape, with any digit, near (x, y)."""
    jitter = rng.uniform(-0.5, 0.5, size=2)
    return Item(
        shape=SHAPES[pair % len(SHAPES)],
        colour=list(COLOURS)[pair // len(SHAPES)],
        digit=int(rng.integers(10)),
        x=x + float(jitter[0]),
        y=y + float(jitter[1]),
        radius=float(rng.uniform(10.5, 12.5)),
    )


def render_clip(
    rng: np.random.Generator, *, split: Split = "train", frames: int | None = None
) -> Clip:
    """Draw a random clip of `frames` frames, four to eight if not given.

    Two to four objects appear in different frames and stay for one to four; exactly one of them
    moves, from one side to the other.
    """
    count = int(rng.integers(4, 9)) if frames is None else frames
    size, tint = (VIEW, VIEW), str(rng.choice(list(TINTS)))
    background = _background(rng, size, tint, split)
    tracks = _tracks(rng, count, int(rng.integers(2, min(4, count - 1) + 1)))
    samples = [_digits(split)[track.item.digit] for track in tracks]
    inks = [some[rng.integers(len(some))] for some in samples]
    scenes = []
    for frame in range(count):
        canvas = background + rng.normal(0, 3, (VIEW, VIEW, 1))  # a camera is never quite still
        owner = np.full(size, -1, dtype=np.int8)
        shown = [i for i, track in enumerate(tracks) if track.start <= frame < track.stop]
        items = tuple(tracks[i].at(frame) for i in shown)
        for index, item in enumerate(items):
            _draw(canvas, owner, item, index, inks[shown[index]])
        pixels = np.clip(canvas.round(), 0, 255).astype(np.uint8)
        scenes.append(Scene(pixels, owner, items, tint))
    return Clip(tuple(scenes), tuple(tracks))


def _tracks(rng: np.random.Generator, frames: int, count: int) -> list[Track]:
    """`count` objects in order of appearance that never touch; one of them moves."""
    pairs = rng.choice(len(SHAPES) * len(COLOURS), size=count, replace=False)
    near, far = (12, 16), (VIEW - 16, VIEW - 12)
    while True:
        # The mover needs three frames, so it must not be the last to come in the last two.
        starts = np.sort(rng.choice(frames, size=count, replace=False))
        movers = np.flatnonzero(starts <= frames - 3)
        if not len(movers):
            continue
        mover = int(rng.choice(movers))
        stays = rng.integers(1, 5, size=count)
        stays[mover] = rng.integers(3, 5)
        stops = np.minimum(starts + stays, frames)
        tracks, taken = [], []
        for index in range(count):
            right, low = bool(rng.integers(2)), bool(rng.integers(2))
            x = int(rng.choice(far if right else near))
            y = int(rng.choice(far if low else near))
            cells = {(low, right)}
            dx = 0.0
            if index == mover:
                cells = {(low, False), (low, True)}
                end = int(rng.choice(near if right else far))
                dx = (end - x) / float(stops[index] - starts[index] - 1)
            interval = range(int(starts[index]), int(stops[index]))
            taken.append({(frame, cell) for frame in interval for cell in cells})
            item = _item(rng, int(pairs[index]), x, y)
            tracks.append(Track(item, int(starts[index]), int(stops[index]), dx))
        if len(set().union(*taken)) == sum(map(len, taken)):
            return tracks


def render_pair(rng: np.random.Generator, *, split: Split = "train") -> Pair:
    """Draw two random scenes of one view with one to three objects each.

    Half of the time they share one, and there is always one that only one of them has.
    """
    size = (VIEW, VIEW)
    first = render(rng, split=split, size=size, items=(1, 3))
    names = [item.name for item in first.items]
    shared = names[rng.integers(len(names))] if rng.integers(2) else ""
    fewest = 2 if shared and len(names) == 1 else 1
    second = render(
        rng,
        split=split,
        size=size,
        items=(fewest, 3),
        named=[shared] if shared else [],
        avoid=[name for name in names if name != shared],
    )
    scenes = (first, second) if rng.integers(2) else (second, first)
    return Pair(scenes, shared)


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
    raise _unknown_kind(kind, KINDS)


def ask_clip(clip: Clip, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A random question of `kind` about `clip`, and its answer."""
    names = [track.item.name for track in clip.tracks]
    index = int(rng.integers(len(names)))
    if kind == "existence":
        if rng.integers(2):
            return f"Is there a {names[index]}?", "yes"
        return f"Is there a {_absent_name(names, rng)}?", "no"
    if kind == "digit":
        return f"Which digit is on the {names[index]}?", str(clip.tracks[index].item.digit)
    if kind in ("first", "last"):
        track = clip.tracks[0 if kind == "first" else -1]
        return f"Which digit appeared {kind}?", str(track.item.digit)
    if kind == "motion":
        mover = next(track for track in clip.tracks if track.dx)
        answer = "right" if mover.dx > 0 else "left"
        return f"Did the {mover.item.name} move left or right?", answer
    raise _unknown_kind(kind, MODALITIES["video"])


def ask_pair(pair: Pair, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    """A random question of `kind` about `pair`, and its answer."""
    owners = [
        (item, index)
        for index, scene in enumerate(pair.scenes)
        for item in scene.items
        if item.name != pair.shared
    ]
    item, owner = owners[rng.integers(len(owners))]
    if kind == "existence":
        if rng.integers(2):
            return f"Is there a {item.name}?", "yes"
        names = [thing.name for scene in pair.scenes for thing in scene.items]
        return f"Is there a {_absent_name(names, rng)}?", "no"
    if kind == "digit":
        return f"Which digit is on the {item.name}?", str(item.digit)
    if kind == "which":
        return f"Which image has the {item.name}?", ("first", "second")[owner]
    if kind == "both":
        name, answer = (pair.shared, "yes") if pair.shared else (item.name, "no")
        return f"Do both images have a {name}?", answer
    raise _unknown_kind(kind, MODALITIES["multi-image"])


def _unknown_kind(kind: str, known: Sequence[str]) -> ValueError:
    return ValueError(f"no kind of question is called {kind!r}; known: {', '.join(known)}.")


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    """The name of an object that is not in the scene."""
    return _absent_name([item.name for item in scene.items], rng)


def _absent_name(names: Sequence[str], rng: np.random.Generator) -> str:
    """The name of an object that is not among `names`.

    Half of the time it is a near miss: its colour and its shape both occur, or, where that is
    impossible, one of them does.
    """
    present = set(names)
    colours = {name.split()[0] for name in names}
    shapes = {name.split()[1] for name in names}
    rivals = [(c, s) for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
    if rng.integers(2):
        both: Sequence[tuple[str, str]] = [p for p in rivals if p[0] in colours and p[1] in shapes]
        rivals = list(both) or [p for p in rivals if p[0] in colours or p[1] in shapes]
    return " ".join(rivals[rng.integers(len(rivals))])


def questions(
    count: int, *, seed: int, split: Split = "test", modality: Modality = "image"
) -> list[SceneQuestion]:
    """`count` questions, every kind of the modality in turn; one of each kind shares a scene.

    The first n questions are the same for every `count` >= n.  Answers are balanced: an answer
    given without the image is right about as often as by chance.
    """
    if modality not in MODALITIES:
        raise ValueError(f"no modality is called {modality!r}; known: {', '.join(MODALITIES)}.")
    kinds = MODALITIES[modality]
    result: list[SceneQuestion] = []
    for index in range(-(-count // len(kinds))):
        mark = () if modality == "image" else (get_args(Modality).index(modality),)
        rng = np.random.default_rng([seed, index, split == "test", *mark])
        prefix = "" if modality == "image" else f"{modality}-"
        image_id = f"{prefix}{split}-{seed}-{index:05d}"
        shown, asked = _quiz(rng, split, modality)
        images = tuple(Image.fromarray(scene.pixels) for scene in shown)
        for kind, (question, answer) in zip(kinds, asked, strict=True):
            identity = f"{image_id}-{kind}"
            place = _place(shown[0], question) if modality == "image" else None
            result.append(
                SceneQuestion(identity, images, question, answer, kind, image_id, modality, place)
            )
    return result[:count]


def _place(scene: Scene, question: str) -> tuple[float, float] | None:
    """Where the object that `question` names is centred, (x, y) as shares of width and height."""
    height, width = scene.size
    found = [(item.x / width, item.y / height) for item in scene.items if item.name in question]
    return found[0] if found else None


def _quiz(
    rng: np.random.Generator, split: Split, modality: Modality
) -> tuple[Sequence[Scene], list[tuple[str, str]]]:
    """Something random of the modality, as scenes, and one question of each kind about it."""
    kinds = MODALITIES[modality]
    if modality == "video":
        clip = render_clip(rng, split=split)
        return clip.frames, [ask_clip(clip, kind, rng) for kind in kinds]
    if modality == "multi-image":
        pair = render_pair(rng, split=split)
        return pair.scenes, [ask_pair(pair, kind, rng) for kind in kinds]
    scene = render(rng, split=split)
    return [scene], [ask(scene, kind, rng) for kind in kinds]
