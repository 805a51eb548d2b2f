"""A run whose steps are CUDA graphs is the run without them, bit for bit (here with a recorder in CUDA's place)."""

import json

import pytest
import torch
from safetensors.torch import load_file

import recorder
from theodora.train import trainer

SETTINGS = {"train_on": "all", "max_length": 12, "held_out": 6, "max_steps": 12, "save_steps": 5, "eval_steps": 4}


@pytest.fixture
def made(monkeypatch):
    """The trainers of the runs below, which run as on a GPU: with the fused loss, and with graphs if asked for."""
    found, init = [], trainer.AdapterTrainer.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.steps = None
        found.append(self)

    release = trainer.GraphedStep.release

    def released(self, why_not):
        found[-1].steps = self
        return release(self, why_not)

    recorder.install(monkeypatch)
    monkeypatch.setattr(trainer.GraphedStep, "release", released)
    monkeypatch.setattr(trainer.AdapterTrainer, "__init__", remember)
    monkeypatch.setattr(trainer, "fused_loss_pays", lambda device: True)
    monkeypatch.setattr(trainer, "graphs_pay", lambda device: True)
    return found


@pytest.fixture
def same_rows(tmp_path):
    """Rows of one length, but for some."""
    rows = [{"text": f"{a} + {b:02} = {a + b:02}" + " "[: b % 7 == 0]} for a in range(8) for b in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def same(one, other, losses):
    for name in ("loss", "eval_loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm", "learning_rate"):
        assert losses(one, name) == losses(other, name), name
        assert losses(one, name), name
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"gradient_accumulation_steps": 3, "logging_steps": 2},
        {"dropout": 0.2, "method": "lora"},
        {"train_on": "completion", "data": None, "max_length": 64},
    ],
    ids=["", "accumulated", "dropout", "few learned"],
)
def test_a_graphed_run_is_the_plain_run(others, run, made, same_rows, sums, tmp_path, losses, monkeypatch):
    settings = {**SETTINGS, "data": same_rows, **others}
    settings["data"] = settings["data"] or str(sums)
    run(output=str(tmp_path / "graphed"), **settings)
    monkeypatch.setattr(trainer, "graphs_pay", lambda device: False)
    run(output=str(tmp_path / "plain"), **settings)
    assert made[0].why_no_graph is None
    assert made[0].steps.replays > 3
    assert made[0].steps.why_not == "training has ended"
    assert made[1].steps is None
    same(tmp_path / "graphed", tmp_path / "plain", losses)


def test_resumed_equals_uninterrupted(run, made, same_rows, tmp_path, losses):
    settings = {**SETTINGS, "data": same_rows}
    run(output=str(tmp_path / "whole"), **settings)
    run(output=str(tmp_path / "parts"), **settings | {"max_steps": 7, "lr_scheduler_type": "constant"})
    run(output=str(tmp_path / "whole"), **settings | {"lr_scheduler_type": "constant"}, overwrite=True)
    run(output=str(tmp_path / "parts"), **settings | {"lr_scheduler_type": "constant"}, resume="auto")
    assert made[-1].steps.replays
    for name in ("loss", "grad_norm", "num_tokens"):
        assert losses(tmp_path / "parts", name) == losses(tmp_path / "whole", name), name


def test_what_cannot_be_a_graph_says_why(run, made):
    run(trainer={"torch_empty_cache_steps": 1})
    assert made[0].why_no_graph == "torch_empty_cache_steps"
    run(kernels="reference", overwrite=True)
    assert "TRL's loss" in made[1].why_no_graph
    assert [t.steps for t in made] == [None, None]
