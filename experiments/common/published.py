"""Published figures as data, and their averages.

``results/published/MODEL.csv`` has one row per method, number of tokens and benchmark.  Each row
names its source, the table there, its address, and where the figure was read the first and the
second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from tokenprune.errors import unknown
from tokenprune.experiments.common.csv_files import read_csv
from tokenprune.experiments.common.published_models import MODELS, published_model
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "AVERAGE",
    "BUDGET",
    "averages",
    "beside",
    "figures",
    "near",
    "nearest",
]


AVERAGE = "average"
"""The `benchmark` of a row that holds the average which the source states."""


BUDGET = ["source", "table", "retention"]
"""The columns that name one ranking: the methods of a table at one retention ratio."""


_FOLDER = Path(__file__).resolve().parents[1] / "results" / "published"


_BESIDE = ["retention", "method", "measured", "published", "at", "source", "table"]


_FACTOR = 1.25  # retention ratios whose quotient is at most this count as near


def figures(model: str) -> pd.DataFrame:
    """All published figures of a model.

    Args:
        model: As of `published_models.published_model`.

    Returns:
        ``model``, ``modality``, ``method`` (the registered name, if there is one), ``label`` (as
        the source writes it), ``tokens`` (missing if the source states a ratio), ``retention``,
        ``benchmark`` or `AVERAGE`, ``score`` and ``uncompressed`` in the source's unit, ``source``,
        ``table``, ``address``, ``first_reading`` and ``second_reading``.

    Raises:
        UserError: No figures of the model are stored.
    """
    known = published_model(model)
    if known is None:
        raise unknown("model with published figures", model, MODELS)
    return read_csv(_FOLDER / f"{known}.csv")


def averages(found: pd.DataFrame) -> pd.DataFrame:
    """The average of every method, relative to the uncompressed model.

    Args:
        found: As `figures` returns it, with all methods of a table.

    Returns:
        One row per `BUDGET` and method: ``average`` is computed, the mean of score divided by
        uncompressed score over the ``benchmarks`` that all methods of the table report at that
        retention ratio; ``stated`` is the average that the source states, divided by that of the
        uncompressed model.  The two differ where a source averages scores instead of ratios, or
        other benchmarks.
    """
    found = found.assign(ratio=found["score"] / found["uncompressed"])
    parts = []
    for _, group in found.groupby(BUDGET, sort=False):
        wide = group.pivot(index="label", columns="benchmark", values="ratio")
        ratios = wide.drop(columns=AVERAGE).dropna(axis=1)
        rows = group.drop_duplicates("label").set_index("label", drop=False)
        same = ["model", "modality", *BUDGET, "address", "tokens", "method", "label"]
        parts.append(
            rows[same].assign(
                average=ratios.mean(axis=1), benchmarks=ratios.shape[1], stated=wide[AVERAGE]
            )
        )
    return pd.concat(parts, ignore_index=True)


def near(one: float, other: float) -> bool:
    """Whether two retention ratios may be compared: neither is more than 1.25 times the other."""
    return abs(math.log(one / other)) <= math.log(_FACTOR) + 1e-9


def nearest(retention: float, others: Iterable[float]) -> float | None:
    """The ratio of ``others`` that is nearest to ``retention``; None if none is `near` it."""
    close = [other for other in others if near(retention, other)]
    return min(close, key=lambda other: abs(math.log(retention / other)), default=None)


def beside(summary: pd.DataFrame, model: str) -> pd.DataFrame | None:
    """The published averages of the methods of a comparison, at the nearest retention ratios.

    Args:
        summary: As `summary.summarise` returns it.
        model: The model of the comparison.

    Returns:
        One row per method, retention ratio and source: ``measured`` (accuracy relative to the
        uncompressed model), ``published`` (the ``average`` of `averages`), and ``at``, the
        published retention ratio.  None if no figures of the model, or of these
        methods, are published.
    """
    name = published_model(model)
    if name is None:
        return None
    rows = summary[(summary["kind"] == OVERALL) & (summary["status"] == "ok")]
    whole = rows.loc[rows["method"] == "uncompressed", "accuracy"]
    published = averages(figures(name))
    asked = rows.get("asked_retention", rows["retention"]).fillna(rows["retention"])
    # A label with options is another method than the published one.
    plain = rows.assign(asked=asked)[(rows["label"] == rows["method"]) & (asked < 1)]
    found = []
    for (_, _), ranking in published.groupby(["source", "table"], sort=False):
        for row in plain.itertuples():
            mine = ranking[ranking["method"] == row.method]
            at = nearest(row.asked, mine["retention"])
            for one in mine[mine["retention"] == at].itertuples():
                measured = row.accuracy / whole.iloc[0] if len(whole) else float("nan")
                figure = (row.asked, row.method, measured, one.average, at)
                found.append((*figure, one.source, one.table))
    if not found:
        return None
    table = pd.DataFrame(found, columns=_BESIDE)
    return table.sort_values("retention", ascending=False, kind="stable", ignore_index=True)
