"""The table of answers."""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from tokenprune.cost.ledger import FIGURES, WHOLE_FIGURES
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell, CellRecord
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.questions import Question, normalise
from tokenprune.experiments.common.run_folder import IMAGE_FREE, THUMBNAIL_ONLY, UNCOMPRESSED

__all__ = [
    "AGREEMENT_ONLY",
    "Measure",
    "answers_frame",
    "measured",
    "read_answers",
]


# --- the tidy table -------------------------------------------------------------------------------


_COLUMNS = [
    *("model", "method", "label", "parameters", "retention"),
    *("asked_retention", "match", "match_target", "match_cost"),
    *("question_id", "image_id", "kind", "question", "truth"),
    *("answer", "correct", "agrees", "kl", "easy", "status", *FIGURES, "visual_per_layer"),
]


_TEXTS = (
    *("model", "method", "label", "parameters", "question_id", "image_id", "kind"),
    *("question", "truth", "answer", "status"),
)


_TYPES: dict[str, Any] = {
    "retention": "float64",
    **dict.fromkeys(("correct", "agrees", "easy"), "boolean"),
    **dict.fromkeys(("kl", "match_target", "match_cost", *FIGURES), "Float64"),
    **dict.fromkeys(WHOLE_FIGURES, "Int64"),
}


_NEEDED = {*_TEXTS, "retention", "correct", "agrees"}  # older runs lack the other columns


def answers_frame(
    model: str, cells: Sequence[Cell | CellRecord], questions: Sequence[Question], journal: Journal
) -> pd.DataFrame:
    """One row per cell and question that has an answer or failed.

    ``status`` is "ok", "failed" if the whole cell failed, or "missing" if it failed on that
    question alone.

    ``correct`` and ``agrees`` (whether the answer equals that of the uncompressed model) compare
    normalised texts and are missing if there is no answer to compare; so is ``correct`` if the true
    answer is unknown.  ``kl`` is the divergence of the first answer token's distribution from the
    uncompressed model's, in nats.  ``easy`` marks questions that are answered correctly without the
    image or from the thumbnail alone; it is the same for all cells, and missing if these references
    were not run or the true answer is unknown.
    """
    little = {cell.name: cell.key for cell in cells if cell.name in (IMAGE_FREE, THUMBNAIL_ONLY)}
    easy = {item.id: _easy(item, little, journal) for item in questions}
    full = {item.id: journal.answers.get((UNCOMPRESSED, item.id), {}) for item in questions}
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    for cell in cells:
        key = cell.key
        failed = key in journal.failures
        unanswered = "failed" if failed else "missing"
        there = [(item, journal.answers.get((key, item.id))) for item in questions]
        shown = [
            (item, record or {})
            for item, record in there
            if failed or record is not None or (key, item.id) in journal.missing
        ]
        answers = [_plain(record.get("answer")) for _, record in shown]
        truths = [_plain(item.answer or None) for item, _ in shown]
        fulls = [_plain(full[item.id].get("answer")) for item, _ in shown]
        matched = cell.matched
        made = {
            "model": model,
            "method": cell.method,
            "label": cell.label,
            "parameters": cell.parameters,
            "retention": cell.retention,
            "asked_retention": cell.asked,
            "match": None if matched is None else matched.kind,
            "match_target": None if matched is None else matched.target,
            "match_cost": None if matched is None else matched.cost,
            "question_id": [item.id for item, _ in shown],
            "image_id": [item.image_id for item, _ in shown],
            "kind": [item.kind for item, _ in shown],
            "question": [item.question for item, _ in shown],
            "truth": [item.answer for item, _ in shown],
            "correct": [
                _right(record, *texts)
                for (_, record), texts in zip(shown, zip(answers, truths, strict=True), strict=True)
            ],
            "agrees": list(map(_same, answers, fulls)),
            "easy": [easy[item.id] for item, _ in shown],
            "status": ["ok" if record else unanswered for _, record in shown],
        }
        for name, column in columns.items():
            if name not in made:
                column += [record.get(name) for _, record in shown]
            else:
                value = made[name]
                column += value if isinstance(value, list) else [value] * len(shown)
    return pd.DataFrame(columns, columns=_COLUMNS).astype(_TYPES)


Measure = Literal["accuracy", "agreement"]
"""What experiments on views measure: `accuracy` needs true answers."""


AGREEMENT_ONLY = (
    "The true answers are unknown, so the figures are agreements with the uncompressed model, not "
    "accuracies."
)


def measured(answers: pd.DataFrame) -> tuple[pd.DataFrame, Measure]:
    """The answers scored by their truth or, if no truth is known, by the uncompressed model.

    Args:
        answers: As `answers_frame` returns them.

    Returns:
        The answers, with ``agrees`` in place of ``correct`` if no truth is known, and the measure.
    """
    if (answers["truth"] != "").any():
        return answers, "accuracy"
    return answers.assign(correct=answers["agrees"]), "agreement"


@lru_cache(maxsize=4096)
def _plain(answer: str | None) -> str | None:
    """The normalised answer; None if there is none."""
    return None if answer is None else normalise(answer)


def _same(one: str | None, other: str | None) -> bool | None:
    return None if one is None or other is None else one == other


def _right(record: Mapping[str, Any], answer: str | None, truth: str | None) -> bool | None:
    """Whether an answer is correct: by its score if it has one, otherwise by its text."""
    score = record.get("score")
    return _same(answer, truth) if score is None else bool(score == 1)


def _easy(item: Question, little: Mapping[str, str], journal: Journal) -> bool | None:
    """Whether a reference answers ``item`` correctly, without the image or with the thumbnail.

    None if the references or the true answer are unknown.

    Args:
        item: The question.
        little: Name to cell key of these references.
        journal: The journal with their answers.
    """
    said = {name: journal.answers.get((key, item.id)) for name, key in little.items()}
    if not said or None in said.values() or not item.answer:
        return None
    # The thumbnail of an image without crops is the whole image and says nothing of difficulty.
    return any(
        name == IMAGE_FREE or record.get("kept_patches", 0) < record.get("patch_tokens", 0)
        for name, record in said.items()
        if record is not None and _plain(record["answer"]) == _plain(item.answer)
    )


def read_answers(folder: Path) -> pd.DataFrame:
    """``answers.parquet`` of a run.

    Raises:
        UserError: The folder holds none, or it is damaged.
    """
    path = folder / "answers.parquet"
    if not os.path.isfile(path):  # accepts impossible file names, unlike Path.is_file
        raise UserError(
            f"{folder} holds no answers.parquet; give the folder of a run, as tokenprune compare "
            "prints it at its end."
        )
    try:
        table = pd.read_parquet(path)
        texts = table[[name for name in _TEXTS if name in table or name in _NEEDED]]
        if wrong := [name for name in texts if not _all_text(texts[name])]:
            raise TypeError(f"the column {wrong[0]!r} is not text")
        types = {name: kind for name, kind in _TYPES.items() if name in table or name in _NEEDED}
        return table.astype(types)
    except Exception as error:  # a damaged Parquet file can raise anything
        raise UserError(
            f"{path} is damaged ({error}); run the command that made the folder to restore it."
        ) from error


def _all_text(column: pd.Series) -> bool:
    return pd.api.types.infer_dtype(column, skipna=True) in ("string", "empty")
