"""One self-contained HTML page about a run: its setup, results and questions.

Everything is read from the run folder and from the files of its questions; no model is loaded.
Where something is missing (the data file, an image, a method's package) the page says so and shows
the rest.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import read_answers, rescored
from tokenprune.experiments.common.cells import Cell, CellRecord
from tokenprune.experiments.common.files import check_file, replace_file
from tokenprune.experiments.common.formatting import arrows, measure
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.reading import (
    cells_of,
    check_folder,
    journaled,
    manifest_of,
    questions_of,
)
from tokenprune.experiments.common.request import Request
from tokenprune.experiments.common.run_folder import UNCOMPRESSED
from tokenprune.experiments.common.summary import aggregated, summarise
from tokenprune.experiments.compare.run import accuracy_so_far
from tokenprune.experiments.metrics import check_metrics, with_metric
from tokenprune.experiments.report.anonymous import anonymous
from tokenprune.experiments.report.columns import Column, table_columns
from tokenprune.experiments.report.gallery import Gallery, planner, question_entry
from tokenprune.experiments.report.tables import (
    command,
    costs,
    facts,
    failures_of,
    kinds,
    own_citation,
    results,
    sources,
    title,
)
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "ReportRequest",
    "run",
]


_PICTURES = 20 * 2**20  # bytes of all pictures together, before base64


_KEPT = 12 * 2**20  # of what was kept


_PLOT_WIDTH = 1400


_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class ReportRequest(Request):
    """What to report on.

    Attributes:
        out: The page; None for ``report.html`` in the folder.
        folder: The run folder.
        questions: Number of questions shown with images and masks.
        first: Whether to show the first questions, not those with the most different answers.
        data: Path of the data file, if it has moved.
        anonymous: Whether to leave out names and paths (`anonymous`); questions, answers and
            pictures do not change.
        force: Whether to replace ``out`` if it exists; ``report.html`` is always replaced.
        metric: Scores the answers instead of the metric of the run (`metrics.with_metric`).
    """

    folder: Path
    questions: int = 100
    first: bool = False
    data: Path | None = None
    anonymous: bool = False
    force: bool = False
    metric: str | None = None


def run(request: ReportRequest, progress: ProgressCallback = silent) -> Outcome:
    """Write the page.

    Returns:
        With the table ``summary``; ``notes`` say what could not be shown.

    Raises:
        UserError: The folder is not that of a run, has neither answers nor questions, or is
            damaged.
    """
    check_number("questions", request.questions, least=0)
    path = request.out or request.folder / "report.html"
    check_folder(request.folder)
    check_file(path, new=request.out is not None and not request.force)
    found = _read(request, progress)
    notes, manifest, journal = found.notes, found.manifest, found.journal
    compressed = found.summary.dropna(subset="retention")
    browser = _browser(found, request, progress)
    images = list(_figures(request.folder, compressed, manifest, notes))
    failures = failures_of(manifest, journal)
    if request.anonymous:
        texts = {"manifest": manifest, "failures": failures, "notes": notes}
        manifest, failures, notes = anonymous(texts).values()
    shown, total = len(browser["questions"]), found.answers["question_id"].nunique()
    page = _template().render(
        title=title(manifest),
        manifest=manifest,
        experiment=manifest["experiment"],
        command=command(manifest),
        facts=facts(manifest),
        status=manifest.get("status", "unknown"),
        answered=len(journal.answers),
        failures=failures,
        results=results(found.summary),
        measure=measure(found.summary),
        aggregated=[name.replace("_", " ") for name in aggregated(found.summary)],
        arrows=arrows(found.summary),
        uniform=(found.summary["label"] == "uniform").any(),
        kinds=kinds(found.summary),
        costs=costs(compressed),
        figures=images,
        sources=sources(found.columns),
        citation=own_citation(manifest),
        browser=_script_safe(browser),
        shown=shown,
        total=total,
        first=request.first,
        notes=notes,
        version=tp.__version__,
    )
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Outcome(
        path.parent,
        tables={"summary": found.summary},
        files=(path.name,),
        answered=shown,
        wanted=total,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Run:
    """The contents of a run folder.

    Attributes:
        answers: As in ``answers.parquet``, without references.
        summary: As in ``summary.csv``.
        columns: The columns of the page.
        notes: Sentences about what cannot be shown; more are added while the page is made.
    """

    manifest: Mapping[str, Any]
    journal: Journal
    questions: list[Question] | None
    answers: pd.DataFrame
    summary: pd.DataFrame
    columns: Sequence[Column]
    notes: list[str]


def _read(request: ReportRequest, progress: ProgressCallback) -> _Run:
    """Read the run."""
    manifest = manifest_of(request.folder)
    notes: list[str] = []
    progress(0, 0, "reading the run")
    journal = Journal(request.folder / "answers.jsonl")
    if journal.unreadable:
        lines = "line" if journal.unreadable == 1 else "lines"
        notes.append(f"{journal.unreadable} {lines} of answers.jsonl cannot be read: left out.")
    questions = questions_of(request.folder, manifest, journal, notes, request.data)
    if questions is not None and request.metric is not None:
        questions = with_metric(questions, request.metric)
        check_metrics(questions)
    answers = _answers(request.folder, manifest, questions, journal, notes, request.metric)
    # Methods at R = 1 are the uncompressed model.
    answers = answers[~(answers["retention"] >= 1) | (answers["method"] == UNCOMPRESSED)]
    summary = summarise(answers, seed=manifest["experiment"]["seed"])
    answers = answers.dropna(subset="retention")
    columns = table_columns(answers, _cells(manifest))
    return _Run(manifest, journal, questions, answers, summary, columns, notes)


def _cells(manifest: Mapping[str, Any]) -> Sequence[Cell | CellRecord]:
    try:
        return cells_of(manifest)
    except UserError:  # methods of an older run that are unknown here
        return []


def _browser(found: _Run, request: ReportRequest, progress: ProgressCallback) -> dict[str, Any]:
    """The data of single questions: answers, pictures and masks."""
    columns, notes = found.columns, found.notes
    chosen = _chosen(found.answers, columns, request)
    known = {item.id: item for item in found.questions or ()}
    shown = {picture.id for name in chosen if name in known for picture in known[name].images}
    adapter = planner(found.manifest, notes, request.folder)
    gallery = Gallery(adapter, notes, _PICTURES // max(1, len(shown)))
    entries = []
    for index, name in enumerate(chosen):
        progress(index, len(chosen), "pictures")
        entries.append(
            question_entry(name, found.answers, columns, known.get(name), gallery, found.journal)
        )
    _bound(entries, notes)
    if columns and chosen and not any(any(entry["kept"]) for entry in entries):
        notes.append(
            "The run did not record what was kept, or it cannot be drawn; no masks are shown."
        )
    return {
        "cells": [{"label": c.label, "keep": c.retention, "failed": c.failed} for c in columns],
        "questions": entries,
        "media": gallery.media,
        "pictures": gallery.pictures,
    }


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("tokenprune.experiments.report", ".")
    found = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return found.get_template(_TEMPLATE)


def _script_safe(value: Any) -> str:
    """JSON that cannot end the script element around it, whatever the texts contain."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# --- the run --------------------------------------------------------------------------------------


def _answers(
    folder: Path,
    manifest: Mapping[str, Any],
    questions: list[Question] | None,
    journal: Journal,
    notes: list[str],
    metric: str | None,
) -> pd.DataFrame:
    """The table of answers, from the journal or, if that fails, from ``answers.parquet``."""
    try:
        return journaled(manifest, questions, journal)
    except UserError as error:
        if not (folder / "answers.parquet").exists():
            raise UserError(
                f"{str(folder)!r} has no answers.parquet, and it cannot be made: {error}"
            ) from error
        notes.append(f"Read from answers.parquet, because {error}")
        return rescored(read_answers(folder), metric)


def _chosen(answers: pd.DataFrame, columns: Sequence[Column], request: ReportRequest) -> list[str]:
    """Ids of the questions to show.

    The most informative questions are those on which most methods differ from the uncompressed
    model or, without it, those with the most different answers.
    """
    names = list(pd.unique(answers["question_id"]))
    if not request.first:
        unlike = (
            (~answers["agrees"].fillna(True).astype(bool)).groupby(answers["question_id"]).sum()
        )
        ways = answers.groupby("question_id")["answer"].nunique()
        names.sort(key=lambda name: (-int(unlike[name]), -int(ways[name])))
    return names[: request.questions]


def _bound(entries: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Leave out the masks of the last questions if all masks would exceed the limit."""
    sizes = [sum(map(len, itertools.chain(*filter(None, entry["kept"])))) for entry in entries]
    fitting = sum(total <= _KEPT for total in itertools.accumulate(sizes))
    for entry in entries[fitting:]:
        entry["kept"] = [None] * len(entry["kept"])
    if fitting < len(entries):
        notes.append(f"Only the masks of the first {fitting} questions fit into the page.")


def _figures(
    folder: Path, summary: pd.DataFrame, manifest: Mapping[str, Any], notes: list[str]
) -> Iterator[dict[str, str]]:
    """The run's figures as data URIs; drawn here if the run has no PNG files."""
    files = sorted((folder / "plots").glob("*.png"), key=lambda file: file.stem)
    for file in files:
        try:
            with Image.open(file) as image:
                image.thumbnail((_PLOT_WIDTH, 4 * _PLOT_WIDTH), Image.Resampling.LANCZOS)
                uri = _plot_uri(image)
        except Exception as error:  # a damaged picture can raise anything
            notes.append(f"The figure {file.name} cannot be shown ({error}).")
        else:
            yield {"name": file.stem.replace("-", " "), "uri": uri}
    drawn = any((folder / "plots").glob("*.*"))  # a finished run; PDF and SVG cannot be shown
    if not files and len(summary) and summary["accuracy"].notna().any():
        name = Path(manifest["experiment"]["model"]).name
        figure = accuracy_so_far(summary, name)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        with Image.open(buffer) as image:
            yield {"name": "accuracy" if drawn else "accuracy so far", "uri": _plot_uri(image)}


def _plot_uri(image: Image.Image) -> str:
    """A figure has few colours: a palette keeps its text sharp and the file small."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
