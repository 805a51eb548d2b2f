"""Bad steps: stopped or skipped, their rows written aside, and never a ruined state over a good one."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from theodora.config import TrainConfig
from theodora.errors import TheodoraError
from theodora.train import train, trainer, trainer_passes
from theodora.train.guard import rows_of
from theodora.train.movement import EarlyGradients


@pytest.fixture
def spoil(monkeypatch):
    """Make the loss of some batches bad: `spoil(torch.nan, 5)` the fifth."""
    plain = trainer.AdapterTrainer.compute_loss
    monkeypatch.setattr(trainer_passes, "graphs_pay", lambda device: False)  # a graph does not come by here

    def at(value, *passes):
        seen = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = plain(self, model, inputs, *args, **kwargs)
            if model.training:
                seen.append(1)
                if len(seen) in passes:
                    return loss * value
            return loss

        monkeypatch.setattr(trainer.AdapterTrainer, "compute_loss", compute_loss)

    return at


def bad_rows(folder):
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


def test_a_bad_step_stops_the_run_before_it_is_taken(run, spoil, tmp_path):
    run(output=str(tmp_path / "good"), max_steps=6, save_steps=2)
    spoil(torch.nan, 5)
    with pytest.raises(TheodoraError, match=r"loss is nan at step 5.*lower learning_rate.*on_nan: skip.*bad_batches"):
        run(max_steps=6, save_steps=2)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    one, other = (
        load_file(p / "checkpoints/checkpoint-4/adapter_model.safetensors")
        for p in checkpoints.parent.parent.glob("[gr]*/")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = bad_rows(tmp_path / "run")
    assert [(row["step"], row["micro_batch"], row["row"]) for row in rows] == [(5, 0, n) for n in range(4)]
    assert rows[0]["loss"] == "nan"
    assert all(row["learned_text"] and row["learned_text"] in row["text"] for row in rows)
    assert all(len(row["input_ids"]) == len(row["text"].encode()) for row in rows if "<|" not in row["text"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e4], ids=["nan", "inf", "exploding"])
def test_a_skipped_step_leaves_no_trace_but_the_schedule(value, run, spoil, tmp_path, losses, options):
    spoil(value, 3)
    console = Console(file=io.StringIO(), width=200)
    settings = options | {"max_steps": 6, "on_nan": "skip", "logging_steps": 2, "weight_decay": 0.1}
    result = train(TrainConfig.from_options(settings), console=console)
    text = console.file.getvalue()
    assert "Step 3 was skipped" in text
    assert "skipped for their loss or gradient: steps 3" in text
    assert "lora_A 14 of 14, lora_B 14 of 14, magnitude 14 of 14; all finite" in text
    assert result.steps == 6
    assert all(0 < loss < 10 for loss in losses(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 3
    assert {row["step"] for row in bad_rows(tmp_path / "run")} == {3}


def test_a_skipped_step_does_not_touch_weights_or_optimizer(run, spoil, tmp_path):
    spoil(torch.nan, 3)
    run(max_steps=4, save_steps=1, save_total_limit=9, on_nan="skip", weight_decay=0.1, dropout=0.1)
    two, three = (tmp_path / "run" / "checkpoints" / f"checkpoint-{n}" for n in (2, 3))
    one, other = (load_file(p / "adapter_model.safetensors") for p in (two, three))
    assert all(torch.equal(one[key], other[key]) for key in one)
    states = [torch.load(p / "optimizer.pt", weights_only=True)["state"] for p in (two, three)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])


def test_skipping_without_end_is_an_error(run, spoil):
    spoil(torch.nan, *range(2, 40))
    with pytest.raises(TheodoraError, match=r"step 11, and the 9 steps before it"):
        run(max_steps=30, on_nan="skip")


def test_max_loss_can_be_chosen(run, tmp_path):
    with pytest.raises(TheodoraError, match=r"more than max_loss \(0.5\), at step 1"):
        run(max_loss=0.5)


def test_rows_of_a_packed_batch_stand_apart():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[-100, 6, -100, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2]]),
    }
    assert rows_of(batch) == [([5, 6], [6]), ([7, 8, 9], [8, 9])]
    padded = {
        "input_ids": torch.tensor([[5, 6, 0]]),
        "labels": torch.tensor([[-100, 6, -100]]),
        "attention_mask": torch.tensor([[1, 1, 0]]),
    }
    assert rows_of(padded) == [([5, 6], [6])]


class _Frozen(trainer.AdapterTrainer):
    part = "magnitude"

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if name.endswith(self.part):
                parameter.grad = None
        return loss


@pytest.mark.parametrize("part", ["magnitude", "lora_A", "lora_B"])
def test_a_part_without_gradients_ends_the_run_after_a_few_steps(part, run, tmp_path, monkeypatch, losses):
    monkeypatch.setattr(_Frozen, "part", part)
    monkeypatch.setattr(sys.modules["theodora.train.build"], "AdapterTrainer", _Frozen)
    with pytest.raises(TheodoraError, match=rf"no gradient in 5 steps(.|\n)*q_proj\.{part}"):
        run(max_steps=40, warmup_steps=3)
    assert len(losses(tmp_path / "run")) <= 8


def test_a_tensor_that_the_optimizer_lacks_ends_the_run_before_it_begins(run, tmp_path, monkeypatch):
    class Forgetful(trainer.AdapterTrainer):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            optimizer.param_groups[0]["params"].pop()
            return optimizer

    monkeypatch.setattr(sys.modules["theodora.train.build"], "AdapterTrainer", Forgetful)
    with pytest.raises(TheodoraError, match=r"the optimizer does not have them"):
        run()
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-4").exists()


def test_batches_with_nothing_to_learn_do_not_count():
    tensors = {name: nn.Parameter(torch.ones(2)) for name in ("q.lora_B", "q.magnitude")}
    optimizer = torch.optim.SGD(tensors.values(), lr=1.0)
    early = EarlyGradients(tensors, patience=2)
    for parameter in tensors.values():
        parameter.grad = torch.zeros(2)
    for _ in range(9):
        early.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    tensors["q.lora_B"].grad = torch.ones(2)
    early.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
    with pytest.raises(TheodoraError, match=r"in 2 steps(.|\n)*q.magnitude"):
        early.on_pre_optimizer_step(None, None, None, optimizer=optimizer)
