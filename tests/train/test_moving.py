"""How far magnitudes and directions have moved, along a run: what `inspect` says of the files, at no cost in bits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from theodora import inspect_adapter
from theodora.adapters.models import load_model_and_tokenizer
from theodora.train import run as run_module
from theodora.train.moving import DIRECTION, MAGNITUDE, moved


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize(
    "options_of_run",
    [{"method": "dora"}, {"method": "lora"}, {"method": "dora", "init": "pissa"}, {"bf16": True}],
    ids=str,
)
def test_it_is_what_inspect_says_of_the_checkpoints(options_of_run, run, tmp_path):
    run(eval_steps=2, save_steps=2, held_out=4, **options_of_run)
    lines = [line for line in lines_of(tmp_path / "run") if DIRECTION in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0][DIRECTION] < 1e-3
    for line in lines[1:]:
        modules = inspect_adapter(tmp_path / "run" / "checkpoints" / f"checkpoint-{line['step']}").modules
        assert line[DIRECTION] == pytest.approx(mean([module.angle_mean for module in modules]), rel=1e-3)
        if options_of_run.get("method") == "lora":
            assert MAGNITUDE not in line
        else:
            assert line[MAGNITUDE] == pytest.approx(mean([m.magnitude_mean for m in modules]), rel=1e-2, abs=1e-6)
            assert line[MAGNITUDE] > 0


def test_a_run_that_goes_on_repeats_it(resumes, tmp_path):
    resumes(held_out=0)
    whole, parts = ([line for line in lines_of(tmp_path / name) if DIRECTION in line] for name in ("whole", "parts"))
    assert [line["step"] for line in whole] == [3, 6]
    assert [line | {"epoch": 0} for line in parts] == [line | {"epoch": 0} for line in whole]


def test_it_changes_no_bit_of_the_run(run, monkeypatch, tmp_path):
    run(held_out=4, eval_steps=1, output=str(tmp_path / "with"))
    monkeypatch.setattr(run_module.Moving, "_note", lambda *_: None)
    run(held_out=4, eval_steps=1, output=str(tmp_path / "without"))
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(DIRECTION in line for line in lines_of(tmp_path / "without"))


def test_weights_that_are_quantised(run, options, tmp_path):
    run(base_dtype="fp8", save_steps=4)
    model, _ = load_model_and_tokenizer(options["model"], dtype="fp32", adapter=str(tmp_path / "run"))
    (line,) = [line for line in lines_of(tmp_path / "run") if line.get("step") == 4 and DIRECTION in line]
    assert line[DIRECTION] == pytest.approx(moved(model)[DIRECTION], rel=0.05)


def test_how_fast_it_goes_stands_beside_the_loss(run, tmp_path):
    run()
    logged = [line for line in lines_of(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory"] > 1e6 for line in logged)
    assert all(line["seconds_left"] > 0 for line in logged[:-1])
    assert logged[-1]["seconds_left"] == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    assert not any("peak_memory" in line for line in state["log_history"])
