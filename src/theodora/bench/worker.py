"""The process of one variant: holds its model, and takes timed steps when asked. Imports torch when it runs.

It answers `load`, `turn` and `stop`, each on the pipe; a failure is an answer too.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from theodora.bench.variants import Job

GIB = 2**30


@dataclass(frozen=True)
class Failure:
    """Why a variant cannot be measured."""

    reason: str
    out_of_memory: bool = False
    traceback: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device, or of the process on a CPU."""

    idle: int
    """Held between turns."""
    peak: int
    """Most ever in use during a step."""
    reserved: int
    """Most ever taken from the device, what the allocator keeps for itself included."""
    capacity: int
    """Of the device."""


@dataclass(frozen=True)
class Loaded:
    """What a variant says once its first step is done."""

    first_step_seconds: float
    """From the frozen model on its device to the end of the first step: adapter, compilation and all."""
    first_loss: float
    trained_parameters: int
    model_bytes: int
    """Memory before the adapter came."""
    flops: float
    device: str
    memory: Memory


@dataclass(frozen=True)
class Turn:
    """Timed steps."""

    seconds: list[float]
    memory: Memory
    why_no_graph: str | None = None
    """Why the step does not run as the CUDA graph that its variant asks for."""


def work(pipe: Connection, job: Job, log: str) -> None:
    """Answer commands until `stop`. All that libraries print goes to the file `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends its workers
    _redirect_output(log)
    sys.path[:0] = job.variant.python_path
    os.environ.update(job.variant.environment)
    try:
        for module in job.variant.modules:
            import_module(module)
        stepper = Stepper(job)
        pipe.send("imported")
        while (command := pipe.recv())[0] != "stop":
            pipe.send(stepper.load() if command[0] == "load" else stepper.turn(*command[1:]))
        os._exit(0)  # tearing torch down takes seconds
    except EOFError:
        return  # the parent is gone
    except BaseException as error:
        pipe.send(_failure(error))


class Stepper:
    """One variant of the step, timed."""

    def __init__(self, job: Job) -> None:
        import torch

        from theodora.bench import build

        self.job, self.torch, self.build = job, torch, build
        self.cuda = job.workload.device.startswith("cuda")
        self.step: Any = None
        self.forward_backward: Any = self._forward_backward
        self.optimizer: Any = None

    def load(self) -> Loaded:
        """Build the model and the adapter, and take the first step."""
        torch, workload = self.torch, self.job.workload
        if workload.memory_limit is not None:
            total = torch.cuda.get_device_properties().total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, workload.memory_limit * GIB / total))
        model, prepare = (self.job.variant.build or self.build.build)(workload, self.job.variant)
        flops = self.build.matmul_flops(model, workload)
        self._wait()
        model_bytes = torch.cuda.memory_allocated() if self.cuda else process_bytes("VmRSS")
        start = time.perf_counter()
        self.step = prepare()
        if workload.optimizer and self.step.trained:
            self.optimizer = torch.optim.AdamW(self.step.trained, lr=1e-4)
        if self.job.variant.graph and self.cuda:
            from theodora.kernels.graph import GraphedStep

            self.forward_backward = GraphedStep(self._forward_backward, self.step.trained)
        first_loss = self._step().item()
        self._wait()
        seconds = time.perf_counter() - start
        self._between_steps()
        gc.collect()
        return Loaded(
            first_step_seconds=seconds,
            first_loss=first_loss,
            trained_parameters=sum(p.numel() for p in self.step.trained),
            model_bytes=model_bytes,
            flops=flops,
            device=torch.cuda.get_device_name() if self.cuda else "cpu",
            memory=self._memory(),
        )

    def turn(self, warm_up: int, steps: int) -> Turn:
        """Take some steps, each waited for before and after; the first `warm_up` of them are not timed."""
        seconds: list[float] = []
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        for _ in range(warm_up + steps):
            self._wait()
            start = time.perf_counter()
            self._step()
            self._wait()
            seconds.append(time.perf_counter() - start)
            self._between_steps()
        return Turn(seconds[warm_up:], self._memory(), getattr(self.forward_backward, "why_not", None))

    def _step(self) -> Any:
        loss = self.forward_backward({})
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    def _forward_backward(self, _: Any) -> Any:
        loss = self.step.loss()
        loss.backward()
        return loss.detach()

    def _between_steps(self) -> None:
        """Move the adapter, outside the timing: nothing that holds for one optimizer step may be used in the next."""
        with self.torch.no_grad():
            for parameter in self.step.trained:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-1e-6)
                    parameter.grad = None

    def _wait(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def _memory(self) -> Memory:
        if not self.cuda:
            peak = process_bytes("VmHWM")
            capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Memory(process_bytes("VmRSS"), peak, peak, capacity)
        cuda = self.torch.cuda
        peak, reserved = cuda.max_memory_allocated(), cuda.max_memory_reserved()
        cuda.empty_cache()  # the other variants' turn
        return Memory(cuda.memory_reserved(), peak, reserved, cuda.mem_get_info()[1])


def process_bytes(key: str) -> int:
    """VmRSS (resident now) or VmHWM (most ever) of this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        # Not Linux. (On Linux ru_maxrss would count the parent's memory, too.)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _failure(error: BaseException) -> Failure:
    text = " ".join(str(error).split())
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    out_of_memory = isinstance(error, MemoryError) or any(sign in text for sign in signs)
    reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {text}"[:500]
    return Failure(reason, out_of_memory, "".join(traceback.format_exception(error)))


def _redirect_output(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
