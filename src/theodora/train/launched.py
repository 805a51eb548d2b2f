"""How this process was started: alone, or as one of several by torchrun, accelerate launch or Ray Train.

Launchers tell a process its place in environment variables. transformers and accelerate read the same ones, and each
would wrap, gather and wait in its own way; a run takes its share of the rows, and adds up gradients, by itself
(shares.py, gradients.py). So the libraries are shown one process (`unseen`), whose path is then that of every run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from theodora.config import TrainConfig
from theodora.errors import ConfigError, bullet_list, shown
from theodora.patches import replaced

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What tells the number of processes to those who look for it; a run does not.
_OTHERS = {
    "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
    "PMI_SIZE": "mpiexec",
    "MV2_COMM_WORLD_SIZE": "mpirun (MVAPICH2)",
    "SLURM_STEP_NUM_TASKS": "srun",
}
_READ_BY_LIBRARIES = (*_PLACE[:3], "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SET_BY_ACCELERATE = ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT")
_ENGINES_OF_ACCELERATE = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
_ELSEWHERE = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_TP": "tensor parallelism",
}
_WAY = (
    "Start as many processes as there are GPUs, each with the whole model: torchrun --nproc-per-node N -m theodora "
    "train …; --sharding fsdp2 spreads the frozen weights over them"
)


@dataclass(frozen=True, kw_only=True)
class Launched:
    """The place of this process among those that were started together."""

    count: int
    index: int
    on_machine: int
    """Its place among those of its machine."""
    count_on_machine: int | None
    """None where the launcher does not say."""


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """What a launcher says of this process; None for one that is alone.

    Raises:
        ConfigError: variables that contradict one another, or of a launcher that does not tell enough.
    """
    given = os.environ if environment is None else environment
    count = _number(given, "WORLD_SIZE", 1)
    if "WORLD_SIZE" not in given:
        _refuse_others(given)
    if count <= 1:
        return None
    missing = [name for name in _PLACE if not given.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {count}, so {count} processes are to train together, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: this one would train by itself, and so would the others. "
            "Start them with torchrun, accelerate launch or --launcher ray; or unset WORLD_SIZE for one process."
        )
    index, on_machine = _number(given, "RANK", 0), _number(given, "LOCAL_RANK", 0)
    if not 0 <= index < count:
        raise ConfigError(f"RANK is {index}, and WORLD_SIZE {count}; expected a rank from 0 to {count - 1}")
    of_machine = _number(given, "LOCAL_WORLD_SIZE", 0) or None
    return Launched(count=count, index=index, on_machine=on_machine, count_on_machine=of_machine)


def _number(given: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(given.get(name) or default)
    except ValueError:
        raise ConfigError(f"{name} is {shown(given[name])}; expected a whole number, as launchers set it") from None


def _refuse_others(given: Mapping[str, str]) -> None:
    for name, launcher in _OTHERS.items():
        count = _number(given, name, 1)
        if count > 1:
            raise ConfigError(
                f"{name} is {count}: {launcher} has started {count} processes, which would train {count} runs in one "
                "folder, because it does not tell them where to meet (WORLD_SIZE, RANK, MASTER_ADDR). Let it start "
                "one torchrun on each machine: torchrun --nnodes M --nproc-per-node N --rdzv-backend c10d "
                f"--rdzv-endpoint HOST:29500 -m theodora train …; or, for one process, unset {name}."
            )


def check_engine(config: TrainConfig, environment: Mapping[str, str] | None = None) -> None:
    """Refuse ways to spread a model that a run does not go, before anything is loaded.

    Raises:
        ConfigError: naming each, and what to say instead.
    """
    given = os.environ if environment is None else environment
    found = [f"{name}={given[name]}: {what}" for name, what in _ELSEWHERE.items() if is_on(given.get(name))]
    options: Mapping[str, Any] = config.trainer
    for name, what in (("deepspeed", "DeepSpeed"), ("parallelism_config", "tensor, context or sequence parallelism")):
        found += [f"{name}: {what}"] if options.get(name) else []
    if options.get("fsdp") or options.get("fsdp_config"):
        found.append("fsdp: say --sharding fsdp2, which leaves the adapter whole in each process")
    loading = options.get("model_init_kwargs")
    for name in ("tp_plan", "tp_size", "pp_plan", "distributed_config"):
        if isinstance(loading, Mapping) and loading.get(name):
            found.append(f"model_init_kwargs: {name}: tensor or pipeline parallelism")
    if found:
        raise ConfigError(f"Adapters are not trained this way:{bullet_list(found)}\n{_WAY}.")


def notes_of_one(config: TrainConfig, environment: Mapping[str, str] | None = None) -> list[str]:
    """What a process that is alone does not do, though it was asked for."""
    given = os.environ if environment is None else environment
    notes: list[str] = []
    # accelerate launch sets the first in any case, and the others for several processes, of which it starts one where
    # it is to use a CPU, or sees one GPU; it tells that one nothing else (read in accelerate 1.15).
    if "WORLD_SIZE" not in given and all(given.get(name) for name in _SET_BY_ACCELERATE):
        notes.append(
            "accelerate launch was asked for several processes and has started one, as it does on a CPU; "
            "torchrun --nproc-per-node N -m theodora train … starts N"
        )
    if config.sharding in ("fsdp2", "hsdp"):
        notes.append(f"sharding {config.sharding} has no effect: there is one process")
    return notes


def is_on(value: str | None) -> bool:
    """Whether an environment variable says yes, as accelerate reads it."""
    return value is not None and value.strip().lower() in ("1", "true", "t", "yes", "y", "on")


def check_devices(found: Launched, gpus: int) -> None:
    """Refuse more processes on a machine than it has GPUs, if it has any.

    Raises:
        ConfigError: with both numbers.
    """
    count = found.count_on_machine or 0
    if gpus and (found.on_machine >= gpus or count > gpus):
        raise ConfigError(
            f"{max(count, found.on_machine + 1)} processes were started on this machine, which has {gpus} "
            f"GPU{'' if gpus == 1 else 's'}: each process needs one of its own. Say --nproc-per-node {gpus}; or, to "
            "train on the CPU, ACCELERATE_USE_CPU=true."
        )


def on_cpu(config: TrainConfig) -> bool:
    """Whether a run computes on the CPU, because it is told to or there is nothing else."""
    told = config.trainer.get("use_cpu") or is_on(os.environ.get("ACCELERATE_USE_CPU"))
    return bool(told) or not torch.cuda.is_available()


@contextmanager
def device_chosen(place: int) -> Iterator[None]:
    """Inside the block transformers and accelerate leave the GPU be that was chosen: the one at `place`.

    They would choose the first one for a process that is alone, where each process would then leave some memory.
    """
    log, name = logging.getLogger("transformers.training_args"), "ACCELERATE_TORCH_DEVICE"
    before = os.environ.get(name)
    log.addFilter(_says_no_ddp)
    try:
        if not torch.cuda.is_available():
            yield
            return
        os.environ[name] = f"cuda:{place}"
        with replaced(torch.cuda, set_device=lambda _: None):
            yield
    finally:
        log.removeFilter(_says_no_ddp)
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def _says_no_ddp(record: logging.LogRecord) -> bool:
    """Whether a line of transformers is other than that processes are joined and it did not do it."""
    return "process group is initialized" not in record.getMessage()


@contextmanager
def unseen() -> Iterator[None]:
    """Inside the block transformers and accelerate see one process."""
    names = (*_READ_BY_LIBRARIES, *_ENGINES_OF_ACCELERATE)
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
