"""What a crop is worth: the thumbnail's score of every crop, and what dropping one costs.

After figure 3 of the GlobalCom² paper (arXiv 2501.05179), which scores a crop by the attention that
the thumbnail pays to its region.  Here the highest- and the lowest-scored crop of every image are
dropped and compared with a random one, on the same questions.  Crops are ranked by the mean over
their regions, since a thumbnail of 7 x 7 patches has no two halves of one size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from tokenprune.allocators import SALIENCY, ThumbnailCommand
from tokenprune.compressor import Compressor, Selection, Separators
from tokenprune.errors import unknown
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.intervals import wilson
from tokenprune.experiments.common.plots import FAINT, INK, style, titles
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.references import region_sizes
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.setting import Outcome, Request, Setting, prepare, with_crops
from tokenprune.experiments.common.summary import OVERALL, compared
from tokenprune.experiments.compare.run import compare
from tokenprune.layout import TokenLayout
from tokenprune.progress import Report
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = [
    "DROPPED",
    "HELD",
    "SCORES",
    "SPARED",
    "DropCrop",
    "Result",
    "crop_importance",
    "crop_of",
    "drops",
    "figure",
    "holding",
    "scored",
]


DROPPED = ("highest", "random", "lowest")
"""Which crop is dropped."""


HELD, SPARED = "object dropped", "object spared"
"""Questions about an object in the dropped crop, and about one elsewhere."""


SCORES = ("saliency", "cls_logits", "cls_attention", "received", "head_attention")


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        outcome: Of the run.
        crops, objects: As `scored` returns them.
        table: As `drops` returns it.  All three are empty if the run was interrupted.
        left_out: Questions whose image has fewer than two crops.
    """

    outcome: Outcome
    crops: pd.DataFrame
    objects: pd.DataFrame
    table: pd.DataFrame
    left_out: int

    @property
    def uneven(self) -> int:
        """In how many images the crops' regions of the thumbnail differ in size."""
        return _uneven(self.crops)


def crop_importance(
    request: Request,
    report: Report = lambda *_: None,
    *,
    score: str = "saliency",
    layer: int = -1,
) -> Result:
    """Score the crops of every image, and answer its questions without one of them.

    Methods and retentions of ``request`` are of no meaning; ``seeds`` is the number of random crops
    that are dropped in turn.  The folder of the run gets ``crops.csv``, ``objects.csv``,
    ``crop_importance.csv`` and a figure besides what `compare` writes.

    Args:
        request: Model, questions and so on.
        report: Told how far it is.
        score: Signal of the vision tower that the thumbnail is scored by, one of `SCORES`.
        layer: Encoder layer of the signal.

    Raises:
        UserError: As `compare`, or no image has two crops, or the tower lacks the signal.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)
    request = replace(request, modality="image")
    setting, left_out = with_crops(prepare(request, report), least=2)
    signal = Signal(score, layer)  # type: ignore[arg-type]  # checked above
    droppers = [
        DropCrop(which="highest", signal=signal),
        *(DropCrop(which="random", signal=signal, seed=seed) for seed in range(request.seeds)),
        DropCrop(which="lowest", signal=signal),
    ]
    columns = [Cell(dropper, name=_label(dropper.which)) for dropper in droppers]
    outcome = compare(
        request, report, name=f"crop-importance-{score}", columns=columns, setting=setting
    )
    if outcome.status == "interrupted":
        return Result(outcome, pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), left_out)
    report(0, 0, "scoring the crops")
    crops, objects = scored(setting, droppers)
    table = drops(read_answers(outcome.folder), crops, objects, droppers, seed=request.seed)
    for name, made in (("crops", crops), ("objects", objects), ("crop_importance", table)):
        with replace_file(outcome.folder / f"{name}.csv") as temporary:
            write_csv(made, temporary)
    if len(table):
        drawn = figure(table, crops, objects, Path(request.model).name, score)
        plots.save(drawn, outcome.folder / "plots" / "crop-importance")
    return Result(outcome, crops, objects, table, left_out)


def _label(which: str) -> str:
    return f"without the {which} crop" if which != "random" else "without a random crop"


@dataclass(frozen=True, kw_only=True)
class DropCrop(Compressor):
    """Drop one crop: that of the highest or of the lowest score, or any.

    A crop's score is the mean of the thumbnail's scores over its region.  GlobalCom² takes their
    sum (`ThumbnailCommand`, arXiv 2501.05179), which ranks alike where all regions are of one size
    and otherwise prefers large ones.  Images of fewer than two crops stay whole.

    Args:
        which: The crop to drop.
        signal: The thumbnail's scores.
        seed: Of the random crop; together with the image it draws one.
        separators: Those of the canvas rows of which something is kept.
        retention: Of no meaning here.
    """

    which: Literal["highest", "lowest", "random"]
    signal: Signal = SALIENCY
    seed: int = 0
    retention: float = 0.5
    separators: Separators = "rows"

    name = "drop-crop"

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)  # R has no say

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({self.signal})

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(n,) float64 score of each crop."""
        sums = ThumbnailCommand(signal=self.signal).richness(tokens)
        return sums / region_sizes(tokens.layout).clamp(min=1).to(sums)

    def crop(self, tokens: VisualTokens) -> int | None:
        """Which crop is dropped, counted from 0; None where there are fewer than two."""
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


def scored(setting: Setting, droppers: Sequence[DropCrop]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The crops and the objects in them; every image is encoded once.

    Args:
        setting: The model, and the questions whose images are looked at.
        droppers: All with the same signal.

    Returns:
        One row per image and crop: ``image_id``, ``crop`` (from 0), ``grid``, ``tokens`` (patch
        tokens), ``region`` (patches of the thumbnail), ``score`` (their mean), ``rank`` (1 is the
        highest), ``centred`` (score minus the mean of the image's crops) and, for every dropper,
        ``dropped highest``, ``dropped random 0`` and so on: whether it drops the crop.  And one row
        per question with a known `Question.place`: ``question_id``, ``image_id`` and the ``crop``
        it lies in, with ``rank`` and ``crops``, how many the image has.
    """
    asked: dict[str, list[Question]] = {}
    for item in setting.questions:
        asked.setdefault(item.image_id, []).append(item)
    rows, objects = [], []
    for image_id, items in asked.items():
        (tokens,) = setting.adapter.encode([items[0].images[0].open()], droppers[0].needs)
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
    names = ["question_id", "image_id", "crop", "rank", "crops"]
    return pd.DataFrame(rows), pd.DataFrame(objects, columns=names)


def _uneven(crops: pd.DataFrame) -> int:
    return int((crops.groupby("image_id")["region"].nunique() > 1).sum()) if len(crops) else 0


def _column(dropper: DropCrop) -> str:
    return f"dropped {dropper.which}" + (f" {dropper.seed}" if dropper.which == "random" else "")


def drops(
    answers: pd.DataFrame,
    crops: pd.DataFrame,
    objects: pd.DataFrame,
    droppers: Sequence[DropCrop],
    *,
    seed: int,
) -> pd.DataFrame:
    """What dropping a crop costs, one row per group of questions and dropped crop.

    Args:
        answers: As in ``answers.parquet``.
        crops, objects: As `scored` returns them.
        droppers: Those that were run.
        seed: Of the bootstrap.

    Returns:
        ``group`` (`OVERALL`, a kind, and where places are known `HELD` and `SPARED`), ``dropped``,
        ``n``, ``accuracy``, ``drop`` (accuracy with all crops minus that without the one) with
        ``low``, ``high`` and ``p``, and ``vs_random`` (accuracy minus that without a random crop)
        with ``vs_random_low``, ``vs_random_high`` and ``vs_random_p``; intervals and p-values as of
        `intervals.compared`.  ``vs_random`` is missing for `HELD` and `SPARED`, which are other
        questions for every crop dropped.
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
        for group, chosen in _groups(part, inside):
            found = compared(whole, chosen, seed=seed)
            if not found:
                continue
            row = {
                "group": group,
                "dropped": which,
                "n": found["n"],
                "accuracy": found["second_accuracy"],
                "drop": found["difference"],
                **{name: found.get(name) for name in ("low", "high", "p")},
            }
            other = cells.get(_label("random"))
            if which != "random" and other is not None and group not in (HELD, SPARED):
                against = compared(chosen, other, seed=seed)
                row |= {"vs_random": against.get("difference")}
                row |= {f"vs_random_{end}": against.get(end) for end in ("low", "high", "p")}
            rows.append(row)
    order = {group: place for place, group in enumerate(dict.fromkeys(r["group"] for r in rows))}
    return pd.DataFrame(sorted(rows, key=lambda row: order[row["group"]]))


def _groups(part: pd.DataFrame, inside: "pd.Series[bool]") -> Iterator[tuple[str, pd.DataFrame]]:
    """Group to the rows of ``part`` in it; ``inside`` tells whose object is in the dropped crop."""
    yield OVERALL, part
    kinds = pd.unique(part["kind"])
    if len(kinds) > 1:
        yield from ((kind, part[part["kind"] == kind]) for kind in kinds)
    if inside.notna().any():
        yield HELD, part[inside.fillna(False)]
        yield SPARED, part[~inside.fillna(True)]


def holding(objects: pd.DataFrame) -> pd.DataFrame:
    """How often the object that is asked about lies in the crop of each rank.

    Args:
        objects: As `scored` returns it; only images of the commonest number of crops count.

    Returns:
        ``rank``, ``n`` (questions about an object), ``share`` with its 95 % Wilson interval ``low``
        and ``high``, and ``chance``, the share of an arbitrary crop.
    """
    if objects.empty:
        return pd.DataFrame()
    crops = int(objects["crops"].mode().iloc[0])
    usual = objects[objects["crops"] == crops]
    rows = []
    for rank in range(1, crops + 1):
        found = int((usual["rank"] == rank).sum())
        low, high = wilson(found, len(usual))
        row = {"rank": rank, "n": len(usual), "share": found / len(usual)}
        rows.append(row | {"low": low, "high": high, "chance": 1 / crops})
    return pd.DataFrame(rows)


# --- the figure -----------------------------------------------------------------------------------

_HUES = {"highest": "#c44e52", "random": "#8c8c8c", "lowest": "#4c72b0"}


def figure(
    table: pd.DataFrame, crops: pd.DataFrame, objects: pd.DataFrame, model: str, score: str
) -> Figure:
    """Scores by rank, where the objects lie, and what dropping a crop costs.

    Args:
        table: As `drops` returns it.
        crops, objects: As `scored` returns them.
        model: What to call the model.
        score: What the thumbnail was scored by.
    """
    held = holding(objects)
    widths = [1.1, 0.9, 2.2] if len(held) else [1.1, 2.4]
    with style():
        figure = Figure(figsize=(3.9 * sum(widths), 5.6), layout="constrained")
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        _scores(panels[0], crops)
        if len(held):
            _objects(panels[1], held)
        _costs(panels[-1], table)
        for axes in panels:
            axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)
            axes.xaxis.label.set_size(13)
            axes.yaxis.label.set_size(13)
        images = crops["image_id"].nunique()
        titles(
            figure,
            f"What a crop is worth to {model}",
            f"{images} images; score of a crop: {score} of the thumbnail, mean over its region "
            f"(of unequal sizes in {_uneven(crops)} images); bars: 95 % confidence intervals",
        )
    return figure


def _scores(axes: Axes, crops: pd.DataFrame) -> None:
    count = crops.groupby("image_id")["crop"].transform("size")
    usual = crops[count == count.mode().iloc[0]]
    ranks = sorted(usual["rank"].unique())
    line = {"color": INK, "linewidth": 1.2}
    # Not seaborn's, which hands Matplotlib an argument that it is about to drop.
    axes.boxplot(
        [usual["centred"][usual["rank"] == rank] for rank in ranks],
        positions=range(len(ranks)), widths=0.6, showfliers=False, patch_artist=True,
        boxprops={"facecolor": "#d9d9d9", "edgecolor": INK, "linewidth": 1.2},
        medianprops=line, whiskerprops=line, capprops=line,
    )  # fmt: skip
    sns.stripplot(
        usual, x="rank", y="centred", order=ranks, ax=axes, color=INK, size=2.5, alpha=0.35
    )
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set(xlabel="rank of the crop", ylabel="score minus the image's mean")
    axes.set_title(f"Scores ({usual['image_id'].nunique()} images)", loc="left", fontsize=13)


def _objects(axes: Axes, held: pd.DataFrame) -> None:
    errors = [held["share"] - held["low"], held["high"] - held["share"]]
    axes.bar(held["rank"], held["share"], 0.7, color="#d9d9d9", zorder=2)
    axes.errorbar(
        held["rank"], held["share"], yerr=errors, ls="", color=INK, elinewidth=1.3, zorder=3
    )
    chance = held["chance"].iloc[0]
    axes.axhline(chance, color=FAINT, lw=1.2, ls=(0, (5, 3)), zorder=4)
    axes.annotate(
        "chance", (1, chance), xycoords=axes.get_yaxis_transform(), ha="right", va="bottom",
        fontsize=11, color=FAINT,
    )  # fmt: skip
    axes.set(xlabel="rank of the crop", ylabel="share of objects asked about")
    axes.set_xticks(held["rank"])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_title(f"Where the object is ({held['n'].iloc[0]} questions)", loc="left", fontsize=13)


def _costs(axes: Axes, table: pd.DataFrame) -> None:
    groups = list(pd.unique(table["group"]))
    plots.grouped_bars(
        axes,
        table.assign(place=table["group"], shown=table["dropped"], value=table["drop"]),
        {group: group.replace(" ", "\n") for group in groups},
        DROPPED,
        _HUES,
    )
    axes.axhline(0, color=INK, lw=1.2)
    axes.set_ylabel("accuracy lost")
    axes.legend(
        title="dropped crop", frameon=False, fontsize=12, title_fontsize=12, loc="upper left"
    )
    axes.set_title("What dropping one costs", loc="left", fontsize=13)


def crop_of(layout: TokenLayout, place: tuple[float, float]) -> int | None:
    """The crop that a place of the image lies in, counted from 0; None where there are no crops.

    Args:
        layout: Of the image's packed sequence.
        place: (x, y) as shares of the image's width and height, in [0, 1).
    """
    rows, cols = layout.canvas_shape
    if not rows or not cols:
        return None
    row, col = min(int(place[1] * rows), rows - 1), min(int(place[0] * cols), cols - 1)
    there = (layout.canvas_row == row) & (layout.canvas_col == col)
    return int(layout.view[there.nonzero()[0, 0]]) - 1
