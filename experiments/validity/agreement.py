"""Kendall's tau-b between rankings, within strata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Stratum",
    "interval",
    "signs",
    "tau_b",
]


_DIGITS = 9  # figures that agree to so many decimals are tied


@dataclass(frozen=True)
class Stratum:
    """A published and a measured ranking of the same methods.

    Attributes:
        source, table: Of the published ranking.
        at: The published retention ratio.
        retention: That of the run.
        methods: m names.
        published: (m,) averages relative to the uncompressed model.
        measured: (m,) accuracies.
        resampled: (b, m) accuracies on b resamples of the run's images.
    """

    source: str
    table: str
    at: float
    retention: float
    methods: tuple[str, ...]
    published: NDArray[np.float64]
    measured: NDArray[np.float64]
    resampled: NDArray[np.float64]


def signs(values: ArrayLike) -> NDArray[np.float64]:
    """(..., p) signs of the differences of all pairs i < j of ``values`` (..., m), row by row."""
    rounded = np.round(np.asarray(values, dtype=float), _DIGITS)
    first, second = np.triu_indices(rounded.shape[-1], 1)
    found: NDArray[np.float64] = np.sign(rounded[..., first] - rounded[..., second])
    return found


def tau_b(
    first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Kendall's tau-b, where only methods of one stratum are pairs.

    Concordant minus discordant pairs, divided by the geometric mean of the numbers of pairs that
    are not tied in the one and in the other ranking; every number is a sum over the strata.  With
    one stratum it is `scipy.stats.kendalltau`.  NaN if all pairs of a ranking are tied.

    Args:
        first, second: The `signs` (..., p) of every stratum; leading dimensions, such as resamples,
            are kept.
    """
    together = sum((one * other).sum(-1) for one, other in zip(first, second, strict=True))
    untied = [sum(np.abs(one).sum(-1) for one in side) for side in (first, second)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(together / np.sqrt(untied[0] * untied[1]))


def interval(values: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """The percentile interval of resampled values (b,).

    A resample in which all methods are tied, where tau-b is NaN, counts as 0.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.nan_to_num(values), [tail, 1 - tail])
    return float(low), float(high)
