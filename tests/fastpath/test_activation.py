"""GELU in one pass: the same numbers, in place, undone."""

import pytest
import torch
from torch.nn import functional as F
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation, QuickGELUActivation

from formula import DEVICE
from steps import needs_triton, other_defaults
from theodora import kernels
from theodora.fastpath.activation import restore_gelu, speed_up_gelu


@needs_triton
@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_one_pass_gives_the_same_numbers(kind, monkeypatch):
    module, x = kind(), torch.linspace(-9, 9, 301, device=DEVICE)
    wanted = module(x)
    for _ in range(2):
        assert speed_up_gelu(module)
    assert isinstance(module, kind)
    monkeypatch.setattr(kind, "forward", lambda *_: pytest.fail("the steps were taken"))
    torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    with kernels.reference():
        assert torch.equal(module(x), wanted)
    restore_gelu(module)
    assert type(module) is kind


def test_it_is_found_whatever_torch_makes_by_default():
    with other_defaults():
        assert speed_up_gelu(NewGELUActivation())


def test_other_activations_stay_as_they_are(monkeypatch):
    changed = NewGELUActivation()
    changed.register_buffer("scale", torch.ones(1))
    strangers = type("NewGELUActivation", (NewGELUActivation,), {})()
    for module in (QuickGELUActivation(), GELUTanh(), torch.nn.GELU(approximate="tanh"), changed, strangers):
        assert not speed_up_gelu(module)
    monkeypatch.setattr(NewGELUActivation, "forward", lambda _, x: F.gelu(x))  # as near as 5e-4
    assert not speed_up_gelu(NewGELUActivation())
