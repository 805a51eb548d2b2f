"""Slotted layers that share launches give what each gives alone (here: under Triton's interpreter, or on a GPU)."""

import pytest
import torch
from torch import nn

from formula import DEVICE
from theodora.kernels.operators import interpreted
from theodora.serve.slotted import Routing, SlotTensors, slot
from theodora.serve.slotted_group import group_slotted

pytestmark = pytest.mark.skipif(DEVICE != "cuda" and not interpreted(), reason="on a CPU nothing is launched")


class Attention(nn.Module):
    def __init__(self, kv=8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(32, 40), nn.Linear(32, kv, bias=False), nn.Linear(32, 8)
        self.cross = False

    def forward(self, x):
        other = x * 2 if self.cross else x
        return self.q_proj(x), self.k_proj(other), self.v_proj(other)


def slotted(names=("q_proj", "k_proj", "v_proj")):
    torch.manual_seed(0)
    model = Attention().to(DEVICE).requires_grad_(False)
    routing = Routing(4)
    for n, name in enumerate(names):
        layer = slot(model.get_submodule(name), routing, n + 2)
        outputs = layer.current_weight.shape[0]
        for at in range(1, 4):
            g = torch.rand(outputs, device=DEVICE) + 0.5 if (at + n) % 2 else None
            a, b = torch.randn(n + 2, 32, device=DEVICE), torch.randn(n + 2, outputs, device=DEVICE)
            layer.fill(at, SlotTensors(a, b, g))
    return model, routing


@torch.no_grad()
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")])
def test_together_as_alone(names):
    model, routing = slotted(names)
    for slots in ([1], [0, 0, 1, 2, 2, 3], [3] * 20 + [0, 1]):
        x = torch.randn(1, len(slots), 32, device=DEVICE)
        routing.set(torch.tensor(slots, device=DEVICE))
        alone = model(x)
        group_slotted(model)
        assert len(model.q_proj.group.layers) == len(names)
        for together in (model(x), model(x)):
            for one, other in zip(alone, together, strict=True):
                torch.testing.assert_close(one, other)
        assert model.q_proj.group._x is None  # nothing is held after the batch
        assert model.q_proj.group._misses == 0
        for name in names:
            model.get_submodule(name).group = None


@torch.no_grad()
def test_a_wrong_guess_costs_time_only():
    model, routing = slotted()
    routing.set(torch.tensor([0, 1, 2], device=DEVICE))
    x = torch.randn(1, 3, 32, device=DEVICE)
    model.cross = True
    expected = model(x)
    group_slotted(model)
    for _ in range(6):
        for one, other in zip(expected, model(x), strict=True):
            torch.testing.assert_close(one, other)
    assert not model.q_proj.group.layers  # it has given up


@torch.no_grad()
def test_a_changed_input_is_seen():
    model, routing = slotted()
    routing.set(torch.tensor([0, 1, 2], device=DEVICE))
    x = torch.randn(1, 3, 32, device=DEVICE)
    group_slotted(model)
    model.q_proj(x)
    x.mul_(2)
    k = model.k_proj(x)
    for name in ("q_proj", "k_proj", "v_proj"):
        model.get_submodule(name).group = None
    torch.testing.assert_close(k, model.k_proj(x))
