"""The light loop takes the same steps as `theodora train`."""

import sys

import pytest
import torch
from transformers import set_seed

from theodora.adapters import inject_adapter
from theodora.adapters.models import load_model_and_tokenizer
from theodora.config import AdapterConfig
from theodora.data import load_examples, tokenize
from theodora.errors import TheodoraError
from theodora.train.fused_loss import fused_head
from theodora.train.light import LightRunDiverged, LightSettings, Row, make_optimizer, train_light


def light(model_dir, data, method="dora", adapter=None, head=None, **settings):
    model, tokenizer = load_model_and_tokenizer(model_dir, dtype="float32")
    rows = tokenize(load_examples(data), tokenizer, max_length=1024)
    rows = [Row(input_ids=row["input_ids"], labels=row["labels"]) for row in rows]
    model.requires_grad_(False)
    head = fused_head(model) if head is None else head
    settings = LightSettings(**{"batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0, "steps": 4} | settings)
    set_seed(settings.seed)
    inject_adapter(model, AdapterConfig(method=method, **(adapter or {})))
    return train_light(model, rows, settings, head=head), model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_losses_are_those_of_theodora_train(family, method, run, tmp_path, tiny_model_dir, sums, losses):
    # 13 steps of 4 rows are more than one epoch of 38, and the last batch of an epoch is not full.
    settings = {"max_steps": 13, "learning_rate": 5e-3, "warmup_steps": 2, "weight_decay": 0.1, "seed": 3}
    run(model=str(tiny_model_dir(family)), held_out=0, method=method, **settings)
    settings["steps"] = settings.pop("max_steps")
    result, _ = light(tiny_model_dir(family), sums, method, **settings)
    torch.testing.assert_close(result.losses, losses(tmp_path / "run"), rtol=2e-5, atol=2e-5)
    assert result.tokens == losses(tmp_path / "run", "num_tokens")[-1]


def test_an_adapted_head_is_trained_too(run, tmp_path, tiny_model_dir, sums, losses):
    run(held_out=0, targets=["q_proj", "lm_head"])
    result, model = light(tiny_model_dir(), sums, adapter={"targets": ("q_proj", "lm_head")})
    torch.testing.assert_close(result.losses, losses(tmp_path / "run"), rtol=2e-5, atol=2e-5)
    assert model.lm_head.adapters["default"].lora_B.abs().max() > 0


def test_divergence_is_an_error(tiny_model_dir, sums):
    with pytest.raises(LightRunDiverged, match=r"diverged: the loss is .* at step"):
        light(tiny_model_dir(), sums, learning_rate=1e30, max_grad_norm=0.0, steps=8)


def test_lora_plus_moves_b_faster(tiny_model):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2))
    groups = make_optimizer(model, LightSettings(steps=1, learning_rate=1e-3, b_ratio=16.0, weight_decay=0.1))
    rates = {(g["lr"], g["weight_decay"]): {p.dim() for p in g["params"]} for g in groups.param_groups}
    assert rates == {(1e-3, 0.1): {2}, (1.6e-2, 0.1): {2}, (1e-3, 0.0): {1}}


@pytest.mark.parametrize("way", ["graphs", "fused loss", "the model's own logits"])
def test_every_way_to_a_step_gives_the_same_losses(way, tiny_model_dir, sums, monkeypatch):
    module = sys.modules["theodora.train.light"]
    monkeypatch.setattr(module, "graphs_pay", lambda device: False)  # also on a GPU
    monkeypatch.setattr(module, "fused_loss_pays", lambda device: False)
    plain, _ = light(tiny_model_dir(), sums, steps=12)
    if way == "graphs":  # batches of one shape
        monkeypatch.setattr(module, "graphs_pay", lambda device: True)
        monkeypatch.setattr(module, "GraphedStep", lambda step, parameters: _Eager(step))
    elif way == "fused loss":
        monkeypatch.setattr(module, "fused_loss_pays", lambda device: True)
    head = "this model's head is not known" if way == "the model's own logits" else None
    other, _ = light(tiny_model_dir(), sums, steps=12, head=head)
    torch.testing.assert_close(other.losses, plain.losses, rtol=2e-5, atol=2e-5)
    assert (plain.graphed, other.graphed) == (0, 12 if way == "graphs" else 0)


def test_who_looks_at_the_model_after_a_step_may_leave_it_in_eval_mode(tiny_model):
    model = inject_adapter(tiny_model(), AdapterConfig(rank=2, dropout=0.5))
    modes, steps = [], []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    def look(step):
        steps.append(step)
        model.eval()

    rows = [Row(input_ids=[3, 4, 5], labels=[-100, 4, 5])] * 2
    train_light(model, rows, LightSettings(steps=3, batch_size=2), head="own", on_step=look)
    assert steps == [1, 2, 3]
    assert modes == [True] * 3


def test_a_model_without_anything_to_train_is_refused(tiny_model):
    with pytest.raises(TheodoraError, match="Nothing in this model is to be trained"):
        make_optimizer(tiny_model().requires_grad_(False), LightSettings(steps=1))


class _Eager:
    """A step as a graph that is never captured, which asks for one shape alone."""

    def __init__(self, step):
        self.step, self.shapes, self.replays = step, set(), 0

    def __call__(self, tensors):
        self.shapes.add(tuple(t.shape for t in tensors.values()))
        assert len(self.shapes) == 1
        self.replays += 1
        return self.step(tensors)

    def release(self, why):
        return False
