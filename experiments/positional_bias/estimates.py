"""Does a selection follow the content or the location of tokens?  Statistics on plain arrays.

All statistics use pairs: the same content is shown at two locations (crops or frames in reversed
order, a flipped image), and tokens are selected for both.  Images, not tokens, are the independent
units: intervals resample whole images, tests flip the signs of whole images.
"""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from tokenprune.experiments.common.intervals import paired_bootstrap
from tokenprune.experiments.positional_bias.rearrange import EXCHANGED

__all__ = [
    "ALL",
    "NORMAL",
    "Agreement",
    "Estimate",
    "PairedBias",
    "agreement",
    "equivariance",
    "paired_bias",
    "profiles",
    "sign_flip",
    "slope",
    "statistics",
]


NORMAL = "normal"
"""The condition without any change; its level has the same name."""


ALL = "all"
"""The row of `statistics` for all conditions together, except `EXCHANGED`."""


Array = NDArray[Any]


_GRID = 2**15  # steps into which `sign_flip` divides the sum of the scores


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval, which are NaN for a single image."""

    value: float
    low: float
    high: float


class PairedBias(NamedTuple):
    """How moving the same content to another location changes whether it is kept.

    Attributes:
        slope: Linear change of the keep probability as content moves from position 0 to 1; 0 where
            content alone decides.
        p: Two-sided p-value of the null hypothesis that the location of content has no influence on
            whether it is kept; NaN with fewer than two images.
        scores: (images,) scores, whose signs the test flips and whose sum is proportional to the
            slope; positive if larger positions are kept more often.
        images: (images,) the image of each score.
    """

    slope: Estimate
    p: float
    scores: Array
    images: Array


class Agreement(NamedTuple):
    """How the selection of a rearranged image compares with that of the original image.

    Attributes:
        equivariance: See `equivariance`.
        content: Share of the kept locations whose content was kept in the original image.
        position: Share of the kept locations that were kept in the original image.
    """

    equivariance: float
    content: float
    position: float


# --- one number from arrays -----------------------------------------------------------------------


def slope(
    kept: ArrayLike,
    position: ArrayLike,
    image: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Estimate:
    """How the keep probability rises along the sequence: least squares, interval over images.

    Kept (0 or 1) is regressed on position with an intercept for every image, and the interval is
    the percentile bootstrap that resamples whole images.  Keeping exactly the last quarter gives
    9/8, keeping evenly spaced or random tokens about 0.  The slope describes where kept tokens are;
    `paired_bias` estimates whether their location is the cause.

    Args:
        kept: (n,) bool, for the tokens of all images.
        position: (n,) in [0, 1], relative index in the packed sequence.
        image: (n,) the image of each token.
        seed: Of the bootstrap.
        resamples: Number of bootstrap samples.
    """
    codes, names = pd.factorize(np.asarray(image))
    x, y = np.asarray(position, dtype=float), np.asarray(kept, dtype=float)
    sizes = np.bincount(codes, minlength=len(names))
    x = x - (np.bincount(codes, x, len(names)) / sizes)[codes]
    products, squares = (np.bincount(codes, x * other, len(names)) for other in (y, x))
    return _ratio(products, squares, seed, resamples)


def sign_flip(scores: ArrayLike) -> float:
    """Exact two-sided p-value of the null hypothesis that both signs of a score are equally likely.

    All 2^n assignments of signs are counted, not sampled, by convolving the distribution of the
    sum score by score (Pagano and Tritchler, JASA 78, 1983).  Scores are rounded to 1/32768 of the
    sum of their absolute values; the test is exact for the rounded scores.  The smallest p-value of
    n nonzero scores is 2^(1-n): p < 1e-6 needs 21 images.

    Args:
        scores: (n,) one for each independent unit, here an image; NaN is left out.

    Returns:
        The p-value; NaN with fewer than two scores, 1 where all are 0.
    """
    values = np.asarray(scores, dtype=float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return np.nan
    total = np.abs(values).sum()
    if not total:
        return 1.0
    steps = np.rint(np.abs(values) / total * _GRID).astype(int)
    whole, observed = int(steps.sum()), abs(int((np.sign(values) * steps).sum()))
    # With P the sum of the scores with a positive sign, the sum of all is 2 P - whole.
    mass = np.zeros(whole + 1)
    mass[0] = 1.0
    for step in steps[steps > 0]:
        mass *= 0.5
        mass[step:] += mass[: whole + 1 - step].copy()
    upper = float(mass[(whole + observed + 1) // 2 :].sum())
    return min(1.0, 2 * upper)


def paired_bias(
    kept_before: ArrayLike,
    kept_after: ArrayLike,
    position_before: ArrayLike,
    position_after: ArrayLike,
    image: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> PairedBias:
    """Does moving content change whether it is kept?

    Let k and k' say whether a content unit is kept before and after it moves from x to x'.  The
    score of an image is ``sum (k' - k)(x' - x)`` over its units, and the slope is the sum of all
    scores over ``sum (x' - x)^2`` of all images.  If the selection does not depend on location, k
    and k' are exchangeable and both signs of a score are equally likely; `sign_flip` over images
    tests that.  A selection that follows content exactly has k' = k, a slope of 0 and p = 1.

    The slope does not detect preferences that the rearrangement maps onto themselves, such as one
    for the middle of the sequence, which stays in the middle.

    Args:
        kept_before: (n,) bool (or weights), for the content units of all images.
        kept_after: (n,) the same at their new locations.
        position_before: (n,) in [0, 1].
        position_after: (n,) in [0, 1].
        image: (n,) the image of each unit.
        seed: Of the bootstrap of the slope.
        resamples: Number of bootstrap samples.
    """
    codes, names = pd.factorize(np.asarray(image))
    moved = np.asarray(position_after, dtype=float) - np.asarray(position_before, dtype=float)
    changed = np.asarray(kept_after, dtype=float) - np.asarray(kept_before, dtype=float)
    products, squares, sizes = (
        np.bincount(codes, values, len(names))
        for values in (moved * changed, moved * moved, np.abs(moved * changed))
    )
    # Scores that cancel exactly are set to 0, as the signs of rounding errors would count.
    products[np.abs(products) < 1e-9 * sizes] = 0.0
    apart = squares > 0  # images in which nothing moved are uninformative
    scores = products[apart]
    estimate = _ratio(scores, squares[apart], seed, resamples)
    return PairedBias(estimate, sign_flip(scores), scores, np.asarray(names)[apart])


def agreement(before: ArrayLike, after: ArrayLike, content: ArrayLike) -> Agreement:
    """Compare the selection of one image before and after its content is rearranged.

    Args:
        before: (N,) bool, the locations that are kept in the original image.
        after: (N,) bool, the locations that are kept in the rearranged image.
        content: (N,) int, the original location of the content of each location; locations with -1
            have no counterpart and are left out.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    origin = np.asarray(content)
    known = origin >= 0
    return _agreement(first[origin[known]], first[known], second[known])


def equivariance(before: ArrayLike, after: ArrayLike, content: ArrayLike) -> float:
    """1 if the selection of an image follows content, 0 if it follows location, 1/2 if neither.

    Let K be the locations that are kept in the original image, K' those that are kept in the
    rearranged image, and T(K) the locations to which the content of K moves.  A selection by
    content alone keeps T(K), one by location alone keeps K.  Only locations that are in exactly one
    of the two sets distinguish them.  With c = \\|T(K) - K\\| and p = \\|K - T(K)\\|,

        E = 1/2 + (\\|K' & (T(K) - K)\\| - \\|K' & (K - T(K))\\|) / (c + p),

    which is 1/2 + (A - P) / (2 (1 - o)) with A, P and o the shares of \\|K\\| that K' has in common
    with T(K), K' with K, and T(K) with K.  K' = T(K) gives exactly 1, K' = K exactly 0, and a
    random selection 1/2 in expectation at every retention ratio, so no correction for chance is
    needed.  E is NaN where T(K) = K, e.g. where everything is kept.

    Args:
        before, after, content: As in `agreement`.
    """
    return agreement(before, after, content).equivariance


def _agreement(by_content: Array, by_position: Array, now: Array) -> Agreement:
    """`agreement` from what content alone and location alone would keep at each location."""
    decisive = by_content != by_position
    kept = int(now.sum())
    signed = int((now & decisive & by_content).sum()) - int((now & decisive & by_position).sum())
    return Agreement(
        0.5 + signed / int(decisive.sum()) if decisive.any() else np.nan,
        int((now & by_content).sum()) / kept if kept else np.nan,
        int((now & by_position).sum()) / kept if kept else np.nan,
    )


def _ratio(products: Array, squares: Array, seed: int, resamples: int) -> Estimate:
    """``sum products / sum squares`` and its percentile interval over resampled images."""
    count = len(products)
    if not squares.sum() > 0:
        return Estimate(np.nan, np.nan, np.nan)
    value = float(products.sum() / squares.sum())
    if count < 2:
        return Estimate(value, np.nan, np.nan)
    weights = np.random.default_rng(seed).multinomial(count, [1 / count] * count, resamples)
    sums, totals = weights @ products, weights @ squares
    low, high = np.quantile(sums[totals > 0] / totals[totals > 0], [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def _mean(values: Array, seed: int) -> Estimate:
    """Mean over images, without NaN, and its bootstrap interval."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(np.nan, np.nan, np.nan)
    interval = (np.nan, np.nan)
    if len(known) > 1:
        interval = paired_bootstrap(known, np.arange(len(known)), seed=seed, resamples=2000)
    return Estimate(float(known.mean()), *interval)


# --- tables ---------------------------------------------------------------------------------------

_CELL = ["method", "retention", "modality"]


_AXES = {"flip-lr": "x", "flip-tb": "y"}  # the axis of a condition, if not the sequence


def statistics(tokens: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """One row per method, retention, modality, condition and level, from the table of tokens.

    Args:
        tokens: As `positional_bias` makes it, or as ``tokens.parquet`` holds it.
        seed: Of the bootstrap.

    Returns:
        ``slope`` (of kept tokens along the sequence in that condition), ``first`` and ``last``
        (share kept of the first and the last crop slot or frame), and for every condition but the
        normal one ``paired_slope`` and ``p`` (`paired_bias` along the sequence; for flips from the
        left edge of the image to the right one, or from top to bottom), ``equivariance`` with
        ``defined``, the number of images that have one, ``content_agreement`` and
        ``position_agreement``.
        Columns with ``_low`` and ``_high`` are the ends of 95 % intervals.

        ``p`` tests ``paired_slope`` only; it is NaN where the slope is, and with a single image.
        Where content moves between views, the comparison excludes the effect of rounding equal
        budgets of views (`_without_rounding`).

        The row `ALL` of each level has the mean over images of the mean equivariance over the
        conditions, and the smallest p-value times the number of conditions (Bonferroni, so that
        biases along different axes cannot cancel); its slopes are NaN.  It excludes `EXCHANGED`,
        where a selection by content that uses the thumbnail cannot follow content.
    """
    rows: list[dict[Hashable, Any]] = []
    for cell, group in tokens.groupby(_CELL, sort=False, observed=True):
        shared: dict[Hashable, Any] = dict(zip(_CELL, cell, strict=True))
        by_condition = dict(iter(group.groupby(["condition", "level"], sort=False, observed=True)))
        normal = by_condition.pop((NORMAL, NORMAL))
        place: dict[Hashable, Any] = {"condition": NORMAL, "level": NORMAL}
        rows.append(shared | place | _described(normal, seed))
        collected: dict[str, list[tuple[float, pd.DataFrame]]] = {}
        for (condition, level), part in by_condition.items():
            place = {"condition": condition, "level": level}
            figures, images = _compared(normal, part, seed)
            rows.append(shared | place | _described(part, seed) | figures)
            if condition != EXCHANGED:
                collected.setdefault(level, []).append((figures["p"], images))
        for level, found in collected.items():
            by_image = pd.concat([images for _, images in found]).groupby("image", sort=False)
            place = {"condition": ALL, "level": level, "images": len(by_image)}
            tested = [p for p, _ in found if not np.isnan(p)]
            p = min(1.0, len(tested) * min(tested)) if tested else np.nan
            rows.append(shared | place | _closing(by_image.mean(), p, seed))
    return pd.DataFrame(rows, columns=list(_columns()))


def _columns() -> Iterator[str]:
    yield from (*_CELL, "condition", "level", "images")
    for name in ("slope", "first", "last", "paired_slope"):
        yield from _spelled(name)
    yield "p"
    yield from _spelled("equivariance")
    yield from ("defined", "content_agreement", "position_agreement")


def _spelled(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _named(name: str, estimate: Estimate) -> dict[Hashable, Any]:
    return dict(zip(_spelled(name), estimate, strict=True))


def _described(part: pd.DataFrame, seed: int) -> dict[Hashable, Any]:
    """Where the kept tokens of one condition are."""
    figures: dict[Hashable, Any] = {"images": part["image"].nunique()}
    figures |= _named("slope", slope(part["kept"], part["position"], part["image"], seed=seed))
    slots = part[part["slot"] >= 0]
    ends = {"first": slots["slot"] == 0, "last": slots["slot"] == slots["slots"] - 1}
    several = slots["slots"] > 1
    for name, chosen in ends.items():
        shares = slots[chosen & several].groupby("image", observed=True)["kept"].mean()
        figures |= _named(name, _mean(shares.to_numpy(float), seed))
    return figures


def _compared(
    normal: pd.DataFrame, part: pd.DataFrame, seed: int
) -> tuple[dict[Hashable, Any], pd.DataFrame]:
    """Figures of a condition against the normal one, and the agreement of every image."""
    axis = _AXES.get(str(part["condition"].iloc[0]), "position")
    places = normal.set_index(["image", "token"])[["kept", "view", axis]]
    known = part[part["content"] >= 0]
    origin = places.loc[pd.MultiIndex.from_frame(known[["image", "content"]])]
    same = places.loc[pd.MultiIndex.from_frame(known[["image", "token"]])]
    by_content, by_position = origin["kept"].to_numpy(bool), same["kept"].to_numpy(bool)
    names = known["image"].to_numpy()
    now = known["kept"].to_numpy(bool)
    before, after = by_content, now
    if (origin["view"].to_numpy() != known["view"].to_numpy()).any():
        views = known.groupby(["image", "view"], sort=False, observed=True).ngroup().to_numpy()
        now, before, after = _without_rounding(by_content, by_position, now, views, names)
    bias = paired_bias(before, after, origin[axis], known[axis], names, seed=seed)
    of = known.reset_index(drop=True).groupby("image", observed=True).indices
    agreed = [_agreement(by_content[of[i]], by_position[of[i]], now[of[i]]) for i in bias.images]
    images = pd.DataFrame(agreed, columns=list(Agreement._fields), dtype=float)
    images = images.assign(image=np.asarray(bias.images))
    figures = _named("paired_slope", bias.slope) | _closing(images, bias.p, seed)
    return figures, images


def _without_rounding(
    by_content: Array, by_position: Array, now: Array, views: Array, images: Array
) -> tuple[Array, Array, Array]:
    """Remove the effect of rounding equal budgets from an image's views.

    Where all views have the same budget but it does not divide evenly, allocators give the
    remaining tokens to earlier views.  That is a preference for locations, but of a single token
    and not caused by the ranking; without a correction, even a selection by content alone, or a
    random one, would look significantly biased.  A difference counts as rounding where every view
    of an image keeps as many tokens as it did with its original content, at least one, and none
    keeps more than one token more or less than the view its content comes from did.  The shares and
    slopes of each condition are not corrected.

    Args:
        by_content, by_position, now: (n,) bool, what content alone and location alone would keep
            at each location, and what is kept.
        views: (n,) int from 0, the view of each location, numbered over all images.
        images: (n,) the image of each location.

    Returns:
        (n,) bool, what is kept, where a view that differs from the selection by content only in the
        extra token takes that selection; and (n,) what is kept before and after, for `paired_bias`,
        weighted so that both have the same sum in every rounded view.
    """
    counts = (np.bincount(views, one) for one in (now, by_position, by_content, now & by_content))
    have, had, due, shared = counts
    codes, names = pd.factorize(images)
    of = np.zeros(len(have), dtype=int)
    of[views] = codes
    same = (have == had) & ((have == due) | ((abs(have - due) == 1) & (np.minimum(have, due) > 0)))
    even = np.bincount(of, ~same, len(names)) == 0
    rounded = even[of] & (have != due)
    now = np.where((rounded & (shared == np.minimum(have, due)))[views], by_content, now)
    have = np.bincount(views, now)
    middle = np.where(rounded, (have + due) / 2, 1.0)
    scale = [middle / np.where(rounded, count, 1.0) for count in (due, have)]
    return now, by_content * scale[0][views], now * scale[1][views]


def _closing(images: pd.DataFrame, p: float, seed: int) -> dict[Hashable, Any]:
    """Figures of one or all conditions, from a table with rows of images."""
    values = images["equivariance"].to_numpy(float)
    return {
        "p": p,
        **_named("equivariance", _mean(values, seed)),
        "defined": int((~np.isnan(values)).sum()),
        "content_agreement": images["content"].mean(),
        "position_agreement": images["position"].mean(),
    }


def profiles(tokens: pd.DataFrame, *, bins: int = 20, cells: int = 7) -> pd.DataFrame:
    """Mean score and keep probability along the sequence, by row, column, view and slot.

    Args:
        tokens: As for `statistics`.
        bins: Number of bins of the relative position in the sequence.
        cells: Number of bins of the relative row and column in the image.

    Returns:
        One row per method, retention, modality, condition, level, ``axis`` (``position``, ``row``,
        ``column``: bins named by their centre; ``view``: 0 is the thumbnail; ``slot``: crops or
        frames, from 0) and ``place`` on it: ``kept``, the mean over images of the share kept, with
        its 95 % t interval; ``score`` and ``score_rank``, the means over images of scores and of
        their ranks within the image (0 lowest, 1 highest; for tokens with a score); and ``images``.
    """
    groups = [*_CELL, "condition", "level"]
    ranks = tokens.groupby([*groups, "image"], sort=False, observed=True)["score"].rank(pct=True)
    table = tokens.assign(score_rank=ranks)
    axes = {
        "position": _binned(table["position"], bins),
        "row": _binned(table["y"], cells),
        "column": _binned(table["x"], cells),
        "view": table["view"].astype(float),
        "slot": table["slot"].where(table["slot"] >= 0).astype(float),
    }
    found = []
    for axis, places in axes.items():
        keyed = table.assign(place=places).dropna(subset=["place"])
        per_image = keyed.groupby([*groups, "place", "image"], sort=False, observed=True)[
            ["kept", "score", "score_rank"]
        ].mean()
        grouped = per_image.groupby([*groups, "place"], sort=False, observed=True)
        count = grouped["kept"].count()
        # A t interval needs two images; pandas gives NaN as the standard error of one.
        half = student.ppf(0.975, (count - 1).clip(lower=1)) * grouped["kept"].sem()
        means = grouped.mean()
        frame = means.assign(
            kept_low=(means["kept"] - half).clip(0, 1),
            kept_high=(means["kept"] + half).clip(0, 1),
            images=count,
        )
        found.append(frame.reset_index().assign(axis=axis))
    columns = [*groups, "axis", "place", "kept", "kept_low", "kept_high", "score", "score_rank"]
    joined = pd.concat(found, ignore_index=True)[[*columns, "images"]]
    return joined.sort_values([*groups, "axis", "place"], kind="stable", ignore_index=True)


def _binned(values: pd.Series, bins: int) -> pd.Series:
    """The centre of the bin of each value in [0, 1]."""
    return (np.floor(values.astype(float) * bins).clip(0, bins - 1) + 0.5) / bins
