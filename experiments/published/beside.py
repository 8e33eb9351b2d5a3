"""Published averages beside measured ones."""

from __future__ import annotations

import pandas as pd

from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.published.figures import averages, figures, nearest
from tokenprune.experiments.published.models import published_model

__all__ = ["beside"]


_COLUMNS = ["retention", "method", "measured", "published", "stated", "at", "source", "table"]


def beside(summary: pd.DataFrame, model: str) -> pd.DataFrame | None:
    """The published averages of the methods of a comparison, at the nearest retention ratios.

    Args:
        summary: As `summary.summarise` returns it.
        model: The model of the comparison.

    Returns:
        One row per method, retention ratio and source: ``measured`` (accuracy relative to the
        uncompressed model), ``published`` and ``stated`` (as `figures.averages` names them), and
        ``at``, the published retention ratio.  None if no figures of the model, or of these
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
                figure = (row.asked, row.method, measured, one.average, one.stated, at)
                found.append((*figure, one.source, one.table))
    if not found:
        return None
    table = pd.DataFrame(found, columns=_COLUMNS)
    return table.sort_values("retention", ascending=False, kind="stable", ignore_index=True)
