"""The figure of complementarity."""

import pandas as pd
from matplotlib.figure import Figure

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import Measure
from tokenprune.experiments.common.references import CROPS_ONLY
from tokenprune.experiments.common.request import FIGURES, FigureOptions
from tokenprune.experiments.common.run_folder import IMAGE_FREE, THUMBNAIL_ONLY, UNCOMPRESSED
from tokenprune.experiments.common.summary import OVERALL

__all__ = [
    "SHOWN",
    "figure",
]


SHOWN = {
    UNCOMPRESSED: "both",
    CROPS_ONLY: "crops only",
    THUMBNAIL_ONLY: "thumbnail only",
    IMAGE_FREE: "no image",
}
"""Maps the label of a cell to the views that the model sees."""


def figure(
    table: pd.DataFrame,
    model: str,
    measure: Measure = "accuracy",
    options: FigureOptions = FIGURES,
) -> Figure:
    """Relative accuracy, or agreement, as bars, one group for each kind of question.

    Args:
        table: As `complementarity.run.relative` returns it.
        model: Name of the model.
        measure: What the table measures.
        options: Width and titles.
    """
    relative = measure == "accuracy"
    what = "accuracy relative to that on" if relative else "agreement with the answer from"
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
        subtitle=f"{what} the whole image (dashed, 100 %); in brackets: number of questions; "
        "lines: 95 % confidence intervals",
        label="relative accuracy (%)" if relative else "agreement (%)",
        reference=1.0,
        colours={SHOWN[IMAGE_FREE]: "#bdbdbd"},
        options=options,
    )  # fmt: skip
