"""The published figures of one model, chosen by method, benchmark and retention ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from tokenprune.budget import check_retention
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import check_file, replace_file
from tokenprune.experiments.common.published import AVERAGE, BUDGET, averages, figures, near
from tokenprune.experiments.common.request import Request

__all__ = [
    "PublishedRequest",
    "published",
]


@dataclass(frozen=True, kw_only=True)
class PublishedRequest(Request):
    """Which published figures to show.

    Attributes:
        out: File of the chosen rows; None for no file.
        model: One of `published_models.MODELS`, or the Hub id of its checkpoint.
        methods: Names, registered or as the sources write them; all methods if empty.
        benchmarks: Benchmarks whose scores are shown beside the averages.
        retention: Only budgets near one of these retention ratios; all budgets if empty.
    """

    model: str
    methods: Sequence[str] = ()
    benchmarks: Sequence[str] = ()
    retention: Sequence[float] = ()


def published(request: PublishedRequest) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The chosen figures, and the averages of these methods with the scores on the benchmarks.

    Averages are over all benchmarks of a table, whichever are shown.

    Raises:
        UserError: An unknown model, method or benchmark, a retention ratio outside (0, 1], or no
            budget near one.
    """
    for ratio in request.retention:
        check_retention(ratio)
    if request.out is not None:
        check_file(request.out)
    found = figures(request.model)
    names = {name for column in ("method", "label") for name in found[column]}
    for name in request.methods:
        if name not in names:
            raise unknown("method with published figures", name, names)
    known = [name for name in found["benchmark"].unique() if name != AVERAGE]
    for name in request.benchmarks:
        if name not in known:
            raise unknown("benchmark", name, known)
    table = _chosen(averages(found), request)
    if table.empty:
        steps = ", ".join(f"{ratio:g}" for ratio in sorted(found["retention"].unique()))
        raise UserError(
            f"there are no such figures near these retention ratios; choose from: {steps}."
        )
    rows = _chosen(found, request)
    if request.benchmarks:
        rows = rows[rows["benchmark"].isin([*request.benchmarks, AVERAGE])]
    for name in request.benchmarks:
        scores = found[found["benchmark"] == name]
        table = table.merge(
            scores[[*BUDGET, "label", "score"]].rename(columns={"score": name}),
            how="left",
            on=[*BUDGET, "label"],
        )
    if request.out is not None:
        with replace_file(request.out) as temporary:
            write_csv(rows, temporary)
    return rows, table


def _chosen(table: pd.DataFrame, request: PublishedRequest) -> pd.DataFrame:
    """The rows of the methods and retention ratios of ``request``."""
    if request.methods:
        named = table["method"].isin(request.methods) | table["label"].isin(request.methods)
        table = table[named]
    if request.retention:
        close = [any(near(ratio, one) for one in request.retention) for ratio in table["retention"]]
        table = table[close]
    return table
