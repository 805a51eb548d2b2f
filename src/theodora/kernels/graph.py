"""A step of fixed shape as one CUDA graph: forward and backward replayed without the host.

The host takes some 100 ms to launch the thousand kernels of a large model's step one by one. Where they are short
(small models, few tokens), and where something made the GPU wait, it is the host that is measured. A graph launches
them all at once. What is captured once is replayed exactly: same kernels, same order, same addresses.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theodora.kernels import offload

Inputs = Mapping[str, Tensor]
_NO_MEMORY = "there is no memory for a graph beside batches of other shapes"


@dataclass(frozen=True)
class _Recording:
    graph: Any
    """Has `replay()`."""
    inputs: Inputs
    """Where the graph reads."""
    result: Any
    """Where it writes."""
    trained: list[nn.Parameter]
    """The parameters that it computes gradients of."""
    grads: list[Tensor]
    """Where it writes them."""
    addresses: list[int]
    """Where they are."""


class GraphedStep:
    """Runs `step(inputs)`, which computes a loss and calls its backward, from a CUDA graph for each shape of inputs.

    The first calls of a shape that is not rare run as they are; in the last of them whatever would make the host wait
    for the GPU, or draws random numbers on the host, is an error, so that a capture does not fail half-way. What cannot
    be captured runs as it is for good (see `why_not`). Gradients are added to those that are there, as always, and
    parameters that the step does not reach keep none.

    A graph keeps the memory of its step. Where that is missing elsewhere, call `release`; the step itself does.

    Example:
        step = GraphedStep(lambda batch: backward_of(model(**batch).loss), model.parameters())
        loss = step({"input_ids": ids, "labels": ids})
    """

    def __init__(
        self,
        step: Callable[[Inputs], Any],
        parameters: Sequence[nn.Parameter],
        warmup: int = 2,
        most_shapes: int = 2,
        least_share: float = 1 / 8,
    ) -> None:
        """Take the step and what it trains.

        Args:
            step: a function of tensors alone that returns a tensor or a (nested) tuple of them, without gradient. It
                must not depend on anything else that changes, but the values of tensors that stay where they are.
            parameters: what gets gradients.
            warmup: calls of the first shape before it is captured, at least 1; the others are captured after one.
            most_shapes: shapes that are captured; they share the memory of the largest step.
            least_share: of the calls, so that a shape is worth its memory.
        """
        self.why_not: str | None = None
        self.replays = 0
        """Calls that ran from a graph."""
        self._step = step
        self._parameters = [p for p in parameters if p.requires_grad]
        self._warmup, self._most_shapes, self._least_share = max(1, warmup), most_shapes, least_share
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, _Recording] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None

    def __call__(self, inputs: Inputs) -> Any:
        """The result of the step; it is overwritten by the next call."""
        key = tuple((name, t.shape, t.dtype, t.device) for name, t in inputs.items())
        recording = self._graphs.get(key)
        if recording is not None:
            if recording.addresses == _addresses(recording.trained):
                return self._replay(recording, inputs)
            del self._graphs[key], self._seen[key]  # a parameter has moved
        if self.why_not is not None or len(self._graphs) >= self._most_shapes:
            return self._plain(inputs)
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        # What a step does at its first calls it has done where there is a graph of another shape.
        calls = 1 if self._graphs else self._warmup
        if seen < calls or seen < self._least_share * sum(self._seen.values()):
            return self._plain(inputs)
        try:
            return self._first(key, inputs)
        except RuntimeError as error:
            short = bool(self._graphs) and isinstance(error, torch.OutOfMemoryError)
            self.release(_NO_MEMORY if short else _reason(error))
        return self._step(inputs)

    def release(self, why_not: str) -> bool:
        """Let the graphs and their memory go, and run as it is from now on; whether there were any."""
        found = bool(self._graphs)
        self.why_not = self.why_not or why_not
        self._graphs, self._pool = {}, None
        if found and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return found

    def _plain(self, inputs: Inputs) -> Any:
        if not self._graphs:
            return self._step(inputs)
        try:
            return self._apart(inputs)[0]
        except torch.OutOfMemoryError:
            self.release(_NO_MEMORY)
        return self._step(inputs)

    def _first(self, key: Any, inputs: Inputs) -> Any:
        """The call that finds out whether a shape can be captured, and captures it for the next."""
        result, trained = self._apart(inputs, strictly=True)
        try:
            self._capture(key, inputs, trained)
        except RuntimeError as error:
            self.release(_reason(error))
        return result

    def _apart(self, inputs: Inputs, strictly: bool = False) -> tuple[Any, list[nn.Parameter]]:
        """The step and what it reached, with all gradients and random states as they were if it fails."""
        before = [p.grad for p in self._parameters]
        states = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        for p in self._parameters:
            p.grad = None
        try:
            with strict() if strictly and states[1] is not None else nullcontext():
                result = self._step(inputs)
        except RuntimeError:
            for p, grad in zip(self._parameters, before, strict=True):
                p.grad = grad
            torch.set_rng_state(states[0])
            if states[1] is not None:
                torch.cuda.set_rng_state(states[1])
            raise
        trained = [p for p in self._parameters if p.grad is not None]
        for p, grad in zip(self._parameters, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        return result, trained

    def _capture(self, key: Any, inputs: Inputs, trained: list[nn.Parameter]) -> None:
        before = [p.grad for p in trained]
        static = {name: t.clone() for name, t in inputs.items()}

        def step() -> tuple[Any, list[Any]]:
            for p in trained:
                p.grad = None  # what was added to would have to be filled with zeros first
            return self._step(static), [p.grad for p in trained]

        try:
            graph, (result, grads), self._pool = record(step, self._pool)
        finally:
            for p, grad in zip(trained, before, strict=True):
                p.grad = grad
        self._graphs[key] = _Recording(graph, static, result, trained, grads, _addresses(trained))

    def _replay(self, recording: _Recording, inputs: Inputs) -> Any:
        trained, grads = recording.trained, recording.grads
        before = [p.grad for p in trained]
        kept = [i for i, grad in enumerate(grads) if before[i] is grad]
        if kept:  # an earlier step's, which this one would overwrite
            sums = [self._sums.setdefault(trained[i], torch.empty_like(grads[i])) for i in kept]
            torch._foreach_copy_(sums, [grads[i] for i in kept])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            for i, total in zip(kept, sums, strict=True):
                before[i] = total
        for name, t in recording.inputs.items():
            t.copy_(inputs[name], non_blocking=True)
        recording.graph.replay()
        added = [(total, grad) for total, grad in zip(before, grads, strict=True) if total is not None]
        if added:
            torch._foreach_add_(*map(list, zip(*added, strict=True)))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]
        for p, total, grad in zip(trained, before, grads, strict=True):
            p.grad = grad if total is None else total
        self.replays += 1
        return recording.result


@dataclass(frozen=True)
class _Graph:
    graph: Any
    host: object
    """The host's memory that it reads and writes."""

    def replay(self) -> None:
        self.graph.replay()


def record(step: Callable[[], Any], pool: Any) -> tuple[Any, Any, Any]:
    """Capture `step`: the graph, the result that it will write, and the memory pool, which was given or is new."""
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    offload.land()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"), offload.captured() as host:
            result = step()
    except RuntimeError:
        torch.cuda.set_stream(stream)  # where the capture itself is broken, torch leaves its own in place
        raise
    return _Graph(graph, host), result, graph.pool()


@contextmanager
def strict() -> Iterator[None]:
    """Inside the block it is an error if the host waits for the GPU, and afterwards if it has drawn random numbers."""
    mode = torch.cuda.get_sync_debug_mode()
    states = random.getstate(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # torch: a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    if states[0] != random.getstate() or not torch.equal(states[1], torch.get_rng_state()):
        raise RuntimeError("the step draws random numbers on the host")


def _reason(error: RuntimeError) -> str:
    """The first line of the error that came first: a capture that was broken off fails once more at its end."""
    first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return (str(first).splitlines() or [type(first).__name__])[0]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]
