"""The fast path and the reference train the same model: their losses stay together step after step."""

from functools import cache

import pytest
import torch

import formula
from formula import DEVICE
from theodora import AdapterConfig, inject_adapter, kernels
from theodora.adapters.state import trained_tensors
from theodora.fastpath.accelerate import speed_up_model
from theodora.kernels.operators import interpreted
from tiny import tiny_model

STEPS = 10 if interpreted() and DEVICE == "cpu" else 100


def losses(method, dtype, fast):
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.bfloat16).to(DEVICE, dtype)  # the same weights in either dtype
    model = inject_adapter(model, AdapterConfig(method=method, rank=4)).train()
    if fast:
        speed_up_model(model)
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(3, 272, (4, 2, 12), generator=generator).to(DEVICE)
    found = []
    for step in range(STEPS):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


@cache
def reference(method, dtype):
    with kernels.reference():
        return losses(method, dtype, fast=False)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_the_same_losses(method):
    wanted = reference(method, torch.float32)
    assert wanted[-4:].mean() < wanted[:4].mean() - (0.01 if STEPS < 100 else 1)
    torch.testing.assert_close(losses(method, torch.float32, fast=True), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_in_bfloat16_they_stray_no_further_than_the_references(method):
    """Rounding sends each run its own way: what counts is how far from the run in float32."""
    exact = reference(method, torch.float32)
    plain, found = reference(method, torch.bfloat16), losses(method, torch.bfloat16, fast=True)
    assert (found - exact).abs().mean() <= formula.budget(torch.bfloat16) * (plain - exact).abs().mean()
