"""Seeded samples of products of cases that are too many to run all of them every time."""

import itertools
import random
from collections.abc import Iterable
from typing import Any


def drawn(share: float, *axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Some combinations of the ``axes``, the same in every run.

    Every entry of the first axis occurs, each with another sample of the other axes.
    """
    first, *others = (list(axis) for axis in axes)
    found = []
    for index, entry in enumerate(first):
        rest = list(itertools.product(*others))
        for chosen in sorted(
            random.Random(index).sample(range(len(rest)), round(share * len(rest)) or 1)
        ):
            found.append((entry, *rest[chosen]))
    return found
