"""How sure we are: intervals of proportions, and paired differences on the same questions."""

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import binomtest

__all__ = ["OVERALL", "Interval", "mcnemar", "paired_bootstrap", "summarise", "wilson"]

OVERALL = "overall"
"""The `kind` of a summary row that takes all questions together."""

_COSTS = (
    "patch_tokens",
    "kept_patches",
    "separators",
    "kept_separators",
    "entered_patches",
    "entered_separators",
    "text_tokens",
    "layer_average",
    "layer_average_with_text",
    "kv_entries",
    "kv_bytes",
    "flops",
    "selector_flops",
    "selector_bytes",
    "uncompressed_flops",
)


_MATCH = ("match", "match_target")


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


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
    return float(binomtest(only_one, discordant).pvalue) if discordant else 1.0


def paired_bootstrap(
    difference: ArrayLike,
    clusters: ArrayLike,
    *,
    seed: int,
    resamples: int = 4000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of the mean of paired differences, whole clusters resampled.

    Questions about one image stand or fall together; resampling them one by one would give too
    narrow an interval.

    Args:
        difference: (n,) per question, e.g. right with the one method minus right with the other.
        clusters: (n,) what each question belongs to, e.g. its image.
        seed: Of the generator used; the same seed gives the same interval.
    """
    codes, names = pd.factorize(np.asarray(clusters))
    sums = np.bincount(codes, np.asarray(difference, dtype=float))
    sizes = np.bincount(codes)
    generator = np.random.default_rng(seed)
    block = max(1, 2_000_000 // len(names))  # of resamples drawn at once: bounds the memory
    means = []
    for start in range(0, resamples, block):
        shape = (min(block, resamples - start), len(names))
        drawn = generator.integers(len(names), size=shape)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(low), float(high))


def summarise(answers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """One row per method, retention and question kind (and `OVERALL`), from ``answers.parquet``.

    Accuracy and agreement stand beside their 95 % Wilson intervals.  ``vs_uncompressed`` and
    ``vs_uniform`` are differences of accuracy to the uncompressed model and to `uniform` at the
    same retention (the same cost, where costs were matched), on the questions both answered, with a
    95 % bootstrap interval (whole images resampled) and the p-value of McNemar's exact test.  Costs
    are means per question.

    A cell that failed has ``status`` "failed" and no figures: neither its missing answers nor the
    ones it gave before it failed are scored.
    """
    cells = dict(iter(answers.groupby(["label", "retention"], sort=False)))
    kinds = [OVERALL, *pd.unique(answers["kind"])]
    if len(kinds) == 2:
        kinds = [OVERALL]
    rows = []
    for (label, retention), cell in cells.items():
        # Where costs were matched, with the uniform cell whose cost was the target.
        asked = cell["asked_retention"].iloc[0] if "asked_retention" in cell else retention
        references = {
            "vs_uncompressed": cells.get(("uncompressed", 1.0)),
            "vs_uniform": cells.get(("uniform", asked)),
        }
        failed = bool((cell["status"] == "failed").any())
        for kind in kinds:
            row: dict[Hashable, Any] = {
                "model": cell["model"].iloc[0],
                "method": cell["method"].iloc[0],
                "label": label,
                "parameters": cell["parameters"].iloc[0],
                "retention": retention,
                "asked_retention": asked,
                **{name: cell[name].iloc[0] for name in _MATCH if name in cell},
                "kind": kind,
                "status": "failed" if failed else "ok",
            }
            rows.append(row)
            if not failed:
                part = _only(cell, kind)
                row |= _figures(part)
                for name, other in references.items():
                    if other is not None:
                        row |= _comparison(name, part, _only(other, kind), seed)
    return pd.DataFrame(rows, columns=list(_columns()))


def _columns() -> Iterator[str]:
    yield from ("model", "method", "label", "parameters", "retention", "kind", "status", "n")
    yield from ("asked_retention", *_MATCH)
    for share in ("accuracy", "agreement"):
        yield from (share, f"{share}_low", f"{share}_high")
    yield from _COSTS
    for name in ("vs_uncompressed", "vs_uniform"):
        yield from (name, f"{name}_low", f"{name}_high", f"{name}_p")


def _only(cell: pd.DataFrame, kind: str) -> pd.DataFrame:
    return cell if kind == OVERALL else cell[cell["kind"] == kind]


def _figures(cell: pd.DataFrame) -> dict[Hashable, Any]:
    figures: dict[Hashable, Any] = {"n": len(cell)}
    for name, column in (("accuracy", "correct"), ("agreement", "agrees")):
        known = cell[column].dropna().astype(bool)
        if len(known):
            low, high = wilson(int(known.sum()), len(known))
            figures |= {name: known.mean(), f"{name}_low": low, f"{name}_high": high}
    if len(cell):
        # Answers of an older run lack the younger columns.
        figures |= cell.reindex(columns=list(_COSTS)).mean().to_dict()
    return figures


def _comparison(
    name: str, cell: pd.DataFrame, other: pd.DataFrame, seed: int
) -> dict[Hashable, Any]:
    if (other["status"] == "failed").any():
        return {}
    mine, theirs = (part.set_index("question_id")["correct"].dropna() for part in (cell, other))
    shared = mine.index.intersection(theirs.index, sort=False)
    if shared.empty:
        return {}
    mine, theirs = (part.loc[shared].astype(bool) for part in (mine, theirs))
    difference = mine.astype(float) - theirs.astype(float)
    images = cell.set_index("question_id")["image_id"].loc[shared]
    low, high = paired_bootstrap(difference, images, seed=seed)
    return {
        name: difference.mean(),
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_p": mcnemar(mine, theirs),
    }
