"""One training step of an adapted tiny model, and what the reference makes of it: `from steps import step`."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from formula import DEVICE
from theodora import AdapterConfig, inject_adapter, kernels
from theodora.adapters.state import trained_tensors
from theodora.kernels.operators import runs_triton
from tiny import tiny_model

IDS = torch.arange(3, 13, device=DEVICE).view(2, 5)
FAST = runs_triton(torch.zeros(1, device=DEVICE))
needs_triton = pytest.mark.skipif(not FAST, reason="the fast path runs where Triton does")


def moved(model):
    """With adapters that do something."""
    with torch.no_grad():
        for t in trained_tensors(model).values():
            t += 0.05 * torch.randn_like(t) * t.abs().mean().clamp_min(0.1)
    return model.train()


def adapted(family="llama", method="dora", dtype=torch.float32, tied=False, blocks=1, **config):
    """A tiny model with an adapter; of several blocks where what passes between them counts."""
    blocks = {"n_layer" if family == "gpt2" else "num_hidden_layers": blocks}
    model = tiny_model(family, dtype=dtype, tied=tied, **blocks).to(DEVICE)
    return moved(inject_adapter(model, AdapterConfig(method=method, rank=3, **config)))


def displaced(family="llama", tied=False, dtype=torch.float32, **config):
    """A tiny model on the CPU, in evaluation mode, with an adapter away from its start."""
    model = inject_adapter(tiny_model(family, tied=tied, dtype=dtype), AdapterConfig(**config))
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def step(model, **inputs):
    """Loss and all gradients."""
    model.zero_grad()
    inputs = inputs or {"input_ids": IDS}
    loss = model(**inputs, labels=IDS, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def expected(model, **inputs):
    with kernels.reference():
        return step(model, **inputs)


def same(found, wanted, within=1e-4):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        difference = (found[name].double() - value.double()).norm()
        assert difference <= within * value.double().norm() + 1e-7, name


def calls_of(monkeypatch, module, name):
    """How often a function is called from now on: a list of one number."""
    count, own = [0], getattr(module, name)

    def counting(*args):
        count[0] += 1
        return own(*args)

    monkeypatch.setattr(module, name, counting)
    return count


@contextmanager
def other_defaults():
    """What torch makes is half precision without memory, as where a library builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


class Calls(TorchDispatchMode):
    """Counts the calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))
