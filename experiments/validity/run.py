"""How far the ranking of methods in a run agrees with published rankings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokenprune.compatibility import compatible_methods
from tokenprune.errors import UserError
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.files import check_writable
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.published import averages, figures, nearest
from tokenprune.experiments.common.published_models import MODELS, published_model
from tokenprune.experiments.common.reading import answers_of, experiment_of
from tokenprune.experiments.common.request import QuestionRequest, comparison
from tokenprune.experiments.common.setting import prepare
from tokenprune.experiments.common.summary import scores
from tokenprune.experiments.compare import run as compare
from tokenprune.experiments.validity.agreement import Stratum, interval, signs, tau_b
from tokenprune.progress import ProgressCallback, silent
from tokenprune.registry import strategies

__all__ = [
    "POOLED",
    "ValidityRequest",
    "pairs_of",
    "strata",
    "taus",
    "validity",
]


POOLED = "pooled"
"""The ``source`` of the row over all sources."""


_COUNTERPARTS = {"testbed-next": "llava-next-7b", "testbed-onevision": "llava-onevision-7b"}


_RESAMPLES = 4000


@dataclass(frozen=True, kw_only=True)
class ValidityRequest(QuestionRequest):
    """Which rankings to compare.

    Attributes:
        folder: The folder of a comparison; None to run one, of all methods that have published
            figures and run on the model, at the published retention ratios.
        published: The model of the published figures; None for the counterpart of the run's model.
        seed: Of the bootstrap, and of the questions of a new comparison.
        out: Folder of the tables; None for that of the comparison.
    """

    folder: Path | None = None
    published: str | None = None


def validity(request: ValidityRequest, progress: ProgressCallback = silent) -> Outcome:
    """Kendall's tau-b between measured and published rankings, and the pairs that disagree.

    Returns:
        With the tables ``validity`` (`taus`) and ``pairs`` (`pairs_of`), which are also written as
        CSV, unless a new comparison was interrupted.

    Raises:
        UserError: Bad input, or no two methods that can be compared.
    """
    check_number("seed", request.seed)
    if request.published is not None:  # a Hub id stands for its model
        (model,) = figures(request.published)["model"].unique()
        request = replace(request, published=model)
    notes: list[str] = []
    if request.folder is None:
        outcome = _comparison(request, progress)
        if outcome.status == "interrupted":
            return outcome
    else:
        check_writable(request.out or request.folder)
        outcome = Outcome(request.folder)
    experiment = experiment_of(outcome.folder)
    answers = answers_of(outcome.folder, notes)
    model = request.published or _counterpart(experiment["model"])
    found = _published(model, experiment["modality"])
    compared = strata(answers, found, seed=request.seed)
    notes += _left_out(found, compared)
    tables = {"validity": taus(compared), "pairs": pairs_of(compared)}
    folder = request.out or outcome.folder
    names = {"validity": f"validity-{model}", "pairs": f"validity-pairs-{model}"}
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, {names[name]: table for name, table in tables.items()})
    files = tuple(f"{name}.csv" for name in names.values())
    about = {"run": experiment["model"], "published": model}
    return replace(
        outcome, folder=folder, tables=tables, files=files, notes=tuple(notes), about=about
    )


def _counterpart(model: str) -> str:
    """The published model that a run of ``model`` is compared with."""
    found = _COUNTERPARTS.get(model) or published_model(model)
    if found is None:
        raise UserError(
            f"{model} has no counterpart with published figures; choose one with --published: "
            f"{', '.join(MODELS)}."
        )
    return found


def _published(model: str, modalities: Sequence[str]) -> pd.DataFrame:
    found = figures(model)
    found = found[found["modality"].isin(modalities)]
    if found.empty:
        shown = ", ".join(modalities)
        raise UserError(f"no figures of {model} for the modality {shown} are published here.")
    return averages(found)


def _comparison(request: ValidityRequest, progress: ProgressCallback) -> Outcome:
    """A new comparison of the methods that have published figures, at their retention ratios."""
    found = _published(
        request.published or _counterpart(request.model), [request.modality or "image"]
    )
    setting = prepare(comparison(request), progress, keep_faulty=True)
    runs = set(compatible_methods(setting.pipe.adapter.facts))
    methods = sorted(set(found["method"]) & runs)
    asked = comparison(
        request, methods=methods, retention=sorted(found["retention"].unique(), reverse=True)
    )
    outcome = compare.run(asked, progress, setting=setting)
    registered = set(found["method"]) & set(strategies.names())
    skipped = dict.fromkeys(sorted(registered - runs), f"it does not run on {request.model}.")
    return replace(outcome, skipped={**outcome.skipped, **skipped})


def strata(answers: pd.DataFrame, published: pd.DataFrame, *, seed: int) -> list[Stratum]:
    """The published rankings, each with the ranking of the run at the nearest retention ratio.

    A method of the run takes part if it has no options and no failed cell.  All accuracies are over
    the questions that all these cells answered, and all resamples draw the same images.

    Args:
        answers: As in ``answers.parquet``.
        published: As `averages` returns it.
        seed: Of the bootstrap.

    Raises:
        UserError: No two methods of a published ranking can be compared.
    """
    wide, images = _rights(answers)
    retentions = sorted({retention for _, retention in wide.columns})
    chosen = []
    for (source, table, at), group in published.groupby(["source", "table", "retention"]):
        retention = nearest(at, retentions)
        if retention is None:
            continue
        mine = group[[(name, retention) in wide.columns for name in group["method"]]]
        if len(mine) > 1:
            chosen.append((source, table, at, retention, mine.sort_values("method")))
    if not chosen:
        raise UserError(
            "no two methods of the run have published figures near its retention ratios; run "
            "'tokenprune validity' without a folder, which compares those that have."
        )
    cells = list(dict.fromkeys((m, r) for *_, r, mine in chosen for m in mine["method"]))
    wide = wide[cells].dropna()
    if wide.empty:
        raise UserError("no question was answered by all methods that have published figures.")
    resampled = _resampled(wide, images.reindex(wide.index), seed)
    found = []
    for source, table, at, retention, mine in chosen:
        places = [cells.index((name, retention)) for name in mine["method"]]
        found.append(
            Stratum(
                source,
                table,
                float(at),
                retention,
                tuple(mine["method"]),
                mine["average"].to_numpy(float),
                wide.mean().to_numpy(float)[places],
                resampled[:, places],
            )
        )
    return found


def _rights(answers: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """How right each cell is on each question, and the image of each question.

    Returns:
        (questions, cells): columns are pairs of method and requested retention ratio, in [0, 1];
        the mean over seeds.
    """
    asked = answers.get("asked_retention", answers["retention"]).fillna(answers["retention"])
    table = answers.assign(asked=asked, right=scores(answers))
    table = table[(table["label"] == table["method"]) & (table["asked"] < 1)]
    failed = table[table["status"] == "failed"].groupby(["method", "asked"]).size().index
    wide = table.pivot_table(
        index="question_id", columns=["method", "asked"], values="right", aggfunc="mean"
    )
    wide = wide.drop(columns=[cell for cell in failed if cell in wide.columns])
    wide.columns = wide.columns.to_flat_index()
    images = answers.drop_duplicates("question_id").set_index("question_id")["image_id"]
    return wide.astype(float), images


def _resampled(wide: pd.DataFrame, images: pd.Series, seed: int) -> np.ndarray[Any, Any]:
    """(b, cells) accuracies on resamples of whole images."""
    codes, names = pd.factorize(images)
    sums = wide.groupby(codes).sum().to_numpy(float)
    sizes = np.bincount(codes).astype(float)
    generator = np.random.default_rng(seed)
    count = len(names)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)
    found: np.ndarray[Any, Any] = (drawn @ sums) / (drawn @ sizes)[:, None]
    return found


def taus(compared: Sequence[Stratum]) -> pd.DataFrame:
    """Tau-b of every published ranking, of every source, and of all sources together.

    Returns:
        ``source``, ``table``, ``at`` (published retention ratio) and ``retention`` (of the run),
        which are missing where rankings are pooled; the numbers of ``methods``, of ``pairs`` and
        of the ``concordant``, ``discordant`` and ``tied`` among them; ``tau`` with its 95 %
        interval ``low`` to ``high``, for which images of the run are resampled and the published
        figures are fixed.
    """
    rows = []
    for source in dict.fromkeys(one.source for one in compared):
        mine = [one for one in compared if one.source == source]
        rows += [_tau([one], source, one.table, one.at, one.retention) for one in mine]
        if len(mine) > 1:
            rows.append(_tau(mine, source))
    if len({one.source for one in compared}) > 1:
        rows.append(_tau(compared, POOLED))
    return pd.DataFrame(rows)


def _tau(
    parts: Sequence[Stratum],
    source: str,
    table: str | None = None,
    at: float | None = None,
    retention: float | None = None,
) -> dict[str, Any]:
    published = [signs(one.published) for one in parts]
    measured = [signs(one.measured) for one in parts]
    resampled = tau_b([signs(one.resampled) for one in parts], published)
    products = np.concatenate([one * other for one, other in zip(published, measured, strict=True)])
    low, high = interval(resampled)
    return {
        "source": source,
        "table": table,
        "at": at,
        "retention": retention,
        "methods": len({name for one in parts for name in one.methods}),
        "pairs": len(products),
        "concordant": int((products > 0).sum()),
        "discordant": int((products < 0).sum()),
        "tied": int((products == 0).sum()),
        "tau": float(tau_b(measured, published)),
        "low": low,
        "high": high,
    }


_ORDERS = {1.0: "agrees", -1.0: "disagrees", 0.0: "tied"}


def pairs_of(compared: Sequence[Stratum]) -> pd.DataFrame:
    """All pairs of methods of every ranking.

    Returns:
        ``source``, ``table``, ``at``, ``retention``; ``first`` and ``second``, of which the first
        has the higher published average; by how much, in shares: ``published_difference`` of
        relative averages, ``measured_difference`` of accuracies; ``order`` (agrees, disagrees or
        tied); ``opposed``, the share of resamples in which the second has the higher accuracy.
    """
    return pd.DataFrame([row for one in compared for row in _pairs(one)])


def _pairs(one: Stratum) -> Iterator[dict[str, Any]]:
    agree = signs(one.published) * signs(one.measured)
    ordered = signs(one.published)
    resampled = signs(one.resampled)
    for place, (i, j) in enumerate(zip(*np.triu_indices(len(one.methods), 1), strict=True)):
        better, worse = (j, i) if ordered[place] < 0 else (i, j)
        opposed = resampled[:, place] == (1.0 if better == j else -1.0)
        yield {
            "source": one.source,
            "table": one.table,
            "at": one.at,
            "retention": one.retention,
            "first": one.methods[better],
            "second": one.methods[worse],
            "published_difference": one.published[better] - one.published[worse],
            "measured_difference": one.measured[better] - one.measured[worse],
            "order": _ORDERS[float(agree[place])],
            "opposed": float(opposed.mean()),
        }


def _left_out(published: pd.DataFrame, compared: Sequence[Stratum]) -> Iterator[str]:
    """Sentences about published rankings and methods that are not compared."""
    used = {(one.source, one.table, one.at) for one in compared}
    ratios = published.groupby(["source", "table", "retention"]).size().index
    for source, table, at in ratios:
        if (source, table, at) not in used:
            yield (
                f"{source}, {table} at R = {at:g} is left out: the run has fewer than two of its "
                "methods near that retention."
            )
    known = {name for name in published["method"] if name in strategies.names()}
    if missing := known - {name for one in compared for name in one.methods}:
        yield f"The run lacks methods that have published figures: {', '.join(sorted(missing))}."
