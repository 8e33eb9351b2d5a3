"""Metrics: how the answer to a question is scored, from 0 to 1.

A metric is a class in a file of this package, or of another package::

    @register("closeness")
    class Closeness(Metric):
        source = "our paper"

        def score(self, prediction: str, question: Question) -> float: ...

Other packages register theirs through the entry-point group ``tokenprune.metrics``.  On the command
line, ``module:function`` and ``module:Class`` name one that is not registered.
"""

from tokenprune.experiments.metrics.base import Metric, Sums, metrics, register
from tokenprune.experiments.metrics.choosing import (
    check_metrics,
    metric_names,
    metric_of,
    scored,
    with_metric,
)

__all__ = [
    "Metric",
    "Sums",
    "check_metrics",
    "metric_names",
    "metric_of",
    "metrics",
    "register",
    "scored",
    "with_metric",
]
