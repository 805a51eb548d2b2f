"""A step of fixed shape as one CUDA graph: forward and backward replayed without the host.

The host takes several milliseconds to launch the thousand kernels of a step one by one. Where they are short (small
models, few tokens), and where something made the GPU wait, it is the host that is measured. A graph launches them all
at once. What is captured once is replayed exactly: same kernels, same order, same addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]


class GraphedStep:
    """Runs `step(inputs)`, which computes a loss and calls its backward, from a CUDA graph for each shape of inputs.

    A shape's first calls run as they are, one of the next is captured. What cannot be captured, because it makes the
    host wait for the GPU, runs as it is for good (see `why_not`). Gradients are added to those that are there, as
    always.

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
    ) -> None:
        """Take the step and what it trains.

        Args:
            step: a function of tensors alone that returns a tensor or a (nested) tuple of them, without gradient. It
                must not depend on anything else that changes, but the values of tensors that stay where they are.
            parameters: what gets gradients.
            warmup: calls of a shape before it is captured.
            most_shapes: shapes that are captured; each keeps the memory of a step.
        """
        self.why_not: str | None = None
        self._step = step
        self._parameters = [p for p in parameters if p.requires_grad]
        self._warmup, self._most_shapes = warmup, most_shapes
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Inputs, Any, list[Tensor]]] = {}
        self._pool: Any = None

    def __call__(self, inputs: Inputs) -> Any:
        """The result of the step; it is overwritten by the next call."""
        key = tuple((name, t.shape, t.dtype, t.device) for name, t in inputs.items())
        if key in self._graphs:
            return self._replay(key, inputs)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self.why_not is not None or self._seen[key] <= self._warmup or len(self._graphs) >= self._most_shapes:
            return self._step(inputs)
        try:
            self._capture(key, inputs)
        except RuntimeError as error:
            self.why_not = str(error).splitlines()[0]
            torch.cuda.synchronize()
            return self._step(inputs)
        return self._replay(key, inputs)

    def _capture(self, key: Any, inputs: Inputs) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        before = [p.grad is None for p in self._parameters]
        static = {name: t.clone() for name, t in inputs.items()}
        graph = torch.cuda.CUDAGraph()
        for p, grad in zip(self._parameters, grads, strict=True):
            p.grad = grad
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = self._step(static)
        except RuntimeError:
            for p, was_none in zip(self._parameters, before, strict=True):
                p.grad = None if was_none else p.grad
            raise
        for p, was_none in zip(self._parameters, before, strict=True):
            p.grad = None if was_none else p.grad
        self._pool = graph.pool()
        self._graphs[key] = graph, static, result, grads

    def _replay(self, key: Any, inputs: Inputs) -> Any:
        graph, static, result, grads = self._graphs[key]
        fresh = [grad for p, grad in zip(self._parameters, grads, strict=True) if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for p, grad in zip(self._parameters, grads, strict=True):
            if p.grad is not None and p.grad is not grad:
                grad.copy_(p.grad)
            p.grad = grad
        for name, t in static.items():
            t.copy_(inputs[name], non_blocking=True)
        graph.replay()
        return result
