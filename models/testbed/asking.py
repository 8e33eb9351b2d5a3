"""Questions about scenes, clips and pairs, with their answers."""

from collections.abc import Sequence

import numpy as np

from tokenprune.models.testbed.drawing import COLOURS, SHAPES, Item
from tokenprune.models.testbed.kinds import KINDS, MODALITIES
from tokenprune.models.testbed.rendering import Clip, Pair, Scene

__all__ = ["DIRECTIONS", "ask", "ask_clip", "ask_pair", "relations"]


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
    if kind == "compare":
        one, other = rng.choice(len(scene.items), size=2, replace=False)
        first, second = scene.items[one], scene.items[other]
        question = f"Is the digit on the {first.name} larger than on the {second.name}?"
        return question, "yes" if first.digit > second.digit else "no"
    if kind == "relation":
        known = relations(scene)
        first, direction, second = known[rng.integers(len(known))]
        return f"What is {direction} the {first.name}?", second.name
    if kind == "number" and scene.sign is not None:
        return "Which digits are on the sign?", " ".join(map(str, scene.sign.digits))
    raise _unknown_kind(kind, KINDS)


def relations(scene: Scene) -> list[tuple[Item, str, Item]]:
    """Every object, direction and second object such that the second lies there, and no other.

    It lies in the direction itself: at most 10 pixels to the side, at least 20 along.  No other
    object is as much as 12 pixels further along and at most as far to the side.
    """
    found = []
    for item in scene.items:
        for direction, (right, down) in DIRECTIONS.items():
            there = []
            for other in scene.items:
                dx, dy = other.x - item.x, other.y - item.y
                along, aside = dx * right + dy * down, abs(dx * down) + abs(dy * right)
                if other is not item and along >= 12 and aside <= along:
                    there.append((other, along >= 20 and aside <= 10))
            if len(there) == 1 and there[0][1]:
                found.append((item, direction, there[0][0]))
    return found


DIRECTIONS = {"right of": (1, 0), "left of": (-1, 0), "above": (0, -1), "below": (0, 1)}


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
