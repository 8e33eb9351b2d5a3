"""What the thumbnail and the crops each contribute: answers from one, from the other, from both.

After figure 2 of the GlobalCom² paper (arXiv 2501.05179).  The accuracy with one kind of view alone
is given relative to that with both, kind of question by kind of question.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.intervals import bootstrap_ratio, wilson
from tokenprune.experiments.common.references import CROPS_ONLY, KeepViews
from tokenprune.experiments.common.run_folder import IMAGE_FREE, THUMBNAIL_ONLY, UNCOMPRESSED
from tokenprune.experiments.common.setting import Outcome, Request, prepare, with_crops
from tokenprune.experiments.common.summary import OVERALL, compared
from tokenprune.experiments.compare.run import compare
from tokenprune.progress import Report

__all__ = [
    "SHOWN",
    "Result",
    "complementarity",
    "figure",
    "relative",
]


SHOWN = {
    UNCOMPRESSED: "both",
    CROPS_ONLY: "crops only",
    THUMBNAIL_ONLY: "thumbnail only",
    IMAGE_FREE: "no image",
}
"""Label of a cell to what the model sees in it."""


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        outcome: Of the run.
        table: As `relative` returns it; empty if the run was interrupted.
        left_out: Questions whose image has no crops.
    """

    outcome: Outcome
    table: pd.DataFrame
    left_out: int


def complementarity(request: Request, report: Report = lambda *_: None) -> Result:
    """Answer every question from the thumbnail, from the crops and from both.

    Methods and retentions of ``request`` are of no meaning.  Videos and prompts of several images
    have no crops, also in LLaVA-OneVision, and are left out.  The folder of the run gets
    ``complementarity.csv`` and a figure besides what `compare` writes.

    Raises:
        UserError: As `compare`, or no image has crops.
    """
    request = replace(request, modality="image")
    setting, left_out = with_crops(prepare(request, report))
    crops = Cell(KeepViews(views="crops"), name=CROPS_ONLY)
    outcome = compare(
        request, report, name="complementarity", columns=[Cell(), crops], setting=setting
    )
    if outcome.status == "interrupted":
        return Result(outcome, pd.DataFrame(), left_out)
    table = relative(read_answers(outcome.folder), seed=request.seed)
    with replace_file(outcome.folder / "complementarity.csv") as temporary:
        write_csv(table, temporary)
    if len(table):
        drawn = figure(table, Path(request.model).name)
        plots.save(drawn, outcome.folder / "plots" / "complementarity")
    return Result(outcome, table, left_out)


def relative(answers: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """One row per kind of question (and `OVERALL`) and what is shown.

    Args:
        answers: As in ``answers.parquet``, with the cells of `SHOWN`; those that failed are left
            out.
        seed: Of the bootstrap.

    Returns:
        ``kind``, ``shown``, ``n``, ``accuracy`` and that of the whole image, ``relative`` (their
        ratio, 1 for the whole image) with its 95 % interval (whole images resampled, both at once;
        from Wilson's interval of the accuracy where all resamples are equal), and ``difference`` in
        accuracy with interval and p-value as of `intervals.compared`.
    """
    cells = dict(iter(answers.groupby("label", sort=False)))
    rows = []
    for kind in [OVERALL, *pd.unique(answers["kind"])]:
        parts = {
            label: cell if kind == OVERALL else cell[cell["kind"] == kind]
            for label, cell in cells.items()
        }
        for label, shown in SHOWN.items():
            part, whole = parts.get(label), parts.get(UNCOMPRESSED)
            found = {} if part is None or whole is None else compared(part, whole, seed=seed)
            if part is None or whole is None or not found:
                continue
            both = part.merge(whole, on="question_id", suffixes=("", "_whole"))
            both = both.dropna(subset=["correct", "correct_whole"])
            right, reference = (both[name].astype(float) for name in ("correct", "correct_whole"))
            low, high = bootstrap_ratio(right, reference, both["image_id"], seed=seed)
            if low == high and label != UNCOMPRESSED:  # nothing varies; that is no certainty
                low, high = (end / reference.mean() for end in wilson(int(right.sum()), len(right)))
            rows.append(
                {
                    "kind": kind,
                    "shown": shown,
                    "n": found["n"],
                    "accuracy": found["first_accuracy"],
                    "whole_accuracy": found["second_accuracy"],
                    "relative": right.sum() / reference.sum() if reference.any() else float("nan"),
                    "relative_low": low,
                    "relative_high": high,
                    **{name: found[name] for name in ("difference", "low", "high", "p")},
                    "visual_tokens": part["kept_patches"].mean() + part["kept_separators"].mean(),
                }
            )
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame, model: str) -> Figure:
    """Relative accuracy as bars, one group for each kind of question.

    Args:
        table: As `relative` returns it.
        model: What to call the model.
    """
    shown = [name for name in SHOWN.values() if name != SHOWN[UNCOMPRESSED]]
    table = table[table["shown"].isin(shown)]
    kinds = [kind for kind in pd.unique(table["kind"]) if kind != OVERALL]
    if len(kinds) == 1:
        kinds = []
    n = table.groupby("kind")["n"].max()
    return plots.bars(
        table.assign(
            place=table["kind"], value=table["relative"],
            low=table["relative_low"], high=table["relative_high"],
        ),
        places={kind: f"{kind}\n({n[kind]})" for kind in (OVERALL, *kinds)},
        hues=shown,
        title=f"What {model} answers from the thumbnail or the crops alone",
        subtitle="accuracy relative to the whole image (100 %), number of questions in brackets; "
        "bars: 95 % confidence intervals",
        label="relative accuracy",
        reference=1.0,
        colours={SHOWN[IMAGE_FREE]: "#bdbdbd"},
    )  # fmt: skip
