"""Sizes of the testbed's pictures, kinds of questions, and the words of all questions."""

from collections.abc import Sequence
from typing import Literal

from tokenprune.models.testbed.drawing import COLOURS, SHAPES, TINTS, Size

__all__ = ["GRID_PINPOINTS", "KINDS", "MODALITIES", "SIZES", "Modality", "vocabulary"]

Modality = Literal["image", "video", "multi-image"]

GRID_PINPOINTS: tuple[Size, ...] = ((60, 120), (120, 60), (120, 120), (60, 180), (180, 60))
"""Any-resolution grid, (height, width) in pixels."""

SIZES: dict[Size, float] = {
    (120, 120): 0.60,
    (60, 120): 0.10,
    (120, 60): 0.10,
    (90, 120): 0.10,  # no pinpoint, so that padding is needed
    (60, 180): 0.05,
    (180, 60): 0.05,
}
"""Canvas sizes (height, width) in pixels, and how often each occurs."""

KINDS = (
    "existence",
    "colour",
    "count",
    "position",
    "digit",
    "compare",
    "relation",
    "number",
)
MODALITIES: dict[Modality, tuple[str, ...]] = {
    "image": KINDS,
    "video": ("existence", "digit", "first", "last", "motion"),
    "multi-image": ("existence", "digit", "which", "both"),
}
"""Kinds of questions about each modality."""


def vocabulary(modalities: Sequence[Modality] = ("image",)) -> tuple[str, ...]:
    """Every word of every question and answer, in lower case, punctuation included.

    The words for images come first and in the same order, whatever the modalities.
    """
    words = "is there a ? yes no what colour is the background how many objects are there "
    words += "which digit is on the left or right top or bottom 0 1 2 3 4 5 6 7 8 9"
    more = {
        "image": "larger than of above below sign digits",
        "video": "which digit appeared first last did the move left or right",
        "multi-image": "which image has the first second do both images have a",
    }
    added = [word for modality in modalities for word in more[modality].split()]
    return tuple(dict.fromkeys((*words.split(), *SHAPES, *COLOURS, *TINTS, *added)))
