"""GELU in one pass: the same numbers, in place, undone."""

import pytest
import torch
from transformers.activations import FastGELUActivation, NewGELUActivation, QuickGELUActivation

from formula import DEVICE
from steps import needs_triton
from theodora import kernels
from theodora.layers.activation import restore_gelu, speed_up_gelu


@needs_triton
@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_one_pass_gives_the_same_numbers(kind, monkeypatch):
    module, x = kind(), torch.linspace(-9, 9, 301, device=DEVICE)
    wanted = module(x)
    assert speed_up_gelu(module)
    assert isinstance(module, kind)
    monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("the steps were taken"))
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    with kernels.reference():
        assert torch.equal(module(x), wanted)
    restore_gelu(module)
    assert type(module) is kind


def test_other_activations_stay_as_they_are():
    changed = NewGELUActivation()
    changed.register_buffer("scale", torch.ones(1))
    for module in (QuickGELUActivation(), torch.nn.GELU(approximate="tanh"), changed):
        assert not speed_up_gelu(module)
