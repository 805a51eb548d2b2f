"""Preferences and rewards on a GPU: from an adapter that is the reference, and answers drawn from CUDA graphs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from theodora import TrainConfig
from theodora.train import train
from theodora.train.rollouts import Rollouts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def lines(folder, name):
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in found if name in line]


@pytest.fixture
def run(tiny_model_dir, tmp_path):
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b}.", "chosen": f" {a + b}.", "rejected": " no!"}
        for a in range(8)
        for b in range(4)
    ]
    for kind, names in {"answers": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")}.items():
        text = "".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows)
        (tmp_path / f"{kind}.jsonl").write_text(text)
    (tmp_path / "rewards.py").write_text("def kinds(answer, reference):\n    return len(set(answer)) / 8\n")
    common = {"model": str(tiny_model_dir()), "per_device_train_batch_size": 8, "warmup_steps": 0, "held_out": 4}
    common |= {"learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1}

    def start(output, objective="sft", **others):
        data = {"data": str(tmp_path / f"{'pairs' if objective == 'dpo' else 'answers'}.jsonl"), "objective": objective}
        if objective == "grpo":
            data |= {
                "reward": [f"{tmp_path}/rewards.py:kinds"],
                "num_generations": 4,
                "max_completion_length": 8,
                "beta": 0.01,
            }
        options = common | data | {"output": str(tmp_path / output)} | others
        return train(TrainConfig.from_options(options, granted=["reward"]), console=Console(quiet=True))

    return start


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_run_goes_on_from_an_adapter(objective, method, run, tmp_path, monkeypatch):
    ways, call = [], Rollouts.__call__

    def once(self, *args, **kwargs):
        completions = call(self, *args, **kwargs)
        ways.append(self.way)
        return completions

    monkeypatch.setattr(Rollouts, "__call__", once)
    run("first", method=method, max_steps=2)
    result = run("second", objective, from_adapter=str(tmp_path / "first"))
    assert all(torch.tensor(lines(tmp_path / "second", "loss")).isfinite())
    name = "rewards/margins" if objective == "dpo" else "kl"
    assert abs(lines(tmp_path / "second", name)[0]) < 0.05  # the reference is what it began from
    assert result.steps == 6
    assert set(ways) <= {"batches in lock-step"}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_answers_are_drawn_alike_when_a_run_goes_on(method, run, tmp_path):
    run("whole", "grpo", method=method, save_steps=3)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "checkpoint-6")
    run("parts", "grpo", method=method, save_steps=3, resume="auto")
    for name in ("loss", "reward", "num_tokens"):
        assert lines(tmp_path / "parts", name) == lines(tmp_path / "whole", name)
    one, other = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
