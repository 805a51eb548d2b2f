"""Slotted layers by themselves: which tokens they see, and what is left of one that could not be made."""

import pytest
import torch
from torch import nn

from theodora.serve.slotted import Routing, SlottedLayer, SlotTensors, prepare_slots, slot


@torch.no_grad()
def test_the_head_sees_the_kept_tokens_and_the_others_all():
    routing, x = Routing(3), torch.randn(4, 6)
    body, head = nn.Linear(6, 5), nn.Linear(6, 5)
    head.load_state_dict(body.state_dict())
    body, head = slot(body, routing, 2), slot(head, routing, 2, is_head=True)
    for at in (1, 2):
        tensors = SlotTensors(torch.randn(2, 6), torch.randn(2, 5), None)
        body.fill(at, tensors)
        head.fill(at, tensors)
    slots, kept = torch.tensor([0, 1, 1, 2]), torch.tensor([2, 3])
    routing.set(slots)
    every = body(x)
    torch.testing.assert_close(head(x), every)  # none are picked
    routing.set(slots, kept)
    torch.testing.assert_close(body(x), every)
    torch.testing.assert_close(head(x[kept]), every[kept])


def test_a_module_without_room_for_slots_is_left_as_it_was(monkeypatch):
    module = nn.Linear(6, 5)
    names = set(vars(module))

    def no_room(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SlottedLayer, "_new", no_room)
    with pytest.raises(torch.OutOfMemoryError):
        slot(module, Routing(2), 1)
    assert type(module) is nn.Linear
    assert set(vars(module)) == names
    assert not list(module.children())


def test_tensors_are_changed_one_by_one():
    a, b, g = torch.ones(2, 6), torch.ones(2, 5), torch.ones(5)
    found = SlotTensors(a, b, g).map(torch.neg).tensors()
    assert [(t.shape, bool((t == -1).all())) for t in found] == [(t.shape, True) for t in (a, b, g)]
    assert SlotTensors(a, b, None).map(torch.neg).g_O is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scaled", [False, True])
def test_layers_are_prepared_together_as_each_alone(scaled, dtype):
    layers = [slot(nn.Linear(6, 5, dtype=dtype), Routing(2), 2) for _ in range(3)]
    a, b = [torch.randn(2, 6) for _ in layers], [torch.randn(5, 2) for _ in layers]
    magnitudes = [torch.rand(5) + 1 for _ in layers] if scaled else None
    together = prepare_slots(layers, a, b, magnitudes, 0.5)
    for i, (layer, found) in enumerate(zip(layers, together, strict=True)):
        (alone,) = prepare_slots([layer], a[i : i + 1], b[i : i + 1], magnitudes and magnitudes[i : i + 1], 0.5)
        torch.testing.assert_close(found.tensors(), alone.tensors())
        if magnitudes is not None:
            norm = (layer.weight.double() + 0.5 * b[i].double() @ a[i].double()).norm(dim=1)
            torch.testing.assert_close(found.g_O.double(), magnitudes[i] / norm, rtol=1e-5, atol=0)
