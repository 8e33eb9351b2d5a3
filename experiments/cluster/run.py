"""Computes tasks on a Ray cluster whose workers hold one model each."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tokenprune.errors import UserError
from tokenprune.experiments.cluster.pool import Died, Event, Pool, Transport
from tokenprune.experiments.cluster.ray_workers import RayTransport, connected, imported
from tokenprune.experiments.common.request import Cluster, ModelRequest
from tokenprune.experiments.common.setting import load_model
from tokenprune.models.loading import without_weights
from tokenprune.pictures import most_pixels, pixel_limit
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = [
    "Died",
    "Event",
    "Hardware",
    "Pool",
    "Transport",
    "description",
    "hardware",
    "on_one_worker",
    "workers",
]


@dataclass(frozen=True)
class Hardware:
    """Where a model runs.

    Attributes:
        device: Type of the device: ``cpu``, ``cuda``.
        name: Of the GPU, or of the processor.
        dtype: Of the weights, without ``torch.``.
    """

    device: str = ""
    name: str = ""
    dtype: str = ""


def hardware(pipe: Pipeline) -> Hardware:
    """Where a loaded model runs."""
    device = pipe.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return Hardware(device.type, name, str(pipe.model.dtype).removeprefix("torch."))


def description(request: ModelRequest, progress: ProgressCallback = silent) -> Pipeline:
    """The pipeline of ``request``, without weights where workers hold them (`workers`).

    Raises:
        UserError: As `tokenprune.load`, or Ray is not installed, or the model is one of timm.
    """
    if request.cluster is None:
        return load_model(request, progress)
    imported()
    if request.model.startswith("timm/"):
        raise UserError(f"--ray runs models of transformers; leave it out for {request.model}.")
    progress(0, 0, f"reading the configuration of {request.model}")
    places = {} if request.revision is None else {"revision": request.revision}
    pipe = without_weights(request.model, trust_remote_code=request.trust_remote_code, **places)
    pipe.system = request.system
    return pipe


@contextmanager
def workers(
    request: ModelRequest,
    serve: Callable[[Pipeline, Any], Any],
    progress: ProgressCallback = silent,
) -> Iterator[tuple[Pool[Hashable], Hardware]]:
    """Workers that have loaded the model of ``request``, and the hardware of the first one.

    Args:
        request: The request; its `cluster` says where the workers are.
        serve: Called in a worker with its pipeline and a task; has to be picklable.
        progress: Called before every step.

    Raises:
        UserError: The model cannot be loaded, or there is no such cluster.
    """
    cluster = request.cluster or Cluster()
    progress(0, 0, f"connecting to Ray ({cluster.address})")
    with connected(cluster) as ray:
        make = partial(_opened, replace(request, cluster=None), serve, most_pixels())
        pool: Pool[Hashable] = Pool(RayTransport(ray, cluster, make))
        progress(0, 0, f"loading {request.model} on {pool.transport.size} workers")
        yield pool, pool.first()


def on_one_worker(
    request: ModelRequest,
    serve: Callable[[Pipeline, Any], Any],
    payload: Any = None,
    progress: ProgressCallback = silent,
) -> Any:
    """The result of ``serve`` for one task, on a single worker.

    Raises:
        UserError: As `workers`, or the workers die.
    """
    from collections import deque

    cluster = replace(request.cluster or Cluster(), workers=1)
    with workers(replace(request, cluster=cluster), serve, progress) as (pool, _):
        for _, found in pool.results(deque([0]), lambda task: payload):
            if isinstance(found, Died):
                raise UserError(f"the worker died ({found.why}); give it more memory.")
            return found


def _opened(
    request: ModelRequest, serve: Callable[[Pipeline, Any], Any], pixels: int
) -> tuple[Hardware, Callable[[Any], Any]]:
    """In a worker: load the model."""
    pipe = load_model(request)
    return hardware(pipe), partial(_served, pipe, serve, pixels)


def _served(
    pipe: Pipeline, serve: Callable[[Pipeline, Any], Any], pixels: int, payload: Any
) -> Any:
    with pixel_limit(pixels):
        return serve(pipe, payload)
