"""What the host does in each step for parameters: it goes through those that are trained, and comes to the same."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from theodora.adapters.state import trained_tensors
from theodora.train.trainer_steps import StepOverrides


@pytest.fixture
def walks(monkeypatch):
    """How many times each step walked through all modules of the model."""
    counts: list[int] = []
    walk, begin = nn.Module.named_modules, TrainerCallback.on_step_begin

    def named_modules(self, memo=None, *args, **kwargs):
        if isinstance(self, PreTrainedModel) and counts:
            counts[-1] += 1
        return walk(self, memo, *args, **kwargs)

    def on_step_begin(self, *args, **kwargs):
        if type(self).__name__ == "StopWhenDiverged":  # one of the run's callbacks
            counts.append(0)
        return begin(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", named_modules)
    monkeypatch.setattr(TrainerCallback, "on_step_begin", on_step_begin)
    return counts


def test_no_step_walks_through_the_model(run, walks):
    run(held_out=0, max_steps=5, save_steps=100)
    assert walks[2:4] == [0, 0]  # the first ones look at what they find, and the last one is saved


@pytest.mark.parametrize("norm", [0.05, 0.0])
def test_the_same_bits_as_by_walking(run, monkeypatch, norm):
    settings = {"max_grad_norm": norm, "gradient_accumulation_steps": 2, "max_steps": 4, "held_out": 0}
    ours = run(**settings)
    monkeypatch.delattr(StepOverrides, "train")
    walked = run(overwrite=True, **settings)
    assert ours.train_loss == walked.train_loss
    for tensor, expected in zip(*(trained_tensors(r.model).values() for r in (ours, walked)), strict=True):
        assert torch.equal(tensor, expected)
        assert tensor.grad is None
    assert "zero_grad" not in vars(ours.model)
