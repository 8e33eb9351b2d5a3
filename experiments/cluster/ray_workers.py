"""Workers as actors of Ray, which is imported here alone and on first use."""

from __future__ import annotations

import math
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.cluster.pool import Event
from tokenprune.experiments.common.request import Cluster

__all__ = [
    "RayTransport",
    "connected",
]


LOCAL = "local"


_STORE = 256 * 2**20  # bytes of the object store of a local cluster, which holds a few tasks


_LOOK = 1.0  # seconds of one wait; an interrupt is noticed in between


_SAID = 200  # characters of a reason that are shown


class _Seat:
    """What runs in the process of a worker."""

    def __init__(self, paths: list[str], folder: str, payload: bytes) -> None:
        sys.path += [path for path in paths if path not in sys.path]
        with suppress(OSError):  # a machine with other folders; paths from the root may still exist
            os.chdir(folder)
        self._payload = payload
        self._serve: Callable[[Any], Any] | None = None

    def open(self) -> Any:
        """Make the function that serves tasks; what the worker reports about itself."""
        try:
            about, self._serve = pickle.loads(self._payload)()
        except UserError as error:
            return error
        return about

    def serve(self, payload: bytes) -> Any:
        """The result of one task."""
        assert self._serve is not None
        try:
            return self._serve(pickle.loads(payload))
        except UserError as error:
            return error


def imported() -> Any:
    """The package ray.  Raises `UserError` if it is not installed."""
    if find_spec("ray") is None:
        raise UserError(
            "--ray needs Ray, which is not installed; run: pip install 'tokenprune[ray]'."
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as Ray will do by default
    import ray

    return ray


@contextmanager
def connected(cluster: Cluster) -> Iterator[Any]:
    """The package ray, connected to the cluster; a local one is started and stopped.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    ray = imported()
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address == LOCAL:
        cpus = max(os.cpu_count() or 1, cluster.workers or 1)
        options |= {"num_cpus": cpus, "object_store_memory": _STORE, "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices to the programmers of Ray's users
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot connect to Ray at {cluster.address!r} ({_short(error)}); give the address of "
            "a running cluster, auto, or --ray alone for this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


class RayTransport:
    """Carries tasks to actors of Ray.

    Args:
        ray: The package, connected.
        cluster: How many workers, and the GPUs of each.
        make: Called in every worker; returns what the worker reports about itself, and the function
            that serves its tasks.

    Raises:
        UserError: The cluster has no room for a single worker.
    """

    def __init__(
        self, ray: Any, cluster: Cluster, make: Callable[[], tuple[Any, Callable[[Any], Any]]]
    ) -> None:
        self._ray = ray
        there = ray.cluster_resources()
        self.gpus = cluster.gpus
        if self.gpus is None:
            self.gpus = 1.0 if there.get("GPU") else 0.0
        self.size = cluster.workers or _room(there, self.gpus)
        self._actor = ray.remote(_Seat).options(num_cpus=1, num_gpus=self.gpus)
        self._waiting: dict[Any, Any] = {}  # reference to the worker that will answer
        self._opening: set[Any] = set()
        payload = ray.cloudpickle.dumps(make)
        self._arguments = ([*sys.path], os.getcwd(), ray.put(payload))

    def start(self) -> Any:
        worker = self._actor.remote(*self._arguments)
        reference = worker.open.remote()
        self._waiting[reference] = worker
        self._opening.add(reference)
        return worker

    def submit(self, worker: Any, payload: Any) -> None:
        sent = self._ray.cloudpickle.dumps(payload)
        self._waiting[worker.serve.remote(sent)] = worker

    def wait(self) -> Event:
        ready: list[Any] = []
        while not ready:
            ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=_LOOK)
        reference = ready[0]
        worker, opening = self._waiting.pop(reference), reference in self._opening
        self._opening.discard(reference)
        gone = self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError
        try:
            value = self._ray.get(reference)
        except gone as error:
            with suppress(Exception):
                self._ray.kill(worker)  # an unreachable one might come back
            return Event(worker, "died", _short(error))
        if isinstance(value, UserError):
            raise value
        return Event(worker, "ready" if opening else "done", value)


def _room(there: dict[str, float], gpus: float) -> int:
    """The number of workers for which a cluster has room."""
    room = there.get("CPU", 0.0)
    if gpus:
        # Workers with more than one GPU take whole ones; fractions share one.
        devices = int(there.get("GPU", 0))
        room = min(room, devices // gpus if gpus >= 1 else devices * math.floor(1 / gpus))
    if room < 1:
        raise UserError(
            f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, "
            f"no room for a worker with 1 CPU and {gpus:g} GPUs; give --workers to wait for more "
            "machines, or a smaller --gpus-per-worker."
        )
    return int(room)


def _short(error: BaseException) -> str:
    """The reason of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if "dead because" in line), lines[0] if lines else "")
    return (reason or type(error).__name__)[:_SAID]
