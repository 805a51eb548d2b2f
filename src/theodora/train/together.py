"""Several processes begin a run together, and end together: each failure is told once, by whom it happened to.

A process that fails says so in torch's store, where the others look when a message to it comes back. Whoever says
nothing within seconds was killed, or hangs: the error names it, and after how long (`ddp_timeout`) that was noticed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from accelerate.utils import check_cuda_p2p_ib_support
from torch import distributed
from torch.distributed import distributed_c10d

import theodora
from theodora.config import TrainConfig
from theodora.errors import ConfigError, TheodoraError, bullet_list
from theodora.files.alone import LOCK
from theodora.train.launched import Launched, check_devices, check_engine, launched, on_cpu, unseen
from theodora.train.processes import OtherFailed, Processes, SaidByFirst, are_here
from theodora.train.sharding import asked_of_accelerate
from theodora.train.stop import TrainingInterrupted

LOGS = "logs"
"""Folder of a run with what processes other than the first print."""
_TIMEOUT = 600  # seconds; transformers' own bound, ddp_timeout, says otherwise
_LATER = timedelta(minutes=1)
_PATIENCE = timedelta(days=30)
_ASKED_FOR = 5.0  # seconds in which others say that they are alive, or why not
_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets")
_OF_MESSAGES = ("gloo", "NCCL", "Connection closed", "Connection reset", "connection was closed", "imed out", "timeout")


@contextmanager
def together(config: TrainConfig) -> Iterator[Processes]:
    """Join the processes that were started with this one; with none nothing happens.

    Raises:
        ConfigError: the environment, or the processes among one another, contradict themselves.
        OtherFailed: another process has failed; in the first process alone, which speaks for the others.
        SaidByFirst: the first process tells why this one ends.
    """
    found = launched()
    check_engine(config)
    sharding = _sharding(config, found)
    if found is None:
        with unseen():
            yield Processes()
        return
    timeout = _timeout(config)
    began = _begin(config, found, timeout)
    processes = replace(_join(found, timeout), sharding=sharding)
    clean = False
    try:
        with unseen(), are_here(processes), _told(processes, config, timeout):
            processes.agree("configuration", _settings(config))
            yield processes
        clean = True
    finally:
        if began and (clean or processes.backend == "gloo"):  # NCCL would wait for those that are gone
            with suppress(Exception):
                distributed.destroy_process_group()


def _sharding(config: TrainConfig, found: Launched | None) -> Any:
    """How the frozen weights are cut; None: not at all."""
    asked = asked_of_accelerate()
    if asked is not None and config.sharding not in ("auto", asked):
        raise ConfigError(
            f"accelerate was told to shard by {asked}, and sharding is {config.sharding}. Leave one of the two out."
        )
    how = asked if config.sharding == "auto" else None if config.sharding == "none" else config.sharding
    if found is None:
        how = None
    if config.cpu_offload and how is None:
        raise ConfigError(
            "cpu_offload keeps the parts of sharded weights in main memory, and none are sharded here. Say "
            "--sharding fsdp2 and start several processes, or leave it out."
        )
    return how


def _timeout(config: TrainConfig) -> timedelta:
    seconds = config.trainer.get("ddp_timeout")
    try:
        return timedelta(seconds=float(_TIMEOUT if seconds is None else seconds))
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"ddp_timeout is {seconds!r}; expected seconds") from None


def _begin(config: TrainConfig, found: Launched, timeout: timedelta) -> bool:
    """Let torch connect the processes, if nobody has; whether it did."""
    cpu = on_cpu(config)
    if not cpu:
        check_devices(found, torch.cuda.device_count())
        torch.cuda.set_device(found.on_machine)
        if not check_cuda_p2p_ib_support():  # NCCL would try, and hang
            for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
                os.environ.setdefault(name, "1")
    if distributed.is_initialized():
        if distributed.get_world_size() != found.count:
            raise ConfigError(
                f"torch.distributed joins {distributed.get_world_size()} processes here, and WORLD_SIZE is "
                f"{found.count}. Start them all with one launcher."
            )
        return False
    # NCCL ends a process that waits too long without a word of ours; what hosts tell one another fails before it then.
    backend = config.trainer.get("ddp_backend") or ("gloo" if cpu else "nccl")
    device: Any = {} if cpu or backend != "nccl" else {"device_id": torch.device("cuda", found.on_machine)}
    try:
        distributed.init_process_group(backend, timeout=timeout + (_LATER if device else timedelta()), **device)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Process {found.index} of {found.count} could not join the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {timeout.total_seconds():g} s (ddp_timeout): {error}"
        ) from error
    return True


def _join(found: Launched, timeout: timedelta) -> Processes:
    try:
        group = distributed.new_group(backend="gloo", timeout=timeout)
        patient = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        hosts: list[Any] = [None] * found.count
        distributed.all_gather_object(hosts, socket.gethostname(), group=group)
        neighbours = patient
        for host in dict.fromkeys(hosts) if len(set(hosts)) > 1 else ():
            of_host = [index for index, each in enumerate(hosts) if each == host]
            made = distributed.new_group(of_host, backend="gloo", timeout=_PATIENCE)
            neighbours = made if found.index in of_host else neighbours
    except RuntimeError as error:
        raise TheodoraError(
            f"Process {found.index} could not reach the others by gloo: {error}\nIf machines have several networks, "
            "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) name the one to use."
        ) from error
    return Processes(
        count=found.count,
        index=found.index,
        machines=len(set(hosts)),
        on_machine=found.on_machine,
        backend=str(distributed.get_backend()),
        group=group,
        patient=patient,
        neighbours=neighbours,
        first_here=hosts.index(hosts[found.index]),
    )


def _settings(config: TrainConfig) -> dict[str, Any]:
    options = json.loads(json.dumps(config.to_options(), default=str))
    return {**options, "theodora": theodora.__version__, **{name: version(name) for name in _LIBRARIES}}


# Failures


@contextmanager
def _told(processes: Processes, config: TrainConfig, timeout: timedelta) -> Iterator[None]:
    """Tell the others when this process fails, and find out whose failure it is."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        raised = _ended(error, processes, config, timeout)
        if raised is error:
            raise
        raise raised from error


def _ended(error: BaseException, processes: Processes, config: TrainConfig, timeout: timedelta) -> BaseException:
    """What this process ends with."""
    at_once = isinstance(error, TrainingInterrupted)
    if at_once or isinstance(error, OtherFailed) or _is_of_messages(error):
        others = _others(processes, wait=not at_once)
        if others:
            index, text = min(others.items(), key=lambda one: one[0])
            reason = f"Process {index} failed: {text}\n" + (
                f"Its output is in {_log_of(config, index)}.\n" if index else ""
            )
            return processes.spoken_by_first(OtherFailed(reason + _again(config)))
        if isinstance(error, OtherFailed):
            return processes.spoken_by_first(error)
        if _is_of_messages(error):
            return processes.spoken_by_first(OtherFailed(_without_word(error, processes, config, timeout)))
    if isinstance(error, KeyboardInterrupt):
        code = error.exit_code if isinstance(error, TrainingInterrupted) else 130
        return error if processes.first else SaidByFirst(str(error), code)
    _tell(processes, str(error) or type(error).__name__)
    same = _others(processes, wait=False, same_as=str(error)) if not processes.first else {}
    return SaidByFirst(str(error)) if same else error


def _is_of_messages(error: BaseException) -> bool:
    if isinstance(error, TheodoraError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in _OF_MESSAGES)


def _store() -> Any:
    return cast(Any, distributed_c10d)._get_default_store()


def _tell(processes: Processes, text: str) -> None:
    with suppress(Exception):  # the store goes with whoever holds it
        _store().set(f"theodora/failed/{processes.index}", text)


def _others(processes: Processes, *, wait: bool, same_as: str | None = None) -> dict[int, str]:
    """Which other processes have failed, with their words."""
    until = time.monotonic() + (_ASKED_FOR if wait else 0.5 if same_as is not None else 0.0)
    while True:
        found: dict[int, str] = {}
        with suppress(Exception):
            store = _store()
            for index in range(processes.count) if same_as is None else (0,):
                key = f"theodora/failed/{index}"
                if index != processes.index and store.check([key]):
                    found[index] = store.get(key).decode(errors="replace")
        if same_as is not None:
            found = {index: text for index, text in found.items() if text == same_as}
        if found or time.monotonic() >= until:
            return found
        time.sleep(0.05)


def _without_word(error: BaseException, processes: Processes, config: TrainConfig, timeout: timedelta) -> str:
    """Who has ended, or hangs, without a word: those that do not say that they are alive."""
    silent: list[int] = []
    with suppress(Exception):
        store = _store()
        store.set(f"theodora/alive/{processes.index}", "")
        time.sleep(1.0)
        silent = [index for index in range(processes.count) if not store.check([f"theodora/alive/{index}"])]
    who = f"process {', '.join(map(str, silent))}" if silent else "another process"
    logs = "".join(f"\nThe last words of process {index} are in {_log_of(config, index)}." for index in silent if index)
    brief = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"No answer from {who}: it was killed, or hung for {timeout.total_seconds():g} s (ddp_timeout sets the bound). "
        f"({brief}){logs}\n{_again(config)}"
    )


def _again(config: TrainConfig) -> str:
    return f"Start the same command with --resume auto to go on from the newest checkpoint in {config.output}."


def _log_of(config: TrainConfig, index: int) -> Path:
    return Path(config.output) / LOGS / f"process-{index}.txt"


def check_seen(processes: Processes, output: Path) -> None:
    """Check that all processes see the folder of the run, which the first one has taken.

    Raises:
        ConfigError: in the first process, naming those that do not.
        SaidByFirst: in the others.
    """
    seen = processes.gather((socket.gethostname(), os.path.abspath(output), (output / LOCK).exists()))
    if blind := [f"process {n} on {host}: {path}" for n, (host, path, there) in enumerate(seen) if not there]:
        raise processes.spoken_by_first(
            ConfigError(
                f"The output folder {output} of process 0 is not where these processes look:{bullet_list(blind)}\n"
                "Choose a folder that all machines share, by its whole path."
            )
        )


@contextmanager
def logged(processes: Processes, config: TrainConfig, *, anew: bool) -> Iterator[TextIO | None]:
    """Inside the block what this process prints goes into its log, which is given; the first process has none.

    Args:
        processes: of which this is one.
        config: names the run's folder.
        anew: whether the run begins, and its logs with it.
    """
    if processes.first:
        yield None
        return
    log = _log_of(config, processes.index)
    log.parent.mkdir(exist_ok=True)
    with log.open("w" if anew else "a", encoding="utf-8") as file:
        kept = {number: os.dup(number) for number in (1, 2)}
        _flush()
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield file
        except BaseException:
            file.write(traceback.format_exc())
            raise
        finally:
            _flush()
            for number, before in kept.items():
                os.dup2(before, number)
                os.close(before)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
