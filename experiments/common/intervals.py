"""Confidence intervals of mean scores, and paired differences on the same questions."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

__all__ = [
    "Interval",
    "bootstrap_ratio",
    "holm",
    "is_binary",
    "mcnemar",
    "mean_score",
    "paired_bootstrap",
    "permutation",
    "wilson",
    "wilson_around",
]


_BLOCK = 2_000_000  # indices of clusters that are drawn at once, to bound the memory
_MOST = 32_000_000  # indices that are cached for the next method, at two bytes each, seldom four
_PART = 64_000
_EQUAL = 1e-9  # sums of scores such as 1/3 differ by rounding


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


@lru_cache(maxsize=4096)
def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; unlike Wald's, it is right near 0 and 1."""
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Exact two-sided p-value of McNemar's test.

    Args:
        first, second: (n,) whether each of two methods is right on the same n questions.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_one, only_other = int((one & ~other).sum()), int((other & ~one).sum())
    discordant = only_one + only_other
    return _even(only_one, discordant) if discordant else 1.0


@lru_cache(maxsize=4096)
def _even(heads: int, tosses: int) -> float:
    """Exact two-sided p-value of a sign test."""
    return float(binomtest(heads, tosses).pvalue)


def paired_bootstrap(
    difference: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    resamples: int = 4000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the mean of paired differences, whole clusters resampled.

    Answers to questions about one image are correlated; resampling them one by one would give too
    narrow an interval.

    Args:
        difference: (n,) per question, e.g. right with the one method minus right with the other.
        clusters: (n,) the cluster of each question, e.g. its image.
        seed: Seed of the generator; the same seed gives the same interval.
    """
    ones = np.ones(np.shape(difference))
    return bootstrap_ratio(
        difference, ones, clusters, seed=seed, resamples=resamples, confidence=confidence
    )


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    resamples: int = 4000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a ratio of sums; whole clusters are resampled, both sums together.

    Resamples whose denominator is 0 do not count.

    Args:
        numerator, denominator: (n,) per question, e.g. whether the answer from a part of the image
            is correct, and whether that from the whole image is.
        clusters: As in `paired_bootstrap`.
        seed: As in `paired_bootstrap`.
    """
    codes, _ = pd.factorize(np.asarray(clusters))
    sums, sizes = (
        np.bincount(codes, np.asarray(values, dtype=float)) for values in (numerator, denominator)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        # Methods of a comparison answer the same questions: their denominators are equal.
        ratios = _sums(sums, resamples, seed) / _equal_sums(sizes.tobytes(), resamples, seed)
    ratios = ratios[np.isfinite(ratios)]
    if not len(ratios):
        return Interval(np.nan, np.nan)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(low), float(high))


@lru_cache(maxsize=64)
def _equal_sums(values: bytes, resamples: int, seed: int) -> NDArray[np.float64]:
    return _sums(np.frombuffer(values), resamples, seed)


def _sums(values: NDArray[Any], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resamples,) sums over the clusters that each resample draws; ``values`` (clusters,)."""
    blocks = _resampled(len(values), resamples, seed)
    return np.concatenate([np.take(values, drawn, mode="clip").sum(1) for drawn in blocks])


def _resampled(clusters: int, resamples: int, seed: int) -> Iterator[NDArray[Any]]:
    """(block, clusters) indices of the clusters in each resample, block by block."""
    if resamples * clusters <= _BLOCK:
        yield _drawn(clusters, resamples, seed)
    elif resamples * clusters <= _MOST:
        yield from _packed(clusters, resamples, seed)
    else:
        yield from _blocks(clusters, resamples, seed)


def _blocks(clusters: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // clusters)
    for start in range(0, resamples, block):
        yield generator.integers(clusters, size=(min(block, resamples - start), clusters))


# All methods of a comparison answer the same questions.
@lru_cache(maxsize=4)
def _drawn(clusters: int, resamples: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))


@lru_cache(maxsize=1)
def _packed(clusters: int, resamples: int, seed: int) -> list[NDArray[Any]]:
    """The blocks in the smallest sufficient integer type, in parts that fit into a cache."""
    kind, rows = np.min_scalar_type(clusters), max(1, _PART // clusters)
    return [
        part
        for drawn in _blocks(clusters, resamples, seed)
        for part in np.split(drawn.astype(kind), range(rows, len(drawn), rows))
    ]


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """(m,) p-values adjusted for m tests, so that all claims below a level hold together.

    The i-th smallest is multiplied by ``m - i``, i from 0, and is at least the one before it
    (S. Holm, A simple sequentially rejective multiple test procedure, 1979).  NaN stays NaN and
    does not count as a test.
    """
    values = np.asarray(p_values, dtype=float)
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known])]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def mean_score(scores: pd.Series, images: pd.Series, *, seed: int) -> Interval:
    """95 % interval of the mean of ``scores``.

    Wilson's interval if each question has one score, 0 or 1.  Several scores per question, from
    several seeds, are not independent, and other scores are not Bernoulli trials; then whole images
    are resampled.  Where nothing can be resampled, because all scores or all images are equal, the
    interval is that of `wilson_around` the sum.

    Args:
        scores: From 0 to 1, indexed by question.
        images: The image of each question.
        seed: Of the bootstrap.
    """
    equal = scores.nunique() == 1 or (images.nunique() == 1 and not is_binary(scores))
    if equal or (scores.index.is_unique and is_binary(scores)):
        questions = scores.index.nunique()
        return wilson_around(scores.mean() * questions if equal else scores.sum(), questions)
    return paired_bootstrap(scores, images, seed=seed)


def wilson_around(total: float, trials: int) -> Interval:
    """Wilson's interval of the whole numbers of successes around ``total``.

    It is wide enough for a sum of numbers from 0 to 1, which vary less than those of 0 and 1 do.
    """
    low, high = (int(end(round(total, 9))) for end in (np.floor, np.ceil))
    return Interval(wilson(low, trials).low, wilson(high, trials).high)


def is_binary(scores: ArrayLike) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(np.asarray(scores, dtype=float), (0.0, 1.0)).all())


def permutation(
    first: ArrayLike,
    second: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    resamples: int = 9999,
) -> float:
    """Two-sided p-value of the paired permutation test of equal means, clusters as a whole.

    Under the hypothesis that two methods are exchangeable, the difference of their scores on a
    cluster is as likely with the other sign (E. J. G. Pitman, Significance tests which may be
    applied to samples from any populations, 1937).  All signs are tried if there are at most
    ``resamples`` of them; otherwise random ones, and the observed signs count as one more.

    Args:
        first, second: (n,) scores of two methods on the same n questions.
        clusters: (n,) the cluster of each question, e.g. its image.
        seed: Of the random signs.
        resamples: Maximum number of signs.
    """
    codes, _ = pd.factorize(np.asarray(clusters))
    gaps = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    sums = np.bincount(codes, gaps)
    sums = sums[np.abs(sums) > _EQUAL]  # equal ones change nothing
    if not len(sums):
        return 1.0
    least = abs(sums.sum()) - _EQUAL * len(sums)
    if 2 ** min(len(sums), 60) <= resamples:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((1 - 2 * bits) @ sums) >= least).mean())
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(sums))
    reached = 1
    for start in range(0, resamples, block):
        shape = (min(block, resamples - start), len(sums))
        signs = 1.0 - 2.0 * generator.integers(2, size=shape, dtype=np.int8)
        reached += int((np.abs(signs @ sums) >= least).sum())
    return reached / (resamples + 1)
