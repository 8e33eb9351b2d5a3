"""Which method of a run meets a budget, how sure that is, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.choose.deciding import Floats, Limits, decide, frontier
from tokenprune.experiments.common.answers import measured
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.reading import answers_of, manifest_of
from tokenprune.experiments.common.request import Request
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.summary import OVERALL, scores, summarise
from tokenprune.experiments.common.times import medians, read_times
from tokenprune.registry import strategies
from tokenprune.spec import has_retention

__all__ = [
    "Choice",
    "ChooseRequest",
    "Time",
    "accuracy_limit",
    "byte_limit",
    "run",
]


Time = Literal["prefill", "total", "token"]
"""Which measured time `--max-ms` limits."""


_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True, kw_only=True)
class ChooseRequest(Request):
    """The budget.

    Attributes:
        folder: The run folder.
        max_ms: Longest time in milliseconds; None without a limit, as for the others.
        time: Which time that is.
        max_memory: Largest peak of memory, in bytes.
        max_flops: Largest share of the FLOPs of the uncompressed prefill, in (0, 1].
        min_accuracy: Least accuracy, in [0, 1]; of a relative one, a multiple.
        relative: Whether ``min_accuracy`` is a multiple of the uncompressed model's accuracy.
        seed: Of the bootstrap.
    """

    folder: Path
    max_ms: float | None = None
    time: Time = "prefill"
    max_memory: float | None = None
    max_flops: float | None = None
    min_accuracy: float | None = None
    relative: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """The answer.

    Attributes:
        cells: One row per method and retention ratio: ``label``, ``retention``, ``accuracy`` with
            its interval, costs (``ms``, ``bytes``, ``flops`` as a share), ``frontier``, ``meets``
            (whether it is within the limits), ``wins`` (share of resamples in which it is the
            pick).
        pick: The index of the pick in ``cells``; None if nothing meets the limits.
        none: The share of resamples in which nothing meets the limits.
        lines: Python that uses the pick; empty without one.
        device: Where times and memory were measured; empty if they were not.
        questions: Number of questions that all cells answered.
        measure: ``accuracy`` or ``agreement``, if no true answer is known.
        left_out: Cell to the reason why it is not among ``cells``.
        notes: Sentences that qualify the answer.
    """

    cells: pd.DataFrame
    pick: int | None
    none: float
    lines: str
    device: str
    questions: int
    measure: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def run(request: ChooseRequest) -> Choice:
    """Choose a method and a retention ratio for a budget.

    Raises:
        UserError: The folder is not that of a comparison, the run has not measured what is limited,
            or no limit is given.
    """
    limits = _limits(request)
    notes: list[str] = []
    manifest = manifest_of(request.folder)
    answers, measure = measured(answers_of(request.folder, notes))
    times = read_times(request.folder)
    needs = {"ms": request.max_ms, "bytes": request.max_memory}
    if times is None and any(value is not None for value in needs.values()):
        raise UserError(
            f"{request.folder} has no measured times and memory; measure them with `tokenprune "
            f"compare --out {request.folder} --measure`."
        )
    cells, left_out = _cells(answers, times, request)
    names = list(limits.most)
    if not names:
        names = ["ms" if cells["ms"].notna().any() else "flops"]
    for index, row in cells[cells[names].isna().any(axis=1)].iterrows():
        unmeasured = f"it was not measured; run compare --out {request.folder} --measure again."
        left_out[_named(row)] = row["status"] if row["status"] not in ("", "ok") else unmeasured
        cells = cells.drop(index=index)
    cells = cells.reset_index(drop=True)
    matrix, images = _matrix(answers, cells)
    full = cells.index[cells["label"] == UNCOMPRESSED]
    if not len(cells) or not len(full) or not len(matrix):
        raise UserError(
            f"{request.folder} has no questions that the uncompressed model and every method "
            "answered; run the comparison again to complete it."
        )
    costs: dict[str, Floats] = {name: cells[name].to_numpy(float) for name in names}
    runs = {"ms": _runs(times, cells, request.time)} if times is not None and "ms" in costs else {}
    found = decide(matrix, images, costs, limits, full=int(full[0]), runs=runs, seed=request.seed)
    accuracy = matrix.mean(axis=0)
    cells = cells.assign(accuracy=accuracy, frontier=frontier(accuracy, costs), wins=found.wins)
    lines = "" if found.pick is None else _lines(manifest, cells.loc[found.pick])
    device = "" if times is None else str(times["device"].iloc[0])
    return Choice(
        cells, found.pick, found.none, lines, device, len(matrix), measure, left_out, tuple(notes)
    )


def _limits(request: ChooseRequest) -> Limits:
    if request.time not in get_args(Time):
        raise unknown("time", request.time, get_args(Time))
    check_number("seed", request.seed)
    most = {"ms": request.max_ms, "bytes": request.max_memory, "flops": request.max_flops}
    given = {name: value for name, value in most.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < float("inf"):
            option = {"ms": "--max-ms", "bytes": "--max-memory", "flops": "--max-flops"}[name]
            raise UserError(f"{option} must be a positive number, got {value:g}.")
    if request.max_flops is not None and request.max_flops > 1:
        raise UserError(
            "--max-flops is a share of the FLOPs of the uncompressed prefill, in (0, 1], got "
            f"{request.max_flops:g}."
        )
    if request.min_accuracy is not None and not 0 <= request.min_accuracy <= 1:
        raise UserError(
            "--min-accuracy must be in [0, 1], or a multiple of the uncompressed model's such as "
            f"0.95x, got {request.min_accuracy:g}."
        )
    if not given and request.min_accuracy is None:
        raise UserError(
            "there is no limit; give --max-ms, --max-memory, --max-flops or --min-accuracy."
        )
    return Limits(given, request.min_accuracy, request.relative)


def byte_limit(text: str) -> float:
    """``text`` such as ``12GB`` or ``900MiB`` in bytes.  Raises `UserError`."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]?i?b)\s*", text, re.IGNORECASE)
    if found is None or found[2].lower() not in _UNITS:
        raise UserError(f"--max-memory must be a size such as 12GB or 900MiB, got {text!r}.")
    return float(found[1]) * _UNITS[found[2].lower()]


def accuracy_limit(text: str) -> tuple[float, bool]:
    """``text`` such as ``0.9``, or ``0.95x`` of the uncompressed model: number, and whether it is
    relative.  Raises `UserError`."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(x?)\s*", text)
    if found is None:
        raise UserError(
            "--min-accuracy must be a number in [0, 1], or a multiple of the uncompressed model's "
            f"such as 0.95x, got {text!r}."
        )
    return float(found[1]), bool(found[2])


def _cells(
    answers: pd.DataFrame, times: pd.DataFrame | None, request: ChooseRequest
) -> tuple[pd.DataFrame, dict[str, str]]:
    """One row per method and retention ratio below 1, and the uncompressed model."""
    full = answers["method"] == UNCOMPRESSED
    shown = answers[full | (answers["retention"] < 1)]
    summary = summarise(shown, seed=request.seed)
    rows = summary[summary["kind"] == OVERALL]
    left_out = {_named(row): "it failed." for _, row in rows[rows["status"] != "ok"].iterrows()}
    rows = rows[(rows["status"] == "ok") & rows["accuracy"].notna()]
    cells = pd.DataFrame(
        {
            **{name: rows[name] for name in ("method", "label", "retention")},
            **{name: rows[name] for name in ("accuracy", "accuracy_low", "accuracy_high")},
            "flops": rows["flops"] / rows["uncompressed_flops"],
        }
    )
    if times is None:
        return cells.assign(ms=np.nan, bytes=np.nan, status=""), left_out
    why = times.groupby(["label", "retention"], sort=False)["status"].first().reset_index()
    found = medians(times).merge(why, on=["label", "retention"], how="outer")
    found = found.assign(ms=found[f"{request.time}_ms"], bytes=found["peak_bytes"])
    found = found[["label", "retention", "ms", "bytes", "status"]]
    cells = cells.merge(found, how="left", on=["label", "retention"])
    return cells.assign(status=cells["status"].fillna("")), left_out


def _matrix(answers: pd.DataFrame, cells: pd.DataFrame) -> tuple[Floats, list[str]]:
    """(questions, cells) scores of the questions that all cells answered, and their images."""
    value = scores(answers)
    known = answers.assign(value=value)[value.notna() & (answers["status"] == "ok")]
    wide = known.pivot_table(
        index="question_id", columns=["label", "retention"], values="value", aggfunc="mean"
    )
    wide = wide.reindex(columns=pd.MultiIndex.from_frame(cells[["label", "retention"]])).dropna()
    images = answers.drop_duplicates("question_id").set_index("question_id")["image_id"]
    return wide.to_numpy(float), list(images.reindex(wide.index))


def _runs(times: pd.DataFrame, cells: pd.DataFrame, time: Time) -> list[Floats]:
    """The timed runs of each cell."""
    fine = times[times["status"] == "ok"]
    found = dict(iter(fine.groupby(["label", "retention"])[f"{time}_ms"]))
    return [
        found[label, retention].to_numpy(float)
        for label, retention in zip(cells["label"], cells["retention"], strict=True)
    ]


def _named(row: pd.Series) -> str:
    return (
        str(row["label"])
        if row["method"] == UNCOMPRESSED
        else f"{row['label']} at {row['retention']:g}"
    )


def _lines(manifest: Mapping[str, Any], cell: pd.Series) -> str:
    """Python that loads the model of the run and answers with the method of ``cell``."""
    experiment = manifest["experiment"]
    label = str(cell["label"])
    method = "None  # the uncompressed model"
    if cell["method"] != UNCOMPRESSED:
        own = "" if has_retention(label) else f", retention={float(cell['retention'])!r}"
        method = f"tp.parse({json.dumps(label)}{own})"
    options = [json.dumps(str(experiment["model"]))]
    options += [f"{name}={json.dumps(experiment[name])}" for name in ("device", "dtype")]
    if (manifest.get("request") or {}).get("trust_remote_code"):
        options.append("trust_remote_code=True")
    lines = ["import tokenprune as tp", *_modules(manifest, label), ""]
    lines += [f"pipe = tp.load({', '.join(options)})", f"method = {method}", "", ""]
    lines += ["def answer(image, question):", "    with tp.compress(pipe.model, method):"]
    new = experiment["max_new_tokens"]
    lines += [f"        return pipe(images=image, text=question, max_new_tokens={new})"]
    return "\n".join(lines)


def _modules(manifest: Mapping[str, Any], label: str) -> list[str]:
    """Imports of the modules that register methods outside this package."""
    files = (manifest.get("own_code") or {}).get(label) or []
    if re.split(r"[:@]", label)[0] in strategies.names():
        return []
    own = [name for name in files if name.endswith(".py") and not name.startswith("tokenprune/")]
    names = [
        name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for name in own
    ]
    return [f"import {name}  # registers the method" for name in names[:1]]
