"""Scenes of coloured shapes with real handwritten digits on real photographs, and questions.

A scene is a tinted crop of a photograph with two to five objects and a white sign.  Each object is
a coloured shape with one handwritten digit, ten pixels high; the sign shows two such
digits.  Digits are legible in the crops of a model and too small in its thumbnail: "which digit is
on the red square?" needs the crops.  Questions about number, side and direction need the whole
picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from PIL import Image

from tokenprune.models.testbed.asking import DIRECTIONS, ask, ask_clip, ask_pair, relations
from tokenprune.models.testbed.drawing import COLOURS, SHAPES, TINTS, VIEW, Item, Sign, Size, Split
from tokenprune.models.testbed.kinds import (
    GRID_PINPOINTS,
    KINDS,
    MODALITIES,
    SIZES,
    Modality,
    vocabulary,
)
from tokenprune.models.testbed.rendering import (
    FEWEST,
    MOST,
    Clip,
    Pair,
    Scene,
    Track,
    render,
    render_clip,
    render_pair,
)

__all__ = [
    "COLOURS",
    "DIRECTIONS",
    "FEWEST",
    "GRID_PINPOINTS",
    "KINDS",
    "MODALITIES",
    "MOST",
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
    "Sign",
    "Size",
    "Split",
    "Track",
    "ask",
    "ask_clip",
    "ask_pair",
    "questions",
    "quiz",
    "relations",
    "render",
    "render_clip",
    "render_pair",
    "vocabulary",
]


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
        prefix = "" if modality == "image" else f"{modality}-"
        image_id = f"{prefix}{split}-{seed}-{index:05d}"
        shown, asked = quiz(index, seed=seed, split=split, modality=modality)
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


def quiz(
    index: int, *, seed: int, split: Split = "test", modality: Modality = "image"
) -> tuple[Sequence[Scene], list[tuple[str, str]]]:
    """The scenes of the image, clip or pair with number `index`, and a question of each kind."""
    kinds = MODALITIES[modality]
    mark = () if modality == "image" else (get_args(Modality).index(modality),)
    rng = np.random.default_rng([seed, index, split == "test", *mark])
    if modality == "video":
        clip = render_clip(rng, split=split)
        return clip.frames, [ask_clip(clip, kind, rng) for kind in kinds]
    if modality == "multi-image":
        pair = render_pair(rng, split=split)
        return pair.scenes, [ask_pair(pair, kind, rng) for kind in kinds]
    scene = render(rng, split=split, sign=True)
    while not relations(scene):
        scene = render(rng, split=split, sign=True)
    return [scene], [ask(scene, kind, rng) for kind in kinds]
