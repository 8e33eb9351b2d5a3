"""Contributions of thumbnail and crops: answers from one, from the other, and from both.

After figure 2 of the GlobalCom² paper (arXiv 2501.05179).  The accuracy with one kind of view alone
is given relative to that with both, for each kind of question.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import (
    AGREEMENT_ONLY,
    Measure,
    measured,
    read_answers,
)
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.intervals import bootstrap_ratio, wilson
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.own_images import with_answers
from tokenprune.experiments.common.references import CROPS_ONLY, KeepViews
from tokenprune.experiments.common.request import QuestionRequest, comparison
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.setting import prepare, with_crops
from tokenprune.experiments.common.summary import OVERALL, compared, scores
from tokenprune.experiments.compare import run as compare
from tokenprune.experiments.complementarity.figures import SHOWN, figure
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "ComplementarityRequest",
    "relative",
    "run",
]


@dataclass(frozen=True, kw_only=True)
class ComplementarityRequest(QuestionRequest):
    """Which questions to answer from the thumbnail, from the crops and from both.

    They are about single images: videos and prompts of several images have no crops, also in
    LLaVA-OneVision.
    """


def run(request: ComplementarityRequest, progress: ProgressCallback = silent) -> Outcome:
    """Answer every question from the thumbnail, from the crops and from both.

    Where no true answer is known, agreement with the whole image takes the place of accuracy.
    Questions whose image has no crops are left out.  The folder of the run gets
    ``complementarity.csv`` and a figure in addition to what `compare` writes.

    Returns:
        With the table ``complementarity``, as `relative` returns it, unless the run was
        interrupted.

    Raises:
        UserError: As `compare`, or no image has crops.
    """
    asked = comparison(request, modality="image")
    setting, left_out = with_crops(prepare(asked, progress, needs_answers=False))
    columns = [Cell(), Cell(KeepViews(views="crops"), name=CROPS_ONLY)]
    outcome = compare.run(asked, progress, name="complementarity", columns=columns, setting=setting)
    notes = []
    if left_out:
        notes.append(f"{left_out} questions were left out: their images have no crops.")
    if not with_answers(setting.questions):
        notes.append(AGREEMENT_ONLY)
    outcome = replace(outcome, notes=tuple(notes))
    if outcome.status == "interrupted":
        return outcome
    answers, measure = measured(read_answers(outcome.folder))
    table = relative(answers, seed=request.seed, measure=measure)
    write_tables(outcome.folder, {"complementarity": table})
    if len(table):
        drawn = figure(table, Path(request.model).name, measure, request.figures)
        plots.save(drawn, outcome.folder / "plots" / "complementarity", request.figures)
    files = ("complementarity.csv", "answers.parquet", "plots/")
    return replace(outcome, tables={"complementarity": table, **outcome.tables}, files=files)


def relative(answers: pd.DataFrame, *, seed: int, measure: Measure = "accuracy") -> pd.DataFrame:
    """One row per kind of question (and `OVERALL`) and what is shown.

    Args:
        answers: As in ``answers.parquet``, with the cells of `SHOWN`; those that failed are left
            out.  For the agreement, as `answers.measured` returns them.
        seed: Of the bootstrap.
        measure: What ``correct`` stands for.

    Returns:
        ``kind``, ``shown``, ``n``, ``accuracy`` and that of the whole image, ``relative`` (their
        ratio, 1 for the whole image) with its 95 % interval (whole images resampled, both at once;
        from Wilson's interval of the accuracy where all resamples are equal), ``difference`` in
        accuracy with interval and p-value as of `summary.compared`, and the mean divergence ``kl``.
        With the measure agreement, the columns ``accuracy`` are called ``agreement``, and ``p`` is
        missing: the whole image agrees with itself by definition.
    """
    cells = dict(iter(answers.groupby("label", sort=False)))
    kinds = list(pd.unique(answers["kind"]))
    rows = []
    for kind in [OVERALL, *(kinds if len(kinds) > 1 else ())]:
        parts = {
            label: cell if kind == OVERALL else cell[cell["kind"] == kind]
            for label, cell in cells.items()
        }
        for label, shown in SHOWN.items():
            part, whole = parts.get(label), parts.get(UNCOMPRESSED)
            found = {} if part is None or whole is None else compared(part, whole, seed=seed)
            if part is None or whole is None or not found:
                continue
            part, whole = (one.assign(score=scores(one)) for one in (part, whole))
            both = part.merge(whole, on="question_id", suffixes=("", "_whole"))
            both = both.dropna(subset=["score", "score_whole"])
            right, reference = (both[name].astype(float) for name in ("score", "score_whole"))
            low, high = bootstrap_ratio(right, reference, both["image_id"], seed=seed)
            if (
                low == high and label != UNCOMPRESSED
            ):  # without variation, the bootstrap gives no interval
                low, high = (end / reference.mean() for end in wilson(int(right.sum()), len(right)))
            rows.append(
                {
                    "kind": kind,
                    "shown": shown,
                    "n": found["n"],
                    measure: found["first_accuracy"],
                    f"whole_{measure}": found["second_accuracy"],
                    "relative": right.sum() / reference.sum() if reference.any() else float("nan"),
                    "relative_low": low,
                    "relative_high": high,
                    **{name: found[name] for name in ("difference", "low", "high")},
                    "p": found["p"] if measure == "accuracy" else float("nan"),
                    "kl": part["kl"].mean() if "kl" in part else float("nan"),
                    "visual_tokens": part["kept_patches"].mean() + part["kept_separators"].mean(),
                }
            )
    return pd.DataFrame(rows)
