"""The processes that train one run together: how many there are, which one this is, who writes, what all agree on.

The one file of `train` that asks torch.distributed about it. With one process nothing here costs anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import accelerate.state
import torch
from torch import Tensor, distributed

from theodora.errors import ConfigError, TheodoraError, bullet_list, shown
from theodora.patches import replaced

T = TypeVar("T")


class OtherFailed(TheodoraError):
    """Another process has failed, and this one ends with it."""


class SaidByFirst(TheodoraError):
    """This process ends over what the first one tells the user."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Processes:
    """All of them, seen from this one."""

    count: int = 1
    index: int = 0
    """Of this one, from 0 on. (Others say rank, which is an adapter's here.)"""
    machines: int = 1
    on_machine: int = 0
    """The place of this one among those of its machine."""
    backend: str = ""
    """What carries gradients: nccl, gloo."""
    group: Any = None
    """Carries what hosts tell one another, and gives up after the run's `ddp_timeout`."""
    patient: Any = None
    """The same, and waits as long as it takes, or until the other side is gone."""
    neighbours: Any = None
    """Like `patient`, the processes of this machine alone."""
    first_here: int = 0
    """The first process of this machine."""
    sharding: Literal["fsdp2", "hsdp"] | None = None
    """How the frozen weights are cut over them; None: each has them all."""

    @staticmethod
    def here() -> Processes:
        """The processes that were started together with this one."""
        return _HERE[-1]

    @staticmethod
    def cut_from_here(how: Literal["fsdp2", "hsdp"]) -> Processes:
        """The same processes, which from now on cut the frozen weights; every process calls this."""
        _HERE[-1] = replace(_HERE[-1], sharding=how)
        return _HERE[-1]

    @property
    def count_here(self) -> int:
        """How many are on this machine."""
        return 1 if self.neighbours is None else distributed.get_world_size(self.neighbours)

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one speaks for all, and writes what there is to write."""
        return self.index == 0

    @property
    def writes(self) -> bool:
        """Whether this one writes the run's files."""
        return self.first

    def described(self) -> str:
        """`2 processes on 1 machine, DDP, gloo`."""
        machines = f"{self.machines} machine{'' if self.machines == 1 else 's'}"
        kind = {None: "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP"}[self.sharding]
        return f"{self.count} processes on {machines}, {kind}, {self.backend}"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what each process has; every process calls this."""
        if self.alone:
            return tensor
        tensor = tensor.detach().clone()
        distributed.all_reduce(tensor)
        return tensor

    def any(self, here: bool) -> bool:
        """Whether it holds in any process; every process calls this."""
        return any(self.gather(here))

    def highest(self, here: int) -> int:
        """The highest number of all processes, which hosts tell one another; every process calls this."""
        if self.alone:
            return here
        told = torch.tensor([here])
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self.group)
        return int(told.item())

    def gather(self, value: T) -> list[T]:
        """What each process has, in all of them."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value, group=self.group)
        return found

    def first_does(self, work: Callable[[], T], *, patient: bool = False) -> T:
        """What the first process makes, in all of them; the others wait, and fail when it fails.

        Args:
            work: done once.
            patient: whether it may take longer than the processes would wait for one another otherwise.
        """
        return self._one_does(work, 0, self.patient if patient else self.group)

    def one_here_does(self, work: Callable[[], T]) -> T:
        """The same with one process of each machine, for however long it takes."""
        return self._one_does(work, self.first_here, self.neighbours)

    def one_here_first(self, work: Callable[[], T]) -> T:
        """What each process makes, one of each machine before the others, which find what it has put by."""
        made: list[T] = []
        self.one_here_does(lambda: made.append(work()))
        return made[0] if made else work()

    def _one_does(self, work: Callable[[], T], who: int, group: Any) -> T:
        if self.alone:
            return work()
        told: list[Any] = [None]
        if self.index == who:
            try:
                done = work()
            except BaseException as error:
                told[0] = False, f"{error or type(error).__name__}"
                distributed.broadcast_object_list(told, src=who, group=group)
                raise
            told[0] = True, done
            distributed.broadcast_object_list(told, src=who, group=group)
            return done
        distributed.broadcast_object_list(told, src=who, group=group)
        good, value = told[0]
        if not good:
            raise OtherFailed(f"Process {who} failed: {value}")
        return value

    def spread(self, tensors: Iterator[Tensor] | list[Tensor]) -> None:
        """Give tensors everywhere the values that they have in the first process."""
        if not self.alone:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), src=0)

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Look whether all processes have the same.

        Args:
            what: the values are, for the message.
            values: name -> value, short enough to be shown.

        Raises:
            ConfigError: in the first process, naming what differs, where, and the values.
            SaidByFirst: in the others.
        """
        if self.alone:
            return
        found = self.gather((socket.gethostname(), dict(values)))
        expected = found[0][1]
        lines: list[str] = []
        for index, (host, own) in enumerate(found):
            for name in dict.fromkeys((*expected, *own)):
                one, other = expected.get(name), own.get(name)
                if one != other:
                    lines.append(f"{name}: {shown(one)} in process 0, {shown(other)} in process {index} on {host}")
        if lines:
            raise self.spoken_by_first(
                ConfigError(
                    f"The processes do not agree about the {what}, and would not train one run:"
                    f"{bullet_list(lines[:12])}\nStart all of them with the same command, data and environment."
                )
            )

    def spoken_by_first(self, error: TheodoraError) -> TheodoraError:
        """What this process raises of an error that all have found alike."""
        return error if self.first else SaidByFirst(str(error))


_HERE: list[Processes] = [Processes()]


@contextmanager
def are_here(processes: Processes) -> Iterator[None]:
    """Inside the block these are `Processes.here()`."""
    _HERE.append(processes)
    try:
        yield
    finally:
        _HERE.pop()


@contextmanager
def links_unasked() -> Iterator[None]:
    """Inside the block accelerate does not run nvidia-smi to see how GPUs reach one another, if none has to."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or "LOCAL_RANK" in os.environ:
        yield
        return
    with replaced(accelerate.state, check_cuda_p2p_ib_support=lambda: True):
        yield


class Agreement:
    """Several processes decide alike whether to stop: one step after the first of them was told to.

    The step in between spares the hosts from waiting for one another.

    Args:
        group: of hosts (None: the default group); their devices go on meanwhile.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._before: tuple[Any, Tensor] | None = None

    def __call__(self, stop: bool) -> bool:
        """Whether all stop now. Every process has to call this in every step."""
        flag = torch.tensor([int(stop)], dtype=torch.int32)
        sent = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        before, self._before = self._before, (sent, flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())
