"""Accuracy per method and retention, and paired comparisons of methods."""

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tokenprune.cost.ledger import FIGURES
from tokenprune.experiments.common.intervals import (
    bootstrap_ratio,
    holm,
    is_binary,
    mcnemar,
    mean_score,
    paired_bootstrap,
    permutation,
    wilson,
    wilson_around,
)
from tokenprune.experiments.common.names import OVERALL
from tokenprune.experiments.metrics import metrics

__all__ = [
    "OVERALL",
    "aggregated",
    "compared",
    "pairs",
    "scores",
    "summarise",
]


_MATCH = ("match", "match_target")


_ENDS = {"difference": "", "low": "_low", "high": "_high", "p": "_p"}


def summarise(answers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """One row per method, retention and question kind (and `OVERALL`), from ``answers.parquet``.

    The accuracy is the mean score.  Accuracy and agreement have 95 % intervals (`mean_score`), the
    mean divergence ``kl`` of the answer token has that of a bootstrap.  ``vs_uncompressed`` and
    ``vs_uniform`` are differences of accuracy from the uncompressed model and from `uniform` at the
    same retention ratio, or at the same cost if costs are matched (`compared`).  Costs are means
    per question.

    ``easy_accuracy`` is the accuracy on questions that the model answers correctly without the
    image or from the thumbnail alone, ``hard_accuracy`` that on all others.  The two references
    have 0 on hard questions by construction.

    A method that ran with several seeds is one row: ``seeds`` is their number, the accuracy is
    their mean accuracy, and ``seed_spread`` its standard deviation.

    References without a retention ratio (``thumbnail-only``, ``image-free``) have NaN there.

    A failed cell has ``status`` "failed" and no figures; the answers that it gave before are not
    scored.  If it failed on some questions only, ``missing`` is their number (of answers, with
    several seeds); figures are over the ``n`` others, and differences over the questions that both
    answered.

    ``metric`` names the metrics.  Further columns are the figures of a set that they define
    (`Metric.aggregates`), such as ``f1``, each with a bootstrap interval (`aggregated`).
    """
    missing = {name: pd.NA for name in ("kl", "easy") if name not in answers}
    answers = answers.assign(**missing).set_index("question_id")
    cells = dict(iter(answers.groupby(["label", "retention"], sort=False, dropna=False)))
    kinds = [OVERALL, *pd.unique(answers["kind"])]
    if len(kinds) == 2:
        kinds = [OVERALL]
    parts = {
        (*which, kind): _CellAnswers(_only(cell, kind))
        for which, cell in cells.items()
        for kind in kinds
    }
    rows = []
    for (label, retention), cell in cells.items():
        # With matched costs, the uniform cell whose cost is the target.
        asked = cell["asked_retention"].iloc[0] if "asked_retention" in cell else retention
        references = {"vs_uncompressed": ("uncompressed", 1.0), "vs_uniform": ("uniform", asked)}
        same = ("model", "method", "parameters", *_MATCH)
        about: dict[Hashable, Any] = {name: cell[name].iloc[0] for name in same if name in cell}
        about |= {"label": label, "retention": retention, "asked_retention": asked}
        failed = bool((cell["status"] == "failed").any())
        for kind in kinds:
            row = about | {"kind": kind, "status": "failed" if failed else "ok"}
            rows.append(row)
            if not failed:
                part = parts[label, retention, kind]
                row |= _figures(part, seed)
                for name, which in references.items():
                    other = parts.get((*which, kind))
                    if other is not None:
                        row |= _named(name, _compared(part, other, seed), _ENDS)
    known = list(_columns())
    return pd.DataFrame(rows, columns=[*known, *_beyond(rows, known)])


def scores(answers: pd.DataFrame) -> pd.Series:
    """The score of each answer, from 0 to 1; of older runs, whether it is correct."""
    return answers["score" if "score" in answers else "correct"].astype("Float64")


def aggregated(summary: pd.DataFrame) -> list[str]:
    """The figures of a set in a summary beside the accuracy, such as ``f1``.

    Args:
        summary: As `summarise` returns it.
    """
    return [name for name in _beyond(summary.columns, list(_columns())) if f"{name}_low" in summary]


def _beyond(found: Iterable[Any], known: Sequence[str]) -> list[str]:
    """The columns that are not ``known``; ``found`` are rows or names."""
    names = (name for one in found for name in (one if isinstance(one, dict) else [one]))
    return [name for name in dict.fromkeys(names) if name not in known]


def pairs(
    answers: pd.DataFrame,
    *,
    seed: int,
    labels: Sequence[str] = (),
    kind: str = OVERALL,
) -> pd.DataFrame:
    """All pairs of methods at every retention, compared on the questions that both answered.

    Args:
        answers: As in ``answers.parquet``.
        seed: Of the bootstrap.
        labels: Only these, in this order; all if empty.
        kind: Only questions of this kind.

    Returns:
        One row per retention and pair: ``first``, ``second``, and the figures of `compared`.
        ``p_holm`` is p adjusted for the number of rows (`holm`).  Matched methods are
        compared at the retention of uniform whose cost they have.  There are no rows at R = 1,
        where all methods are the uncompressed model.
    """
    part = _only(answers, kind)
    asked = part.get("asked_retention", part["retention"]).fillna(part["retention"])
    part = part.assign(asked=asked).set_index("question_id")
    rows = []
    for retention, group in part[part["asked"] != 1].groupby("asked", sort=False):
        cells = {name: _CellAnswers(cell) for name, cell in group.groupby("label", sort=False)}
        names = [name for name in (labels or cells) if name in cells]
        for first, second in combinations(names, 2):
            found = _compared(cells[first], cells[second], seed)
            if found:
                rows.append({"retention": retention, "first": first, "second": second, **found})
    table = pd.DataFrame(rows, columns=["retention", "first", "second", *_COMPARED])
    return table.assign(kind=kind, p_holm=holm(table["p"]))


_COMPARED = (
    *("n", "first_accuracy", "second_accuracy"),
    *("difference", "low", "high", "only_first", "only_second", "p", "test"),
)


def compared(first: pd.DataFrame, second: pd.DataFrame, *, seed: int) -> dict[Hashable, Any]:
    """The difference of mean scores of two methods, on the questions that both answered.

    Args:
        first, second: Rows of ``answers.parquet``, of one method each.
        seed: Of the bootstrap.

    Returns:
        ``n`` questions, both accuracies, their ``difference`` with its 95 % bootstrap interval
        ``low`` to ``high`` (whole images resampled; if no question differs, Wilson's interval of 0
        in n), how many questions ``only_first`` and ``only_second`` answered better, and the
        p-value of the ``test``: McNemar's exact one if all scores are 0 or 1, otherwise a
        permutation of whole images; the last four only without several seeds.  Empty if either
        failed or no question is shared.
    """
    one, other = (_CellAnswers(answers.set_index("question_id")) for answers in (first, second))
    return _compared(one, other, seed)


class _CellAnswers:
    """Answers of one cell, all or those of one kind, with values that several figures need.

    Attributes:
        answers: Rows of ``answers.parquet``, indexed by question.
    """

    def __init__(self, answers: pd.DataFrame) -> None:
        self.answers = answers

    @cached_property
    def failed(self) -> bool:
        return bool((self.answers["status"] == "failed").any())

    @cached_property
    def known(self) -> pd.Series:
        """The score of each answer, without failed questions, indexed by question."""
        return scores(self.answers).dropna().astype(float)

    @cached_property
    def repeated(self) -> bool:
        """Whether questions have several answers, from several seeds."""
        return not self.known.index.is_unique

    @cached_property
    def right(self) -> pd.Series:
        """The mean score of each question."""
        return self.known.groupby(level=0, sort=False).mean() if self.repeated else self.known

    @cached_property
    def images(self) -> pd.Series:
        """The image of each question, indexed by question."""
        images = self.answers["image_id"]
        return images[~images.index.duplicated()]


def _compared(first: _CellAnswers, second: _CellAnswers, seed: int) -> dict[Hashable, Any]:
    if first.failed or second.failed:
        return {}
    shared = first.right.index
    if not shared.equals(second.right.index):
        shared = shared.intersection(second.right.index, sort=False)
    if shared.empty:
        return {}
    mine, theirs = (part.right.reindex(shared).to_numpy() for part in (first, second))
    low, high = paired_bootstrap(mine - theirs, first.images.reindex(shared), seed=seed)
    if not (mine != theirs).any():  # equal answers are no certainty
        high = wilson(0, len(shared)).high
        low = -high
    found: dict[Hashable, Any] = {
        "n": len(shared),
        "first_accuracy": mine.mean(),
        "second_accuracy": theirs.mean(),
        "difference": (mine - theirs).mean(),
        "low": low,
        "high": high,
    }
    if not (first.repeated or second.repeated):
        binary = is_binary(mine) and is_binary(theirs)
        images = first.images.reindex(shared)
        found |= {
            "only_first": int((mine > theirs).sum()),
            "only_second": int((mine < theirs).sum()),
            "p": mcnemar(mine, theirs) if binary else permutation(mine, theirs, images, seed=seed),
            "test": "McNemar" if binary else "permutation",
        }
    return found


def _named(
    prefix: str, found: dict[Hashable, Any], suffixes: dict[str, str]
) -> dict[Hashable, Any]:
    return {f"{prefix}{end}": found[name] for name, end in suffixes.items() if name in found}


def _columns() -> Iterator[str]:
    yield from ("model", "method", "label", "parameters", "retention", "kind", "status", "n")
    yield "missing"
    yield from ("asked_retention", *_MATCH)
    for share in ("accuracy", "agreement"):
        yield from (share, f"{share}_low", f"{share}_high")
    yield from FIGURES
    for name in ("vs_uncompressed", "vs_uniform"):
        yield from (name, f"{name}_low", f"{name}_high", f"{name}_p")
    yield from ("kl", "kl_low", "kl_high")
    for part in ("easy", "hard"):
        yield from (f"{part}_n", *(f"{part}_accuracy{end}" for end in ("", "_low", "_high")))
    yield from ("seeds", "seed_spread", "metric")


def _only(cell: pd.DataFrame, kind: str) -> pd.DataFrame:
    return cell if kind == OVERALL else cell[cell["kind"] == kind]


def _figures(part: _CellAnswers, seed: int) -> dict[Hashable, Any]:
    cell = part.answers
    easy = cell["easy"].astype("boolean")
    images = cell["image_id"]
    lacking = cell["status"] == "missing"
    figures: dict[Hashable, Any] = {"missing": int(lacking.sum())}
    cell = cell[~lacking]
    easy, images = easy[~lacking], images[~lacking]
    figures["n"] = cell.index.nunique()
    graded = scores(cell)
    figures |= _share("accuracy", graded, images, seed)
    figures |= _share("agreement", cell["agrees"], images, seed)
    for name, which in (("easy", easy.fillna(False)), ("hard", ~easy.fillna(True))):
        if easy.notna().any():
            figures[f"{name}_n"] = cell.index[which].nunique()
        figures |= _share(f"{name}_accuracy", graded[which], images[which], seed)
    known = cell["kl"].notna()
    if known.any():
        values = cell["kl"][known].astype(float)
        low, high = paired_bootstrap(values, images[known], seed=seed)
        figures |= {"kl": values.mean(), "kl_low": low, "kl_high": high}
    if len(cell):
        # Answers of older runs lack newer columns.
        figures |= {name: cell[name].mean() for name in FIGURES if name in cell}
        figures["seeds"] = cell["parameters"].nunique()
    if figures.get("seeds", 1) > 1:
        each = graded.astype(float).groupby(cell["parameters"]).mean()
        figures["seed_spread"] = each.std(ddof=1)
    return figures | _aggregates(cell, graded, seed)


def _share(name: str, values: pd.Series, images: pd.Series, seed: int) -> dict[Hashable, Any]:
    known = values.notna()
    if not known.any():
        return {}
    values = values[known].astype(float)
    low, high = mean_score(values, images[known], seed=seed)
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}


def _aggregates(cell: pd.DataFrame, graded: pd.Series, seed: int) -> dict[Hashable, Any]:
    """The metrics of a cell, and the figures that they define of a set."""
    if "metric" not in cell:
        return {}
    cell = cell.assign(score=graded)[graded.notna()]
    names = list(cell["metric"].dropna().unique())
    figures: dict[Hashable, Any] = {"metric": ", ".join(names)} if names else {}
    for metric in names:
        if metric not in metrics.names():
            if ":" not in metric:  # a function has no such figures
                warnings.warn(
                    f"the metric {metric!r} is not known here; its figures of a set are left out.",
                    stacklevel=2,
                )
            continue
        rows = cell[cell["metric"] == metric]
        for name, (numerator, denominator) in metrics.get(metric)().aggregates(rows).items():
            parts = [np.asarray(part, dtype=float) for part in (numerator, denominator)]
            whole = parts[1].sum()
            low, high = bootstrap_ratio(parts[0], parts[1], rows["image_id"], seed=seed)
            value = parts[0].sum() / whole if whole else np.nan
            if low == high and 0 <= value <= 1:  # equal answers are no certainty
                trials = max(1, round(whole))
                low, high = wilson_around(value * trials, trials)
            figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return figures
