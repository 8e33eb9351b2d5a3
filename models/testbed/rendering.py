"""Rendering of the testbed's scenes, clips and pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tokenprune.models.testbed.drawing import (
    COLOURS,
    SHAPES,
    TINTS,
    VIEW,
    Item,
    Sign,
    Size,
    Split,
    background,
    digits,
    draw,
    draw_sign,
)
from tokenprune.models.testbed.kinds import SIZES

__all__ = [
    "FEWEST",
    "MOST",
    "Clip",
    "Pair",
    "Scene",
    "Track",
    "render",
    "render_clip",
    "render_pair",
]

FEWEST, MOST = 2, 5  # objects of an image that questions are asked about


@dataclass(frozen=True)
class Scene:
    """A picture and its objects.

    Attributes:
        pixels: (height, width, 3).
        owner: (height, width) index of the item that a pixel belongs to, -1 for the background.
        items: The objects.
        tint: Colour of the background, one of `TINTS`.
        sign: The sign, if there is one.  Its pixels have the index after the last object.
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int8]
    items: tuple[Item, ...]
    tint: str
    sign: Sign | None = None

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


def _arrange(
    rng: np.random.Generator, size: Size, count: int, sign: bool
) -> tuple[list[tuple[int, int]], Sign | None]:
    """Centres of `count` objects, and a sign that touches none of them nor a border of crops."""
    numbers = tuple(int(digit) for digit in rng.integers(10, size=2))
    high, wide = Sign(numbers, 0, 0).half
    offset_y, offset_x = (-side % VIEW // 2 for side in size)
    while True:
        places = _places(rng, size, count)
        if not sign:
            return places, None
        for _ in range(20):
            y = int(rng.integers(round(high), size[0] - round(high)))
            x = int(rng.integers(round(wide), size[1] - round(wide)))
            inside = _inside(y + offset_y, high) and _inside(x + offset_x, wide)
            free = all(abs(x - u) >= wide + 13 or abs(y - v) >= high + 13 for u, v in places)
            if inside and free:
                return places, Sign(numbers, x, y)


def _inside(centre: float, half: float) -> bool:
    """Whether [centre - half, centre + half] lies in one crop."""
    return (centre - half) // VIEW == (centre + half) // VIEW


def render(
    rng: np.random.Generator,
    *,
    split: Split = "train",
    size: Size | None = None,
    items: tuple[int, int] = (FEWEST, MOST),
    alike: bool = False,
    sign: bool = False,
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
        sign: Whether there is a sign.
        named: Objects that must be there, such as ``red square``.
        avoid: Objects that must not be there.
    """
    if size is None:
        size = tuple(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    tint = str(rng.choice(list(TINTS)))
    canvas = background(rng, size, tint, split)
    owner = np.full(size, -1, dtype=np.int8)
    count = max(int(rng.integers(items[0], items[1] + 1)), len(named))
    places, board = _arrange(rng, size, min(count, 4) if alike else count, sign)
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
    if board is not None:
        inks = [digits(split)[digit] for digit in board.digits]
        chosen = [some[rng.integers(len(some))] for some in inks]
        draw_sign(canvas, owner, board, len(drawn), chosen)
    pixels = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return Scene(pixels, owner, tuple(drawn), tint, board)


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
