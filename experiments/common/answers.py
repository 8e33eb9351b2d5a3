"""The table of answers."""

import json
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
from tokenprune.experiments.metrics import check_metrics, metric_of, scored, with_metric

__all__ = [
    "AGREEMENT_ONLY",
    "Measure",
    "answers_frame",
    "measured",
    "read_answers",
    "rescored",
]


# --- the tidy table -------------------------------------------------------------------------------


_COLUMNS = [
    *("model", "method", "label", "parameters", "retention"),
    *("asked_retention", "match", "match_target", "match_cost"),
    *("question_id", "image_id", "kind", "question", "truth"),
    *("answer", "correct", "agrees", "kl", "easy", "status", *FIGURES, "visual_per_layer"),
    *("metric", "score", "truths", "choices"),
]


_TEXTS = (
    *("model", "method", "label", "parameters", "question_id", "image_id", "kind"),
    *("question", "truth", "answer", "status", "metric", "truths", "choices"),
)


_TYPES: dict[str, Any] = {
    "retention": "float64",
    **dict.fromkeys(("correct", "agrees", "easy"), "boolean"),
    **dict.fromkeys(("kl", "match_target", "match_cost", "score", *FIGURES), "Float64"),
    **dict.fromkeys(WHOLE_FIGURES, "Int64"),
}


# Older runs lack the other columns.
_NEEDED = {*_TEXTS, "retention", "correct", "agrees"} - {"metric", "truths", "choices"}


_RIGHT = 0.5  # the least score of an answer that counts as correct


def answers_frame(
    model: str, cells: Sequence[Cell | CellRecord], questions: Sequence[Question], journal: Journal
) -> pd.DataFrame:
    """One row per cell and question that has an answer or failed.

    ``status`` is "ok", "failed" if the whole cell failed, or "missing" if it failed on that
    question alone.

    ``score`` is that of the question's ``metric`` (`metrics.metric_of`), and ``correct`` whether it
    is at least 0.5.  ``agrees`` (whether the answer equals that of the uncompressed model) compares
    normalised texts.  They are missing if there is no answer to compare; so are ``score`` and
    ``correct`` if the true answer is unknown.  ``truths`` and ``choices`` are JSON lists of all
    true answers and of the options; empty with one answer and without options.  ``kl`` is the
    divergence of the first answer token's distribution from the uncompressed model's, in nats.
    ``easy`` marks questions that are answered correctly without the image or from the thumbnail
    alone; it is the same for all cells, and missing if these references were not run or the true
    answer is unknown.

    Raises:
        UserError: As `metrics.metric_of` and `metrics.scored`.
    """
    marks = _Marks(questions)
    little = {cell.name: cell.key for cell in cells if cell.name in (IMAGE_FREE, THUMBNAIL_ONLY)}
    easy = {item.id: _easy(item, little, journal, marks) for item in questions}
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
        scores = [marks.given(item, record) for item, record in shown]
        fulls = [_plain(full[item.id].get("answer")) for item, _ in shown]
        made = {
            "model": model,
            **_ran(cell),
            **_asked([item for item, _ in shown], marks),
            "correct": [None if score is None else score >= _RIGHT for score in scores],
            "agrees": list(map(_same, answers, fulls)),
            "easy": [easy[item.id] for item, _ in shown],
            "status": ["ok" if record else unanswered for _, record in shown],
            "metric": [marks.name(item, record) for item, record in shown],
            "score": scores,
        }
        for name, column in columns.items():
            if name not in made:
                column += [record.get(name) for _, record in shown]
            else:
                value = made[name]
                column += value if isinstance(value, list) else [value] * len(shown)
    return pd.DataFrame(columns, columns=_COLUMNS).astype(_TYPES)


def _ran(cell: Cell | CellRecord) -> dict[str, Any]:
    """The columns of `answers_frame` that describe the cell."""
    matched = cell.matched
    return {
        "method": cell.method,
        "label": cell.label,
        "parameters": cell.parameters,
        "retention": cell.retention,
        "asked_retention": cell.asked,
        "match": None if matched is None else matched.kind,
        "match_target": None if matched is None else matched.target,
        "match_cost": None if matched is None else matched.cost,
    }


def _asked(items: Sequence[Question], marks: "_Marks") -> dict[str, list[Any]]:
    """The columns of `answers_frame` that describe the questions."""
    return {
        "question_id": [item.id for item in items],
        "image_id": [item.image_id for item in items],
        "kind": [item.kind for item in items],
        "question": [item.question for item in items],
        "truth": [item.answer for item in items],
        "truths": [_listed(item.answers[1:] and item.answers) for item in items],
        "choices": [_listed(item.choices) for item in items],
    }


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
        The answers, with ``agrees`` in place of ``correct`` and ``score`` if no truth is known, and
        the measure.
    """
    if (answers["truth"] != "").any():
        return answers, "accuracy"
    agrees = answers["agrees"]
    return answers.assign(correct=agrees, score=agrees.astype("Float64")), "agreement"


class _Marks:
    """The scores of answers; equal answers to a question are scored once.

    Attributes:
        metrics: Id of a question to its metric.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.metrics = {item.id: metric_of(item) for item in questions}
        self._known: dict[tuple[str, str], float] = {}

    def given(self, item: Question, record: Mapping[str, Any]) -> float | None:
        """The score of a record: an imported one, unless the question names a metric, or `of`."""
        if item.metric is None and "score" in record:
            return float(record["score"])
        return self.of(item, record.get("answer"))

    def name(self, item: Question, record: Mapping[str, Any]) -> str:
        """The metric of `given`."""
        imported = item.metric is None and "score" in record
        return str(record["metric"]) if imported else self.metrics[item.id].name

    def of(self, item: Question, answer: str | None) -> float | None:
        """The score of ``answer``; None if there is none, or if the true answer is unknown."""
        if answer is None or not item.answer:
            return None
        key = (item.id, answer)
        if key not in self._known:
            self._known[key] = scored(self.metrics[item.id], answer, item)
        return self._known[key]


def rescored(answers: pd.DataFrame, metric: str | None) -> pd.DataFrame:
    """The answers scored by another metric; None leaves them as they are.

    Args:
        answers: As `read_answers` returns them.
        metric: As in `metrics.with_metric`.

    Raises:
        UserError: There is no such metric, or it cannot score a question.
    """
    if metric is None:
        return answers
    asked = answers.drop_duplicates("question_id")
    items = with_metric([_stored(row) for row in asked.to_dict("records")], metric)
    check_metrics(items)
    known, marks = {item.id: item for item in items}, _Marks(items)
    scores = pd.Series(
        [
            marks.of(known[name], None if pd.isna(answer) else answer)
            for name, answer in zip(answers["question_id"], answers["answer"], strict=True)
        ],
        index=answers.index,
        dtype="Float64",
    )
    found = answers.assign(
        score=scores, correct=scores >= _RIGHT, metric=marks.metrics[items[0].id].name
    )
    return found.assign(easy=_easy_again(found))


def _easy_again(answers: pd.DataFrame) -> pd.Series:
    """``easy`` of `answers_frame`, from the table."""
    by_id = answers["question_id"]
    alone = answers["label"] == IMAGE_FREE
    part = answers["label"] == THUMBNAIL_ONLY
    counts = alone | (part & (answers["kept_patches"] < answers["patch_tokens"]))
    asked = answers[alone | part]
    whole = asked["correct"].notna().groupby(by_id).all()
    easy = (asked["correct"].fillna(False) & counts).groupby(by_id).any().astype("boolean")
    return by_id.map(easy.where(whole)).astype("boolean")


def _stored(row: Mapping[str, Any]) -> Question:
    """The question of a row, without its images."""
    truths = json.loads(row.get("truths") or "null") or [row["truth"]] * bool(row["truth"])
    choices = json.loads(row.get("choices") or "null")
    return Question(
        row["question_id"],
        (),
        row["question"],
        row["truth"],
        answers=tuple(truths),
        choices=None if choices is None else tuple(choices),
    )


def _listed(texts: Sequence[str] | None) -> str:
    """A JSON list; an empty text for none."""
    return json.dumps(texts, ensure_ascii=False) if texts else ""


@lru_cache(maxsize=4096)
def _plain(answer: str | None) -> str | None:
    """The normalised answer; None if there is none."""
    return None if answer is None else normalise(answer)


def _same(one: str | None, other: str | None) -> bool | None:
    return None if one is None or other is None else one == other


def _easy(
    item: Question, little: Mapping[str, str], journal: Journal, marks: _Marks
) -> bool | None:
    """Whether a reference answers ``item`` correctly, without the image or with the thumbnail.

    None if the references or the true answer are unknown.

    Args:
        item: The question.
        little: Name to cell key of these references.
        journal: The journal with their answers.
        marks: The scores of answers.
    """
    said = {name: journal.answers.get((key, item.id)) for name, key in little.items()}
    if not said or None in said.values() or not item.answer:
        return None
    # The thumbnail of an image without crops is the whole image and says nothing of difficulty.
    return any(
        name == IMAGE_FREE or record.get("kept_patches", 0) < record.get("patch_tokens", 0)
        for name, record in said.items()
        if record is not None and (marks.of(item, record["answer"]) or 0.0) >= _RIGHT
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
