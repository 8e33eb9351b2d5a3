"""A comparison that has all its answers: its tables and plots, without the model.

Neither PyTorch nor transformers is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import CellRecord
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    answer_files,
    digests,
    environment,
)
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.common.request import (
    CompareRequest,
    questions_for,
)
from tokenprune.experiments.common.run_folder import (
    RunFolder,
    asked_for,
    folder_name,
    manifests,
)
from tokenprune.experiments.common.summary import summarise
from tokenprune.experiments.common.times import TIMES, read_times, with_times
from tokenprune.experiments.compare.cut_short import warn_of_cut_answers
from tokenprune.models import testbed
from tokenprune.progress import ProgressCallback, silent
from tokenprune.registry import strategies

__all__ = [
    "FILES",
    "as_in_run",
    "finished",
    "stored_request",
    "stored_requests",
]


FILES = ("answers.parquet", "summary.csv", "plots/")
"""The files of a comparison that a reader opens."""


_NOT_TAKEN = {"out", "figures", "trust_remote_code", "measure"}
"""Fields of a request that are never those of an earlier one."""


_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""The device files of the drivers of NVIDIA, AMD and WSL."""


def finished(request: CompareRequest, progress: ProgressCallback = silent) -> Outcome | None:
    """The outcome of a comparison that has all its answers; None if there may be more to do.

    The outcome is returned if an equal request has run before and weights, processor, code, data
    and versions are unchanged.  Nothing is refused here: any change is left to `compare.run.run`.

    Args:
        request: What to compare.
        progress: Called before every step.

    Raises:
        UserError: The folder cannot be written, or another process is working in it.
    """
    for path in [request.out] if request.out else sorted(Path("runs").glob("*")):
        manifest = next(manifests(path), {})
        try:
            found = _found(request, path, manifest, progress)
        except (KeyError, TypeError, AttributeError, OSError, UserError):
            continue  # a malformed manifest or a missing file
        if found is not None:
            progress(0, 0, "tables and plots")
            return _written(request, path, manifest, found)
    return None


def as_in_run(request: CompareRequest, given: Collection[str]) -> CompareRequest:
    """``request``, with everything that was not ``given`` as in the run in its folder.

    New methods run at all retention ratios of the run, and at new ratios all its methods run.

    Args:
        request: What to compare.
        given: Names of the fields that the user gave.
    """
    manifest = next(manifests(request.out), {}) if request.out is not None else {}
    stored = list(stored_requests(manifest))
    if not stored or "name" in manifest["experiment"]:
        return request
    try:
        earlier = [stored_request(Path(str(request.out)), one) for one in stored]
    except (TypeError, UserError):  # a malformed manifest, which is refused later
        return request
    taken: dict[str, Any] = {item.name: getattr(earlier[-1], item.name) for item in fields(request)}
    # With neither given, the request adds no cells.
    for name in ("methods", "retention") if {"methods", "retention"} & set(given) else ():
        values = [value for one in earlier for value in getattr(one, name)]
        taken[name] = tuple(dict.fromkeys(values))
    largest = max(earlier, key=lambda one: one.questions or float("inf"))
    taken["questions"] = largest.questions
    own = {*given, *_NOT_TAKEN}
    if {"data", "benchmark"} & own:
        own |= {"data", "benchmark", "root", "split", "questions"}
    kept = {name: value for name, value in taken.items() if name not in own}
    return replace(request, **kept)


def stored_requests(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The requests of a run, as its manifest stores them; of an older run there is one."""
    found = manifest.get("requests") or [manifest.get("request")]
    yield from (one for one in found if isinstance(one, dict))


def stored_request(folder: Path, stored: Mapping[str, Any]) -> CompareRequest:
    """The request that the manifest of the run in ``folder`` stores.

    Raises:
        TypeError: It is damaged.
        UserError: It is damaged.
    """
    found: dict[str, Any] = {}
    for item in fields(CompareRequest):
        value = stored.get(item.name)
        if item.name not in stored or item.name in ("out", "figures"):
            continue
        if item.name == "metric" and ":" in str(value):
            continue  # nothing that a run folder names is imported
        if value is not None and "Path" in str(item.type):
            value = _place(folder, value)
        found[item.name] = tuple(value) if isinstance(value, list) else value
    return CompareRequest(**found)


def _place(folder: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_place(folder, one) for one in value]
    near = folder / value
    return near if near.exists() else Path(value)


@dataclass(frozen=True)
class _Found:
    """The inputs of the tables, and the new entries of the manifest."""

    columns: Sequence[CellRecord]
    questions: Sequence[Question]
    journal: Journal
    details: Mapping[str, Any]


def _found(
    request: CompareRequest, path: Path, manifest: Mapping[str, Any], progress: ProgressCallback
) -> _Found | None:
    """What the run in ``path`` holds, or None if an answer is missing or an input changed."""
    folder = _model_folder(request.model)
    if folder is None or not _matches_request(request, path, manifest):
        return None
    noted, experiment = manifest["finished"], manifest["experiment"]
    progress(0, 0, "checking the answers")
    questions = questions_for(request, check_images=False)
    files, surroundings = answer_files(folder, (), noted["code"]), environment()
    now = {
        "questions": len(questions),
        "data": fingerprint(questions),
        **digests(files),
        **{package: surroundings["versions"][package] for package in DECISIVE},
    }
    if experiment != experiment | now:
        return None
    columns = [CellRecord.read(cell) for cell in manifest["cells"]]
    journal = Journal(path / "answers.jsonl")
    keys = {column.key for column in columns}
    if not all((key, item.id) in journal.answers for key in keys for item in questions):
        return None
    kept = ("finished", "cells", "device_name", "model_folder", "requests", "own_code", "functions")
    same = {name: manifest[name] for name in kept if name in manifest}
    details = asked_for(request, path) | same | {"files": files} | surroundings
    return _Found(columns, questions, journal, details)


def _model_folder(model: str) -> Path | None:
    """The files of a local model; None for a model on the Hub, which may have changed."""
    if model in testbed.names():
        return testbed.path(model)
    return Path(model) if Path(model).is_dir() else None


def _matches_request(request: CompareRequest, path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether the run in ``path`` is complete and had the same options."""
    if manifest.get("status") != "complete" or not manifest.get("finished"):
        return False
    experiment, registered = manifest["experiment"], manifest["finished"]["registered"]
    if request.out is None and path.name != folder_name(experiment):
        return False
    if request.measure and not (path / TIMES).exists():
        return False
    # Requests of older runs lack fields that came later.
    plain = asked_for(CompareRequest(), path)["request"]
    now, then = asked_for(request, path)["request"], plain | manifest["request"]
    same = {
        "out": None,
        "figures": None,
        "measure": None,
        "metric": None,
    }  # none of them changes an answer
    if json.loads(json.dumps(now | same)) != json.loads(json.dumps(then | same)):
        return False
    if registered is not None and registered != strategies.names():
        return False  # the meaning of `all` has changed
    # Without PyTorch, the default device is known only on a machine without a GPU.
    alone = sys.platform == "linux" and not any(Path(gpu).exists() for gpu in _GPUS)
    return request.device is not None or (alone and experiment["device"] == "cpu")


def _written(
    request: CompareRequest, path: Path, manifest: Mapping[str, Any], found: _Found
) -> Outcome:
    """Write the tables again, and the plots if there are none like them.

    Plots show the journal as it is, because the run was complete.
    """
    folder = RunFolder.open(path, manifest["experiment"], found.details)
    answers = answers_frame(request.model, found.columns, found.questions, found.journal)
    keys = (column.key for column in found.columns)
    warn_of_cut_answers(found.journal, keys, request.max_new_tokens)
    summary = with_times(summarise(answers, seed=request.seed), read_times(path))
    folder.write_tables(answers, summary)
    wanted = json.loads(json.dumps(asdict(request.figures))), request.metric
    drawn = manifest["request"].get("figures"), manifest["request"].get("metric")
    if drawn != wanted or not any((path / "plots").glob("*")):
        from tokenprune.experiments.compare.figures import draw

        draw(folder, request.model, summary, request.figures)
    folder.close("complete")
    return Outcome(
        status="complete",
        folder=path,
        answered=len(found.journal.answers),
        wanted=len({column.key for column in found.columns}) * len(found.questions),
        new=0,
        tables={"summary": summary},
        files=FILES,
        skipped=manifest["finished"]["skipped"],
    )
