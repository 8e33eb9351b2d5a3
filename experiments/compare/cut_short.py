"""Answers that end because they are as long as allowed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from tokenprune.experiments.common.journal import Journal

__all__ = ["CUT_SHORT", "warn_of_cut_answers"]


CUT_SHORT = "cut_short"
"""The entry, in the record of an answer, that it has no end token at its maximum length."""


def warn_of_cut_answers(journal: Journal, keys: Iterable[str], limit: int) -> None:
    """Warn if answers reached their maximum length, because their scores may be too low.

    Args:
        journal: The journal with the answers.
        keys: Of the cells of the run.
        limit: Maximum length of answers to questions without their own.
    """
    shown = set(keys)
    records = [record for (key, _), record in journal.answers.items() if key in shown]
    cut = sum(CUT_SHORT in record for record in records)
    if cut:
        warnings.warn(
            f"{cut} of {len(records)} answers reached the limit of their length and may be cut "
            f"short; raise --max-new-tokens (now {limit}), or max_new_tokens in the data.",
            RuntimeWarning,
            stacklevel=2,
        )
