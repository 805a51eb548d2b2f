"""CUDA graphs without CUDA: what is recorded runs again on the same tensors, and its results are overwritten."""

import random
from contextlib import nullcontext

import torch

from theodora.kernels import graph
from theodora.serve import static_batches


class FakeGraph:
    """The host's side of a step happens once, at the recording, in a real graph; here it happens at each replay."""

    def __init__(self, step):
        self._step = step
        cpu, host, enabled = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
        self.result = step()
        torch.set_rng_state(cpu)
        random.setstate(host)
        assert torch.is_grad_enabled() == enabled
        assert not any(t.requires_grad for t in _tensors(self.result))

    def replay(self):
        for old in _tensors(self.result):
            old.fill_(float("nan"))
        for old, new in zip(_tensors(self.result), _tensors(self._step()), strict=True):
            old.copy_(new)


def install(monkeypatch):
    """Let `GraphedStep` record with `FakeGraph`."""
    capture = graph.GraphedStep._capture

    def captured(self, key, inputs, trained):
        """Nothing is computed while a graph is captured: gradients are not touched."""
        before = [(p.grad, p.grad.clone()) for p in trained if p.grad is not None]
        capture(self, key, inputs, trained)
        for grad, value in before:
            grad.copy_(value)

    monkeypatch.setattr(graph.GraphedStep, "_capture", captured)
    monkeypatch.setattr(graph, "record", record)


def record(step, pool):
    """In the place of `theodora.kernels.graph.record`."""
    fake = FakeGraph(step)
    return fake, fake.result, pool or object()


def _tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in _tensors(part)]


class Step:
    """A recorded step without a result. Nothing is computed while it is recorded."""

    def __init__(self, step):
        self.replay = step


def install_steps(monkeypatch):
    """Let batches in lock-step record their steps on a CPU.

    Returns:
        The rows of each step that is recorded, from its first replay on.
    """
    rows, forward = [], static_batches._Steps._forward

    def noted(self, size):
        if rows and rows[-1] is None:
            rows[-1] = size
        forward(self, size)

    def record(step, pool):
        rows.append(None)
        return Step(step), None, pool or object()

    monkeypatch.setattr(static_batches, "record", record)
    monkeypatch.setattr(static_batches, "strict", nullcontext)
    monkeypatch.setattr(static_batches, "records", lambda model: True)
    monkeypatch.setattr(static_batches._Steps, "_forward", noted)
    return rows
