"""The cells that meet limits, the best of them, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = [
    "Decision",
    "Limits",
    "decide",
    "frontier",
]


RESAMPLES = 2000


_BLOCK = 2_000_000  # numbers that are drawn at once, to bound the memory


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """What a cell must meet.

    Attributes:
        most: Name of a cost to its largest allowed value; the first one breaks ties of accuracy.
        accuracy: Least accuracy; None without a limit.
        relative: Whether ``accuracy`` is a multiple of the uncompressed model's.
    """

    most: Mapping[str, float]
    accuracy: float | None = None
    relative: bool = False


@dataclass(frozen=True)
class Decision:
    """Which cell to use.

    Attributes:
        pick: Its index; None if no cell meets the limits.
        wins: (cells,) the share of resamples in which each cell is the pick.
        none: The share of resamples in which no cell meets the limits.
    """

    pick: int | None
    wins: Floats
    none: float


def decide(
    answers: Floats,
    images: Sequence[str],
    costs: Mapping[str, Floats],
    limits: Limits,
    *,
    full: int,
    runs: Mapping[str, Sequence[Floats]] | None = None,
    seed: int = 0,
) -> Decision:
    """Choose the most accurate cell within the limits; of equally accurate ones the cheapest.

    If only the accuracy is limited, the cheapest cell is chosen, and of equally cheap ones the most
    accurate.  The choice is repeated for `RESAMPLES` resamples of whole images and, for measured
    times, of timed runs.

    Args:
        answers: (questions, cells) scores in [0, 1].
        images: The image of each question.
        costs: Name to (cells,) costs, in the order in which they break ties.
        limits: The limits.
        full: Index of the uncompressed model.
        runs: Name of a measured cost to the timed runs of each cell; its cost is their median.
        seed: Seed of the resamples.
    """
    pick = _best(answers.mean(axis=0), costs, limits, full)
    codes, _ = pd.factorize(np.asarray(images))
    clusters = int(codes.max()) + 1
    sums = np.zeros((clusters, answers.shape[1]))
    np.add.at(sums, codes, answers)
    sizes = np.bincount(codes)
    generator = np.random.default_rng(seed)
    wins, none = np.zeros(answers.shape[1]), 0
    block = max(1, _BLOCK // clusters)
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        weights = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=count)
        accuracies = (weights @ sums) / (weights @ sizes)[:, None]
        drawn = {name: _medians(some, count, generator) for name, some in (runs or {}).items()}
        for row, accuracy in enumerate(accuracies):
            now = {
                name: drawn[name][row] if name in drawn else cost for name, cost in costs.items()
            }
            found = _best(accuracy, now, limits, full)
            if found is None:
                none += 1
            else:
                wins[found] += 1
    return Decision(pick, wins / RESAMPLES, none / RESAMPLES)


def _medians(runs: Sequence[Floats], count: int, generator: np.random.Generator) -> Floats:
    """(count, cells) medians of resampled runs."""
    return np.stack(
        [np.median(generator.choice(one, size=(count, len(one))), axis=1) for one in runs], axis=1
    )


def _best(accuracy: Floats, costs: Mapping[str, Floats], limits: Limits, full: int) -> int | None:
    meets = np.ones(len(accuracy), dtype=bool)
    for name, most in limits.most.items():
        meets &= costs[name] <= most
    if limits.accuracy is not None:
        least = limits.accuracy * (accuracy[full] if limits.relative else 1.0)
        meets &= accuracy >= least - 1e-12  # a mean of the same answers is rounded differently
    if not meets.any():
        return None
    best = np.round(-accuracy, 12)
    keys = [best, *costs.values()] if limits.most else [*costs.values(), best]
    order = np.lexsort(keys[::-1])
    return int(next(index for index in order if meets[index]))


def frontier(accuracy: Floats, costs: Mapping[str, Floats]) -> NDArray[np.bool_]:
    """(cells,) whether no other cell is at least as good in everything and better in something."""
    values = np.stack([np.round(-accuracy, 12), *costs.values()], axis=1)
    no_worse = (values[:, None] <= values[None]).all(axis=2)
    better = (values[:, None] < values[None]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))
