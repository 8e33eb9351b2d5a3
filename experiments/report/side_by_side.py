"""Several runs of `compare` side by side, as one table."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tokenprune.errors import UserError
from tokenprune.experiments.common.formatting import measure
from tokenprune.experiments.common.reading import answers_of, experiment_of
from tokenprune.experiments.common.summary import OVERALL, summarise

__all__ = [
    "markdown",
    "read",
    "side_by_side",
]


_MISSING = "–"


def side_by_side(
    folders: Sequence[Path], notes: list[str], metric: str | None = None
) -> pd.DataFrame:
    """One row per method, one column per run: accuracies and, in brackets, the decoder's FLOPs.

    Args:
        folders: Folders of runs.
        notes: Receives a sentence for each run whose table is older than its answers.
        metric: As in `read`.

    Returns:
        Texts, indexed by method, highest retention first: accuracies in %, FLOPs in % of the
        uncompressed prefill; «–» where a run does not have the method.

    Raises:
        UserError: A folder is not a run folder, or no cell of its run is finished.
    """
    columns = {}
    for folder in folders:
        name, summary = read(folder, notes, metric)
        steps = sorted(summary["retention"].unique(), reverse=True)
        steps = [step for step in steps if step < 1] or steps
        shares = {
            "accuracy": summary["accuracy"],
            "flops": summary["flops"] / summary["uncompressed_flops"],
        }
        accuracy, flops = (
            summary.assign(share=100 * share)
            .pivot_table(index="label", columns="retention", values="share", sort=False)
            .reindex(columns=sorted({1.0, *steps}))
            for share in shares.values()
        )
        columns[f"{name}: {' / '.join(f'{100 * step:.3g}' for step in steps)} %"] = pd.Series(
            {
                label: f"{_spell(accuracy.loc[label], steps, 1)} "
                f"({_spell(flops.loc[label], steps, 0)})"
                for label in accuracy.index
            }
        )
    table = pd.DataFrame(columns)
    first = table.index == "uncompressed"
    others = table[~first].sort_index()
    return pd.concat([table[first], others]).fillna(_MISSING)


def markdown(table: pd.DataFrame) -> str:
    """A data frame of texts as a Markdown table."""
    rows = [["method", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [[str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _spell(row: "pd.Series[float]", steps: Sequence[float], digits: int) -> str:
    if row[steps].isna().all():  # the uncompressed model, or a chain with its own retention
        return f"{row[1.0]:.{digits}f}"
    return " / ".join(_MISSING if pd.isna(row[s]) else f"{row[s]:.{digits}f}" for s in steps)


def read(folder: Path, notes: list[str], metric: str | None = None) -> tuple[str, pd.DataFrame]:
    """Model, modality and metric (unless exact) of a run, and its summary of all questions.

    Matched methods have the retention of `uniform` whose cost they have.

    Args:
        folder: Folder of a run.
        notes: Receives a sentence if the run's table is older than its answers.
        metric: Scores the answers instead of the metric of the run (`metrics.with_metric`).

    Raises:
        UserError: It is not a run folder, or no cell of its run is finished.
    """
    experiment = experiment_of(folder)
    answers = answers_of(folder, notes, metric).assign(kind=OVERALL)
    summary = summarise(answers, seed=0)
    done = summary[summary["status"] == "ok"]
    # With --match: the ratio of uniform, whose cost it has, not the solved one.
    done = done.assign(retention=done["asked_retention"].fillna(done["retention"]))
    done = done.dropna(subset="retention")  # answers without the image or from one kind of view
    if done.empty:
        raise UserError(f"no cell is finished in {str(folder)!r}; run the command again.")
    kinds = ", ".join(experiment["modality"])
    scored = measure(done).removeprefix("accuracy")
    return f"{Path(experiment['model']).name}, {kinds}{scored}", done
