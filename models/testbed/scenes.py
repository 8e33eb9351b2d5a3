"""Scenes of coloured shapes with real handwritten digits on real photographs, and questions.

A scene is a tinted crop of a photograph with one to four objects.  Each object is a coloured shape
with one handwritten digit, ten pixels high.  Digits are legible in the crops of a model and too
small in its thumbnail: "which digit is on the red square?" needs the crops.  Questions about number
and side need the whole picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.models.testbed.drawing import (
    COLOURS,
    SHAPES,
    TINTS,
    VIEW,
    Item,
    Size,
    Split,
    background,
    digits,
    draw,
)

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
    "Size",
    "Split",
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

Modality = Literal["image", "video", "multi-image"]

GRID_PINPOINTS: tuple[Size, ...] = ((56, 112), (112, 56), (112, 112), (56, 168), (168, 56))
"""Any-resolution grid, (height, width) in pixels."""

SIZES: dict[Size, float] = {
    (112, 112): 0.60,
    (56, 112): 0.10,
    (112, 56): 0.10,
    (80, 112): 0.10,  # no pinpoint, so that padding is needed
    (56, 168): 0.05,
    (168, 56): 0.05,
}
"""Canvas sizes (height, width) in pixels, and how often each occurs."""

KINDS = ("existence", "colour", "count", "position", "digit")
MODALITIES: dict[Modality, tuple[str, ...]] = {
    "image": KINDS,
    "video": ("existence", "digit", "first", "last", "motion"),
    "multi-image": ("existence", "digit", "which", "both"),
}
"""Kinds of questions about each modality."""

MAX_ITEMS = 4


@dataclass(frozen=True)
class Scene:
    """A picture and its objects.

    Attributes:
        pixels: (height, width, 3).
        owner: (height, width) index of the item that a pixel belongs to, -1 for the background.
        items: The objects.
        tint: Colour of the background, one of `TINTS`.
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
    """An object of a clip, visible from frame `start` to the frame before `stop`.

    Attributes:
        item: The object in its first frame.
        start: First frame.
        stop: First frame in which it is no longer visible.
        dx: Pixels that it moves to the right in every frame.
    """

    item: Item
    start: int
    stop: int
    dx: float = 0.0

    def at(self, frame: int) -> Item:
        """The object in ``frame``, in which it is visible."""
        return replace(self.item, x=self.item.x + self.dx * (frame - self.start))


@dataclass(frozen=True)
class Clip:
    """A video: one `Scene` of one view per frame, and its objects in order of appearance."""

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

    Questions with the same `image_id` are about the same images.  `place` is the centre of the
    object that the question names, (x, y) as shares of width and height; None for other modalities
    and if the image does not show such an object.
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

    The words for images come first and in the same order, whatever the modalities.
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
def _centres(length: int) -> NDArray[np.int64]:
    """Allowed centres of objects along a side of `length` pixels, in steps of four pixels.

    They keep 12 px from the middle, so that the side is unambiguous, and 8 px from the border of
    two crops, so that no digit is cut.
    """
    candidates = np.arange(12, length - 11, 4)
    offset = -length % VIEW // 2  # other lengths than multiples of the view are padded evenly
    to_border = np.abs((candidates + offset + VIEW // 2) % VIEW - VIEW // 2)
    keep = np.abs(candidates - length / 2) >= 12
    if length > VIEW:
        keep &= (to_border >= 8) | (candidates + offset < 8) | (candidates + offset > length - 8)
    places: NDArray[np.int64] = candidates[keep]
    return places


def _places(rng: np.random.Generator, size: Size, count: int) -> list[tuple[int, int]]:
    """`count` centres (x, y) of objects that do not touch."""
    ys, xs = _centres(size[0]), _centres(size[1])
    while True:
        places: list[tuple[int, int]] = []
        for _ in range(8 * count):
            x, y = int(rng.choice(xs)), int(rng.choice(ys))
            if all(max(abs(x - u), abs(y - v)) >= 24 for u, v in places):
                places.append((x, y))
            if len(places) == count:
                return places


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
        rng: Source of all randomness.
        split: Split of the digits and the photographs.
        size: Canvas (height, width) in pixels; None draws one of `SIZES`.
        items: Smallest and largest number of objects, both inclusive.
        alike: Whether objects have only two colours and two shapes, so that most are identified
            only by both.  There are then at most four objects.
        named: Objects that must be there, such as ``red square``.
        avoid: Objects that must not be there.
    """
    if size is None:
        size = tuple(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    tint = str(rng.choice(list(TINTS)))
    canvas = background(rng, size, tint, split)
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
        samples = digits(split)[item.digit]
        draw(canvas, owner, item, index, samples[rng.integers(len(samples))])
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

    Two to four objects appear in different frames and stay for one to four frames.  Exactly one of
    them moves, from one side to the other.
    """
    count = int(rng.integers(4, 9)) if frames is None else frames
    size, tint = (VIEW, VIEW), str(rng.choice(list(TINTS)))
    still = background(rng, size, tint, split)
    tracks = _tracks(rng, count, int(rng.integers(2, min(4, count - 1) + 1)))
    samples = [digits(split)[track.item.digit] for track in tracks]
    inks = [some[rng.integers(len(some))] for some in samples]
    scenes = []
    for frame in range(count):
        canvas = still + rng.normal(0, 3, (VIEW, VIEW, 1))  # camera noise
        owner = np.full(size, -1, dtype=np.int8)
        shown = [i for i, track in enumerate(tracks) if track.start <= frame < track.stop]
        items = tuple(tracks[i].at(frame) for i in shown)
        for index, item in enumerate(items):
            draw(canvas, owner, item, index, inks[shown[index]])
        pixels = np.clip(canvas.round(), 0, 255).astype(np.uint8)
        scenes.append(Scene(pixels, owner, items, tint))
    return Clip(tuple(scenes), tuple(tracks))


def _tracks(rng: np.random.Generator, frames: int, count: int) -> list[Track]:
    """`count` objects in order of appearance that never touch.  One of them moves."""
    pairs = rng.choice(len(SHAPES) * len(COLOURS), size=count, replace=False)
    near, far = (12, 16), (VIEW - 16, VIEW - 12)
    while True:
        # The mover needs three frames, so it cannot appear in the last two.
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

    Half of the pairs share one object.  At least one object is in only one of the scenes.
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

    Half of the names are near misses: their colour and their shape both occur, or, if that is
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
    """`count` questions that cycle through the kinds of the modality, one scene per cycle.

    The first n questions are the same for every `count` >= n.  Answers are balanced: without the
    image, accuracy is about that of chance.
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
    """Centre of the object that `question` names, (x, y) as shares of width and height."""
    height, width = scene.size
    found = [(item.x / width, item.y / height) for item in scene.items if item.name in question]
    return found[0] if found else None


def _quiz(
    rng: np.random.Generator, split: Split, modality: Modality
) -> tuple[Sequence[Scene], list[tuple[str, str]]]:
    """Random scenes of one image, clip or pair, and one question of each kind about them."""
    kinds = MODALITIES[modality]
    if modality == "video":
        clip = render_clip(rng, split=split)
        return clip.frames, [ask_clip(clip, kind, rng) for kind in kinds]
    if modality == "multi-image":
        pair = render_pair(rng, split=split)
        return pair.scenes, [ask_pair(pair, kind, rng) for kind in kinds]
    scene = render(rng, split=split)
    return [scene], [ask(scene, kind, rng) for kind in kinds]
