"""The Ray cluster: this machine, or one that is there already; what it has, and whether that is enough."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from theodora.errors import ConfigError, TheodoraError
from theodora.extras import pip_line
from theodora.patches import replaced

# Ray reads these when it is imported. What the user has set stays.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to its makers
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean here
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it would start a run anew; ours are resumed by hand
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds until a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # imports over a network's file system take longer than a minute
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # where a process hangs in a collective
}
_SECONDS_TO_ANSWER = 10


def load_ray() -> Any:
    """Ray, imported with our settings.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("ray") is None:
        raise ConfigError(f"--launcher ray needs Ray, which is not installed: {pip_line('ray')}")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    return import_module("ray")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A node of the cluster, and what it has."""

    id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is, and what of it is free."""

    machines: tuple[Machine, ...]
    free_cpus: float
    free_gpus: float
    own: bool
    """Whether it was started for this command, on this machine."""

    @property
    def cpus(self) -> float:
        """CPUs of all machines."""
        return sum(machine.cpus for machine in self.machines)

    @property
    def gpus(self) -> float:
        """GPUs of all machines."""
        return sum(machine.gpus for machine in self.machines)

    def __str__(self) -> str:
        where = "this machine" if self.own else f"{_counted(len(self.machines), 'machine')} of the Ray cluster"
        return (
            f"{where} with {_counted(self.gpus, 'GPU')} ({self.free_gpus:g} free) and {_counted(self.cpus, 'CPU')} "
            f"({self.free_cpus:g} free)"
        )


@dataclass(frozen=True, kw_only=True)
class Share:
    """What each of several processes gets."""

    count: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """How many of its own a process starts for the CPU's part."""
        return max(1, int(self.cpus))


@contextmanager
def cluster(address: str | None) -> Iterator[tuple[Any, Cluster]]:
    """Connect to a Ray cluster, or start one on this machine that ends with the block.

    Args:
        address: `host:port` of a cluster's head, or `auto` for the one that runs on this machine. Default: what
            RAY_ADDRESS says, else a cluster of this command's own.

    Yields:
        Ray, and what there is.

    Raises:
        ConfigError: Ray is not installed, or no cluster is there.
    """
    ray = load_ray()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise ConfigError(
            f"The Ray address is {address}; expected host:port (as in 10.0.0.1:6379) or auto. There is no training "
            "through a Ray client: run this command on a machine of the cluster, or hand it in with ray job submit."
        )
    own = address == "local"
    already = ray.is_initialized()
    if not already:
        _connect(ray, address, own)
    try:
        with _unprinted():
            yield ray, _seen(ray, own)
    finally:
        if not already:
            ray.shutdown()


def _connect(ray: Any, address: str, own: bool) -> None:
    _look_for(address)
    options: dict[str, Any] = {"include_dashboard": False} if own else {}
    for left in (1, 0):
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **options)
            return
        except Exception as error:  # of a plain Exception, too, where a machine is too busy to start in Ray's time
            ray.shutdown()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if own and left:
                continue  # what it imports is in the system's cache by now
            if own:
                raise TheodoraError(f"Ray does not start on this machine: {lines[0]}") from error
            raise ConfigError(
                f"No Ray cluster could be used at {address}: {lines[0]}\n"
                "Expected the address of a running head (ray start --head), with the same versions of Ray and Python, "
                "and its token if it asks for one (RAY_AUTH_TOKEN_PATH)."
            ) from error


@contextmanager
def _unprinted() -> Iterator[None]:
    """Inside the block Ray prints no account of a worker's death, a screen long, beside ours; no option says so."""
    worker: Any = import_module("ray._private.worker")
    if not hasattr(worker, "print_to_stdstream"):  # there in Ray 2.60
        yield
        return
    with replaced(worker, print_to_stdstream=lambda *_, **__: None):
        yield


def _look_for(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for ten minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Nobody answers at {address} ({error}). Expected host:port of a running head, as ray start --head --port "
            "6379 tells it."
        ) from error


def _seen(ray: Any, own: bool) -> Cluster:
    machines = [
        Machine(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    free = ray.available_resources()
    return Cluster(machines=tuple(machines), free_cpus=free.get("CPU", 0.0), free_gpus=free.get("GPU", 0.0), own=own)


def share_for_training(there: Cluster, count: int | None) -> Share:
    """One GPU for each process, or CPUs where there is no GPU.

    Args:
        there: the cluster.
        count: how many processes. Default: as many as there are GPUs.

    Raises:
        ConfigError: there is not enough; Ray would wait without a word.
    """
    gpus = 1.0 if there.gpus >= 1 else 0.0
    if count is None:
        if not gpus:
            raise ConfigError(f"--num-workers is missing: there is {there}, and no GPU whose number could be taken")
        count = int(there.gpus)
    cpus = 1.0
    if there.own:  # nobody else's
        cpus = float(max(1, int(there.cpus) // count))
    places = sum(_places(machine, cpus, gpus) for machine in there.machines)
    what = "a GPU and a CPU" if gpus else "a CPU"
    if places < count:
        raise ConfigError(
            f"{count} workers want {what} each, and there is {there}, room for {places}. Lower --num-workers"
            + (", or add machines to the cluster." if not there.own else ".")
        )
    if there.free_cpus < count * cpus or there.free_gpus < count * gpus:
        raise ConfigError(
            f"{count} workers want {what} each, and others are at work in the cluster: there is {there}. Lower "
            "--num-workers, or wait (ray status shows what runs)."
        )
    return Share(count=count, cpus=cpus, gpus=gpus)


def _places(machine: Machine, cpus: float, gpus: float) -> int:
    return int(min(machine.cpus // cpus, machine.gpus // gpus if gpus else machine.cpus // cpus))


def share_for_cells(there: Cluster, per_gpu: int, count: int | None) -> Share:
    """Workers that take cells: `per_gpu` on each GPU of the cluster, or one on each machine where there is no GPU.

    Args:
        there: the cluster.
        per_gpu: workers that share a GPU.
        count: how many workers. Default: as many as there is room for.

    Raises:
        ConfigError: there is not enough, or nothing is free.
    """
    gpus = 1 / per_gpu if there.gpus >= 1 else 0.0
    if gpus:
        room = sum(int(machine.gpus) for machine in there.machines) * per_gpu
        count = count or room
        cpus = min(machine.cpus / (int(machine.gpus) * per_gpu) for machine in there.machines if machine.gpus >= 1)
        cpus = float(int(cpus)) if cpus >= 1 else cpus
        cpus = cpus if there.own else min(1.0, cpus)
    else:
        machines = [machine for machine in there.machines if machine.cpus >= 1]
        count = count or len(machines)
        room = sum(int(machine.cpus) for machine in machines)
        cpus = (
            float(max(1, min(int(machine.cpus) // -(-count // len(machines)) for machine in machines)))
            if machines
            else 1
        )
    if not count or room < count:
        raise ConfigError(
            f"{count} workers were asked for, and there is {there}, room for {room}. Lower --num-workers."
        )
    if there.free_gpus < gpus or there.free_cpus < cpus:
        raise ConfigError(f"Nothing is free in the cluster: there is {there} (ray status shows what runs)")
    return Share(count=count, cpus=cpus, gpus=gpus)


@contextmanager
def beside(output: str) -> Iterator[str]:
    """A file next to a folder that is to be written, by which other machines see whether they see the folder, too."""
    nearest = Path(output).absolute().parent
    while not nearest.is_dir():
        nearest = nearest.parent
    try:
        handle, name = tempfile.mkstemp(prefix=".theodora-seen-", dir=nearest)
    except OSError as error:
        raise ConfigError(
            f"{nearest}, where {output} is to be written, cannot be written to: {error.strerror}"
        ) from error
    os.close(handle)
    try:
        yield name
    finally:
        Path(name).unlink(missing_ok=True)


def go_to(folder: str, mark: str, output: str) -> None:
    """In a worker: go to the folder where the command was given, and make sure that the output is the same there.

    Raises:
        TheodoraError: this machine has another file system.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    if not os.path.exists(mark):
        raise TheodoraError(
            f"{os.uname().nodename} does not see {os.path.dirname(mark)}, where {output} is to be written. Choose an "
            "output folder that every machine of the cluster has mounted in the same place."
        )


def _counted(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")


def how_it_died(error: Exception) -> str:
    """Ray's account of a worker's death in a few words."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or ("memory" in text.lower() and "monitor" in text.lower()):
        return "ended by Ray: its machine was out of memory"
    if "node has died" in text or "node died" in text or type(error).__name__ == "NodeDiedError":
        return "its node died"
    if "SIGKILL" in text or "connection error" in text.lower() or "unexpectedly" in text:
        return "killed (for want of memory, perhaps), or crashed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
