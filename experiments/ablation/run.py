"""Sweep options of methods; every value is compared with the first on the same questions."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.compatibility import check_compatible
from tokenprune.errors import UserError
from tokenprune.experiments.ablation.figures import figure
from tokenprune.experiments.cluster.run import description
from tokenprune.experiments.common import plots
from tokenprune.experiments.common.answers import read_answers
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.csv_files import write_tables
from tokenprune.experiments.common.intervals import holm
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.request import QuestionRequest, comparison
from tokenprune.experiments.common.setting import prepare
from tokenprune.experiments.common.summary import compared
from tokenprune.experiments.compare import run as compare
from tokenprune.grammar import Part, parts
from tokenprune.grammar import options as written_options
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "PAPER",
    "AblationRequest",
    "Point",
    "Sweep",
    "differences",
    "parse_sweep",
    "run",
]


MOST = 1000  # settings of a sweep


DEFAULT = "default"
"""The value that stands for the default of an option."""


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
"""The parts of GlobalCom²: the weight of the thumbnail in the score of tokens (alpha: 0 is the crop
alone, 1 the thumbnail alone), the allocator of crops (equal, without borders, by the largest score
or by the sum of scores), the temperature, the score, the separators, and its allocation with other
rankings.  The first value is the default of the method."""


@dataclass(frozen=True)
class Point:
    """One setting of a sweep: its values by option, and the spec that makes it."""

    values: tuple[tuple[str, str], ...]
    spec: str


@dataclass(frozen=True)
class Sweep:
    """A method, and one or two options with several values.

    Attributes:
        text: The sweep as written.
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
        """The method and its fixed options."""
        fixed = {name: values[0] for name, values in self.options.items() if len(values) == 1}
        return str(Part(self.method, fixed))

    @property
    def points(self) -> list[Point]:
        """Every combination of values, the first values first."""
        made = []
        for values in itertools.product(*self.options.values()):
            chosen = dict(zip(self.options, values, strict=True))
            given = {name: value for name, value in chosen.items() if value != DEFAULT}
            shown = tuple((name, chosen[name]) for name in self.swept)
            made.append(Point(shown, str(Part(self.method, given))))
        return made


@dataclass(frozen=True, kw_only=True)
class AblationRequest(QuestionRequest):
    """Which options to sweep.

    Attributes:
        sweeps: Texts for `parse_sweep`, or `PAPER`, whose settings are left out if they do not
            run on the model.
        retention: Retention ratios, each in (0, 1].
    """

    sweeps: Sequence[str] = ()
    retention: Sequence[float] = (0.25,)


def parse_sweep(text: str) -> Sweep:
    """Read ``method:option=value,value;option=value,value``.

    Options may also be separated by commas, as in a spec: a comma in front of ``name=`` begins an
    option, any other comma a value.  ``default`` stands for the default of an option.

    >>> parse_sweep("globalcom2:alpha=0,0.5;tau=1,10,score=received").options
    {'alpha': ('0', '0.5'), 'tau': ('1', '10'), 'score': ('received',)}

    Raises:
        UserError: The text is not of that form, has no option with several values or more than two
            of them, repeats one, or has more than `MOST` settings.
    """
    method, colon, rest = text.partition(":")
    if "@" in text or len(parts(text)) > 1:
        raise UserError(
            f"{text!r} is not a sweep: retentions are given by --retention, and chains cannot be "
            "swept; write method:option=value,value."
        )
    options: dict[str, tuple[str, ...]] = {}
    for name, values in written_options(rest, ";,") if colon else ():
        listed = tuple(value.strip() for value in values.split(","))
        if not all(listed) or ";" in values:
            raise UserError(
                f"cannot read {name!r} in {text!r}; write method:option=value,value and separate "
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


def run(request: AblationRequest, progress: ProgressCallback = silent) -> Outcome:
    """Run every setting of the sweeps at every retention ratio.

    The folder of the run gets ``ablation.csv`` and a figure in addition to what `compare` writes.

    Returns:
        With the table ``ablation``, as `differences` returns it, unless the run was interrupted.

    Raises:
        UserError: As `parse_sweep` and `compare`.
    """
    read = [parse_sweep(text) for text in request.sweeps]
    if not read:
        raise UserError("give at least one sweep, e.g. 'globalcom2:alpha=0,0.5,1', or --paper.")
    specs = list(dict.fromkeys(point.spec for sweep in read for point in sweep.points))
    asked = comparison(request, methods=specs, retention=request.retention)
    setting = prepare(asked, progress, load=description)
    skipped = dict(_lacking(setting.pipe.adapter, read))
    asked = replace(asked, methods=[spec for spec in specs if spec not in skipped])
    outcome = compare.run(asked, progress, name="ablation", setting=setting)
    outcome = replace(outcome, skipped=skipped)
    if outcome.status == "interrupted":
        return outcome
    table = differences(read_answers(outcome.folder), read, request.retention, seed=request.seed)
    write_tables(outcome.folder, {"ablation": table})
    if len(table):
        drawn = figure(table, outcome.summary, Path(request.model).name, request.figures)
        plots.save(drawn, outcome.folder / "plots" / "ablation", request.figures)
    files = ("ablation.csv", "answers.parquet", "plots/")
    return replace(outcome, tables={"ablation": table, **outcome.tables}, files=files)


def _lacking(adapter: Adapter, sweeps: Iterable[Sweep]) -> Iterable[tuple[str, str]]:
    """Specs of the paper's sweeps that do not run on the model, and why."""
    for sweep in sweeps:
        for point in sweep.points if sweep.text in PAPER else ():
            try:
                check_compatible(adapter.facts, tp.parse(point.spec, retention=0.5))
            except UserError as error:
                yield point.spec, str(error)


def differences(
    answers: pd.DataFrame, sweeps: Sequence[Sweep], retention: Iterable[float], *, seed: int
) -> pd.DataFrame:
    """One row per sweep, retention and setting.

    Args:
        answers: As in ``answers.parquet``.
        sweeps: What was swept.
        retention: Retention ratios.
        seed: Of the bootstrap.

    Returns:
        ``sweep``, ``method`` (with the options that stay the same), ``first`` and ``second`` (names
        of the swept options), ``first_value`` and ``second_value``, ``label``, ``retention``,
        ``n``, ``accuracy``, ``difference`` to the first setting of the sweep that was run, with
        ``low``, ``high``, ``p`` (as of `summary.compared`) and ``p_holm`` (adjusted for the
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
                            name: math.nan if cell is base else found.get(name)
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
