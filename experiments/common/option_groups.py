"""Groups of options: a parameter of a command whose type is one of these classes stands for all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from tokenprune.errors import UserError
from tokenprune.experiments.common import options

if TYPE_CHECKING:
    from tokenprune.experiments.common.request import Cluster, FigureOptions

__all__ = [
    "DRAWING",
    "JOB",
    "LOADING",
    "WORDING",
    "DrawingOptions",
    "JobOptions",
    "LoadingOptions",
    "WordingOptions",
    "grouped",
]


@dataclass(frozen=True, kw_only=True)
class DrawingOptions:
    """How figures are drawn."""

    formats: options.Formats = None
    width: options.Width = "page"
    no_title: options.NoTitle = False

    @property
    def figures(self) -> FigureOptions:
        """The options of `ModelRequest`.  Raises `UserError`."""
        return options.figures(self.formats, self.width, self.no_title)


DRAWING = DrawingOptions()


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """How a long command runs."""

    ray: options.Ray = None
    workers: options.Workers = None
    gpus_per_worker: options.GpusPerWorker = None
    log_file: options.LogFile = None

    @property
    def cluster(self) -> Cluster | None:
        """The option of `ModelRequest`.  Raises `UserError`."""
        from tokenprune.experiments.common.request import Cluster

        if self.ray is not None:
            return Cluster(address=self.ray, workers=self.workers, gpus=self.gpus_per_worker)
        if self.workers is not None or self.gpus_per_worker is not None:
            raise UserError(
                "--workers and --gpus-per-worker are about the workers of --ray; give --ray too."
            )
        return None


JOB = JobOptions()


@dataclass(frozen=True, kw_only=True)
class LoadingOptions:
    """How a model is loaded; the fields are those of `ModelRequest`."""

    device: options.Device = None
    device_map: options.DeviceMap = None
    dtype: options.Dtype = "auto"
    attn: options.Attn = None
    quantize: options.Quantize = None
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False


LOADING = LoadingOptions()


@dataclass(frozen=True, kw_only=True)
class WordingOptions:
    """Where questions come from, and how they are asked; fields of `QuestionRequest`."""

    benchmark: options.Benchmark = None
    root: options.Root = None
    split: options.Split = None
    prompt: options.Prompt = None
    template: options.Template = None
    suffix: options.Suffix = None
    system: options.System = None


WORDING = WordingOptions()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with one option for every field of its parameters that are groups."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter)
            continue
        groups[parameter.name] = kind
        hints = get_type_hints(kind, include_extras=True)
        parameters += [
            parameter.replace(name=item.name, annotation=hints[item.name], default=item.default)
            for item in fields(kind)
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{item.name: given.pop(item.name) for item in fields(kind)})
        command(**given)

    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
