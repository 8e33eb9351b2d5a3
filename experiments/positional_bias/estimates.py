"""Does a choice of tokens follow their content or their place?  Statistics on plain arrays.

Everything rests on pairs: the same content is shown at two places (crops in reversed order, a
flipped image, frames in reversed order), and the choice is made for both.  Images, not tokens, are
the independent units: intervals resample whole images, tests flip the signs of whole images.
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
"""The condition in which everything is where it belongs; its level has the same name."""


ALL = "all"
"""The row of `statistics` that takes all conditions together in which crops fit their thumbnail."""


Array = NDArray[Any]


_GRID = 2**15  # steps that the sum of the scores is cut into in `sign_flip`


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; the interval of one image is missing."""

    value: float
    low: float
    high: float


class PairedBias(NamedTuple):
    """What moving the same content to another place does to its being kept.

    Attributes:
        slope: Change of the keep probability as content moves from position 0 to position 1,
            linear; 0 where content alone decides.
        p: Two-sided p-value of a slope of 0, "which content is kept does not depend on its place";
            missing with fewer than two images.
        scores: (images,) whose sum the slope is in proportion to and whose signs the test flips;
            positive: larger positions are kept more.
        images: (images,) what each score belongs to.
    """

    slope: Estimate
    p: float
    scores: Array
    images: Array


class Agreement(NamedTuple):
    """How one image's choice under rearranged content compares with the original choice.

    Attributes:
        equivariance: See `equivariance`.
        content: Share of the kept places whose content was kept originally as well.
        position: Share of the kept places that were kept originally as well.
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
    9/8, keeping evenly spaced or random tokens about 0.  This describes where what is kept lies;
    whether *place* is the reason is for `paired_bias` to say.

    Args:
        kept: (n,) bool, of the tokens of all images.
        position: (n,) in [0, 1], place in the packed sequence.
        image: (n,) what each token belongs to.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
    """
    codes, names = pd.factorize(np.asarray(image))
    x, y = np.asarray(position, dtype=float), np.asarray(kept, dtype=float)
    sizes = np.bincount(codes, minlength=len(names))
    x = x - (np.bincount(codes, x, len(names)) / sizes)[codes]
    products, squares = (np.bincount(codes, x * other, len(names)) for other in (y, x))
    return _ratio(products, squares, seed, resamples)


def sign_flip(scores: ArrayLike) -> float:
    """Two-sided p-value of "each score might as well have had the other sign", exact.

    All 2^n assignments of signs are counted, not sampled, by adding up the distribution of the
    sum score by score (Pagano and Tritchler, JASA 78, 1983), on scores rounded to 1/32768 of the
    sum of their sizes: the test is exact for the rounded scores.  The smallest p that n scores
    other than 0 can give is therefore 2^(1-n): 21 images for p < 1e-6.

    Args:
        scores: (n,) one for each independent unit, here images; missing ones are left out.

    Returns:
        Missing where there are fewer than two scores, 1 where all are 0.
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
    # With P the sum of the scores given a plus, the sum of all is 2 P - whole.
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

    With k, k' whether a content unit is kept before and after it moved from x to x', an image's
    score is ``sum (k' - k)(x' - x)`` over its units, and the slope is the sum of all scores over
    ``sum (x' - x)^2`` of all images.  If the choice does not depend on places, k and k' could be
    exchanged and the score might as well have had the other sign; `sign_flip` over images tests
    that.  A choice that follows content exactly has k' = k throughout, a slope of 0 and p = 1.

    What it cannot see: preferences that the rearrangement maps onto themselves, e.g. one for the
    middle, which lies in the middle of a reversed sequence as well.

    Args:
        kept_before: (n,) bool (or weights), of the content units of all images.
        kept_after: (n,) the same at their other places.
        position_before: (n,) in [0, 1].
        position_after: (n,) in [0, 1].
        image: (n,) what each unit belongs to.
        seed: Of the bootstrap of the slope.
        resamples: Of the bootstrap of the slope.
    """
    codes, names = pd.factorize(np.asarray(image))
    moved = np.asarray(position_after, dtype=float) - np.asarray(position_before, dtype=float)
    changed = np.asarray(kept_after, dtype=float) - np.asarray(kept_before, dtype=float)
    products, squares, sizes = (
        np.bincount(codes, values, len(names))
        for values in (moved * changed, moved * moved, np.abs(moved * changed))
    )
    # What cancels out exactly must not leave rounding errors behind: their signs count as others'.
    products[np.abs(products) < 1e-9 * sizes] = 0.0
    apart = squares > 0  # images in which nothing moved say nothing
    scores = products[apart]
    estimate = _ratio(scores, squares[apart], seed, resamples)
    return PairedBias(estimate, sign_flip(scores), scores, np.asarray(names)[apart])


def agreement(before: ArrayLike, after: ArrayLike, content: ArrayLike) -> Agreement:
    """Compare one image's choice before and after its content was rearranged.

    Args:
        before: (N,) bool, which places were kept originally.
        after: (N,) bool, which places were kept with rearranged content.
        content: (N,) int, at which place the content now at each place was originally; -1 where
            that cannot be said, and these places are left out.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    origin = np.asarray(content)
    known = origin >= 0
    return _agreement(first[origin[known]], first[known], second[known])


def equivariance(before: ArrayLike, after: ArrayLike, content: ArrayLike) -> float:
    """1 if one image's choice follows content, 0 if it follows position, 1/2 if neither.

    Let K be the places kept originally, K' those kept now, and T(K) the places to which the
    content of K moved: T(K) is what a choice by content alone would be, K what a choice by
    position alone would be.  Only places in one of the two but not in both can tell them apart.
    With c = \\|T(K) - K\\| and p = \\|K - T(K)\\|,

        E = 1/2 + (\\|K' & (T(K) - K)\\| - \\|K' & (K - T(K))\\|) / (c + p),

    which is 1/2 + (A - P) / (2 (1 - o)) with A, P and o the shares of \\|K\\| that K' has in common
    with T(K), K' with K, and T(K) with K.  K' = T(K) gives exactly 1, K' = K exactly 0, and a
    choice at random 1/2 in expectation at every retention, so nothing is left to be corrected for
    chance.  Missing where T(K) = K, e.g. where everything is kept.

    Args:
        before, after, content: As in `agreement`.
    """
    return agreement(before, after, content).equivariance


def _agreement(by_content: Array, by_position: Array, now: Array) -> Agreement:
    """The same from what content alone and position alone would have kept, place by place."""
    telling = by_content != by_position
    kept = int(now.sum())
    signed = int((now & telling & by_content).sum()) - int((now & telling & by_position).sum())
    return Agreement(
        0.5 + signed / int(telling.sum()) if telling.any() else np.nan,
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
    """Mean over images, missing ones left out, and its bootstrap interval."""
    there = values[~np.isnan(values)]
    if not len(there):
        return Estimate(np.nan, np.nan, np.nan)
    interval = (np.nan, np.nan)
    if len(there) > 1:
        interval = paired_bootstrap(there, np.arange(len(there)), seed=seed, resamples=2000)
    return Estimate(float(there.mean()), *interval)


# --- tables ---------------------------------------------------------------------------------------

_CELL = ["method", "retention", "modality"]


_AXES = {"flip-lr": "x", "flip-tb": "y"}  # what a condition moves content along; else the sequence


def statistics(tokens: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """One row per method, retention, modality, condition and level, from the table of tokens.

    Args:
        tokens: As `positional_bias` makes it, or as ``tokens.parquet`` holds it.
        seed: Of the bootstrap.

    Returns:
        ``slope`` (of what is kept in that condition along the sequence), ``first`` and ``last``
        (share kept of the first and the last crop slot or frame), and for every condition but the
        normal one ``paired_slope`` and ``p`` (`paired_bias` along the sequence; of flips from the
        left edge of the image to the right one, or top to bottom), ``equivariance`` with
        ``defined``, the number of images that have one, ``content_agreement`` and
        ``position_agreement``.
        Values stand beside their 95 % intervals (``_low``, ``_high``).

        ``p`` tests ``paired_slope`` and nothing else; it is missing where that is, and with a
        single image.  What rounding does to equal budgets of views is taken out of the comparison
        where content moves from view to view (`_without_rounding`).

        The row `ALL` of each level has the mean of every image's equivariance over the conditions,
        and the smallest of their p-values times their number (Bonferroni: biases along different
        axes may not cancel each other); its slopes are missing.  `EXCHANGED` is left out of it: a
        choice by content that asks the thumbnail cannot follow content there.
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
    """Where what is kept in one condition lies."""
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
    """One condition against the normal one: figures, and every image's score and equivariance."""
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
    """Take out what the rounding of equal budgets does to an image's views.

    Where all views have the same budget but it does not divide evenly, allocators give the tokens
    left over to earlier views.  That is a preference for places, but of a single token and none of
    the ranking's doing; counted as it stands, it would make the plainest choice by content, or one
    at random, look significantly biased.  It is taken for rounding where every view of an image
    keeps as many tokens as it did with its original content, at least one, and none keeps more than
    one token more or less than the view its content comes from did.  The shares and slopes of each
    condition are left as they are.

    Args:
        by_content, by_position, now: (n,) bool, what content alone and position alone would keep
            at each place, and what is kept.
        views: (n,) int from 0, numbers of the views (of all images) that the places lie in.
        images: (n,) what image the places lie in.

    Returns:
        (n,) bool what is kept, with the odd token of a view that is otherwise the choice by content
        moved along; and (n,) what is kept before and after, weighted so that both sum to the same
        in every view that was rounded, for `paired_bias`.
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
    """What is said of a condition, or of all together, from a table with a row per image."""
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
        bins: Of the relative position in the sequence.
        cells: Of the relative row and column in the image.

    Returns:
        One row per method, retention, modality, condition, level, ``axis`` (``position``, ``row``,
        ``column``: bins named by their middle; ``view``: 0 is the thumbnail; ``slot``: of crops or
        frames, from 0) and ``place`` on it: ``kept``, the mean over images of the share kept, with
        its 95 % t interval, ``score`` and ``score_rank``, the means over images of scores and of
        their ranks within the image (0 lowest, 1 highest; of tokens that have a score), and
        ``images``.
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
        # A t interval needs two images; pandas has no standard error of one.
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
    """The middle of the bin that each value of [0, 1] lies in."""
    return (np.floor(values.astype(float) * bins).clip(0, bins - 1) + 0.5) / bins
