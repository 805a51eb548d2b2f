"""Two and four processes train what one trains with twice, and four times, the accumulation; and end together."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from several import Scenario, launch

FIGURES = ("loss", "eval_loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "step")
KINDS = {
    # 33 rows in batches of 3: the last of an epoch's 11 batches is one process' alone
    "plain": {"held_out": 7, "eval_steps": 3, "logging_steps": 2, "gradient_accumulation_steps": 1, "max_steps": 8},
    "packed": {"packing": True, "max_length": 64, "held_out": 7, "per_device_train_batch_size": 1, "eval_steps": 3},
    "lengths": {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "max_steps": 10},
    "stops": {"early_stopping_patience": 1, "eval_steps": 2, "save_steps": 2, "learning_rate": 0.3, "max_steps": 12},
}


@pytest.fixture(scope="module")
def base(tiny_model_dir, sums):
    return {
        "model": str(tiny_model_dir()),
        "data": str(sums),
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "bf16": False,
        "ddp_timeout": 20,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def two(base, folder):
    def kind(name, options, **more):
        return Scenario(name, base | {"output": str(folder / name)} | options, **more)

    scenarios = [kind(name, options) for name, options in KINDS.items()]
    return launch(2, scenarios, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_trace_one_with_twice_the_accumulation(kind, two, folder, run, base, tmp_path):
    assert [found["error"] for found in two[kind]] == [None, None], two[kind]
    steps = 2 * KINDS[kind].get("gradient_accumulation_steps", 1)
    run(**base | KINDS[kind] | {"gradient_accumulation_steps": steps, "output": str(tmp_path / "one")})
    trace(folder / kind, tmp_path / "one")


def trace(one: Path, other: Path, rtol=2e-4):
    lines = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, other)]
    assert [sorted(line) for line in lines[0]] == [sorted(line) for line in lines[1]]
    for name in FIGURES:
        values = [torch.tensor([line[name] for line in each if name in line]).double() for each in lines]
        torch.testing.assert_close(*values, rtol=rtol, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-3)
