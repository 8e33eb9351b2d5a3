"""One self-contained HTML page of a run: what was run, its results, and every question to look at.

Everything is read from the run folder (`results`) and from where its questions come from; no model
is loaded.  Where something is gone - the data file, an image, a method's package - the page says so
and shows the rest.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments import plots
from tokenprune.experiments.anonymous import anonymous
from tokenprune.experiments.data import (
    Picture,
    Question,
    normalise,
)
from tokenprune.experiments.files import check_file
from tokenprune.experiments.geometry import Box, Lattice, ViewSize, crop_boxes, frame_box, lattices
from tokenprune.experiments.intervals import OVERALL, summarise
from tokenprune.experiments.kept import unpack
from tokenprune.experiments.limits import check_number
from tokenprune.experiments.reading import journaled, manifest_of, questions_of
from tokenprune.experiments.results import (
    UNCOMPRESSED,
    Cell,
    Journal,
    read_answers,
    replace_file,
)
from tokenprune.models.adapter import Adapter, host_of
from tokenprune.models.loading import read_config
from tokenprune.registry import strategies
from tokenprune.terminal import Report, percent
from tokenprune.tokens import TokenLayout

__all__ = ["Request", "Written", "report"]

_SIDE = 336  # longest side of an image, in pixels
_FRAME_SIDE = 168  # of a video's frame
_STEPS = ((1.0, 85), (1.0, 65), (0.75, 60), (0.5, 50))  # side and quality where pictures are many
_PICTURES = 20 * 2**20  # bytes of all pictures together, before base64
_KEPT = 12 * 2**20  # of what was kept
_PLOT_WIDTH = 1400
_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to report on.

    Attributes:
        folder: Of the run.
        questions: How many to show with images and masks.
        first: Take the first ones, not those that methods answer most differently.
        data: Where the data file is now, if it was moved.
        out: The page; None for ``report.html`` in the folder.
        anonymous: Leave out who ran it and where (`anonymous`); questions, answers and pictures
            stay as they are.
    """

    folder: Path
    questions: int = 100
    first: bool = False
    data: Path | None = None
    out: Path | None = None
    anonymous: bool = False


@dataclass(frozen=True)
class Written:
    """The page, how many of the run's questions it shows, and what could not be shown."""

    path: Path
    shown: int
    of: int
    notes: tuple[str, ...]


def report(request: Request, tell: Report = lambda *_: None) -> Written:
    """Write the page.

    Raises:
        UserError: The folder is not that of a run, has neither answers nor questions, or is
            damaged.
    """
    check_number("questions", request.questions, least=0)
    path = request.out or request.folder / "report.html"
    manifest = manifest_of(request.folder)
    check_file(path)
    notes: list[str] = []
    tell(0, 0, "reading the run")
    journal = Journal(request.folder / "answers.jsonl")
    if journal.unreadable:
        lines = "line" if journal.unreadable == 1 else "lines"
        notes.append(f"{journal.unreadable} {lines} of answers.jsonl cannot be read: left out.")
    questions = questions_of(request.folder, manifest, journal, notes, request.data)
    answers = _answers(request.folder, manifest, questions, journal, notes)
    # Methods at R = 1 are the uncompressed model.
    answers = answers[~(answers["retention"] >= 1) | (answers["method"] == UNCOMPRESSED)]
    summary = summarise(answers, seed=manifest["experiment"]["seed"])
    answers = answers.dropna(subset="retention")
    compressed = summary.dropna(subset="retention")
    columns = _columns(answers)
    chosen = _chosen(answers, columns, request)
    known = {item.id: item for item in questions or ()}
    shown = {picture.id for name in chosen if name in known for picture in known[name].images}
    gallery = _Gallery(_planner(manifest, notes), notes, _PICTURES // max(1, len(shown)))
    entries = []
    for index, name in enumerate(chosen):
        tell(index, len(chosen), "pictures")
        entries.append(_entry(name, answers, columns, known.get(name), gallery, journal))
    _bound(entries, notes)
    if columns and chosen and not any(any(entry["kept"]) for entry in entries):
        notes.append(
            "The run did not record what was kept, or it cannot be drawn; no masks are shown."
        )
    browser = {
        "cells": [{"label": c.label, "keep": c.retention, "failed": c.failed} for c in columns],
        "questions": entries,
        "media": gallery.media,
        "pictures": gallery.pictures,
    }
    total = answers["question_id"].nunique()
    figures = list(_figures(request.folder, compressed, manifest, notes))
    failures = _failures(manifest, journal)
    if request.anonymous:
        told = {"manifest": manifest, "failures": failures, "notes": notes}
        manifest, failures, notes = anonymous(told).values()
    page = _template().render(
        title=_title(manifest),
        manifest=manifest,
        experiment=manifest["experiment"],
        command=_command(manifest),
        facts=_facts(manifest),
        status=manifest.get("status", "unknown"),
        answered=len(journal.answers),
        failures=failures,
        results=_results(summary),
        kinds=_kinds(summary),
        costs=_costs(compressed),
        figures=figures,
        sources=_sources(columns),
        citation=_own_citation(manifest),
        browser=_script_safe(browser),
        shown=len(entries),
        total=total,
        first=request.first,
        notes=notes,
        version=tp.__version__,
    )
    with replace_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Written(path, len(entries), total, tuple(notes))


def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("tokenprune.experiments", ".")
    found = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return found.get_template(_TEMPLATE)


def _script_safe(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts contain."""
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
) -> pd.DataFrame:
    """As `answers_frame`: from the journal, or as it was written where that is not possible."""
    try:
        return journaled(manifest, questions, journal)
    except UserError as error:
        if not (folder / "answers.parquet").exists():
            raise UserError(
                f"{str(folder)!r} has no answers.parquet, and it cannot be made: {error}"
            ) from error
        notes.append(f"Read from answers.parquet, because {error}")
        return read_answers(folder)


@dataclass(frozen=True)
class _Column:
    """A method at a retention."""

    label: str
    retention: float
    key: str | None
    failed: bool

    @property
    def method(self) -> str:
        return self.label.partition(":")[0]


def _columns(answers: pd.DataFrame) -> list[_Column]:
    """The uncompressed model first, then methods in the order of the run."""
    found = []
    for (label, retention), rows in answers.groupby(["label", "retention"], sort=False):
        failed = bool((rows["status"] == "failed").any())
        found.append(_Column(label, float(retention), _key(label, float(retention)), failed))
    return sorted(found, key=lambda column: column.label != UNCOMPRESSED)


def _key(label: str, retention: float) -> str | None:
    """What the journal files a method's answers under; None where the method is not known here."""
    if label == UNCOMPRESSED:
        return UNCOMPRESSED
    try:
        return Cell(tp.parse(label) if "@" in label else tp.parse(label, retention=retention)).key
    except UserError:
        return None


def _chosen(answers: pd.DataFrame, columns: Sequence[_Column], request: Request) -> list[str]:
    """Ids of the questions to show.

    The most informative ones are those with most methods that answer unlike the uncompressed
    model, or, without one, with most different answers.
    """
    names = list(pd.unique(answers["question_id"]))
    if not request.first:
        unlike = (
            (~answers["agrees"].fillna(True).astype(bool)).groupby(answers["question_id"]).sum()
        )
        ways = answers.groupby("question_id")["answer"].nunique()
        names.sort(key=lambda name: (-int(unlike[name]), -int(ways[name])))
    return names[: request.questions]


# --- one question ---------------------------------------------------------------------------------


def _entry(
    name: str,
    answers: pd.DataFrame,
    columns: Sequence[_Column],
    item: Question | None,
    gallery: _Gallery,
    journal: Journal,
) -> dict[str, Any]:
    rows = answers[answers["question_id"] == name]
    first = rows.iloc[0]
    by_cell = {(row["label"], row["retention"]): row for _, row in rows.iterrows()}
    said: list[str | None] = []
    ways: list[int | None] = []
    seen: dict[str, int] = {}
    right, same, keeps = "", "", []
    media = gallery.add(item)
    for column in columns:
        row = by_cell.get((column.label, column.retention))
        answer = None if row is None or pd.isna(row["answer"]) else str(row["answer"])
        said.append(answer)
        ways.append(None if answer is None else seen.setdefault(normalise(answer), len(seen)))
        right += _flag(None if row is None else row["correct"])
        same += _flag(None if row is None else row["agrees"])
        record = journal.answers.get((column.key or "", name), {})
        keeps.append(gallery.fitting(media, record.get("kept")))
    return {
        "id": name,
        "kind": first["kind"],
        "question": first["question"],
        "truth": first["truth"],
        "media": media,
        "answers": said,
        "ways": ways,
        "right": right,
        "same": same,
        "kept": keeps,
    }


def _bound(entries: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Leave out what was kept of the last questions where that of all would be too much."""
    sizes = [sum(map(len, itertools.chain(*filter(None, entry["kept"])))) for entry in entries]
    fitting = sum(total <= _KEPT for total in itertools.accumulate(sizes))
    for entry in entries[fitting:]:
        entry["kept"] = [None] * len(entry["kept"])
    if fitting < len(entries):
        notes.append(f"Only the masks of the first {fitting} questions fit into the page.")


def _flag(value: Any) -> str:
    return "-" if value is None or pd.isna(value) else "1" if value else "0"


class _Gallery:
    """Every picture once, and how the tokens of images and videos lie over them.

    Attributes:
        room: Bytes that a picture should not exceed.
        pictures: Data URIs, or None of a picture that is missing.
        media: Images and videos: their size, their pictures and the lattices of their tokens.
    """

    def __init__(self, adapter: Adapter | None, notes: list[str], room: int) -> None:
        self.adapter, self.notes, self.room = adapter, notes, room
        self.pictures: list[str | None] = []
        self.media: list[dict[str, Any]] = []
        self._sizes: list[tuple[int, int]] = []
        self._known: dict[tuple[str, int], int] = {}
        self._media: dict[tuple[Any, ...], int] = {}
        self._entries: list[int | None] = []

    def add(self, item: Question | None) -> list[int]:
        """Indices of the images or the video of a question."""
        if item is None:
            return []
        side = _FRAME_SIDE if item.video else _SIDE
        groups = [item.images] if item.video else [(picture,) for picture in item.images]
        together = len(groups) > 1
        return [self._medium(group, side, item.video, together) for group in groups]

    def fitting(self, media: Sequence[int], kept: Any) -> list[str] | None:
        """A journal's ``kept`` if it is of these images."""
        if not isinstance(kept, list) or len(kept) != len(media) or not media:
            return None
        lengths = [self._entries[index] for index in media]
        for text, length in zip(kept, lengths, strict=True):
            if length is None or not isinstance(text, str) or unpack(text, length) is None:
                return None
        return kept

    def _medium(self, group: Sequence[Picture], side: int, video: bool, together: bool) -> int:
        pictures = [self._picture(picture, side) for picture in group]
        key = (tuple(pictures), video, together)
        if key in self._media:
            return self._media[key]
        width, height = self._sizes[pictures[0]]
        medium: dict[str, Any] = {"size": [width, height], "pictures": pictures}
        entries = None
        whole = all(self.pictures[index] is not None for index in pictures)
        if whole and self.adapter is not None:
            try:
                layout = _layout(self.adapter, (height, width), len(group), video, together)
                medium["views"] = _views(layout, (height, width), ViewSize.of(self.adapter))
                entries = len(layout)
            except Exception as error:  # of an adapter of anyone's: the page must not fail
                note = f"No masks for some images: {type(error).__name__}: {error}"
                if note not in self.notes:
                    self.notes.append(note)
        self.media.append(medium)
        self._entries.append(entries)
        self._media[key] = len(self.media) - 1
        return self._media[key]

    def _picture(self, picture: Picture, side: int) -> int:
        key = (picture.id, side)
        if key not in self._known:
            try:
                image = picture.open()
            except UserError:
                self.pictures.append(None)
                self._sizes.append((4, 3))
            else:
                self.pictures.append(_data_uri(image, side, self.room))
                self._sizes.append(image.size)
            self._known[key] = len(self.pictures) - 1
        return self._known[key]


def _data_uri(image: Image.Image, side: int, room: int) -> str:
    """``image`` as WebP, its longest side at most ``side`` pixels; coarser to fit into ``room``."""
    for share, quality in _STEPS:
        small = image.copy()
        small.thumbnail((share * side, share * side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        # Cameras and programs write names into what comes along with the pixels.
        small.save(buffer, "WEBP", quality=quality, exif=b"", xmp=b"")
        if buffer.tell() <= room:
            break
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


# --- where tokens lie -----------------------------------------------------------------------------


def _planner(manifest: Mapping[str, Any], notes: list[str]) -> Adapter | None:
    """The model's adapter around its configuration alone, which is all that layouts need."""
    experiment = manifest["experiment"]
    name, revision = str(experiment["model"]), experiment.get("revision")
    try:
        # Of whoever made the run: nothing that it names is executed or downloaded.
        config = read_config(
            name, trust_remote_code=False, local_files_only=True, revision=revision
        )
        _, family = host_of(config)
    except UserError as error:
        notes.append(f"No masks: the configuration of {name} is not here ({error}).")
        return None
    return family(SimpleNamespace(config=config))  # type: ignore[arg-type]


def _layout(
    adapter: Any, size: tuple[int, int], pictures: int, video: bool, together: bool
) -> TokenLayout:
    found: TokenLayout
    found = adapter.video_layout(pictures) if video else adapter.layout(size, together=together)
    return found


def _views(layout: TokenLayout, size: tuple[int, int], view: ViewSize) -> list[dict[str, Any]]:
    """The lattices of tokens, in shares of what each shows.

    Each has its ``box`` (left, top, right, bottom in shares of the image, beyond it where there is
    padding), whether it is drawn as a ``square``, the ends of its rows and columns in shares of the
    box, the index ``at`` which its tokens begin in the packed sequence and the ``step`` from row to
    row, and where crops meet.
    """
    height, width = size
    found = []
    for lattice in lattices(layout, size, view):
        whole: Box = (0, 0, width, height)
        seams: list[list[float]] = [[], []]
        if lattice.view is None:
            crops = crop_boxes(layout, size, view)
            seams = [
                sorted({_share(x, 0, width) for x in crops[:, 0] if 0 < x < width}),
                sorted({_share(y, 0, height) for y in crops[:, 1] if 0 < y < height}),
            ]
        else:
            whole = frame_box(layout, size, view)
        left, top, right, bottom = whole
        found.append(
            {
                "square": lattice.view is not None,
                "box": [_share(x, 0, n) for x, n in zip(whole, (width, height) * 2, strict=True)],
                "rows": _ends(lattice.top, lattice.bottom, top, bottom),
                "cols": _ends(lattice.left, lattice.right, left, right),
                "seams": seams,
                **_places(lattice),
            }
        )
    return found


def _ends(start: Any, end: Any, low: float, high: float) -> list[list[float]]:
    return [[_share(value, low, high) for value in part] for part in (start, end)]


def _share(value: float, low: float, high: float) -> float:
    return round(float((value - low) / (high - low)), 5)


def _places(lattice: Lattice) -> dict[str, int]:
    """Where in the packed sequence the lattice's rows are."""
    index = lattice.index
    if not index.size:
        return {"at": 0, "step": 0}
    step = int(index[1, 0] - index[0, 0]) if len(index) > 1 else index.shape[1]
    rows, cols = np.indices(index.shape)
    if not np.array_equal(index, index[0, 0] + step * rows + cols):
        raise UserError("the tokens of a view are not packed row by row.")
    return {"at": int(index[0, 0]), "step": step}


# --- tables and texts -----------------------------------------------------------------------------


def _title(manifest: Mapping[str, Any]) -> str:
    experiment = manifest["experiment"]
    return f"{Path(experiment['model']).name}: {', '.join(experiment['methods'])}"


def _command(manifest: Mapping[str, Any]) -> str:
    words = [str(word) for word in manifest.get("command") or []]
    return shlex.join(["tokenprune", *words[1:]]) if words else ""


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know to trust or repeat the run."""
    experiment = manifest["experiment"]
    asked = manifest.get("request") or {}
    git = manifest.get("git") or {}
    sessions = manifest.get("sessions") or [{}]
    source = "the testbed's held-out questions"
    if asked.get("data"):
        source = str(asked["data"])
    facts = {
        "model": experiment["model"],
        "questions": f"{experiment['questions']} ({', '.join(experiment['modality'])}), {source}",
        "seed": experiment["seed"],
        "device": f"{experiment['device']} ({manifest.get('device_name', 'unknown')})",
        "dtype": experiment["dtype"],
        "longest answer": f"{experiment['max_new_tokens']} tokens",
        "started": sessions[0].get("started"),
        "took": f"{manifest['seconds']:.0f} s" if "seconds" in manifest else None,
        "platform": manifest.get("platform"),
        "python": manifest.get("python"),
        "commit": f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git else None,
        "weights (SHA-256)": experiment.get("weights"),
        "revision": experiment.get("revision"),
        "processor (SHA-256)": experiment.get("processor"),
        "data (SHA-256)": experiment.get("data"),
        "code (SHA-256)": experiment.get("code"),
    }
    versions = manifest.get("versions") or {}
    facts |= {f"{name} version": version for name, version in versions.items()}
    return {name: str(value) for name, value in facts.items() if value is not None}


def _failures(manifest: Mapping[str, Any], journal: Journal) -> list[dict[str, str]]:
    """Those of the manifest, or, of a run that was killed, of the journal."""
    found = manifest.get("failures")
    if found is None:
        found = [
            {"cell": key, "error": why.error, "traceback": why.traceback}
            for key, why in journal.failures.items()
        ]
    return list(found)


def _kinds(summary: pd.DataFrame) -> list[str]:
    return [kind for kind in pd.unique(summary["kind"]) if kind != OVERALL]


def _results(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each method and retention, most tokens first; last what sees less of the image."""
    rows = []
    ordered = summary.sort_values("retention", ascending=False, kind="stable")
    cells = ordered.groupby(["retention", "label"], sort=False, dropna=False)
    for (retention, label), group in cells:
        by_kind = {row["kind"]: row for _, row in group.iterrows()}
        overall = by_kind[OVERALL]
        p = overall.get("vs_uncompressed_p")
        rows.append(
            {
                "keep": "" if pd.isna(retention) else percent(float(retention), None),
                "label": label,
                "failed": overall["status"] != "ok",
                "n": _number(overall["n"], "{:.0f}"),
                "accuracy": _percent(overall["accuracy"], 1),
                "interval": _interval(overall, "accuracy"),
                "same": _percent(overall["agreement"], 1),
                "worse": label != UNCOMPRESSED
                and bool(p is not None and p < 0.05 and overall["vs_uncompressed"] < 0),
                "kinds": [
                    {
                        "value": _percent(row["accuracy"], 0),
                        "interval": _interval(row, "accuracy"),
                    }
                    for kind in _kinds(summary)
                    for row in [by_kind.get(kind, _MISSING)]
                ],
            }
        )
    return rows


_MISSING: Any = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), float("nan"))


def _costs(summary: pd.DataFrame) -> list[dict[str, Any]]:
    """The ledger of each cell, a question on average."""
    rows = []
    overall = summary[(summary["kind"] == OVERALL) & (summary["status"] == "ok")]
    for _, row in overall.sort_values("retention", ascending=False, kind="stable").iterrows():
        rows.append(
            {
                "keep": percent(float(row["retention"]), None),
                "label": row["label"],
                "realised": _percent(row["kept_patches"] / row["patch_tokens"], 1),
                "patches": f"{row['kept_patches']:.1f} of {row['patch_tokens']:.1f}",
                "separators": f"{row['kept_separators']:.1f} of {row['separators']:.1f}",
                "average": _number(row["layer_average"], "{:.1f}"),
                "kv": _number(row["kv_bytes"] / 2**20, "{:.3g}"),
                "flops": _number(row["flops"] / 1e9, "{:.4g}"),
                "selector": _number(row["selector_flops"] / 1e9, "{:.3g}"),
                "share": _percent(row["flops"] / row["uncompressed_flops"], 1),
            }
        )
    return rows


def _number(value: Any, form: str) -> str:
    return "" if pd.isna(value) else form.format(value)


def _percent(share: Any, decimals: int) -> str:
    return "" if pd.isna(share) else f"{100 * share:.{decimals}f}"


def _interval(row: Any, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if pd.isna(low) else f"{100 * low:.1f}–{100 * high:.1f}"


def _figures(
    folder: Path, summary: pd.DataFrame, manifest: Mapping[str, Any], notes: list[str]
) -> Iterator[dict[str, str]]:
    """The run's figures as data URIs; made afresh if an interrupted run has none."""
    files = sorted((folder / "plots").glob("*.png"), key=lambda file: file.stem)
    for file in files:
        try:
            with Image.open(file) as image:
                image.thumbnail((_PLOT_WIDTH, 4 * _PLOT_WIDTH), Image.Resampling.LANCZOS)
                uri = _plot_uri(image)
        except Exception as error:  # whatever damage does to a picture
            notes.append(f"The figure {file.name} cannot be shown ({error}).")
        else:
            yield {"name": file.stem.replace("-", " "), "uri": uri}
    if not files and len(summary) and summary["accuracy"].notna().any():
        name = Path(manifest["experiment"]["model"]).name
        figure = plots.accuracy(summary, f"Accuracy of {name} so far")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        with Image.open(buffer) as image:
            yield {"name": "accuracy so far", "uri": _plot_uri(image)}


def _plot_uri(image: Image.Image) -> str:
    """A figure has few colours: a palette keeps its text sharp and the file small."""
    buffer = io.BytesIO()
    image.convert("RGB").quantize(128).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _sources(columns: Sequence[_Column]) -> list[dict[str, Any]]:
    """The cards of the methods that were run, with BibTeX entries of their papers."""
    names: dict[str, None] = {}
    for column in columns:
        for part in column.label.split(" + "):
            names.setdefault(part.partition("@")[0].partition(":")[0])
    found = []
    for name in names:
        if name not in strategies.names():
            continue
        card = strategies.get(name).card
        found.append(
            {
                "name": name,
                "paper": card.paper,
                "arxiv": card.arxiv,
                "code": card.code,
                "verified": card.verified,
                "deviations": card.deviations,
                "bibtex": _bibtex(name, card.paper, card.arxiv) if card.arxiv else "",
            }
        )
    return found


def _bibtex(name: str, title: str, arxiv: str) -> str:
    """An entry for a paper; its year and month are in the identifier."""
    return (
        f"@misc{{{name},\n"
        f"  title         = {{{{{title}}}}},\n"
        f"  year          = {{20{arxiv[:2]}}},\n"
        f"  eprint        = {{{arxiv}}},\n"
        f"  archivePrefix = {{arXiv}},\n"
        f"  url           = {{https://arxiv.org/abs/{arxiv}}}\n"
        f"}}"
    )


def _own_citation(manifest: Mapping[str, Any]) -> str:
    """An entry for the software as it was when the run was made."""
    version = (manifest.get("versions") or {}).get("tokenprune") or tp.__version__
    git = manifest.get("git") or {}
    note = f"version {version}"
    if git.get("commit"):
        note += f", commit {git['commit']}{' with changes' if git.get('dirty') else ''}"
    year = str((manifest.get("sessions") or [{}])[0].get("started") or "")[:4]
    return (
        "@software{tokenprune,\n"
        "  title   = {{tokenprune}},\n"
        + (f"  year    = {{{year}}},\n" if year else "")
        + f"  version = {{{version}}},\n"
        f"  note    = {{{note}}}\n"
        "}"
    )
