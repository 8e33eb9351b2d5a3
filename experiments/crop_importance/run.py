"""Crop importance: the thumbnail's score of every crop, and the accuracy lost by dropping one.

After figure 3 of the GlobalCom² paper (arXiv 2501.05179), which scores a crop by the attention that
the thumbnail pays to its region.  Here the highest- and the lowest-scored crop of every image are
dropped and compared with a random one, on the same questions.  Crops are ranked by the mean over
their regions, since regions may have different sizes.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from tokenprune.allocators import SALIENCY, ThumbnailCommand
from tokenprune.compressor import Compressor, Selection, Separators
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.cluster.run import Died, description, workers
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import (
    AGREEMENT_ONLY,
    Measure,
    measured,
    read_answers,
)
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.own_images import with_answers
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.references import region_sizes
from tokenprune.experiments.common.request import QuestionRequest, comparison
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.setting import Setting, prepare, with_crops
from tokenprune.experiments.common.summary import OVERALL, compared
from tokenprune.experiments.compare import run as compare
from tokenprune.experiments.crop_importance.figures import DROPPED, figure, uneven
from tokenprune.layout import TokenLayout
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "HELD",
    "SCORES",
    "SPARED",
    "CropImportanceRequest",
    "DropCrop",
    "crop_of",
    "drops",
    "run",
    "scored",
]


HELD, SPARED = "object dropped", "object spared"
"""Questions about an object in the dropped crop, and about one elsewhere."""


CHUNK = 16
"""The number of images that a worker scores at once."""


_Rows = tuple[list[dict[str, Any]], list[dict[str, Any]]]


SCORES = ("saliency", "cls_logits", "cls_attention", "received", "head_attention")


@dataclass(frozen=True, kw_only=True)
class CropImportanceRequest(QuestionRequest):
    """Which questions to answer without one of the crops.  They are about single images.

    Attributes:
        score: Signal of the vision encoder that scores the thumbnail, one of `SCORES`.
        layer: Encoder layer of the signal.
        seeds: Number of random draws of the dropped crop.
    """

    score: str = "saliency"
    layer: int = -1
    seeds: int = 1


def run(request: CropImportanceRequest, progress: ProgressCallback = silent) -> Outcome:
    """Score the crops of every image, and answer its questions without one of them.

    Where no true answer is known, agreement with the whole image takes the place of accuracy.
    Questions whose image has fewer than two crops are left out.  The folder of the run gets
    ``crops.csv``, ``objects.csv``, ``crop_importance.csv`` and a figure in addition to what
    `compare` writes.

    Returns:
        With the tables ``crop_importance``, as `drops` returns it, ``crops`` and ``objects``, as
        `scored` returns them, unless the run was interrupted.

    Raises:
        UserError: As `compare`, or no image has two crops, or the encoder lacks the signal.
    """
    if request.score not in SCORES:
        raise unknown("score", request.score, SCORES)
    asked = comparison(request, modality="image", seeds=request.seeds)
    setting, left_out = with_crops(
        prepare(asked, progress, needs_answers=False, load=description), least=2
    )
    droppers = _droppers(request)
    columns = [Cell(dropper, name=_label(dropper.which)) for dropper in droppers]
    name = f"crop-importance-{request.score}"
    outcome = compare.run(asked, progress, name=name, columns=columns, setting=setting)
    notes = [f"{left_out} questions were left out: fewer than two crops."] if left_out else []
    if not with_answers(setting.questions):
        notes.append(AGREEMENT_ONLY)
    if outcome.status == "interrupted":
        return replace(outcome, notes=tuple(notes))
    progress(0, 0, "scoring the crops")
    crops, objects = _scored(request, setting, droppers, progress)
    answers, measure = measured(read_answers(outcome.folder))
    table = drops(answers, crops, objects, droppers, seed=request.seed, measure=measure)
    tables = {"crop_importance": table, "crops": crops, "objects": objects}
    write_tables(outcome.folder, tables)
    if len(table):
        model = Path(request.model).name
        drawn = figure(table, crops, objects, model, request.score, measure, request.figures)
        plots.save(drawn, outcome.folder / "plots" / "crop-importance", request.figures)
    if count := uneven(crops):
        notes.insert(
            0,
            f"In {count} of {crops['image_id'].nunique()} images the crops' regions of the "
            "thumbnail differ in size: crops are ranked by the mean over their regions.",
        )
    files = (*(f"{name}.csv" for name in tables), "answers.parquet", "plots/")
    tables |= outcome.tables
    return replace(outcome, tables=tables, files=files, notes=tuple(notes))


def _droppers(request: CropImportanceRequest) -> list["DropCrop"]:
    signal = Signal(request.score, request.layer)
    return [
        DropCrop(which="highest", signal=signal),
        *(DropCrop(which="random", signal=signal, seed=seed) for seed in range(request.seeds)),
        DropCrop(which="lowest", signal=signal),
    ]


def _label(which: str) -> str:
    return f"without the {which} crop" if which != "random" else "without a random crop"


@dataclass(frozen=True, kw_only=True)
class DropCrop(Compressor):
    """Drop one crop: the one with the highest or the lowest score, or a random one.

    A crop's score is the mean of the thumbnail's scores over its region.  GlobalCom² takes their
    sum (`ThumbnailCommand`, arXiv 2501.05179), which gives the same ranking where all regions have
    one size and otherwise prefers large ones.  Images with fewer than two crops stay whole.

    Args:
        which: The crop to drop.
        signal: The scores of the thumbnail.
        seed: Seed of the random crop, combined with the image.
        separators: By default, those of canvas rows with a kept token.
        retention: Has no effect.
    """

    which: Literal["highest", "lowest", "random"]
    signal: Signal = SALIENCY
    seed: int = 0
    retention: float = 0.5
    separators: Separators = "rows"

    name = "drop-crop"

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)  # independent of R

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(n,) float64 score of each crop."""
        sums = ThumbnailCommand(signal=self.signal).richness(tokens)
        return sums / region_sizes(tokens.layout).clamp(min=1).to(sums)

    def crop(self, tokens: VisualTokens) -> int | None:
        """Index of the dropped crop, from 0; None if there are fewer than two."""
        count = tokens.layout.grid[0] * tokens.layout.grid[1]
        if count < 2:
            return None
        if self.which == "random":
            generator = torch.Generator("cpu").manual_seed(hash((self.seed, tokens.seed)) % 2**63)
            return int(torch.randint(count, (), generator=generator, device="cpu"))
        scores = self.scores(tokens)
        return int(scores.argmax() if self.which == "highest" else scores.argmin())

    def select(self, tokens: VisualTokens) -> Selection:
        patches, crop = tokens.layout.patches, self.crop(tokens)
        if crop is None:
            return Selection(patches)
        return Selection(patches[tokens.layout.view[patches] != 1 + crop])


# --- what is measured -----------------------------------------------------------------------------


def _scored(
    request: CropImportanceRequest,
    setting: Setting,
    droppers: Sequence[DropCrop],
    progress: ProgressCallback,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As `scored`, on the workers of ``request`` if it has any."""
    if request.cluster is None:
        return scored(setting, droppers)
    by_image = list(_by_image(setting.questions).values())
    chunks = [by_image[first : first + CHUNK] for first in range(0, len(by_image), CHUNK)]
    found: dict[Any, Any] = {}
    with workers(request, partial(_rows, droppers=tuple(droppers)), progress) as (pool, _):
        tasks: dict[Any, Any] = dict(enumerate(chunks))
        for index, rows in pool.results(deque(tasks), tasks.__getitem__):
            if isinstance(rows, Died):
                raise UserError(f"the workers that score crops die ({rows.why}).")
            found[index] = rows
            progress(len(found), len(chunks), "scoring the crops, 0 failed")
    return _tables([found[index] for index in sorted(found)])


def scored(setting: Setting, droppers: Sequence[DropCrop]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The crops and the objects in them; every image is encoded once.

    Args:
        setting: The model, and the questions with the images.
        droppers: All with the same signal.

    Returns:
        One row per image and crop: ``image_id``, ``crop`` (from 0), ``grid``, ``tokens`` (patch
        tokens), ``region`` (patches of the thumbnail), ``score`` (their mean), ``rank`` (1 is the
        highest), ``centred`` (score minus the mean of the image's crops) and, for every dropper,
        ``dropped highest``, ``dropped random 0`` and so on: whether it drops the crop.  And one row
        per question with a known `Question.place`: ``question_id``, ``image_id`` and the ``crop``
        it lies in, with ``rank`` and ``crops``, how many the image has.
    """
    by_image = list(_by_image(setting.questions).values())
    return _tables([_rows(setting.pipe, by_image, droppers=droppers)])


def _by_image(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Image to the questions about it."""
    found: dict[str, list[Question]] = {}
    for item in questions:
        found.setdefault(item.image_id, []).append(item)
    return found


def _rows(
    pipe: Pipeline, by_image: Sequence[Sequence[Question]], *, droppers: Sequence[DropCrop]
) -> _Rows:
    """The rows of the tables of `scored`, for the questions about each of some images."""
    rows: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for items in by_image:
        image_id = items[0].image_id
        (tokens,) = pipe.encode([items[0].images[0].open()], droppers[0].needs)
        scores = droppers[0].scores(tokens)
        ranks = (scores.argsort(descending=True, stable=True).argsort() + 1).tolist()
        sizes = region_sizes(tokens.layout).tolist()
        dropped = {_column(dropper): dropper.crop(tokens) for dropper in droppers}
        for crop, value in enumerate(scores.tolist()):
            rows.append(
                {
                    "image_id": image_id,
                    "crop": crop,
                    "grid": "x".join(map(str, tokens.layout.grid)),
                    "tokens": tokens.layout.view_sizes[1 + crop],
                    "region": sizes[crop],
                    "score": value,
                    "rank": ranks[crop],
                    "centred": value - float(scores.mean()),
                    **{name: crop == which for name, which in dropped.items()},
                }
            )
        for item in items:
            place = crop_of(tokens.layout, item.place) if item.place else None
            if place is not None:
                where = {"crop": place, "rank": ranks[place], "crops": len(ranks)}
                objects.append({"question_id": item.id, "image_id": image_id, **where})
    return rows, objects


def _tables(parts: Sequence[_Rows]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of `scored`, of the rows of all parts."""
    rows, objects = ([row for part in parts for row in part[which]] for which in (0, 1))
    names = ["question_id", "image_id", "crop", "rank", "crops"]
    return pd.DataFrame(rows), pd.DataFrame(objects, columns=names)


def _column(dropper: DropCrop) -> str:
    return f"dropped {dropper.which}" + (f" {dropper.seed}" if dropper.which == "random" else "")


def drops(
    answers: pd.DataFrame,
    crops: pd.DataFrame,
    objects: pd.DataFrame,
    droppers: Sequence[DropCrop],
    *,
    seed: int,
    measure: Measure = "accuracy",
) -> pd.DataFrame:
    """The accuracy lost by dropping a crop, one row per group of questions and dropped crop.

    Args:
        answers: As in ``answers.parquet``; for the agreement, as `answers.measured` returns them.
        crops, objects: As `scored` returns them.
        droppers: Those that were run.
        seed: Of the bootstrap.
        measure: What ``correct`` stands for.

    Returns:
        ``group`` (`OVERALL`, a kind, and where places are known `HELD` and `SPARED`), ``dropped``,
        ``n``, ``accuracy``, ``drop`` (accuracy with all crops minus that without the one) with
        ``low``, ``high`` and ``p``, and ``vs_random`` (accuracy minus that without a random crop)
        with ``vs_random_low``, ``vs_random_high`` and ``vs_random_p``; intervals and p-values as of
        `summary.compared`.  ``vs_random`` is missing for `HELD` and `SPARED`, which are other
        questions for every crop dropped.  With the measure agreement, the column ``accuracy`` is
        called ``agreement``, ``drop`` is the share of answers that change, and ``p`` is missing;
        ``kl`` is the mean divergence.
    """
    cells = dict(iter(answers.groupby("label", sort=False)))
    gone = {
        (image_id, Cell(dropper).parameters): crop
        for dropper in droppers
        for image_id, crop in crops.loc[crops[_column(dropper)], ["image_id", "crop"]].to_numpy()
    }
    where = dict(zip(objects["question_id"], objects["crop"], strict=True))
    rows = []
    for which in DROPPED:
        whole, part = (cells.get(label) for label in (UNCOMPRESSED, _label(which)))
        if whole is None or part is None:
            continue
        names = part[["question_id", "image_id", "parameters"]].itertuples(index=False)
        inside = pd.Series(
            [
                where[question] == gone[image, parameters] if question in where else pd.NA
                for question, image, parameters in names
            ],
            index=part.index,
            dtype="boolean",
        )
        other = cells.get(_label("random")) if which != "random" else None
        for group, chosen in _groups(part, inside):
            rows += _drop(group, which, whole, chosen, other, seed)
    if measure == "agreement":
        for row in rows:
            row |= {"agreement": row.pop("accuracy"), "p": math.nan}
    order = {group: place for place, group in enumerate(dict.fromkeys(r["group"] for r in rows))}
    return pd.DataFrame(sorted(rows, key=lambda row: order[row["group"]]))


def _drop(
    group: str,
    which: str,
    whole: pd.DataFrame,
    chosen: pd.DataFrame,
    other: pd.DataFrame | None,
    seed: int,
) -> list[dict[str, Any]]:
    """The row of a group of questions and a dropped crop; none if no question is shared.

    Args:
        group: Of questions.
        which: Which crop is dropped.
        whole: Answers from all crops.
        chosen: Answers without the crop, of the group.
        other: Answers without a random crop, if there are any to compare with.
        seed: Of the bootstrap.
    """
    found = compared(whole, chosen, seed=seed)
    if not found:
        return []
    row = {
        "group": group,
        "dropped": which,
        "n": found["n"],
        "accuracy": found["second_accuracy"],
        "drop": found["difference"],
        **{name: found.get(name) for name in ("low", "high", "p")},
        "kl": chosen["kl"].mean() if "kl" in chosen else math.nan,
    }
    if other is not None and group not in (HELD, SPARED):
        against = compared(chosen, other, seed=seed)
        row |= {"vs_random": against.get("difference")}
        row |= {f"vs_random_{end}": against.get(end) for end in ("low", "high", "p")}
    return [row]


def _groups(part: pd.DataFrame, inside: "pd.Series[bool]") -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of ``part`` by group; ``inside`` marks objects in the dropped crop."""
    yield OVERALL, part
    kinds = pd.unique(part["kind"])
    if len(kinds) > 1:
        yield from ((kind, part[part["kind"] == kind]) for kind in kinds)
    if inside.notna().any():
        yield HELD, part[inside.fillna(False)]
        yield SPARED, part[~inside.fillna(True)]


def crop_of(layout: TokenLayout, place: tuple[float, float]) -> int | None:
    """The index of the crop that contains a place of the image; None without crops.

    Args:
        layout: Layout of the packed sequence.
        place: (x, y) as shares of the image's width and height, in [0, 1).
    """
    rows, cols = layout.canvas_shape
    if not rows or not cols:
        return None
    row, col = min(int(place[1] * rows), rows - 1), min(int(place[0] * cols), cols - 1)
    there = (layout.canvas_row == row) & (layout.canvas_col == col)
    return int(layout.view[there.nonzero()[0, 0]]) - 1
