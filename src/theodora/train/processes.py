"""The processes that train one run together: how many there are, which one this is, who writes, what all agree on.

The one file of `train` that asks transformers, accelerate or torch about it. With one process nothing here costs
anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate.state
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import Trainer, TrainingArguments

from theodora.patches import replaced


@dataclass(frozen=True, kw_only=True)
class Processes:
    """All of them, seen from this one."""

    count: int = 1
    index: int = 0
    """Of this one, from 0 on. (Others say rank, which is an adapter's here.)"""
    writes: bool = True
    """Whether this one writes the run's files: the first one does, or with `save_on_each_node` the first of each
    machine."""

    @staticmethod
    def of(arguments: TrainingArguments) -> Processes:
        """The processes that were started together with this one."""
        return Processes(count=arguments.world_size, index=arguments.process_index, writes=arguments.should_save)

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this one speaks for all."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all have come here."""
        PartialState().wait_for_everyone()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of what each process has; every process calls this."""
        return tensor if self.alone else self._reduced(tensor, "sum")

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of what each process has; every process calls this."""
        return tensor if self.alone else self._reduced(tensor, "mean")

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it holds in any process; every process calls this, with the device its messages travel from."""
        return here if self.alone else bool(self.sum(torch.tensor([float(here)], device=device)).item())

    @staticmethod
    def _reduced(tensor: Tensor, how: str) -> Tensor:
        reduced: Any = reduce(tensor, how)
        return reduced


@contextmanager
def links_unasked() -> Iterator[None]:
    """Inside the block accelerate does not run nvidia-smi to see how GPUs reach one another, if none has to."""
    if os.environ.get("WORLD_SIZE", "1") != "1" or "LOCAL_RANK" in os.environ:
        yield
        return
    with replaced(accelerate.state, check_cuda_p2p_ib_support=lambda: True):
        yield


def is_spread(trainer: Trainer) -> bool:
    """Whether the model or its batches are spread over processes (FSDP, DeepSpeed, parallel contexts or tensors)."""
    return bool(
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.accelerator.parallelism_config is not None
    )


class Agreement:
    """Several processes decide alike whether to stop: one step after the first of them was told to.

    The step in between spares the hosts from waiting for their devices.

    Args:
        device: where the processes' messages travel.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before: tuple[Any, Tensor] | None = None

    def __call__(self, stop: bool) -> bool:
        """Whether all stop now. Every process has to call this in every step."""
        flag = torch.tensor([int(stop)], dtype=torch.int32, device=self.device)
        sent = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
        before, self._before = self._before, (sent, flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())
