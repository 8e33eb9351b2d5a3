"""Writes a folder with which a method of a run is served."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.files import replace_file
from tokenprune.experiments.common.result_folder import ResultFolder
from tokenprune.experiments.common.run_folder import UNCOMPRESSED, manifests
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.export.texts import (
    CLIENT_OF_EMBEDDINGS,
    CLIENT_OF_IMAGES,
    commands,
    readme,
)
from tokenprune.grammar import has_retention, shortest
from tokenprune.models import testbed
from tokenprune.models.checkpoints import read_config
from tokenprune.serving import served
from tokenprune.serving.vllm_pruning import Plan
from tokenprune.serving.weights import copy_model

__all__ = ["ExportRequest", "Exported", "run"]

MARKER = "serving.json"

_FIGURES = ("n", "accuracy", "accuracy_low", "accuracy_high", "flops", "kv_bytes")


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        folder: A run of ``tokenprune compare``.
        method: The label of a method in it.
        retention: One of its retention ratios; None if the method is a chain.
        out: The folder to write; None for a new one in ``runs/``.
        weights: Whether to copy the model too, with weights named as vLLM expects.  A testbed is
            always copied.
        force: Whether to replace an earlier export in ``out``.
    """

    folder: Path
    method: str
    retention: float | None
    out: Path | None = None
    weights: bool = False
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: The folder.
        about: The content of ``serving.json``.
    """

    folder: Path
    about: Mapping[str, Any]


def run(request: ExportRequest) -> Exported:
    """Write the folder.

    Raises:
        UserError: The folder is not that of a run, the run has no such method and retention, the
            method cannot be served, or the folder cannot be written.
    """
    manifest = next(manifests(request.folder), None)
    if manifest is None:
        raise UserError(
            f"{request.folder} is not the folder of a run; give one that tokenprune compare wrote."
        )
    experiment = manifest["experiment"]
    row, plain = _rows(request)
    label = str(row["label"])
    spec = label if has_retention(label) else f"{label}@{shortest(float(row['retention']))}"
    served(spec)
    model, source = str(experiment["model"]), _source(request.folder, manifest)
    try:
        Plan(read_config(str(source or model)), spec)
        inside, way = True, "in the server."
    except UserError as error:
        inside, way = False, f"by the client, because {error}"
    if request.weights and source is None:
        raise UserError(
            f"{model} is on the Hub, not in a folder; vLLM loads it from there, so leave --weights "
            "out."
        )
    copied = source is not None and (request.weights or model in testbed.names())
    folder = ResultFolder.open(
        request.out, f"serve-{Path(model).name}", marker=MARKER, force=request.force
    )
    loaded = "model" if copied else str(source or model)
    about = {
        "spec": spec,
        "model": model,
        "way": way,
        "inside": inside,
        "commands": commands(loaded, spec, inside),
        "measured": _figures(row),
        "uncompressed": _figures(plain),
        "run": manifest.get("command"),
        "versions": manifest.get("versions"),
        "questions": experiment.get("questions"),
        "data": experiment.get("data"),
    }
    client = CLIENT_OF_IMAGES
    if not inside:
        client = CLIENT_OF_EMBEDDINGS.replace("@MODEL@", repr(loaded)).replace("@SPEC@", repr(spec))
    files = {"README.md": readme(about), "client.py": client}
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        with replace_file(folder.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    names = list(files)
    if copied and source is not None:
        names += [f"model/{name}" for name in copy_model(source, folder.path / "model")]
    folder.finish(about, names)
    return Exported(folder.path, about)


def _rows(request: ExportRequest) -> tuple["pd.Series[Any]", "pd.Series[Any]"]:
    """The rows of ``summary.csv`` of the method and of the uncompressed model."""
    file = request.folder / "summary.csv"
    try:
        table = pd.read_csv(file)
        table = table[table["kind"] == OVERALL]
        plain = table[table["method"] == UNCOMPRESSED].iloc[0]
        labels = [str(one) for one in table.loc[table["status"] == "ok", "label"]]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}); run the comparison to its end."
        ) from error
    if request.method not in labels:
        raise unknown("method of this run", request.method, {*labels} - {UNCOMPRESSED})
    mine = table[table["label"] == request.method]
    known = [float(one) for one in mine["retention"]]
    if request.retention is None and len(known) > 1:
        raise UserError(f"the run has {request.method} at {_listed(known)}; give --retention.")
    wanted = known[0] if request.retention is None else request.retention
    found = mine[(mine["retention"] - wanted).abs() < 1e-9]
    if found.empty:
        raise UserError(
            f"the run has {request.method} at {_listed(known)}, not at {wanted:g}; give one of "
            "these."
        )
    return found.iloc[0], plain


def _listed(retentions: list[float]) -> str:
    return ", ".join(f"{one:g}" for one in retentions)


def _figures(row: "pd.Series[Any]") -> dict[str, float]:
    figures = {name: float(row[name]) for name in _FIGURES if name in row}
    tokens = float(row["kept_patches"] + row["kept_separators"])
    return {**figures, "n": int(figures["n"]), "visual_tokens": tokens}


def _source(folder: Path, manifest: Mapping[str, Any]) -> Path | None:
    """The model's folder, or None if it is on the Hub."""
    model = str(manifest["experiment"]["model"])
    if model in testbed.names():
        return testbed.path(model)
    stored = manifest.get("model_folder")
    found = folder / str(stored) if stored is not None else Path(model)
    return found.resolve() if found.is_dir() else None
