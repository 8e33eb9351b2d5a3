"""Any option of any method swept, every value compared with the first on the same questions."""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.errors import UserError
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_csv
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.intervals import holm
from tokenprune.experiments.common.plots import INK, MARKERS, style, titles
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.setting import Outcome, Request, prepare
from tokenprune.experiments.common.summary import OVERALL, compared
from tokenprune.experiments.compare.run import compare
from tokenprune.progress import Report

__all__ = [
    "PAPER",
    "Point",
    "Result",
    "Sweep",
    "ablation",
    "differences",
    "figure",
    "parse_sweep",
]


MOST = 1000  # settings of a sweep


DEFAULT = "default"
"""The value that stands for what an option is when it is not given."""


PAPER = (
    "globalcom2:alpha=0.5,0,0.25,0.75,1",
    "globalcom2:tau=10,0.1,1,5,20,100",
    "globalcom2:allocator=default,proportional,topk,max",
    "globalcom2:score=saliency,cls_attention,received",
    "globalcom2:normalisation=l2,minmax,none",
    "globalcom2:separators=all,rows,none",
    "fastv:allocator=default,proportional,globalcom2",
    "divprune:allocator=default,proportional,globalcom2",
)
"""What GlobalCom² is made of: how much the thumbnail says about tokens (alpha: 0 is the crop alone,
1 the thumbnail alone) and about crops (allocator: nothing, no borders, the largest score or the sum
of scores), at which temperature, from which score, with which separators; and its allocation under
other rankings.  The first value is the method's own."""


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: its values by option, and the spec that makes it."""

    values: tuple[tuple[str, str], ...]
    spec: str


@dataclass(frozen=True)
class Sweep:
    """A method, and one or two options with the values they take.

    Attributes:
        text: As it was written.
        method: Its name.
        options: Option to its values; a single value is fixed.
    """

    text: str
    method: str
    options: dict[str, tuple[str, ...]]

    @property
    def swept(self) -> tuple[str, ...]:
        """Options with several values."""
        return tuple(name for name, values in self.options.items() if len(values) > 1)

    @property
    def title(self) -> str:
        """The method and the options that stay the same."""
        fixed = [f"{name}={values[0]}" for name, values in self.options.items() if len(values) == 1]
        return f"{self.method}{':' * bool(fixed)}{','.join(fixed)}"

    @property
    def points(self) -> list[Point]:
        """Every combination of values, the first values first."""
        made = []
        for values in itertools.product(*self.options.values()):
            chosen = dict(zip(self.options, values, strict=True))
            given = ",".join(f"{n}={v}" for n, v in chosen.items() if v != DEFAULT)
            shown = tuple((name, chosen[name]) for name in self.swept)
            made.append(Point(shown, f"{self.method}{':' * bool(given)}{given}"))
        return made


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        outcome: Of the run.
        table: As `differences` returns it; empty if the run was interrupted.
        skipped: Settings that the model lacks something for, and what.
    """

    outcome: Outcome
    table: pd.DataFrame
    skipped: dict[str, str]


def parse_sweep(text: str) -> Sweep:
    """Read ``method:option=value,value;option=value,value``.

    Options may also be separated by commas, as in a spec: a comma in front of ``name=`` begins an
    option, any other one a value.  ``default`` stands for what an option is when it is not given.

    >>> parse_sweep("globalcom2:alpha=0,0.5;tau=1,10,score=received").options
    {'alpha': ('0', '0.5'), 'tau': ('1', '10'), 'score': ('received',)}

    Raises:
        UserError: The text is not of that form, has no option with several values or more than two
            of them, repeats one, or has more than `MOST` settings.
    """
    method, colon, rest = text.partition(":")
    if "@" in text or " + " in text:
        raise UserError(
            f"{text!r} is not a sweep: retentions are given by --retention, and chains cannot be "
            "swept; write method:option=value,value."
        )
    options: dict[str, tuple[str, ...]] = {}
    for option in re.split(r"[;,](?=\s*\w+\s*=)", rest) if colon else ():
        name, equals, values = (part.strip() for part in option.partition("="))
        listed = tuple(value.strip() for value in values.split(","))
        if not equals or not all(listed) or ";" in values:
            raise UserError(
                f"cannot read {option!r} in {text!r}; write method:option=value,value and separate "
                "options by ';', e.g. 'globalcom2:alpha=0,0.5,1;tau=1,10'."
            )
        if name in options or len(set(listed)) < len(listed):
            raise UserError(f"{text!r} gives an option or a value of {name!r} twice.")
        options[name] = listed
    sweep = Sweep(text, method.strip(), options)
    if len(sweep.swept) not in (1, 2):
        raise UserError(
            f"{text!r} must give several values to one or two options, e.g. "
            f"'{sweep.method}:option=value,value'; it does so to {len(sweep.swept)}."
        )
    settings = math.prod(map(len, options.values()))
    if settings > MOST:
        raise UserError(f"{text!r} has {settings} settings; sweep at most {MOST} at once.")
    return sweep


def ablation(request: Request, sweeps: Sequence[str], report: Report = lambda *_: None) -> Result:
    """Run every setting of ``sweeps`` at every retention.

    The folder of the run gets ``ablation.csv`` and a figure besides what `compare` writes.

    Args:
        request: Model, questions, retention and so on; its methods are of no meaning.
        sweeps: As `parse_sweep` reads them, or those of `PAPER`, where settings that the model
            lacks something for are left out.
        report: Told how far it is.

    Raises:
        UserError: As `parse_sweep` and `compare`.
    """
    read = [parse_sweep(text) for text in sweeps]
    if not read:
        raise UserError("give at least one sweep, e.g. 'globalcom2:alpha=0,0.5,1', or --paper.")
    specs = list(dict.fromkeys(point.spec for sweep in read for point in sweep.points))
    request = replace(request, methods=specs)
    setting = prepare(request, report)
    skipped = dict(_lacking(setting.adapter, read))
    request = replace(request, methods=[spec for spec in specs if spec not in skipped])
    outcome = compare(request, report, name="ablation", setting=setting)
    if outcome.status == "interrupted":
        return Result(outcome, pd.DataFrame(), skipped)
    table = differences(read_answers(outcome.folder), read, request.retention, seed=request.seed)
    with replace_file(outcome.folder / "ablation.csv") as temporary:
        write_csv(table, temporary)
    if len(table):
        drawn = figure(table, outcome.summary, Path(request.model).name)
        plots.save(drawn, outcome.folder / "plots" / "ablation")
    return Result(outcome, table, skipped)


def _lacking(adapter: Adapter, sweeps: Iterable[Sweep]) -> Iterable[tuple[str, str]]:
    """Specs of the paper's sweeps that the model lacks something for, and what."""
    for sweep in sweeps:
        for point in sweep.points if sweep.text in PAPER else ():
            try:
                adapter.check(tp.parse(point.spec, retention=0.5))
            except UserError as error:
                yield point.spec, str(error)


def differences(
    answers: pd.DataFrame, sweeps: Sequence[Sweep], retention: Iterable[float], *, seed: int
) -> pd.DataFrame:
    """One row per sweep, retention and setting.

    Args:
        answers: As in ``answers.parquet``.
        sweeps: What was swept.
        retention: At which ratios.
        seed: Of the bootstrap.

    Returns:
        ``sweep``, ``method`` (with the options that stay the same), ``first`` and ``second`` (names
        of the swept options), ``first_value`` and ``second_value``, ``label``, ``retention``,
        ``n``, ``accuracy``, ``difference`` to the first setting of the sweep that was run, with
        ``low``, ``high``, ``p`` (as of `intervals.compared`) and ``p_holm`` (adjusted for the
        settings of one sweep at one retention), ``kl``, and ``visual_tokens`` and ``flops`` means.
    """
    cells = dict(iter(answers.groupby(["label", "retention"], sort=False)))
    parts = []
    for sweep in sweeps:
        for ratio in sorted(set(retention), reverse=True):
            rows, base = [], None
            for point in sweep.points:
                label = Cell(tp.parse(point.spec, retention=ratio)).label
                cell = cells.get((label, ratio))
                if cell is None or (cell["status"] == "failed").any():
                    continue
                base = cell if base is None else base
                found = compared(cell, base, seed=seed)
                (first, one), (second, two) = (*point.values, ("", ""))[:2]
                rows.append(
                    {
                        "sweep": sweep.text,
                        "method": sweep.title,
                        "first": first,
                        "second": second,
                        "first_value": one,
                        "second_value": two,
                        "label": label,
                        "retention": ratio,
                        "n": found["n"],
                        "accuracy": found["first_accuracy"],
                        "difference": found["difference"],
                        **{
                            name: np.nan if cell is base else found.get(name)
                            for name in ("low", "high", "p")
                        },
                        "kl": cell["kl"].mean(),
                        "visual_tokens": cell["layer_average"].mean(),
                        "flops": cell["flops"].mean(),
                    }
                )
            part = pd.DataFrame(rows)
            parts.append(part.assign(p_holm=holm(part["p"])) if len(part) else part)
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


# --- the figure -----------------------------------------------------------------------------------

_PANELS = 3  # in a row


def figure(table: pd.DataFrame, summary: pd.DataFrame, model: str) -> Figure:
    """A panel for every sweep of one option, a heat map per retention for those of two.

    Args:
        table: As `differences` returns it.
        summary: As `intervals.summarise` returns it; gives intervals and the uncompressed model.
        model: What to call the model.
    """
    overall = summary[summary["kind"] == OVERALL]
    ends = overall[["label", "retention", "accuracy_low", "accuracy_high"]]
    table = table.merge(ends, on=["label", "retention"], how="left")
    panels = []
    for _, sweep in table.groupby("sweep", sort=False):
        if sweep["second"].iloc[0]:
            panels += [part for _, part in sweep.groupby("retention", sort=False)]
        else:
            panels.append(sweep)
    columns = min(_PANELS, len(panels))
    rows = -(-len(panels) // columns)
    full = overall.loc[overall["method"] == UNCOMPRESSED, "accuracy"]
    with style():
        figure = Figure(figsize=(max(9.6, 5.2 * columns), 1.3 + 4.1 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, part in zip(grid, panels, strict=False):
            if part["second"].iloc[0]:
                _heat(axes, part)
            else:
                _lines(axes, part, float(full.iloc[0]) if len(full) else np.nan)
            axes.tick_params(axis="both", length=0, labelsize=12, labelcolor=INK)
            axes.xaxis.label.set_size(13)
            axes.yaxis.label.set_size(13)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        lines = [axes for axes in grid if axes.containers]
        limits = [end for axes in lines for end in axes.get_ylim()]
        for axes in lines:
            axes.set_ylim(min(limits), max(limits))
        if lines and table["retention"].nunique() > 1:
            handles, labels = lines[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        titles(
            figure,
            f"What the options are worth on {model}",
            f"accuracy on {int(table['n'].max())} questions; bars: 95 % confidence intervals; "
            "dashed: uncompressed; shaded: what the others are compared with",
        )
    return figure


def _numbers(values: Iterable[str]) -> bool:
    try:
        return bool([float(value) for value in values])
    except ValueError:
        return False


def _ordered(values: Iterable[str]) -> list[str]:
    """Distinct values, numbers ascending, names as they come."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if _numbers(distinct) else distinct


def _lines(axes: Axes, part: pd.DataFrame, full: float) -> None:
    """Accuracy at every value, joined by lines where values are numbers."""
    places = {value: place for place, value in enumerate(_ordered(part["first_value"]))}
    ratios = list(pd.unique(part["retention"]))
    offsets = np.linspace(-0.12, 0.12, len(ratios)) if len(ratios) > 1 else [0.0]
    colours = sns.color_palette("colorblind", len(ratios))
    for index, ratio in enumerate(ratios):
        rows = part[part["retention"] == ratio]
        rows = rows.assign(place=rows["first_value"].map(places)).sort_values("place")
        x = rows["place"] + offsets[index]
        errors = [rows["accuracy"] - rows["accuracy_low"], rows["accuracy_high"] - rows["accuracy"]]
        axes.errorbar(
            x, rows["accuracy"], yerr=np.abs(errors), color=colours[index], ms=8, mec="white",
            mew=0.8, elinewidth=1.6, fmt=MARKERS[index], ls="-" if _numbers(places) else "",
            lw=1.5, label=f"keeps {100 * ratio:.3g} %", zorder=3,
        )  # fmt: skip
    axes.axhline(full, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=1)
    base = places[part["first_value"].iloc[0]]
    axes.axvspan(base - 0.3, base + 0.3, color="black", alpha=0.06, lw=0)
    broken = [value.replace("_", "_\n") for value in places]
    axes.set_xticks(list(places.values()), broken)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set(xlabel=part["first"].iloc[0], ylabel="accuracy")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # whole percents
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_title(part["method"].iloc[0], loc="left", fontsize=14, fontweight="bold")


def _heat(axes: Axes, part: pd.DataFrame) -> None:
    """Accuracy at every pair of values."""
    rows, columns = _ordered(part["first_value"]), _ordered(part["second_value"])
    wide = 100 * part.pivot(index="first_value", columns="second_value", values="accuracy")
    sns.heatmap(
        wide.loc[rows, columns], ax=axes, annot=True, fmt=".1f", cmap="crest", linewidths=2,
        cbar=False, annot_kws={"size": 13},
    )  # fmt: skip
    axes.set(xlabel=part["second"].iloc[0], ylabel=part["first"].iloc[0])
    axes.tick_params(axis="y", rotation=0)
    title = (
        f"{part['method'].iloc[0]}, keeps {100 * part['retention'].iloc[0]:.3g} %: accuracy in %"
    )
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
