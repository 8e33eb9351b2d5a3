"""All pairs of methods of a run, compared on the questions that both answered."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common import summary
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import check_file, replace_file
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.reading import answers_of
from tokenprune.experiments.common.request import Request
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "PairsRequest",
    "pairs",
]


@dataclass(frozen=True, kw_only=True)
class PairsRequest(Request):
    """Which methods of a run to compare.

    Attributes:
        out: The table; None for ``pairs.csv`` in the folder, or ``pairs-KIND.csv``.
        folder: The run folder.
        methods: Labels; all methods if empty.
        kind: Only questions of this kind; all questions if empty.
        seed: Of the bootstrap and of permutations.
        metric: Scores the answers instead of the metric of the run (`metrics.with_metric`).
    """

    folder: Path
    methods: Sequence[str] = ()
    kind: str = ""
    seed: int = 0
    metric: str | None = None


def pairs(request: PairsRequest) -> Outcome:
    """Compare all pairs of methods, and write them as CSV.

    Returns:
        With the table ``pairs``, as `summary.pairs` returns it.

    Raises:
        UserError: The folder is not that of a run, or has no such methods or questions.
    """
    check_number("seed", request.seed)
    kind = request.kind or OVERALL
    notes: list[str] = []
    answers = answers_of(request.folder, notes, request.metric)
    name = "pairs.csv" if kind == OVERALL else f"pairs-{_file_part(kind)}.csv"
    path = request.out or request.folder / name
    check_file(path)
    found = _found(answers, tuple(request.methods), kind, request.seed)
    with replace_file(path) as temporary:
        write_csv(found, temporary)
    return Outcome(path.parent, tables={"pairs": found}, files=(path.name,), notes=tuple(notes))


def _file_part(kind: str) -> str:
    """``kind`` if it is a plain word, otherwise a digest, so that data cannot name files."""
    if re.fullmatch(r"[\w-]{1,40}", kind, re.ASCII):
        return kind
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


def _found(answers: pd.DataFrame, labels: tuple[str, ...], kind: str, seed: int) -> pd.DataFrame:
    """The pairs.  Raises `UserError` for a label or a kind that the run does not have."""
    for name in labels:
        if name not in set(answers["label"]):
            raise unknown("method of the run", name, answers["label"].unique())
    if kind != OVERALL and kind not in set(answers["kind"]):
        raise unknown("kind of question", kind, answers["kind"].unique())
    found = summary.pairs(answers, seed=seed, labels=labels, kind=kind)
    if found.empty:
        raise UserError(
            "no two methods of the run answered the same questions at the same retention; give at "
            "least two that did."
        )
    return found
